"""Checkpoints: what is kept, real damage, a full disk, and one-line errors that lose nothing."""

import re
import resource
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from runs import ROOT, environment, flags_of, run_binary, run_config

import llm_jax
from llm_jax.train import checkpoint, loop


def train(cfg, workdir):
    return loop.train(cfg, workdir, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A run with four checkpoints written, of which the last two and the best are kept."""
    workdir = tmp_path_factory.mktemp("kept")
    train(
        run_config(
            corpus, **{"steps": 8, "eval.every": 2, "checkpoint.every": 2, "eval.sample_tokens": 0}
        ),
        workdir,
    )
    return workdir


def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def test_last_and_best_are_kept(corpus, tmp_path):
    cfg = run_config(
        corpus,
        **{"steps": 10, "eval.every": 2, "checkpoint.every": 2, "eval.sample_tokens": 0, "checkpoint.keep_last": 1,
           "optimizer.schedule": "constant", "optimizer.ema_decay": 0.0, "optimizer.learning_rate": 0.02},
    )  # fmt: skip
    from llm_jax.eval import likelihood

    real, calls = likelihood.evaluate, iter([3.0, 1.0, 2.0, 4.0, 5.0])
    likelihood.evaluate = lambda *a: {**real(*a), "eval_loss": next(calls)}
    try:
        train(cfg, tmp_path)
    finally:
        likelihood.evaluate = real
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "10",
        "4",
    ]  # last, and best (1.0)


def test_a_checkpoint_is_all_that_later_verbs_need(run, tmp_path):
    """One step folder, moved elsewhere, with the run gone."""
    step = sorted((run / "checkpoints").iterdir(), key=lambda p: int(p.name))[-1]
    moved = shutil.copytree(step, tmp_path / step.name)
    model, original = llm_jax.load(moved), llm_jax.load(run)
    assert (
        model.config == original.config
        and model.tokenizer.fingerprint() == original.tokenizer.fingerprint()
    )
    tokens = np.arange(20, dtype=np.int32).reshape(2, 10)
    np.testing.assert_array_equal(model.logits(tokens), original.logits(tokens))
    assert model.generate(["the "], max_new_tokens=4, seed=1) == original.generate(
        ["the "], max_new_tokens=4, seed=1
    )


# Orbax leaves coroutines behind where a file is damaged.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("victim", ["params", "training"])
def test_half_written_checkpoint(run, corpus, tmp_path, victim):
    """The largest file of an item is cut in half: a one-line error, and the others still work."""
    workdir = copy(run, tmp_path)
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
    folder = workdir / "checkpoints" / str(steps[-1])
    largest = max(
        (p for p in (folder / victim).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])

    def cfg():
        return run_config(
            corpus,
            **{
                "steps": 9,
                "eval.every": 2,
                "checkpoint.every": 2,
                "eval.sample_tokens": 0,
            },
        )

    with pytest.raises(
        ValueError, match=f"{folder} is damaged or half-written .*delete that folder"
    ) as e:
        train(cfg(), workdir)
    assert "\n" not in str(e.value) and f"go on from step {steps[-2]}" in str(e.value)
    shutil.rmtree(folder)
    assert train(cfg(), workdir)["steps"] == 9  # what the message said


def test_missing_pieces(run, tmp_path):
    workdir = copy(run, tmp_path)
    step = max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
    shutil.rmtree(step / "config")
    with pytest.raises(ValueError, match="damaged or half-written"):
        llm_jax.load(workdir)
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match="--checkpoint="):
            llm_jax.load(path)


def test_a_write_cut_off_by_death_is_not_seen(run, corpus, tmp_path):
    """Orbax's temporary folder of a save that never ended is ignored and cleaned."""
    workdir = copy(run, tmp_path)
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
    torn = workdir / "checkpoints" / f"{steps[-1] + 1}.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / str(steps[-1]), torn)
    assert checkpoint.locate(workdir)[1] == steps[-1]
    train(run_config(corpus, **{"steps": 9, "eval.sample_tokens": 0}), workdir)
    assert not torn.exists()


def pretrain(corpus, workdir, steps, **kw):
    changes = {"steps": steps, "checkpoint.every": 2, "eval.every": 0, "optimizer.warmup_steps": 1,
               "eval.sample_tokens": 0, "log.compilation_cache": ""}  # fmt: skip
    args = [sys.executable, "-m", "experiments.pretrain", "--config=configs/smoke.py", f"--workdir={workdir}",
            f"--input={corpus}", *flags_of(changes)]  # fmt: skip
    return subprocess.run(
        args, cwd=ROOT, env=kw.pop("env", environment()), capture_output=True, text=True, **kw
    )


def test_full_disk_in_a_real_process(corpus, tmp_path):
    """A file system that holds one checkpoint and not two: one line, and the first is intact."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        assert pretrain(corpus, disk, 2).returncode == 0
        full = pretrain(corpus, disk, 4)
        assert full.returncode == 1 and full.stderr.count("\n") == 1, full.stderr
        assert (
            "No space left on device" in full.stderr
            and "the last whole checkpoint is step 2" in full.stderr
        )
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = pretrain(corpus, disk, 4)
        assert again.returncode == 0 and "resuming from step 2" in again.stdout, again.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_write_that_fails_half_way(corpus, tmp_path):
    """Files may not grow past a limit: the last line says it, and earlier checkpoints are intact."""
    assert pretrain(corpus, tmp_path, 2).returncode == 0
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))  # noqa: E731
    failed = pretrain(
        corpus, tmp_path, 4, env=environment() | {"JAX_COMPILATION_CACHE_DIR": ""}, preexec_fn=limit
    )
    assert failed.returncode == 1, failed.stderr
    assert re.search(
        "^error: cannot write a checkpoint .*File too large; the last whole checkpoint is step 2",
        failed.stderr,
        re.M,
    ), failed.stderr
    again = pretrain(corpus, tmp_path, 4)
    assert again.returncode == 0 and "resuming from step 2" in again.stdout, again.stderr


def test_generate_binary_from_a_checkpoint(run):
    import json

    args = [f"--checkpoint={run}", "--prompt=the ", "--max_new_tokens=5", "--temperature=1", "--top_k=5",
            "--top_p=0.9", "--seed=7", "--json"]  # fmt: skip
    a, b = run_binary("generate", *args), run_binary("generate", *args)
    assert a.returncode == 0 and a.stdout == b.stdout, a.stderr
    record = json.loads(a.stdout)
    assert record["prompt"] == "the " and len(record["tokens"]) == len(record["log_probs"]) == 5
    direct = llm_jax.load(run).complete(
        ["the "], max_new_tokens=5, temperature=1.0, top_k=5, top_p=0.9, seed=7
    )[0]
    assert direct.tokens == record["tokens"] and direct.text == record["text"]
