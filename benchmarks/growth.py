r"""What grows with what: step time with tokens, temporaries with length, memory with steps.

    python -m benchmarks.growth --output=benchmarks/results/growth.json

Tokens: seconds of single train steps for 1 to 32 rows of 128 tokens, and the exponent of the
growth (1 is linear; fixed costs make it less). Length: bytes of temporaries of the compiled train
step at one row of 1k to 32k tokens, from XLA's own account, nothing is run: attention in blocks
has them grow linearly, where scores of a whole row would grow fourfold a doubling. Steps: the real
loop with evaluation, samples and checkpoints (configs/smoke.py); the process's own memory (RssAnon)
once a second over the last half of the steps, and tokens/s of the first and last quarter.
Ends with exit status 1 and one line if a bound is missed. Linux only; about 5 minutes on 2 cores.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import flags

from benchmarks import growth_worker, record
from experiments.cli import run_main

OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")
PARTS = flags.DEFINE_list("parts", ["tokens", "length", "steps"], "What to measure.")
STEPS = flags.DEFINE_integer(
    "steps", 2000, "Of the long run; at most 16 with --toy.", lower_bound=8
)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns through the numbers of rows.", lower_bound=1)
TOY = flags.DEFINE_bool("toy", False, "Tiny shapes, no bounds: does it run?")

SHAPE = {"layers": 4, "heads": 4, "width": 128, "length": 128, "vocab": 4096}
LONG = {"layers": 2, "heads": 4, "width": 64, "batch": 1, "vocab": 512}
ROWS, LENGTHS = [1, 2, 4, 8, 16, 32], [1024 * 2**i for i in range(6)]
TOY_SHAPE = {"layers": 1, "heads": 2, "width": 16, "length": 8, "vocab": 32}
TOY_LONG = {"layers": 1, "heads": 2, "width": 16, "batch": 1, "vocab": 32}
RECIPE = ["--config=configs/smoke.py", "--config.log.compilation_cache="]
SMALL = {"model.n_layers": 1, "model.d_model": 16, "model.n_heads": 2, "length": 16}
SMALL |= {"batch_size": 4, "eval.rows": 4, "eval.sample_tokens": 0, "model.vocab_multiple": 1}


def worker(kind: str, spec: dict) -> dict:
    """One of our measurements in a fresh process."""
    environment = {"JAX_PLATFORMS": "cpu"}
    if TOY.value:
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is all the time it takes
    command = [sys.executable, "-m", "benchmarks.growth_worker", kind, json.dumps(spec)]
    return record.worker(command, environment)


def tokens(toy: bool, rounds: int) -> dict:
    """Step time at each number of tokens."""
    shape, rows = (TOY_SHAPE, ROWS[:2]) if toy else (SHAPE, ROWS)
    spec = {"shape": shape, "batches": rows, "rounds": rounds, "seconds": 0.0 if toy else 3.0}
    times = worker("step_times", spec)["step_seconds"]
    points = []
    for batch, seconds in times.items():
        count = int(batch) * shape["length"]
        step = record.spread(seconds)
        points.append(
            {
                "tokens": count,
                "step_seconds": step,
                "milliseconds_per_1k_tokens": 1e6 * step["median"] / count,
            }
        )
    medians = [p["step_seconds"]["median"] for p in points]
    exponent = growth_worker.slope([p["tokens"] for p in points], medians)
    return {"shape": shape, "points": points, "exponent": exponent}


def length(toy: bool) -> dict:
    """Temporaries of the train step at each length, with and without rematerialisation."""
    shape, lengths = (TOY_LONG, [16, 32]) if toy else (LONG, LENGTHS)
    found = {"shape": shape}
    for remat in ("none",) if toy else ("none", "full"):
        spec = {"shape": shape, "lengths": lengths, "remat": remat}
        points = worker("temporaries", spec)["temporaries"]
        found[remat] = {"points": points, "ratios": growth_worker.ratios(points)}
    return found


def steps(toy: bool, number: int) -> dict:
    """The real loop in a process of its own: its memory and its speed from quarter to quarter."""
    often = max(1, number // (4 if toy else 10))
    changes = {"steps": number, "eval.every": often, "checkpoint.every": often}
    changes |= {"log.every": 1, **SMALL} if toy else {"log.every": 10, "model.n_layers": 4}
    changes["model.scan"] = False
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "run"
        command = [sys.executable, "-m", "experiments.pretrain", *RECIPE, f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in changes.items()]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if toy else {}
        said = pathlib.Path(folder) / "said.txt"
        with said.open("w") as f:
            run = subprocess.Popen(command, cwd=record.ROOT, env=environment, stdout=f, stderr=f)
            try:
                memory = watch(run, workdir / "metrics.jsonl", 0.005 if toy else 1.0)
            finally:
                run.kill()  # nothing happens to one that has ended
                run.wait()
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{said.read_text()[-2000:]}")
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        speeds = [(line["step"], line["tokens_per_second"]) for line in lines]
    return {"steps": number, "changes": changes} | growth_worker.summarise(number, memory, speeds)


def watch(run: subprocess.Popen, metrics: pathlib.Path, pause: float) -> list[tuple]:
    """(seconds, last step written, RssAnon in MB) of a process, until it ends."""
    begin, found = time.perf_counter(), []
    while run.poll() is None:
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []  # whole ones
        done = json.loads(lines[-1])["step"] if lines else 0
        status = pathlib.Path(f"/proc/{run.pid}/status").read_text()
        held = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
        if held:  # a process that has just ended holds nothing
            found.append((round(time.perf_counter() - begin, 2), done, int(held[0]) / 1024))
        time.sleep(pause)
    return found


def table(result: dict) -> str:
    """The result as text."""
    lines = []
    if part := result.get("tokens"):
        lines.append(f"step time grows as tokens ** {part['exponent']:.2f}")
        for p in part["points"]:
            lines.append(
                f"  {p['tokens']:6,} tokens {1000 * p['step_seconds']['median']:9.2f} ms"
                f"{p['milliseconds_per_1k_tokens']:9.2f} ms per 1k"
            )
    for remat in ("none", "full"):
        if points := result.get("length", {}).get(remat):
            lines.append(f"temporaries of the train step, remat {remat}")
            for p, ratio in zip(points["points"], [None, *points["ratios"]], strict=True):
                lines.append(
                    f"  {p['length']:6,} tokens {p['bytes'] / 1e6:9.1f} MB"
                    + (f"  x {ratio:.2f}" if ratio else "")
                )
    if part := result.get("steps"):
        low, high = part["last_half"]["lowest"], part["last_half"]["highest"]
        first, last = (q["median"] for q in part["tokens_per_second"].values())
        lines.append(
            f"{part['steps']:,} steps: memory {low:,.1f} to {high:,.1f} MB over the last half "
            f"({part['last_half_range']:.2%}), {first:,.0f} tokens/s in the first quarter, "
            f"{last:,.0f} in the last ({part['last_over_first']:.3f})"
        )
    return "\n".join(lines)


def main(_) -> None:
    parts = {
        "tokens": lambda: tokens(TOY.value, 2 if TOY.value else ROUNDS.value),
        "length": lambda: length(TOY.value),
        "steps": lambda: steps(TOY.value, min(STEPS.value, 16) if TOY.value else STEPS.value),
    }
    if unknown := set(PARTS.value) - set(parts):
        raise ValueError(f"--parts={','.join(sorted(unknown))}: parts are {', '.join(parts)}")
    result = record.header() | {"config": {"toy": TOY.value, "rounds": ROUNDS.value}}
    for name, measure in parts.items():
        if name in PARTS.value:
            result[name] = measure()
            print(table({name: result[name]}), flush=True)
            if OUTPUT.value:
                record.save(result, OUTPUT.value)
    if not TOY.value and (problems := growth_worker.missed(result)):
        raise ValueError("; ".join(problems))


if __name__ == "__main__":
    run_main(main)
