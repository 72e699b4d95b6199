"""The processes of a sweep: how many, what becomes of those that die, and how all are stopped.

The workers here are shell scripts that write what a worker would.
"""

import os
import signal
import threading
import time

import pytest

from llm_jax import config as configs
from llm_jax.config import OptimizerConfig, TokenizerConfig, TrainConfig
from llm_jax.scaling.sweep import runner
from llm_jax.scaling.sweep.config import SweepConfig

FINISH = 'for r in "$@"; do echo \'{"status": "finished", "loss": 2.5}\' > "$r/result.json"; done; '


@pytest.fixture
def cfg(corpus, monkeypatch):
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return SweepConfig(
        run=TrainConfig(
            batch_size=4,
            length=16,
            optimizer=OptimizerConfig(warmup_steps=2),
            tokenizer=TokenizerConfig(kind="byte"),
            data=configs.DataConfig(inputs=(str(corpus),)),
        ),
        sizes=((16, 1, 2), (32, 1, 2), (48, 1, 2)),
        tokens=(640, 1280),
    )


def workers(output, script, of_one=None):
    """trunk -> the shell command whose $1, $2 are its run folders and whose $0 is its name; the
    model of width 32 runs `of_one`."""

    def command(trunk):
        folders = [output / "runs" / trunk.name / p.name for p in trunk.points]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        chosen = of_one if of_one is not None and trunk.size.d_model == 32 else script
        return ["sh", "-c", chosen, trunk.name, *map(str, folders)]

    return command


def statuses(rows):
    return {w: [r["status"] for r in rows if r["width"] == w] for w in (16, 32, 48)}


def test_a_worker_that_is_killed_is_recorded_and_the_rest_runs(cfg, tmp_path):
    said = []
    dies = 'echo "about to allocate"; echo \'{"status": "finished", "loss": 3.0}\' > "$1/result.json"; kill -9 $$'
    command = workers(tmp_path, FINISH, of_one=dies)
    rows = runner.run_sweep(cfg, tmp_path, command, jobs=2, say=said.append)
    assert statuses(rows) == {
        16: ["finished"] * 2,
        32: ["finished", "failed"],
        48: ["finished"] * 2,
    }
    (lost,) = [r for r in rows if r["status"] == "failed"]
    assert "SIGKILL (out of memory?)" in lost["error"] and "about to allocate" in lost["error"]
    assert "5 of 6 runs finished, 1 failed" in said[-1]
    assert sum("(6/6, 0 min left)" in line for line in said) == 1
    table = (tmp_path / "runs.csv").read_text()
    assert lost["error"] in table and table.count("\n") == 7

    def forbidden(trunk):
        raise AssertionError(f"{trunk.name} is started again")

    assert runner.run_sweep(cfg, tmp_path, forbidden, say=said.append) == rows
    again = runner.run_sweep(cfg, tmp_path, workers(tmp_path, FINISH), retry_failed=True, say=print)
    assert statuses(again) == {w: ["finished"] * 2 for w in (16, 32, 48)}
    assert [r["loss"] for r in again if r["width"] == 32] == [2.5, 2.5]  # of one trunk, run again


def test_a_worker_that_cannot_start_and_one_that_is_busy(cfg, tmp_path):
    broken = 'echo "error: --config=x: no such file" >&2; exit 1'
    rows = runner.run_sweep(cfg, tmp_path, workers(tmp_path, FINISH, of_one=broken), jobs=1)
    errors = {r["error"] for r in rows if r["width"] == 32}
    assert errors == {"the worker ended with exit code 1: error: --config=x: no such file"}
    # Another process has it: that is no failure, and none of our business.
    busy = tmp_path / "busy"
    rows = runner.run_sweep(cfg, busy, workers(busy, FINISH, of_one="exit 75"), jobs=1)
    assert statuses(rows)[32] == ["unfinished"] * 2 and statuses(rows)[16] == ["finished"] * 2


def test_as_many_at_a_time_as_jobs_each_on_its_cores(cfg, tmp_path):
    log = tmp_path / "log"
    # The first two wait for each other, for a minute at most; the third finds that both were there.
    script = (
        f"echo start >> {log}; taskset -p $$ >> {log}.cores; i=0; "
        f"while [ $(grep -c start {log}) -lt 2 ] && [ $i -lt 600 ]; do sleep 0.1; i=$((i+1)); done; "
        f"echo end >> {log}; "
    )
    runner.run_sweep(cfg, tmp_path, workers(tmp_path, script + FINISH), jobs=2)
    running = most = 0
    for line in log.read_text().split():
        running += 1 if line == "start" else -1
        most = max(most, running)
    assert most == 2 and running == 0
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1:
        masks = [line.split()[-1] for line in (tmp_path / "log.cores").read_text().splitlines()]
        assert len(set(masks)) == 2


def test_sigterm_lets_workers_save_and_the_same_command_goes_on(cfg, tmp_path):
    saves = (
        f'trap "echo saved >> {tmp_path}/saved; exit 143" TERM; : > {tmp_path}/$0; sleep 60 & wait'
    )

    def stop():
        while len(list(tmp_path.glob("w*_*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    begin = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        runner.run_sweep(cfg, tmp_path, workers(tmp_path, saves), jobs=2)
    assert stopped.value.code == 143 and time.monotonic() - begin < 50
    assert (tmp_path / "saved").read_text() == "saved\n" * 2  # and the third was not started
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list(tmp_path.glob("runs/*/*/result.json"))
    rows = runner.run_sweep(cfg, tmp_path, workers(tmp_path, FINISH), jobs=2)
    assert statuses(rows) == {w: ["finished"] * 2 for w in (16, 32, 48)}
