r"""Generation on a CPU, ours against transformers' `generate`, with the same weights and prompts.

    python -m benchmarks.decode_cpu --peer_python=PYTHON_WITH_TORCH_AND_TRANSFORMERS \
        --output=benchmarks/results/decode_cpu.json

A GPT-2 shape of 10.8 million parameters (nanoGPT's character model) in float32, greedy.
tokens/s is that of whole generations,
prefill included, as a user waits for them; the first token's time that of a generation of one token.
Both sides run in fresh processes, ours, peer, ours, peer, ..., and warm up first: compilation is
reported apart. The peer runs at the fastest of its settings (attention: sdpa or eager; threads: all
cores or one), tried anew by each process. About 4 minutes on 2 cores.
"""

import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

from absl import flags

from benchmarks import record
from experiments.cli import run_main

PEER_PYTHON = flags.DEFINE_string("peer_python", None, "Python with torch and transformers.")
ONLY = flags.DEFINE_enum("only", "both", ["both", "ours", "peer"], "Which side to run.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Processes of each side.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 5, "Generations timed by a process.", lower_bound=1)
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "16"], "Prompts at a time.")
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 32, "Length of a prompt.", lower_bound=1)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 128, "Tokens to generate.", lower_bound=1)
TOY = flags.DEFINE_bool("toy", False, "A tiny model and few tokens: seconds instead of minutes.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write; none: only print.")
WORKER = flags.DEFINE_string("worker", None, "What a process of our side is started with.")

SHAPE = {"n_layers": 6, "n_heads": 6, "d_model": 384, "vocab_size": 65, "vocab_multiple": 1}
TOY_SHAPE = {"n_layers": 2, "n_heads": 2, "d_model": 32, "vocab_size": 61, "vocab_multiple": 1}
NAMES = {"ours": "llm_jax", "peer": "transformers"}


def model_config(shape: dict[str, int], length: int) -> Any:
    """The frozen config of a GPT-2 of that shape, in float32."""
    from llm_jax import config as configs
    from llm_jax.models import presets

    cfg = presets.gpt2(**shape, max_length=length, dtype="float32")
    configs.resolve_model(cfg, vocab_size=shape["vocab_size"], length=length, backend="cpu")
    return configs.freeze(cfg)


