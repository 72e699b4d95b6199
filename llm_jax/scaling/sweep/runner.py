"""Runs a sweep: one process a trunk, as many at a time as there are devices or cores for.

A worker is a process of its own, so that a crash, a lack of memory or a NaN ends one trunk and not
the sweep. Everything is in files: the same command goes on where an earlier one stopped.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax import config as configs
from llm_jax.scaling.sweep import data, grid
from llm_jax.scaling.sweep import output as files
from llm_jax.scaling.sweep.config import GRID_KEYS, SweepConfig, validate_sweep
from llm_jax.scaling.sweep.grid import Point, Trunk
from llm_jax.train.accelerators import accelerators
from llm_jax.train.environment import config_changes

POLL_SECONDS = 0.5
BUSY_EXIT = 75  # of a worker whose trunk another process has
SIGTERM_EXIT = 143
WORKER_EXITS = (0, 1)  # all runs finished; some ended with an error that the worker recorded


class Slot(NamedTuple):
    """What one worker at a time gets of this machine."""

    cpus: tuple[int, ...]  # empty: it is not pinned
    environment: dict[str, str]


def prepare(cfg: SweepConfig, output: Path) -> int:
    """Checks and freezes the config, tokenises the text, writes sweep.json.

    Returns the size of the vocabulary, from which `grid.trunks` makes the grid.

    Raises:
      ValueError: what cannot work, or a config that does not go with what `output` holds.
    """
    validate_sweep(cfg)
    configs.freeze(cfg)
    path = output / "sweep.json"
    if path.exists():
        there = json.loads(path.read_text())["config"]
        old = configs.freeze(configs.from_dict(SweepConfig, there, str(path)))
        changes = [c for c in config_changes(old, cfg) if c.split("=")[0] not in GRID_KEYS]
        if changes:
            raise ValueError(
                f"--output={output} holds a sweep of another config: {changes[0]}; set it back or "
                "choose another folder"
            )
    vocab_size = data.prepare(cfg.run, output)
    files.write_description(cfg, output)
    return vocab_size


def run_sweep(
    cfg: SweepConfig,
    output: str | Path,
    command: Callable[[Trunk], list[str]],
    *,
    jobs: int = 0,
    retry_failed: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Runs what is not finished of a sweep; returns the rows of its runs.csv.

    Args:
      command: a trunk -> the command that runs `worker.run_trunk` for it and ends with one of
        WORKER_EXITS, BUSY_EXIT or SIGTERM_EXIT.
      jobs: workers at a time; 0: one for each accelerator, or for each core.
      retry_failed: runs that ended with an error are tried again.

    Raises:
      ValueError, OSError: what the user can mend, in one line.
      SystemExit: 143 after SIGTERM or Ctrl-C, once all workers have saved.
    """
    output = Path(output).absolute()
    trunks = grid.trunks(cfg, prepare(cfg, output))
    for trunk in trunks if retry_failed else ():
        files.forget_failures(output, trunk)
    todo = [t for t in trunks if any(files.is_open(output, t, p) for p in t.points)]
    if todo:
        _Runner(output, command, say).run(
            todo, slots(cfg, min(jobs, len(todo)) if jobs else 0, len(todo))
        )
    return finish(cfg, trunks, output, say)


