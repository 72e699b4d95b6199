r"""How long the train step takes to compile as layers are added, and what the cache saves.

    python -m benchmarks.compile --output=benchmarks/results/compile.json

Each point is a process of its own, without any cache: seconds to trace and lower, seconds to
compile, and the peak of its memory (VmHWM), for layers scanned and unrolled. A scan compiles its
layer once, so its time should not depend on their number; an unrolled loop pays for each. Then a
start twice, with a compilation cache that is empty and one that the first start has filled: from
the end of the imports to the end of the first step, and the whole process.
Ends with exit status 1 and one line if a bound is missed. Linux only; about 5 minutes on 2 cores.
"""

import json
import sys
import tempfile
import time

from absl import flags

from benchmarks import compile_worker, record
from experiments.cli import run_main

OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")
LAYERS = flags.DEFINE_list("layers", ["2", "4", "8", "16", "32", "64", "96"], "Numbers of layers.")
UNROLLED_UP_TO = flags.DEFINE_integer("unrolled_up_to", 32, "Most layers to compile unrolled.")
ROUNDS = flags.DEFINE_integer("rounds", 1, "Processes of each point.", lower_bound=1)
TOY = flags.DEFINE_bool("toy", False, "Tiny shapes, no bounds: does it run?")

SHAPE = {"heads": 4, "width": 64, "length": 64, "batch": 2, "vocab": 512}
TOY_SHAPE = {"heads": 2, "width": 16, "length": 8, "batch": 2, "vocab": 32}
STARTS = (8, 96)  # layers, scanned


def worker(kind: str, spec: dict) -> dict:
    """One of our measurements in a fresh process."""
    environment = {"JAX_PLATFORMS": "cpu"}
    if TOY.value:
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is all the time it takes
    spec = spec | {"began": time.time(), "keep_all": TOY.value}
    command = [sys.executable, "-m", "benchmarks.compile_worker", kind, json.dumps(spec)]
    return record.worker(command, environment)


def cold_and_warm(spec: dict) -> dict:
    """A start with an empty cache, and one with what the first left there."""
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (worker("start", spec | {"cache": cache}) for _ in range(2))
    if cold["loss"] != warm["loss"]:
        raise RuntimeError(f"first losses {cold['loss']} without and {warm['loss']} with the cache")
    return {"cold": cold, "warm": warm}


def table(result: dict) -> str:
    """The result as text."""
    lines = ["layers              trace + lower   compile     peak memory"]
    for p in result["points"]:
        lines.append(
            f"{p['layers']:6} {p['how']:9} {p['trace_seconds']['median']:14.2f} s"
            f"{p['compile_seconds']['median']:8.2f} s {p['peak_megabytes']['median']:12,.0f} MB"
        )
    if result["scan_growth_8_to_96"] is not None:
        lines.append(f"96 scanned layers over 8: {result['scan_growth_8_to_96']:.2f}")
    for p in result["starts"]:
        lines.append(f"start with {p['layers']} layers, {p['how']}")
        for name, s in p["seconds"].items():
            lines.append(
                f"  {name:32}{s['cold']['median']:8.2f} s cold {s['warm']['median']:8.2f} s warm"
                f"  x {s['ratio']['ratio']:.2f}"
            )
    return "\n".join(lines)


def main(_) -> None:
    shape = TOY_SHAPE if TOY.value else SHAPE
    layers = [1] if TOY.value else sorted({int(n) for n in LAYERS.value})
    most = 1 if TOY.value else UNROLLED_UP_TO.value
    unrolled = [n for n in layers if n <= most]
    specs = [(n, True) for n in layers] + [(n, False) for n in unrolled]
    starts = [(n, True) for n in layers if n in STARTS]
    starts += [(max(unrolled), False)] if unrolled else []
    rounds = 1 if TOY.value else ROUNDS.value
    result = record.header() | {
        "config": {"shape": shape, "rounds": rounds, "toy": TOY.value},
        "points": [],
        "starts": [],
    }

    def sides(wanted, measure):
        spec = {(n, scan): {"shape": shape | {"layers": n}, "scan": scan} for n, scan in wanted}
        return {key: lambda s=s: measure(s) for key, s in spec.items()}

    compiled = record.in_turn(sides(specs, lambda s: worker("compile", s)), rounds)
    result["points"] = [compile_worker.point(*key, runs) for key, runs in compiled.items()]
    result["scan_growth_8_to_96"] = compile_worker.scan_growth(result["points"], 8, 96)
    started = record.in_turn(sides(starts, cold_and_warm), rounds)
    result["starts"] = [compile_worker.both_starts(*key, runs) for key, runs in started.items()]
    for name in ("build", "process"):
        ratios = [p["seconds"][name]["ratio"]["ratio"] for p in result["starts"]]
        key = "warm_over_cold" if name == "build" else "warm_over_cold_process"
        result[key] = max(ratios, default=None)
    print(table(result))
    if OUTPUT.value:
        record.save(result, OUTPUT.value)
    if not TOY.value and (problems := compile_worker.missed(result)):
        raise ValueError("; ".join(problems))


if __name__ == "__main__":
    run_main(main)
