r"""Our `shakespeare_char` recipe and nanoGPT's own, trained in turn on the same cores.

    python -m benchmarks.shakespeare_char --data=tinyshakespeare.txt \
        --peer_python=PYTHON_WITH_TORCH --peer_repo=NANOGPT_CHECKOUT \
        --seeds=0,1,2 --output=benchmarks/results/shakespeare_char.json

Both train 2,000 steps in float32 on the first 90 % of the characters. Both are scored here, not by
themselves, on all of the rest: consecutive windows of 64. The order is ours, peer, ours, peer, ...;
tokens/s is the median after warm-up and without evaluation. About 2 minutes a seed on 2 cores, when
nothing else runs. The peer's Python needs torch and numpy; seed S is its torch seed 1337 + S.
"""

import datetime
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time

from absl import flags

from benchmarks import record
from experiments.cli import run_main

DATA = flags.DEFINE_string("data", None, "The text, tinyshakespeare.", required=True)
PEER_PYTHON = flags.DEFINE_string("peer_python", None, "Python with torch and numpy.")
PEER_REPO = flags.DEFINE_string("peer_repo", None, "Checkout of nanoGPT.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "One run of each side for each.")
ONLY = flags.DEFINE_enum("only", "both", ["both", "ours", "peer"], "Which side to run.")
CORES = flags.DEFINE_list("cores", [], "CPU cores to run on; empty: all this process may use.")
WORKDIR = flags.DEFINE_string("workdir", "", "Where runs are kept; empty: nowhere.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.", required=True)

STEPS, LENGTH, BATCH_SIZE, WARMUP_STEPS = 2000, 64, 12, 100
PEER_SEED = 1337  # the constant in the peer's train.py
# The CPU command of the peer's README. Then: float32, and evaluate and save only at the ends.
PEER_RECIPE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 "
    "--dtype=float32 --eval_interval=2000 --always_save_checkpoint=True"
).split()
OUR_RECIPE = (
    "-m experiments.pretrain --config=configs/shakespeare_char.py --config.model.dtype=float32 "
    "--config.eval.every=0 --config.checkpoint.every=0"
).split()