def write_task(folder: pathlib.Path, toy: bool) -> dict[str, Any]:
    """Weights and prompts for both sides; returns the settings, which stand in settings.json."""
    import jax
    import numpy as np

    from llm_jax import config as configs
    from llm_jax.models import decoder
    from llm_jax.nn import params as P

    shape = TOY_SHAPE if toy else SHAPE
    prompt, new = (5, 6) if toy else (PROMPT_TOKENS.value, NEW_TOKENS.value)
    cfg = model_config(shape, prompt + new)
    rng = np.random.default_rng(0)
    weights = {}
    for path, leaf in P.flatten(P.init(decoder.specs(cfg), jax.random.key(0))).items():
        leaf = np.asarray(leaf)
        if path.endswith(("/bias", "/scale")):  # not 0 and 1, or a wrong one would not show
            leaf = leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32)
        weights[path] = leaf
    np.savez(folder / "weights.npz", **weights)
    sizes = [int(size) for size in BATCH_SIZES.value]
    settings = {
        "shape": shape,
        "model": configs.to_dict(cfg),
        "parameters": sum(w.size for w in weights.values()),
        "batch_sizes": sizes,
        "prompts": rng.integers(0, cfg.vocab_size, (max(sizes), prompt)).tolist(),
        "new_tokens": new,
        "trial_tokens": max(2, new // 16),
        "repeats": 2 if toy else REPEATS.value,
        "threads": len(os.sched_getaffinity(0)),
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    return settings


def load(folder: pathlib.Path) -> tuple[dict[str, Any], Any, Any]:
    """(settings, parameters, config) of what `write_task` wrote."""
    import jax.numpy as jnp
    import numpy as np

    from llm_jax.nn import params as P

    settings = json.loads((folder / "settings.json").read_text())
    with np.load(folder / "weights.npz") as f:
        params = P.unflatten({name: jnp.asarray(f[name]) for name in f.files})
    length = len(settings["prompts"][0]) + settings["new_tokens"]
    return settings, params, model_config(settings["shape"], length)


class Ids:
    """A tokenizer for prompts that are ids already and texts that nobody reads."""

    bos_id = eos_id = None

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def decode(self, ids: list[int]) -> str:
        return ""


def work(folder: pathlib.Path) -> dict[str, Any]:
    """Our side: generates with `llm_jax.decode.generate` and times it."""
    from llm_jax.train import host_memory

    host_memory.keep()
    settings, params, cfg = load(folder)
    from llm_jax.decode.generate import generate

    results = {}
    for size in settings["batch_sizes"]:
        prompts = settings["prompts"][:size]

        def run(n: int, prompts=prompts) -> tuple[float, list[list[int]]]:
            start = time.perf_counter()
            out = generate(
                params, cfg, Ids(cfg.vocab_size), prompts, max_new_tokens=n, temperature=0
            )
            return time.perf_counter() - start, [c.tokens for c in out]

        n, repeats = settings["new_tokens"], settings["repeats"]
        (first_call, tokens), _ = run(n), run(1)
        results[str(size)] = {
            "first_call_seconds": first_call,
            "seconds": [run(n)[0] for _ in range(repeats)],
            "first_token_seconds": [run(1)[0] for _ in range(repeats)],
            "tokens": tokens,
        }
    return {"results": results, "versions": {}}


def compare(folder: pathlib.Path, ours: list[list[int]], peer: list[list[int]]) -> dict[str, Any]:
    """Whether the tokens are the same; else where the first row parts, and by what logit gap."""
    if ours == peer:
        return {"equal": True}
    import jax.numpy as jnp

    from llm_jax.models import decoder
    from llm_jax.types import Batch

    settings, params, cfg = load(folder)
    row = next(r for r, (a, b) in enumerate(zip(ours, peer, strict=True)) if a != b)
    at = next(n for n, (a, b) in enumerate(zip(ours[row], peer[row], strict=True)) if a != b)
    ids = jnp.array([settings["prompts"][row] + ours[row][:at]], jnp.int32)
    x = decoder.hidden(params, Batch(tokens=ids), cfg).x[:, -1:]
    logits = decoder.logits(params, x, cfg)[0, 0]
    gap = float(logits[ours[row][at]] - logits[peer[row][at]])
    return {"equal": False, "row": row, "token": at, "logit_gap": gap}


def summarise(runs: dict[str, list[dict[str, Any]]], settings: dict[str, Any]) -> dict[str, Any]:
    """Spreads over all generations of a side and, where both ran, ratios of the rounds' medians."""
    batches = {}
    for size in map(str, settings["batch_sizes"]):
        batch: dict[str, Any] = {}
        speeds, waits = {}, {}
        for side, rounds in runs.items():
            results = [r["results"][size] for r in rounds]
            made = int(size) * settings["new_tokens"]
            rates = [[made / t for t in r["seconds"]] for r in results]
            first = [r["first_token_seconds"] for r in results]
            speeds[side] = [statistics.median(r) for r in rates]
            waits[side] = [statistics.median(r) for r in first]
            batch[side] = {
                "tokens_per_second": record.spread(list(itertools.chain(*rates))),
                "first_token_seconds": record.spread(list(itertools.chain(*first))),
                "first_call_seconds": [r["first_call_seconds"] for r in results],
            }
            for key in ("setting", "tried_tokens_per_second"):
                if key in results[0]:
                    batch[side][key] = [r[key] for r in results]
        if len(runs) == 2:
            batch["tokens_per_second_ratio"] = record.ratio(speeds["ours"], speeds["peer"])
            batch["first_token_speedup"] = record.ratio(waits["peer"], waits["ours"])
        batches[size] = batch
    return batches


def table(batches: dict[str, Any]) -> str:
    """The summary as text."""
    lines = [f"{'batch':>5} {'':13}{'tokens/s':>10}{'quartiles':>17}{'first token':>13}"]
    for size, batch in batches.items():
        for side in ("ours", "peer"):
            if side not in batch:
                continue
            speed, wait = batch[side]["tokens_per_second"], batch[side]["first_token_seconds"]
            low, high = speed["quartiles"]
            lines.append(
                f"{size:>5} {NAMES[side]:13}{speed['median']:>10,.0f}"
                f"{f'{low:,.0f} to {high:,.0f}':>17}{wait['median'] * 1000:>10.1f} ms"
            )
        if "tokens" in batch:
            speed, wait = batch["tokens_per_second_ratio"], batch["first_token_speedup"]
            tokens = batch["tokens"]
            same = "equal tokens"
            if not tokens["equal"]:
                same = f"tokens part at a logit gap of {tokens['logit_gap']:.1e}"
            lines.append(
                f"{size:>5} {'ours / peer':13}{speed['ratio']:>9.2f}x"
                f"{'{:.2f} to {:.2f}'.format(*speed['range']):>17}{wait['ratio']:>9.2f}x faster, {same}"
            )
    return "\n".join(lines)


def main(_) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # the workers' too
    if WORKER.value:
        print(json.dumps(work(pathlib.Path(WORKER.value))))
        return
    if ONLY.value != "ours" and not (PEER_PYTHON.value and os.access(PEER_PYTHON.value, os.X_OK)):
        raise FileNotFoundError(f"--peer_python={PEER_PYTHON.value} is not a Python to run")
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        settings = write_task(folder, TOY.value)
        ours = [sys.executable, "-m", "benchmarks.decode_cpu", f"--worker={folder}"]
        sides = {
            "ours": lambda: record.worker(ours),
            "peer": lambda: record.worker(
                [
                    os.path.abspath(PEER_PYTHON.value),
                    "-m",
                    "benchmarks.transformers_driver",
                    temporary,
                ]
            ),
        }
        if ONLY.value != "both":
            sides = {ONLY.value: sides[ONLY.value]}
        runs = record.in_turn(sides, 1 if TOY.value else ROUNDS.value)
        batches = summarise(runs, settings)
        if len(runs) == 2:
            for size, batch in batches.items():
                made = [[r["results"][size]["tokens"] for r in runs[s]] for s in ("ours", "peer")]
                if any(m != side[0] for side in made for m in side):
                    raise RuntimeError(f"batch {size}: a side made other tokens in another process")
                batch["tokens"] = compare(folder, made[0][0], made[1][0])
    head = record.header()
    for rounds in runs.values():
        head["versions"] |= rounds[0]["versions"]
    keys = ("model", "parameters", "new_tokens", "repeats", "threads")
    result = head | {
        "config": {k: settings[k] for k in keys}
        | {"prompt_tokens": len(settings["prompts"][0]), "rounds": len(next(iter(runs.values())))},
        "batches": batches,
    }
    print(table(batches))
    if OUTPUT.value:
        record.save(result, OUTPUT.value)


if __name__ == "__main__":
    run_main(main)
