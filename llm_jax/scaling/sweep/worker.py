"""One worker of a sweep: trains a trunk and the runs that branch off it, through `train.loop`.

A trunk stays at its peak rate. At each point where a run leaves it, its state (parameters,
optimizer, step, key) is copied into the run's folder, and the run goes on from there with a linear
decay. Batches are a function of (seed, step), so that a branch is the very run that one process
would have made with the schedule "wsd".
"""

import difflib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_jax import config as configs
from llm_jax.config import TrainConfig
from llm_jax.scaling.sweep import data, grid, runner
from llm_jax.scaling.sweep import output as files
from llm_jax.scaling.sweep.config import SweepConfig
from llm_jax.scaling.sweep.grid import Point, Size, Trunk, run_config
from llm_jax.scaling.sweep.tuning import tune
from llm_jax.train import checkpoint, distributed
from llm_jax.train.loop import train


class Busy(OSError):
    """Another process works on this trunk."""


def run_only(
    cfg: SweepConfig, output: str | Path, name: str, *, retry_failed: bool = False
) -> bool:
    """`run_trunk` of the trunk with this name, on all processes of a job; prepares the sweep first.

    Raises:
      ValueError: there is no such trunk, or what `runner.prepare` finds.
    """
    output = Path(output).absolute()
    vocab_size = _on_main("prepare", lambda: runner.prepare(configs.thaw(cfg), output))
    trunks = grid.trunks(configs.freeze(cfg), int(vocab_size))
    chosen = [t for t in trunks if t.name == name]
    if not chosen:
        near = difflib.get_close_matches(name, [t.name for t in trunks], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"--only={name}: the sweep has no such model and seed{hint}")
    return run_trunk(cfg, chosen[0], output, retry_failed=retry_failed)


def run_trunk(cfg: SweepConfig, trunk: Trunk, output: Path, *, retry_failed: bool = False) -> bool:
    """Trains what is not finished of a trunk; returns whether all of its runs are.

    A run that ends with an error is recorded in its result.json, and where the trunk itself does,
    so are all that it did not reach. `output`/data holds the tokens.

    Raises:
      Busy: another process has this trunk.
      Interrupted: after SIGTERM or Ctrl-C, once the state is saved.
    """
    folder = files.trunk_folder(output, trunk)
    with _alone(folder):
        if retry_failed:
            _on_main("forget", lambda: files.forget_failures(output, trunk))
        todo = [p for p in trunk.points if _status(output, trunk, p) == files.UNFINISHED]
        for i, point in enumerate(todo):
            try:
                rate = _rate(cfg, trunk, output)
                _branch_off(cfg, trunk, point, output, rate)
            except Exception as e:  # whatever it is, the other trunks go on
                for lost in todo[i:]:
                    _record(output, trunk, lost, _failure(e))
                break
            try:
                _run_point(cfg, trunk, point, output, rate)
            except Exception as e:
                _record(output, trunk, point, _failure(e))
        finished = all(_status(output, trunk, p) == files.FINISHED for p in trunk.points)
        if finished and not cfg.keep_checkpoints:
            _on_main("clean", lambda: shutil.rmtree(folder / "trunk" / "checkpoints", True))
        return finished


def _status(output: Path, trunk: Trunk, point: Point) -> str:
    def read() -> str:
        result = files.read_result(output, trunk, point)
        return result["status"] if result else files.UNFINISHED

    return _on_main("status", read)


def _failure(error: Exception) -> dict[str, Any]:
    return files.failure(f"{type(error).__name__}: {error}")


def _run_point(cfg: SweepConfig, trunk: Trunk, point: Point, output: Path, rate: float) -> None:
    """Trains a run from where it left its trunk, or from the start, and records its result."""
    folder = files.run_folder(output, trunk, point)
    run = base_config(cfg, trunk.size, trunk.seed, rate, output)
    run.name, run.steps = point.name, point.steps
    if point.start:
        run.optimizer.schedule = "wsd"
        run.optimizer.decay_steps = point.steps - point.start
    summary = train(run, folder)

    def record() -> None:
        result = {
            "status": files.FINISHED,
            "loss": summary["eval_loss"],
            "bits_per_byte": summary["bits_per_byte"],
            "train_loss": summary["train_loss"],
            "learning_rate": rate,
            "seconds": round(summary["tokens"] / summary["tokens_per_second"], 1),
        }
        files.write_result(output, trunk, point, result)
        if not cfg.keep_checkpoints:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    _on_main("result", record)


def base_config(cfg: SweepConfig, size: Size, seed: int, rate: float, output: Path) -> TrainConfig:
    """The mutable config of a run on the sweep's own tokens that saves its last state alone."""
    run = run_config(cfg, size, seed, rate)
    data.read_shared(run, output)
    run.checkpoint.keep_last, run.checkpoint.keep_best = 1, 0
    return run


def _branch_off(cfg: SweepConfig, trunk: Trunk, point: Point, output: Path, rate: float) -> None:
    """Trains the trunk up to the point where a run leaves it, and copies its state there."""
    if not point.start or _saved(files.run_folder(output, trunk, point)) is not None:
        return
    folder = files.trunk_folder(output, trunk) / "trunk"
    passed = _on_main("passed", lambda: _steps_done(folder) > point.start) == "True"
    if passed:  # a run that failed or was added later: the trunk and its curve stay as they are
        folder = folder.with_name(f"trunk-{point.start}")
    if _saved(folder) != point.start:
        run = base_config(cfg, trunk.size, trunk.seed, rate, output)
        run.name, run.steps, run.optimizer.schedule = f"{trunk.name} trunk", point.start, "constant"
        # Nothing is read off the trunk but its training loss.
        run.data.eval_fraction, run.data.eval_inputs = 0.0, ()
        train(run, folder)
    source = folder / "checkpoints" / str(point.start)
    target = files.run_folder(output, trunk, point) / "checkpoints" / str(point.start)

    def copy() -> None:
        partial = target.parent.with_name("checkpoints.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial / target.name)
        os.replace(partial, target.parent)
        if passed:
            shutil.rmtree(folder)

    _on_main("branch", copy)


def _steps_done(folder: Path) -> int:
    """Steps of a run directory's last finished training; 0: there is none."""
    path = folder / "summary.json"
    return json.loads(path.read_text())["steps"] if path.exists() else 0


def _rate(cfg: SweepConfig, trunk: Trunk, output: Path) -> float:
    if trunk.size.rate is not None:
        return trunk.size.rate
    return tune(cfg, trunk, output, base_config)


def _saved(folder: Path) -> int | None:
    """Step of a run directory's last checkpoint."""

    def find() -> str:
        try:
            return str(checkpoint.locate(folder)[1])
        except FileNotFoundError:
            return ""

    return int(found) if (found := _on_main("saved", find)) else None


def _record(output: Path, trunk: Trunk, point: Point, result: dict[str, Any]) -> None:
    _on_main("result", lambda: files.write_result(output, trunk, point, result))


def _on_main(name: str, do: Callable[[], Any]) -> str:
    """Process 0 touches the files of the sweep; the others go on when it has, with its answer."""
    return distributed.from_main(name, lambda: str(do()))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Held while a trunk is worked on."""
    folder.mkdir(parents=True, exist_ok=True)
    if not distributed.is_main():
        yield
        return
    with (folder / ".lock").open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{folder}: another process works on it") from None
        yield