def finish(
    cfg: SweepConfig, trunks: list[Trunk], output: Path, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Writes runs.csv, curves.csv and sweep.json from what is there, and says how much that is."""
    rows = files.collect(cfg, trunks, output)
    files.write_description(cfg, output)
    for row in rows:
        if row["status"] == files.FAILED:
            say(f"failed: {row['run']}: {row['error']}")
    counts = {s: sum(r["status"] == s for r in rows) for s in (files.FAILED, files.UNFINISHED)}
    rest = "".join(f", {n} {what}" for what, n in counts.items() if n)
    say(f"{len(rows) - sum(counts.values())} of {len(rows)} runs finished{rest}: {output}/runs.csv")
    return rows


def slots(cfg: SweepConfig, jobs: int, most: int) -> list[Slot]:
    """What each of `jobs` workers gets (0: one for each accelerator or core, but at most `most`).

    Raises:
      ValueError: more devices than there are, or several processes on one TPU.
    """
    cpus = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    kinds = [] if on_cpu else [kind for kind, _ in accelerators()]
    if "tpu" in kinds:
        if jobs > 1:
            raise ValueError(
                f"--jobs={jobs}: the TPUs of a machine belong to one process at a time"
            )
        return [Slot((), {})]
    if "cuda" not in kinds:
        jobs = jobs or min(len(cpus) or os.cpu_count(), most)
        return [Slot(_share(cpus, i, jobs), {}) for i in range(jobs)]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(i) for i in range(kinds.count("cuda"))]
    places = len(names) // cfg.devices
    if not places:
        raise ValueError(f"devices={cfg.devices}, but only {len(names)} accelerator(s) are here")
    jobs = jobs or min(places, most)
    out = []
    for i in range(jobs):
        place = i % places * cfg.devices
        env = {"CUDA_VISIBLE_DEVICES": ",".join(names[place : place + cfg.devices])}
        if jobs > places:  # several on one device share its memory
            env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / -(-jobs // places):.2f}"
        out.append(Slot(_share(cpus, i, jobs), env))
    return out


def _share(cpus: tuple[int, ...], i: int, jobs: int) -> tuple[int, ...]:
    """The i-th worker's cores: its own, as long as there is one for each."""
    if not cpus:
        return ()
    each = max(len(cpus) // jobs, 1)
    first = i * each % len(cpus)
    return cpus[first : first + each]


class _Runner:
    """Starts workers, watches them, and stops them when it is told to stop."""

    def __init__(
        self, output: Path, command: Callable[[Trunk], list[str]], say: Callable[[str], None]
    ):
        self.output, self.command, self.say = output, command, say
        self.stopping = 0

    def run(self, todo: list[Trunk], places: list[Slot]) -> None:
        waiting, free = list(todo), list(places)
        running: dict[subprocess.Popen, tuple[Trunk, Slot]] = {}
        self.progress = _Progress(self.output, todo, self.say)
        with self._signals():
            try:
                while running or (waiting and not self.stopping):
                    while waiting and free and not self.stopping:
                        trunk, slot = waiting.pop(0), free.pop(0)
                        running[self._start(trunk, slot)] = trunk, slot
                    time.sleep(POLL_SECONDS)
                    self.progress.look()
                    for process in [p for p in running if p.poll() is not None]:
                        trunk, slot = running.pop(process)
                        free.append(slot)
                        self._ended(trunk, process.returncode)
                    if self.stopping:
                        self._stop(list(running))
            finally:
                for process in running:  # an error of ours, or running is empty
                    process.terminate()
        if self.stopping:
            self.say("stopped; run the same command again to go on")
            raise SystemExit(SIGTERM_EXIT)

    def _stop(self, processes: list[subprocess.Popen]) -> None:
        """Has all workers save and end; a second signal to us kills them."""
        asked = self.stopping
        for process in processes:
            process.send_signal(signal.SIGTERM if asked == 1 else signal.SIGKILL)
        while self.stopping == asked and any(p.poll() is None for p in processes):
            time.sleep(POLL_SECONDS / 5)

    def _start(self, trunk: Trunk, slot: Slot) -> subprocess.Popen:
        folder = files.trunk_folder(self.output, trunk)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "worker.log").open("a") as log, _pinned(slot.cpus):
            return subprocess.Popen(
                self.command(trunk),
                env={**os.environ, **slot.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes to us, who pass it on once
            )

    def _ended(self, trunk: Trunk, code: int) -> None:
        """A worker that could not record how it ended has its runs recorded here."""
        if code in (BUSY_EXIT, SIGTERM_EXIT) or (self.stopping and code < 0):
            if code == BUSY_EXIT:
                self.say(f"{trunk.name}: another process works on it")
            return
        for point in trunk.points:
            if files.is_open(self.output, trunk, point):
                error = f"{_exit(code)}: {_last_line(files.trunk_folder(self.output, trunk))}"
                files.write_result(self.output, trunk, point, files.failure(error))
        self.progress.look()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: Any) -> None:
            self.stopping += 1

        old = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _pinned(cpus: tuple[int, ...]) -> Iterator[None]:
    """This thread on these cores, and so what it starts: code of ours between fork and exec could
    hang, as jax has threads."""
    if not cpus:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class _Progress:
    """A line for each run that ends, with the time left by the FLOPs that are."""

    def __init__(self, output: Path, todo: list[Trunk], say: Callable[[str], None]):
        self.output, self.say, self.begin = output, say, time.monotonic()
        self.open: dict[str, tuple[Trunk, Point, float]] = {}
        for trunk in todo:
            reached = 0
            for point in trunk.points:
                if files.is_open(output, trunk, point):
                    # Of the trunk, its part since the point before.
                    cost = point.steps - reached if point.start else point.steps
                    self.open[point.name] = trunk, point, cost * trunk.size.flops_exact
                reached = point.start
        self.count, self.work = len(self.open), sum(cost for *_, cost in self.open.values())
        self.done = 0.0

    def look(self) -> None:
        """Says which runs have ended since."""
        for name, (trunk, point, cost) in list(self.open.items()):
            result = files.read_result(self.output, trunk, point)
            if result is None:
                continue
            del self.open[name]
            self.done += cost
            if result["status"] == files.FAILED:
                what = f"failed: {result['error']}"
            else:
                what = f"loss {result['loss']:.4f}"
            left = (time.monotonic() - self.begin) * (self.work - self.done) / self.done
            number = self.count - len(self.open)
            self.say(f"{name}: {what}  ({number}/{self.count}, {left / 60:.0f} min left)")


def _exit(code: int) -> str:
    if code >= 0:
        return f"the worker ended with exit code {code}"
    name = signal.Signals(-code).name
    why = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"the worker was ended by {name}{why}"


def _last_line(folder: Path) -> str:
    lines = (folder / "worker.log").read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no output")
