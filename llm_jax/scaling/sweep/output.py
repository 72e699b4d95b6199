"""What a sweep leaves: result.json of each run, runs.csv, curves.csv and sweep.json.

OUTPUT/sweep.json            the config, the command, the environment
      /data                  tokenizer and tokens, shared by all runs
      /runs/TRUNK/worker.log
                 /trunk      run directory of the constant-rate part
                 /RUN        run directory of a branch, and its result.json
      /runs.csv  /curves.csv
"""

import csv
import io
import json
import math
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from llm_jax import config as configs
from llm_jax.report import read_metrics
from llm_jax.scaling.sweep.config import SweepConfig
from llm_jax.scaling.sweep.grid import Point, Trunk

COLUMNS = (
    "run", "status", "width", "layers", "heads", "N", "N_non_embedding", "N_embedding", "N_head",
    "D", "C", "C_exact", "budget", "loss", "bits_per_byte", "train_loss", "learning_rate",
    "batch_size", "steps", "seed", "seconds", "error",
)  # fmt: skip
CURVE_COLUMNS = ("run", "step", "D", "C", "N", "loss")
# Training losses of a curve are means over this share of the steps so far.
SMOOTHING = 0.1
CURVE_POINTS = 60
FINISHED, FAILED, UNFINISHED = "finished", "failed", "unfinished"


def trunk_folder(output: Path, trunk: Trunk) -> Path:
    """Everything of one worker."""
    return output / "runs" / trunk.name


def run_folder(output: Path, trunk: Trunk, point: Point) -> Path:
    """The run directory of one point."""
    return trunk_folder(output, trunk) / point.name


def write_atomically(path: Path, text: str) -> None:
    """The whole text, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with open(handle, "w") as f:
        f.write(text)
    os.chmod(partial, 0o644)
    os.replace(partial, path)


def write_result(output: Path, trunk: Trunk, point: Point, result: dict[str, Any]) -> None:
    """Records how a run ended: status, and the columns that only the run knows."""
    path = run_folder(output, trunk, point) / "result.json"
    write_atomically(path, json.dumps(result, indent=2) + "\n")


def read_result(output: Path, trunk: Trunk, point: Point) -> dict[str, Any] | None:
    """What `write_result` wrote; None: the run has not ended."""
    try:
        return json.loads((run_folder(output, trunk, point) / "result.json").read_text())
    except FileNotFoundError:
        return None


def is_open(output: Path, trunk: Trunk, point: Point) -> bool:
    """Whether a run is still to be made."""
    return read_result(output, trunk, point) is None


def forget_failures(output: Path, trunk: Trunk) -> None:
    """Opens the runs of a trunk again that ended with an error."""
    for point in trunk.points:
        result = read_result(output, trunk, point)
        if result is not None and result["status"] == FAILED:
            (run_folder(output, trunk, point) / "result.json").unlink()


def failure(error: str) -> dict[str, Any]:
    """The result of a run that did not get to its end, with the reason in one line."""
    return {"status": FAILED, "error": " ".join(error.split())[:500]}


def write_description(cfg: SweepConfig, output: Path) -> None:
    """sweep.json: the config, the command that began it, and what the first run ran on."""
    path = output / "sweep.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    environments = sorted(output.glob("runs/*/*/env.json"))
    found = json.loads(environments[0].read_text()) if environments else {}
    new = {
        "config": configs.to_dict(cfg),
        "command": old.get("command") or shlex.join(sys.argv),
        "environment": old.get("environment")
        or {k: v for k, v in found.items() if k not in ("command", "data")},
    }
    if json.loads(json.dumps(new)) != old:
        write_atomically(path, json.dumps(new, indent=2) + "\n")


def row(cfg: SweepConfig, trunk: Trunk, point: Point, result: dict[str, Any] | None) -> dict:
    """A run's row of runs.csv."""
    size = trunk.size
    d = point.steps * cfg.run.batch_size * cfg.run.length
    return {
        "run": point.name,
        "status": UNFINISHED,
        "width": size.d_model,
        "layers": size.n_layers,
        "heads": size.n_heads,
        "N": size.n,
        "N_non_embedding": size.n_non_embedding,
        "N_embedding": size.n_embedding,
        "N_head": size.n_head,
        "D": d,
        "C": size.flops * d,
        "C_exact": size.flops_exact * d,
        "budget": point.budget,
        "learning_rate": size.rate,
        "batch_size": cfg.run.batch_size,
        "steps": point.steps,
        "seed": trunk.seed,
        **(result or {}),
    }


def collect(cfg: SweepConfig, trunks: list[Trunk], output: Path) -> list[dict]:
    """Writes runs.csv and curves.csv from the run folders; returns the rows of the former.

    Curves are of the training loss, smoothed over the last tenth of the steps: of a trunk, that is
    at the constant rate, before any decay; without branches, of each run.
    """
    rows, curves = [], []
    for trunk in sorted(trunks, key=lambda t: (t.size.n, t.seed)):
        for point in trunk.points:
            rows.append(row(cfg, trunk, point, read_result(output, trunk, point)))
        name = "trunk" if cfg.branches else trunk.points[0].name
        curves += _curve(cfg, trunk, trunk_folder(output, trunk) / name / "metrics.jsonl")
    write_atomically(output / "runs.csv", _csv(COLUMNS, rows))
    write_atomically(output / "curves.csv", _csv(CURVE_COLUMNS, curves))
    return rows


def _curve(cfg: SweepConfig, trunk: Trunk, path: Path) -> list[dict]:
    """About CURVE_POINTS points, evenly spaced in the logarithm of the tokens."""
    if not path.exists():
        return []
    metrics = read_metrics(path)
    steps = metrics.get("step", [])
    pairs = [(s, v) for s, v in zip(steps, metrics.get("loss", []), strict=True) if v is not None]
    out, last, first = [], 0, 0
    factor = math.exp(math.log(max(steps, default=1) + 1) / CURVE_POINTS)
    for i, (step, _) in enumerate(pairs):
        while pairs[first][0] <= (1 - SMOOTHING) * step:
            first += 1
        if step <= cfg.run.optimizer.warmup_steps or step < last * factor:
            continue
        window = [v for _, v in pairs[first : i + 1]]
        last, d = step, step * cfg.run.batch_size * cfg.run.length
        out.append(
            {
                "run": trunk.name,
                "step": step,
                "D": d,
                "C": trunk.size.flops * d,
                "N": trunk.size.n,
                "loss": sum(window) / len(window),
            }
        )
    return out


def _csv(columns: tuple[str, ...], rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
