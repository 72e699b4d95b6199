"""Runs of the real loop: resuming bit for bit, also after a real SIGTERM; what a run leaves."""

import json
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import flags_of, run_binary, run_config, start

from llm_jax import api
from llm_jax.config import MeshConfig
from llm_jax.train import loop
from llm_jax.types import Loss, Mean


def train(cfg, workdir, devices=1, **kw):
    return loop.train(cfg, workdir, devices=jax.devices()[:devices], **kw)


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def losses(workdir) -> list:
    return [(r["step"], r["loss"], r["grad_norm"], r.get("eval_loss")) for r in lines(workdir)]


def params_of(workdir):
    return jax.tree.leaves(jax.device_get(api.load(workdir).params))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """One run without a stop."""
    workdir = tmp_path_factory.mktemp("whole")
    summary = train(run_config(corpus), workdir)
    return workdir, summary


def test_a_run_leaves_what_it_promises(whole):
    workdir, summary = whole
    for name in (
        "config.json",
        "env.json",
        "metrics.jsonl",
        "summary.json",
        "report.md",
        "samples.jsonl",
    ):
        assert (workdir / name).stat().st_size > 0, name
    assert json.loads((workdir / "summary.json").read_text()) == summary
    for key in (
        "steps",
        "tokens",
        "params",
        "params_non_embedding",
        "flops",
        "train_loss",
        "eval_loss",
        "bits_per_byte",
        "tokens_per_second",
        "wall_seconds",
    ):
        assert summary[key] is not None, key
    assert summary["steps"] == 12 and summary["tokens"] == 12 * 8 * 32
    rows = lines(workdir)
    assert [r["step"] for r in rows] == list(range(1, 13))
    for key in ("step", "loss", "lr", "grad_norm", "tokens_per_second", "mfu"):
        assert all(key in r for r in rows), key
    assert [r["step"] for r in rows if "eval_loss" in r] == [6, 12]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert len(list((workdir / "plots").glob("*.png"))) >= 4
    env = json.loads((workdir / "env.json").read_text())
    assert env["versions"]["jax"] == jax.__version__ and env["tokenizer_hash"]


def test_evaluation_uses_the_average_and_what_is_saved_is_what_was_evaluated(whole, corpus):
    """eval_loss can be computed again from the checkpoint and the text alone."""
    workdir, summary = whole
    text = corpus.read_text()
    held_out = text[int(len(text) * 0.9) :]
    model = api.load(workdir)
    ids = model.tokenizer.encode(held_out) + [model.tokenizer.eos_id]
    total = count = 0
    for at in range(0, len(ids) - 1, 32):
        row = ids[at : at + 33]
        z = np.asarray(model.logits([row[:-1]]), np.float64)[0]
        log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        total -= log_p[np.arange(len(row) - 1), row[1:]].sum()
        count += len(row) - 1
    assert count == summary["eval_tokens"]
    assert total / count == pytest.approx(summary["eval_loss"], rel=1e-5)
    assert total / np.log(2) / (len(held_out.encode()) - 1) == pytest.approx(
        summary["bits_per_byte"], rel=1e-5
    )


