r"""One accelerator in under nine minutes: its ceilings, and what training and decoding reach of them.

    python -m benchmarks.accelerator --output=benchmarks/results/accelerator_h100.json

Needs no data: tokens are random. In this order: bandwidth of a copy and speed of a matmul; training
of five models from 124M to 3B parameters with the real train step; attention implementations beside
one another; decoding against the bandwidth bound; the 124M step in PyTorch where it is installed.
Each is a process of its own. What --minutes leaves no time for is skipped and named, and the file
is written after each, so that an end from outside loses nothing. --toy runs tiny shapes anywhere.
"""

import importlib.util
import json
import os
import sys
from typing import Any

from absl import flags

from benchmarks import record
from benchmarks.accelerator_worker import MODELS, REFERENCE_BYTES
from benchmarks.cases import Clock, most_rows, rows_to_try, run_case
from experiments.cli import run_main

PARTS = ("ceilings", "train", "attention", "decode", "torch")
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write, after every part.")
MINUTES = flags.DEFINE_float("minutes", 9.0, "Time for everything.", lower_bound=0.1)
ONLY = flags.DEFINE_list("only", list(PARTS), f"Parts to run, of {', '.join(PARTS)}.")
MODELS_FLAG = flags.DEFINE_list("models", [], "Models to train; none: all, or two with --toy.")
XLA_FLAGS = flags.DEFINE_enum(
    "xla_flags", "auto", ["auto", "none"], "auto: those of llm_jax/train/xla_flags.py"
)
TORCH_PYTHON = flags.DEFINE_string(
    "torch_python", None, "Python of the PyTorch side; none: this one, if it has torch."
)
TOY = flags.DEFINE_bool("toy", False, "Tiny shapes, in seconds.")

# Seconds that a case needs at least: compiling and a first run. What is left has to hold it, and
# one case of each part that follows.
LEAST = {"ceilings": 20, "train": 35, "attention": 40, "decode": 40, "torch": 60}
DECODED = ("gpt2-124m", "llama-1b")
DECODE_ROWS = (1, 8, 64)


def needed(part: str) -> dict[str, float]:
    """`run_case`'s least and reserve of a part."""
    if TOY.value:
        return {"least": 1.0, "reserve": 0.0}
    later = [p for p in PARTS[PARTS.index(part) + 1 :] if p in ONLY.value]
    return {"least": LEAST[part], "reserve": sum(LEAST[p] for p in later)}


