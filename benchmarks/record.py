"""What every benchmark shares: who measured, workers in turn, quartiles, the JSON file."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent


def cpu_model() -> str:
    """The processor's name."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The vector and matrix instructions that decide how fast a CPU multiplies."""
    info = pathlib.Path("/proc/cpuinfo")
    flags = (
        next((x.split() for x in info.read_text().splitlines() if x.startswith("flags")), [])
        if info.exists()
        else []
    )
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
    return [name for name in wanted if name in flags]


def revision(repo: pathlib.Path) -> str | None:
    """The git commit of a checkout, with "+changes" if its files differ; None outside git."""
    if not (repo / ".git").exists():
        return None

    def git(*args: str) -> str:
        command = ["git", "-C", str(repo), *args]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")


def header(packages: Sequence[str] = ("jax", "jaxlib")) -> dict[str, Any]:
    """Date, versions and machine: the head of every result."""
    versions = {"python": platform.python_version(), "llm_jax_revision": revision(ROOT)}
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "versions": versions | {name: importlib.metadata.version(name) for name in packages},
        "device": {
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "features": cpu_features(),
        },
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, extremes and number of some measurements."""
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {
        "median": median,
        "quartiles": [low, high],
        "range": [min(values), max(values)],
        "count": len(values),
    }


def worker(command: Sequence[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a worker process from the project's root; its last line of output is JSON.

    Raises:
      RuntimeError: it failed; the message ends with what it said.
    """
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | (environment or {}), capture_output=True, text=True
    )
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"exit status {done.returncode} of: {' '.join(command)}\n{tail}")
    return json.loads(done.stdout.splitlines()[-1])


def serve(kinds: dict[str, Callable[[dict], Any]]) -> None:
    """The main of a worker process: `worker(["python", "-m", MODULE, KIND, JSON])` gets
    kinds[KIND](what the JSON says). To be called before jax starts its threads."""
    from llm_jax.train import host_memory

    host_memory.keep()  # as every run has it
    kind, spec = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(kinds[kind](spec)))


def in_turn(
    sides: dict[str, Callable[[], dict[str, Any]]], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Runs the sides A B ... A B ..., so that a machine that gets slower does so for all of them."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            results[name].append(run())
    return results


def ratio(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Ratio of the medians, and the lowest and highest of the rounds' own ratios."""
    pairs = [a / b for a, b in zip(ours, peer, strict=True)]
    return {
        "ratio": statistics.median(ours) / statistics.median(peer),
        "range": [min(pairs), max(pairs)],
    }


def save(result: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes a result as JSON."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