def test_stop_and_resume_is_bit_equal(whole, corpus, tmp_path, monkeypatch):
    """The process dies after step 9; the same command goes on from the checkpoint of step 6."""
    record = loop._Run._record

    def dies(self, step, *args, **kwargs):
        record(self, step, *args, **kwargs)
        if step == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop._Run, "_record", dies)
    with pytest.raises(KeyboardInterrupt):
        train(run_config(corpus), tmp_path)
    monkeypatch.undo()
    assert [s for s, *_ in losses(tmp_path)] == list(range(1, 10))
    train(run_config(corpus), tmp_path)
    assert losses(tmp_path) == losses(whole[0])
    for a, b in zip(params_of(tmp_path), params_of(whole[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    first = train(run_config(corpus), tmp_path)  # finished: says so, changes nothing
    (tmp_path / "summary.json").unlink()  # as if it had died before writing it
    again = train(run_config(corpus), tmp_path)
    assert again["eval_loss"] == first["eval_loss"] and losses(tmp_path) == losses(whole[0])


def test_resume_on_another_mesh(whole, corpus, tmp_path):
    train(
        run_config(corpus, **{"steps": 12, "eval.sample_tokens": 0}), tmp_path / "a"
    )  # same as whole
    import shutil

    shutil.rmtree(tmp_path / "a/checkpoints/12")
    cut = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "eval.sample_tokens": 0}
    train(run_config(corpus, **cut), tmp_path / "a", devices=8)
    got, want = np.array(losses(tmp_path / "a")[6:], float), np.array(losses(whole[0])[6:], float)
    np.testing.assert_allclose(got[:, 1], want[:, 1], rtol=1e-6)
    on_one = api.load(tmp_path / "a")  # and back on one device
    assert {d for x in jax.tree.leaves(on_one.params) for d in x.devices()} == {jax.devices()[0]}
    on_eight = api.load(tmp_path / "a", mesh=MeshConfig(data=2, tensor=4))
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    np.testing.assert_allclose(on_one.logits(tokens), on_eight.logits(tokens), atol=1e-5)


def test_sigterm_in_a_real_process(corpus, tmp_path):
    """SIGTERM in mid-run saves; the same command goes on; losses and weights equal an unbroken run."""
    changes = {
        "steps": 150, "checkpoint.every": 0, "eval.every": 0, "log.every": 1, "model.n_layers": 2, "batch_size": 8,
        "length": 32, "eval.sample_tokens": 0, "log.compilation_cache": "",
    }  # fmt: skip

    def args(name):
        return [
            "--config=configs/smoke.py",
            f"--workdir={tmp_path / name}",
            f"--input={corpus}",
            *flags_of(changes),
        ]

    process = start("pretrain", *args("broken"))
    log = tmp_path / "broken" / "metrics.jsonl"
    deadline = time.time() + 200
    while not (log.exists() and log.read_text().count("\n") >= 25):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 143, err
    assert "stopped by SIGTERM and saved at step" in out
    stopped = losses(tmp_path / "broken")[-1][0]
    assert 25 <= stopped < 150
    assert [p.name for p in (tmp_path / "broken/checkpoints").iterdir()] == [str(stopped)]
    assert run_binary("pretrain", *args("broken")).returncode == 0
    assert run_binary("pretrain", *args("unbroken")).returncode == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    for a, b in zip(params_of(tmp_path / "broken"), params_of(tmp_path / "unbroken"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_non_finite_steps_stop_the_run_and_save(corpus, tmp_path, monkeypatch, capsys):
    from llm_jax.train import program

    real = program.make_loss_fn

    def poisoned(cfg):
        inner = real(cfg)

        def loss_fn(params, batch, carry, keys):
            loss, carry = inner(params, batch, carry, keys)
            if keys is not None:  # training has keys (dropout), evaluation has none
                ce = loss.terms["cross_entropy"]
                loss = Loss(
                    {"cross_entropy": Mean(ce.total * np.nan, ce.weight)}, loss.scales, loss.metrics
                )
            return loss, carry

        return loss_fn

    monkeypatch.setattr(program, "make_loss_fn", poisoned)
    cfg = run_config(
        corpus, **{"optimizer.max_bad_steps": 3, "model.dropout": 0.1, "eval.sample_tokens": 0}
    )
    with pytest.raises(
        loop.NonFiniteError,
        match=r"3 non-finite steps in a row up to step 3 \(loss nan\).*learning_rate.*saved",
    ):
        train(cfg, tmp_path)
    assert "step 1 is skipped: non-finite loss nan (1 in a row)" in capsys.readouterr().out
    assert any((tmp_path / "checkpoints").iterdir())


def test_continued_pretraining_with_a_longer_context(whole, corpus, tmp_path):
    longer = run_config(
        corpus,
        **{
            "checkpoint.init_from": str(whole[0]),
            "length": 64,
            "steps": 4,
            "model.rope_scaling": "yarn",
            "model.rope_factor": 2.0,
            "model.rope_original_length": 32,
            "optimizer.learning_rate": 1e-4,
        },
    )
    summary = train(longer, tmp_path)
    assert (
        lines(tmp_path)[0]["loss"] < lines(whole[0])[0]["loss"] - 0.3
    )  # it starts from what was learned
    assert summary["tokens"] == 4 * 8 * 64
    assert api.load(tmp_path).config.length == 64
    wider = run_config(corpus, **{"checkpoint.init_from": str(whole[0]), "model.d_model": 64})
    with pytest.raises(ValueError, match=r"has shape .* but --config.model makes it"):
        train(wider, tmp_path / "wider")


def test_freezing_and_mixture_train_end_to_end(corpus, tmp_path):
    from llm_jax.config import SourceConfig

    other = tmp_path / "other.txt"
    other.write_text("zyx wvu tsr " * 400)
    cfg = run_config(
        corpus,
        **{
            "data.sources": (
                SourceConfig(
                    name="main", inputs=(str(corpus),), weights=((0.0, 1.0), (0.5, 1.0), (1.0, 0.0))
                ),
                SourceConfig(name="better", inputs=(str(other),), weights=((0.0, 0.0), (1.0, 1.0))),
            ),
            "optimizer.freeze_rules": ((r"^layers/mlp/", True), (r".*", False)),
            "data.packing": "first_fit",
        },
    )
    train(cfg, tmp_path / "run")
    assert lines(tmp_path / "run")[-1]["loss"] < lines(tmp_path / "run")[0]["loss"]
    resumed = run_config(
        corpus,
        **{
            "data.sources": cfg.data.sources,
            "optimizer.freeze_rules": cfg.optimizer.freeze_rules,
            "data.packing": "first_fit",
            "seed": 1,
        },
    )
    with pytest.raises(ValueError, match="was trained with another seed: 0, now 1"):
        train(resumed, tmp_path / "run")


def test_dry_run_compiles_nothing_and_debug_needs_no_jit(corpus, tmp_path, capsys):
    out = train(run_config(corpus), tmp_path, dry_run=True)
    assert out["parameters"] > 0 and "training FLOPs" in capsys.readouterr().out
    assert not (tmp_path / "checkpoints").exists()
