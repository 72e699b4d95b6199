"""A sweep as its users run it: processes, killed ones, and one command after another."""

import csv
import os
import shlex
import signal
import time
from pathlib import Path

import pytest
from runs import finish_job, run_binary, start

RECIPE = "configs/sweep_tiny.py"
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # it compiles in a third of the time


def flags_for(corpus, output) -> list[str]:
    """One size at two lengths: the recipe, made tiny by its flags."""
    changes = {
        "sizes": "((24,1,2),)",
        "budgets": "()",
        "tokens": "(4096,8192)",
        "rate.rule": "fixed",
        "run.length": 16,
        "run.eval.rows": 16,
        "run.log.every": 1,
        "run.log.compilation_cache": "",
        "run.optimizer.warmup_steps": 3,
        "run.tokenizer.kind": "byte",
    }
    return [
        f"--config={RECIPE}",
        f"--output={output}",
        f"--input={corpus}",
        *(f"--config.{key}={value}" for key, value in changes.items()),
    ]


def table(output: Path) -> list[dict]:
    with (output / "runs.csv").open() as f:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(f)]


def worker_of(parent: int, name: str) -> int | None:
    """Process id of the worker that has a trunk."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            status = (path.parent / "stat").read_text().rsplit(")", 1)[1].split()
            if int(status[1]) == parent and f"--only={name}" in path.read_text():
                return int(path.parent.name)
        except OSError:
            continue
    return None


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the worker in /proc")
def test_a_killed_worker_and_single_commands_give_the_same_table(corpus, tmp_path):
    # The whole sweep, whose worker is killed once its first run has left the trunk.
    output = tmp_path / "killed"
    name = "w24_l1_h2-seed0"
    sweep = start("sweep", *flags_for(corpus, output), "--jobs=1", **QUICK)
    branch = output / "runs" / name / f"{name}-step32" / "checkpoints"
    deadline = time.monotonic() + 200
    while not branch.exists() and sweep.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed = worker_of(sweep.pid, name)
    if killed:
        os.kill(killed, signal.SIGKILL)
    [(code, out, err)] = finish_job([sweep])
    assert killed and code == 1, out + err
    broken = table(output)
    assert [r["status"] for r in broken] == ["failed"] * 2
    assert all("SIGKILL" in r["error"] for r in broken)

    again = start("sweep", *flags_for(corpus, output), "--retry_failed", **QUICK)
    [(code, out, err)] = finish_job([again])
    assert code == 0, out + err
    assert "2 of 2 runs finished" in out and "step64: loss" in out

    # The same, as a cluster would: a command by itself.
    other = tmp_path / "single"
    printed = run_binary("sweep", *flags_for(corpus, other), "--print_commands", "--jobs", "2")
    [command] = [shlex.split(line) for line in printed.stdout.splitlines()]
    assert command[:3] == ["python", "-m", "experiments.sweep"]
    assert command[-1] == f"--only={name}" and not {"--jobs", "2", "--print_commands"} & {*command}
    [(code, out, err)] = finish_job([start("sweep", *command[3:], **QUICK)])
    assert code == 0, out + err
    collected = run_binary("sweep", *flags_for(corpus, other), "--collect")
    assert "2 of 2 runs finished" in collected.stdout, collected.stderr

    for a, b in zip(table(output), table(other), strict=True):
        for column in a:
            if column in ("loss", "bits_per_byte", "train_loss"):  # another number of threads
                assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-5)
            else:
                assert a[column] == b[column]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.budgts=(1e9,)", ["no key 'budgts'", "did you mean 'budgets'"]),
        ("--config.run.model.d_modle=3", ["--config.run.model has no key 'd_modle'"]),
        ("--config.sizes=((33,2,4),)", ["sizes: (33, 2, 4)", "n_heads=4"]),
        ("--only=w24_l1_h2", ["--only=w24_l1_h2:", "did you mean w24_l1_h2-seed0?"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors_are_one_line(corpus, tmp_path, flag, words):
    done = run_binary("sweep", *flags_for(corpus, tmp_path / "x"), flag)
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words)


def test_dry_run_prints_the_grid_and_trains_nothing(corpus, tmp_path):
    own = flags_for(corpus, tmp_path / "x")
    two = [f.replace("((24,1,2),)", "((16,1,2),(24,1,2))") for f in own]
    done = run_binary("sweep", *two, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "4 runs in 2 processes" in done.stdout and "w16_l1_h2-seed0-step32" in done.stdout
    assert not (tmp_path / "x" / "runs").exists()