def attempt(part: str, spec: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """One of our workers, if the time allows."""
    spec = {"toy": TOY.value, "flags": XLA_FLAGS.value, **spec}
    # JAX takes three quarters of a GPU's memory unless told otherwise.
    share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": share}
    if TOY.value:
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is all the time it takes
    command = [sys.executable, "-m", "benchmarks.accelerator_worker", part, json.dumps(spec)]
    return run_case(command, environment, clock, **needed(part))


def train(name: str, memory: float | None, clock: Clock) -> dict[str, Any]:
    """Trains a model with as many rows as fit, a power of two below the table's number."""
    start = rows_to_try(MODELS[name][2], memory, REFERENCE_BYTES)
    return most_rows(start, lambda rows: attempt("train", {"model": name, "rows": rows}, clock))


def torch_side(ours: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """The PyTorch step with the batch that our 124M ran with, and the ratio of the two."""
    python = TORCH_PYTHON.value or sys.executable
    if not TORCH_PYTHON.value and importlib.util.find_spec("torch") is None:
        return {"skipped": "this Python has no torch; name one that does with --torch_python"}
    if "rows" not in ours:
        return {"skipped": "our gpt2-124m was not measured, so there is nothing to compare"}
    command = [python, "-m", "benchmarks.torch_step", f"--length={ours['length']}"]
    command += [f"--batch_size={ours['rows']}"] + ["--toy"] * TOY.value
    result = run_case(command, {}, clock, **needed("torch"))
    if "skipped" not in result:
        speeds = [x["tokens_per_second"]["median"] for x in (ours, result)]
        result["ours_over_torch"] = speeds[0] / speeds[1]
    return result


def measure() -> dict[str, Any]:
    """All parts in order; what is known so far is written after each case."""
    clock, result = Clock(MINUTES.value), {**record.header(), "flags": flags_used()}

    def keep() -> None:
        result["seconds"] = round(clock.passed(), 1)
        if OUTPUT.value:
            record.save(result, OUTPUT.value)

    wanted = [part for part in PARTS if part in ONLY.value]
    ceilings = {}
    for part in wanted:
        print(f"{part}: {clock.left():.0f} s left", flush=True)
        match part:
            case "ceilings":
                ceilings = result["ceilings"] = attempt(part, {}, clock)
                result["device"] |= ceilings.get("device", {})
            case "train":
                result["train"] = {}
                for name in models_to_train():
                    memory = result["device"].get("hbm_bytes")
                    result["train"][name] = train(name, memory, clock)
                    keep()
            case "attention":
                result["attention"] = attempt(part, {}, clock)
            case "decode":
                result["decode"] = {}
                for name in DECODED[: 1 if TOY.value else None]:
                    speed = ceilings.get("copy_gigabytes_per_second", {}).get("median")
                    rows = DECODE_ROWS[:2] if TOY.value else DECODE_ROWS
                    spec = {"model": name, "rows": rows, "bandwidth": speed and 1e9 * speed}
                    result["decode"][name] = attempt(part, spec, clock)
                    keep()
            case "torch":
                ours = result.get("train", {}).get("gpt2-124m", {})
                result["torch"] = torch_side(ours, clock)
        keep()
    return result


def models_to_train() -> list[str]:
    """The names that --models gives or means."""
    return MODELS_FLAG.value or (["gpt2-124m", "llama-3b"] if TOY.value else list(MODELS))


def flags_used() -> dict[str, Any]:
    """The flags that change what is measured."""
    names = ("toy", "minutes", "only", "models", "xla_flags")
    return {name: flags.FLAGS[name].value for name in names}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = []

    def why(name: str, part: dict[str, Any]) -> bool:
        if "skipped" in part or "out_of_memory" in part:
            lines.append(f"{name}: skipped: {part.get('skipped') or part['out_of_memory']}")
            return True
        if "cut_short" in part:
            lines.append(f"{name}: cut short: {part['cut_short']}")
        return False

    def share(value: float, of: float | None) -> str:
        return f" ({value / of:.0%} of the data sheet)" if of else ""

    c = result.get("ceilings")
    if c and not why("ceilings", c):
        copy, matmul = (c[n]["median"] for n in ("copy_gigabytes_per_second", "matmul_tflops"))
        device = c["device"]
        lines.append(
            f"{device['kind']}: copy {copy:,.0f} GB/s"
            f"{share(copy, device['peak_gigabytes_per_second'])}, bfloat16 matmul "
            f"{matmul:,.1f} TFLOP/s{share(matmul, device['peak_tflops'])}"
        )
    for name, r in result.get("train", {}).items():
        if not why(f"train {name}", r):
            memory = r["hbm_peak_bytes"]
            held = f", {memory / 1e9:.1f} GB" if memory else ""
            lines.append(
                f"train {name}: {r['tokens_per_second']['median']:,.0f} tokens/s, MFU "
                f"{r['mfu_full']:.1%} (causal {r['mfu_causal']:.1%}), {r['rows']} x {r['length']}, "
                f"{r['step_milliseconds']['median']:.1f} ms a step{held}, "
                f"compiled in {r['compile_seconds']:.0f} s"
            )
    attention = result.get("attention")
    if attention and not why("attention", attention):
        for r in attention["rows"]:
            B, L, H, _, Dh = r["shape"]
            what = f"attention {B} x {L}, {H} heads of {Dh}, {r['documents']} documents a row"
            speed = (
                f"{r['tflops']['median']:.3g} TFLOP/s, {r['milliseconds']['median']:.3g} ms"
                if "tflops" in r
                else f"refused: {r['refused']}"
            )
            lines.append(f"{what}: {r['implementation']}: {speed}")
    for name, part in result.get("decode", {}).items():
        if not why(f"decode {name}", part):
            for r in part["rows"]:
                bound = r.get("share_of_bound")
                lines.append(
                    f"decode {name}, {r['rows']} rows: {r['tokens_per_second']['median']:,.0f} "
                    f"tokens/s" + (f", {bound:.0%} of the bandwidth bound" if bound else "")
                )
    peer = result.get("torch")
    if peer and not why("torch", peer):
        lines.append(
            f"torch {peer['torch']}, gpt2-124m: {peer['tokens_per_second']['median']:,.0f} "
            f"tokens/s; ours / torch: {peer['ours_over_torch']:.2f}"
        )
    return "\n".join(lines)


def main(_) -> None:
    for flag, values, known in (("only", ONLY.value, PARTS), ("models", MODELS_FLAG.value, MODELS)):
        if unknown := [v for v in values if v not in known]:
            raise ValueError(f"--{flag}={unknown[0]} is not one of {', '.join(known)}")
    result = measure()
    print(table(result))
    print(f"{result['seconds']:.0f} s in all", flush=True)


if __name__ == "__main__":
    run_main(main)