def prepare(text: str, folder: pathlib.Path) -> dict:
    """Writes the split that both are scored on, and the peer's input; returns what it is."""
    import numpy as np

    characters = sorted(set(text))
    ids = {c: i for i, c in enumerate(characters)}
    split = int(0.9 * len(text))
    folder.mkdir(parents=True)
    for name, part in (("train", text[:split]), ("val", text[split:])):
        np.array([ids[c] for c in part], np.uint16).tofile(folder / f"{name}.bin")
    (folder / "val.txt").write_text(text[split:], encoding="utf-8", newline="")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters)}))
    return {
        "train_characters": split,
        "val_characters": len(text) - split,
        "vocabulary": len(characters),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def call(command: list[str], log: pathlib.Path) -> float:
    """Runs a command on the CPU from the project's root; returns its seconds."""
    start = time.perf_counter()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with open(log, "w") as f:
        code = subprocess.call(command, cwd=record.ROOT, env=environment, stdout=f, stderr=f)
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise RuntimeError(f"exit status {code} of: {' '.join(command)}\n{tail}")
    return time.perf_counter() - start


def run_ours(seed: int, data: pathlib.Path, folder: pathlib.Path) -> dict:
    """Trains and scores our side in fresh processes."""
    run = folder / "run"
    flags_ = [f"--workdir={run}", f"--input={os.path.abspath(DATA.value)}", f"--config.seed={seed}"]
    process_seconds = call([sys.executable, *OUR_RECIPE, *flags_], folder / "train.log")
    summary = json.loads((run / "summary.json").read_text())
    if summary["steps"] != STEPS or summary["tokens"] != STEPS * BATCH_SIZE * LENGTH:
        raise RuntimeError(
            f"configs/shakespeare_char.py ran {summary['steps']} steps and {summary['tokens']} "
            f"tokens; the peer runs {STEPS} and {STEPS * BATCH_SIZE * LENGTH}"
        )
    scored = folder / "score.json"
    where = [f"--checkpoint={run}", f"--input={data / 'val.txt'}"]
    what = [f"--length={LENGTH}", f"--output={scored}"]
    program = [sys.executable, "-m", "benchmarks.score_checkpoint"]
    call([*program, *where, *what], folder / "score.log")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = [x for x in lines if x.get("tokens_per_second")]
    speeds = [
        x["tokens_per_second"]
        for x in timed
        if x["step"] > WARMUP_STEPS and x.get("eval_loss") is None
    ]
    return {
        **json.loads(scored.read_text()),
        "eval_loss_in_summary": summary["eval_loss"],
        "tokens_per_second": statistics.median(speeds),
        "steps_per_measurement": statistics.median(
            b["step"] - a["step"] for a, b in itertools.pairwise(timed)
        ),
        "params": summary["params"],
        "train_seconds": summary["wall_seconds"],
        "process_seconds": process_seconds,
    }


def run_peer(seed: int, data: pathlib.Path, folder: pathlib.Path, group: int, threads: int) -> dict:
    """Trains and scores the peer in a fresh process; `group` steps make one speed measurement."""
    command = [
        *(os.path.abspath(PEER_PYTHON.value), "-m", "benchmarks.nanogpt_driver"),
        *(f"--repo={os.path.abspath(PEER_REPO.value)}", f"--data={data}", f"--workdir={folder}"),
        *(f"--seed={PEER_SEED + seed}", f"--threads={threads}"),
        *(f"--steps={STEPS}", f"--length={LENGTH}", "--", *PEER_RECIPE),
    ]
    process_seconds = call(command, folder / "driver.log")
    result = json.loads((folder / "result.json").read_text())
    seconds = result.pop("step_seconds")[WARMUP_STEPS:]
    groups = [seconds[i : i + group] for i in range(0, len(seconds) - group + 1, group)]
    speeds = [group * BATCH_SIZE * LENGTH / sum(g) for g in groups]
    return {
        **result,
        "tokens_per_second": statistics.median(speeds),
        "steps_per_measurement": group,
        "process_seconds": process_seconds,
    }


def run_all(data: pathlib.Path, workdir: pathlib.Path, seeds: list[int]) -> list[dict]:
    """All runs in the order they are made: ours and the peer in turn, for each seed."""
    sides = ["ours", "peer"] if ONLY.value == "both" else [ONLY.value]
    threads = len(os.sched_getaffinity(0))
    group, runs = 10, []
    for seed in seeds:
        for side in sides:
            folder = workdir / f"{side}{seed}"
            folder.mkdir()
            load = os.getloadavg()[0]
            if side == "ours":
                result = run_ours(seed, data, folder)
                group = int(result["steps_per_measurement"])
            else:
                result = run_peer(seed, data, folder, group, threads)
            runs.append({"side": side, "seed": seed, "load_before": round(load, 2), **result})
            print(
                f"{side} seed {seed}: eval loss {result['eval_loss']:.4f}, "
                f"{result['tokens_per_second']:,.0f} tokens/s",
                flush=True,
            )
    return runs


def summarise(runs: list[dict]) -> dict:
    """Medians, means and spread for each side; difference and ratio where both ran."""
    report = {"medians": {}, "means": {}, "spread": {}}
    for side in sorted({r["side"] for r in runs}):
        values = {
            key: [r[key] for r in runs if r["side"] == side]
            for key in ("eval_loss", "tokens_per_second", "train_seconds")
        }
        report["medians"][side] = {k: statistics.median(v) for k, v in values.items()}
        report["means"][side] = {k: statistics.fmean(v) for k, v in values.items()}
        report["spread"][side] = {k: [min(v), max(v)] for k, v in values.items()}
    if len(report["medians"]) == 2:
        ours, peer = (report["means"][s]["eval_loss"] for s in ("ours", "peer"))
        report["difference"] = {"mean_eval_loss": ours - peer}
        report["ratio"] = {
            key: report["medians"]["ours"][key] / report["medians"]["peer"][key]
            for key in ("tokens_per_second", "train_seconds")
        }
        speed = {(r["side"], r["seed"]): r["tokens_per_second"] for r in runs}
        pairs = [speed["ours", s] / speed["peer", s] for side, s in speed if side == "ours"]
        report["spread"]["ratio"] = {"tokens_per_second": [min(pairs), max(pairs)]}
    return report


def table(report: dict) -> str:
    """The summary as text."""
    rows = [f"{'':6}{'seeds':>6}{'mean eval loss':>16}{'lowest':>9}{'highest':>9}{'tokens/s':>10}"]
    for side, medians in report["medians"].items():
        count = sum(r["side"] == side for r in report["runs"])
        low, high = report["spread"][side]["eval_loss"]
        rows.append(
            f"{side:6}{count:>6}{report['means'][side]['eval_loss']:>16.4f}{low:>9.4f}{high:>9.4f}"
            f"{medians['tokens_per_second']:>10,.0f}"
        )
    if "ratio" in report:
        low, high = report["spread"]["ratio"]["tokens_per_second"]
        rows.append(
            f"ours - peer: {report['difference']['mean_eval_loss']:+.4f} nats; "
            f"ours / peer: {report['ratio']['tokens_per_second']:.2f} tokens/s "
            f"({low:.2f} to {high:.2f})"
        )
    return "\n".join(rows)


def check_flags() -> list[int]:
    """The seeds; raises an error that names the flag to change."""
    if not os.path.isfile(DATA.value):
        raise FileNotFoundError(f"--data={DATA.value} does not exist")
    if ONLY.value != "ours":
        if not PEER_PYTHON.value or not os.access(PEER_PYTHON.value, os.X_OK):
            raise FileNotFoundError(f"--peer_python={PEER_PYTHON.value} is not a Python to run")
        for name in ("train.py", "model.py", "config/train_shakespeare_char.py"):
            if not PEER_REPO.value or not os.path.isfile(os.path.join(PEER_REPO.value, name)):
                raise FileNotFoundError(f"--peer_repo={PEER_REPO.value} has no {name}")
    if WORKDIR.value and os.path.isdir(WORKDIR.value) and os.listdir(WORKDIR.value):
        raise ValueError(f"--workdir={WORKDIR.value} is not empty; a finished run would be resumed")
    if not SEEDS.value or not all(s.isdigit() for s in SEEDS.value):
        raise ValueError(f"--seeds={','.join(SEEDS.value)} has to be numbers such as 0,1,2")
    there = {str(core) for core in os.sched_getaffinity(0)}
    if not set(CORES.value) <= there:
        raise ValueError(
            f"--cores={','.join(CORES.value)} has to be among {','.join(sorted(there))}"
        )
    return [int(s) for s in SEEDS.value]


def main(_) -> None:
    seeds = check_flags()
    if CORES.value:
        os.sched_setaffinity(0, {int(c) for c in CORES.value})  # children inherit it
    text = pathlib.Path(DATA.value).read_bytes().decode("utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        workdir = pathlib.Path(WORKDIR.value or temporary).absolute()
        data = prepare(text, workdir / "data")
        runs = run_all(workdir / "data", workdir, seeds)

    versions = {
        "python": platform.python_version(),
        "llm_jax_revision": record.revision(record.ROOT),
    }
    versions |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    for run in runs:
        peer = run.pop("versions", {})
        versions |= {f"peer_{k}" if k == "python" else k: v for k, v in peer.items()}
    if PEER_REPO.value:
        versions["nanogpt_revision"] = record.revision(pathlib.Path(PEER_REPO.value))
    report = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "versions": versions,
        "device": {"cpu": record.cpu_model(), "cores": len(os.sched_getaffinity(0))},
        "config": {
            "ours": ["python", *OUR_RECIPE],
            "peer": ["python", "train.py", *PEER_RECIPE],
            "seeds": seeds,
            "peer_seeds": [PEER_SEED + s for s in seeds],
            "warmup_steps": WARMUP_STEPS,
            "window": LENGTH,
            "data": data,
        },
        "runs": runs,
        **summarise(runs),
    }
    output = pathlib.Path(OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))


if __name__ == "__main__":
    run_main(main)
