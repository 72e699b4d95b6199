r"""Our training step against nanoGPT's on the same cores, and the ladder from a naive step to ours.

    python -m benchmarks.train_cpu --peer_python=PYTHON_WITH_TORCH --peer_repo=NANOGPT_CHECKOUT \
        --output=benchmarks/results/train_cpu.json

Both do the same work on random tokens: forward and backward pass, clipping, AdamW, float32
parameters. Each measurement is a process of its own; they alternate (ours, peer, peer's other
modes, ours, ...), because the speed of a shared machine drifts: the ratio is the figure, the
tokens/s are of that hour. The peer runs eager and compiled, in float32 and in bfloat16 autocast;
ours in float32. `matmul` is the fastest of eight products of [2048, 2048] in float32 in the same
processes: the share of it that a step reaches says how much is left. About 15 minutes on 2 cores.
"""

import json
import os
import pathlib
import statistics
import sys

from absl import flags

from benchmarks import record
from experiments.cli import run_main

PEER_PYTHON = flags.DEFINE_string("peer_python", None, "Python with torch and numpy.")
PEER_REPO = flags.DEFINE_string("peer_repo", None, "Checkout of nanoGPT.")
ONLY = flags.DEFINE_enum(
    "only", "both", ["both", "peers", "ours", "ladder"], "What to run: both is peers and ladder."
)
SIZES = flags.DEFINE_list("sizes", [], "Of 4/128 and 6/384; empty: both.")
MODES = flags.DEFINE_list("modes", ["float32", "bfloat16"], "Of the peer.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Processes of each side.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 10.0, "Of steps in each process.")
TOY = flags.DEFINE_bool("toy", False, "Tiny shapes, one short round of ours: does it run?")
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")

SHAPES = {
    "4/128": {"layers": 4, "heads": 4, "width": 128, "length": 64, "batch": 12, "vocab": 65},
    "6/384": {"layers": 6, "heads": 6, "width": 384, "length": 256, "batch": 8, "vocab": 4096},
}
TOY_SHAPES = {"toy": {"layers": 1, "heads": 2, "width": 16, "length": 8, "batch": 2, "vocab": 32}}
# What each rung switches on, from a step as one would write it first; the last is ours.
RUNGS = {
    "naive: layers scanned, attention as written, memory given back": set(),
    "+ layers unrolled": {"unrolled"},
    "+ attention with its own derivative": {"unrolled", "attention"},
    "+ attention in strips": {"unrolled", "attention", "strips"},
    "+ one matmul for q, k and v": {"unrolled", "attention", "strips", "merged"},
    "+ memory kept: ours": {"unrolled", "attention", "strips", "merged", "memory"},
}
OURS = list(RUNGS.values())[-1]
PEER_MODES = [(mode, compiled) for mode in ("float32", "bfloat16") for compiled in (False, True)]
SLOW = 3.0  # times our step: such a mode of the peer is measured once


def measure(shape: dict, switches: list[str], seconds: float) -> dict:
    """Times our steps; to be called in a fresh process, before anything uses jax."""
    from llm_jax.train import host_memory

    if "memory" in switches:
        host_memory.keep()
    import time

    import jax
    import jax.numpy as jnp
    import numpy as np

    from llm_jax import config as configs
    from llm_jax import sharding
    from llm_jax.nn import blockwise, dense
    from llm_jax.nn.params import count
    from llm_jax.train.metrics import train_flops_per_token
    from llm_jax.train.program import build, put
    from llm_jax.types import Batch

    if "strips" not in switches:
        blockwise.MAX_STRIPS = 1
    if "merged" not in switches:
        dense.MERGED_FROM = 1 << 62
    cfg = configs.TrainConfig(batch_size=shape["batch"], length=shape["length"], steps=100_000)
    wanted = {
        "model.n_layers": shape["layers"],
        "model.n_heads": shape["heads"],
        "model.d_model": shape["width"],
        "model.positions": "learned",
        "model.norm": "layernorm",
        "model.activation": "gelu_erf",
        "model.scan": "unrolled" not in switches,
        "model.attention": "xla" if "attention" in switches else "reference",
        "optimizer.b2": 0.99,
    }
    configs.override(cfg, wanted)
    configs.resolve_model(
        cfg.model, vocab_size=shape["vocab"], length=shape["length"], backend="cpu"
    )
    configs.validate(cfg)
    configs.freeze(cfg)
    mesh = sharding.make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        program = build(cfg, mesh)
        state = program.init(jax.random.key(0))
        rows = (shape["batch"], shape["length"])
        tokens = np.random.default_rng(0).integers(0, shape["vocab"], (2, *rows)).astype(np.int32)
        batch = put(
            Batch(
                tokens=tokens[0],
                targets=tokens[1],
                weights=np.ones(rows, np.float32),
                bytes=np.ones(rows, np.int32),
            ),
            mesh,
            1,
        )

        def step(state):
            start = time.perf_counter()
            state, metrics = program.step(state, batch)
            metrics["loss"].block_until_ready()
            return state, time.perf_counter() - start

        state, first = step(state)
        state, _ = step(state)
        times, begin = [], time.perf_counter()
        while time.perf_counter() - begin < seconds or not times:
            state, duration = step(state)
            times.append(duration)
    big, matmuls = jnp.ones((2048, 2048)), []
    product = jax.jit(jnp.matmul)
    for _ in range(9):
        start = time.perf_counter()
        product(big, big).block_until_ready()
        matmuls.append(time.perf_counter() - start)
    return {
        "step_seconds": times,
        "first_step_seconds": first,
        "params": count(program.specs),
        "flops_per_token": train_flops_per_token(program.specs, cfg.model, cfg.length),
        "matmul_gflops": 2 * 2048**3 / min(matmuls[1:]) / 1e9,
    }


def ours(shape: dict, switches: set[str], seconds: float) -> dict:
    """Our steps in a fresh process."""
    call = f"print(json.dumps(measure({shape!r}, {sorted(switches)!r}, {seconds})))"
    code = f"import json; from benchmarks.train_cpu import measure; {call}"
    return record.worker([sys.executable, "-c", code], {"JAX_PLATFORMS": "cpu"})


def peer(shape: dict, mode: str, compiled: bool, seconds: float) -> dict:
    """The peer's steps in a fresh process."""
    command = [
        *(os.path.abspath(PEER_PYTHON.value), "-m", "benchmarks.nanogpt_step"),
        *(f"--repo={os.path.abspath(PEER_REPO.value)}", f"--shape={json.dumps(shape)}"),
        *(f"--mode={mode}", f"--threads={len(os.sched_getaffinity(0))}", f"--seconds={seconds}"),
    ]
    return record.worker(command + ["--compiled"] * compiled)


def compare(shape: dict, rounds: int, seconds: float) -> dict:
    """Ours and the peer's modes in turn: tokens/s of each, and our ratio to each."""
    runs: dict[str, list[dict]] = {}
    sides = {"ours": lambda: ours(shape, OURS, seconds)}
    for mode, compiled in PEER_MODES if ONLY.value in ("both", "peers") else []:
        if mode not in MODES.value:
            continue
        name = f"nanoGPT {mode} {'compiled' if compiled else 'eager'}"
        sides[name] = lambda m=mode, c=compiled: peer(shape, m, c, seconds)
    for _ in range(rounds):
        for name, run in sides.items():
            earlier = runs.setdefault(name, [])
            slow = earlier and _step(earlier[0]) > SLOW * _step(runs["ours"][0])
            earlier.append(earlier[0] if slow else run())
            print(f"  {name}: {1000 * _step(runs[name][-1]):,.1f} ms", flush=True)
    tokens = shape["batch"] * shape["length"]
    speeds = {name: [tokens / _step(r) for r in results] for name, results in runs.items()}
    flops = runs["ours"][0]["flops_per_token"]
    fastest = max(r["matmul_gflops"] for results in runs.values() for r in results)
    out = {
        "shape": shape,
        "params": {name: results[0]["params"] for name, results in runs.items()},
        "tokens_per_second": {name: record.spread(v) for name, v in speeds.items()},
        "first_step_seconds": {
            name: statistics.median(r["first_step_seconds"] for r in results)
            for name, results in runs.items()
        },
        "matmul_gflops": fastest,
        "share_of_matmul": {
            name: statistics.median(v) * flops / 1e9 / fastest for name, v in speeds.items()
        },
        "ratio": {
            name: record.ratio(speeds["ours"], v) for name, v in speeds.items() if name != "ours"
        },
    }
    versions = [r["versions"] for results in runs.values() for r in results if "versions" in r]
    return out | ({"peer_versions": versions[0]} if versions else {})


def climb(shape: dict, rounds: int, seconds: float) -> list[dict]:
    """The ladder: tokens/s of each rung, and its gain over the one before."""
    sides = {name: lambda s=s: ours(shape, s, seconds) for name, s in RUNGS.items()}
    runs = record.in_turn(sides, rounds)
    tokens = shape["batch"] * shape["length"]
    speeds = {name: [tokens / _step(r) for r in results] for name, results in runs.items()}
    rungs, before = [], None
    for name, values in speeds.items():
        gain = record.ratio(values, before) if before else None
        rungs.append({"rung": name, "tokens_per_second": record.spread(values), "gain": gain})
        before = values
    return rungs


def _step(run: dict) -> float:
    return statistics.median(run["step_seconds"])


def table(result: dict) -> str:
    """The result as text."""
    lines = []
    for name, r in result["comparison"].items():
        lines.append(f"{name}: matmul {r['matmul_gflops']:,.0f} GFLOP/s")
        for side, speed in r["tokens_per_second"].items():
            line = f"  {side:28}{speed['median']:>10,.0f} tokens/s"
            line += f"  {r['share_of_matmul'][side]:6.0%} of matmul"
            if side in r["ratio"]:
                ratio = r["ratio"][side]
                low, high = ratio["range"]
                line += f"  ours is {ratio['ratio']:.2f} x ({low:.2f} to {high:.2f})"
            lines.append(line)
    for name, rungs in result["ladder"].items():
        lines.append(f"{name}: ladder")
        for r in rungs:
            gain = f"  x {r['gain']['ratio']:.2f}" if r["gain"] else ""
            lines.append(
                f"  {r['rung']:64}{r['tokens_per_second']['median']:>10,.0f} tokens/s{gain}"
            )
    return "\n".join(lines)


def main(_) -> None:
    if ONLY.value in ("both", "peers") and not TOY.value:
        if not PEER_PYTHON.value or not os.access(PEER_PYTHON.value, os.X_OK):
            raise FileNotFoundError(f"--peer_python={PEER_PYTHON.value} is not a Python to run")
        if not (pathlib.Path(PEER_REPO.value or "") / "model.py").exists():
            raise FileNotFoundError(f"--peer_repo={PEER_REPO.value} is not a checkout of nanoGPT")
    shapes, rounds, seconds = SHAPES, ROUNDS.value, SECONDS.value
    if TOY.value:
        shapes, rounds, seconds = TOY_SHAPES, 1, 0.0
    result = record.header() | {
        "config": {"rounds": rounds, "seconds": seconds},
        "comparison": {},
        "ladder": {},
    }
    if PEER_REPO.value:
        result["versions"]["nanogpt_revision"] = record.revision(pathlib.Path(PEER_REPO.value))
    for name, shape in shapes.items():
        if SIZES.value and name not in SIZES.value:
            continue
        if ONLY.value != "ladder":
            print(name, flush=True)
            result["comparison"][name] = compare(shape, rounds, seconds)
        if ONLY.value in ("both", "ladder") and not TOY.value:
            result["ladder"][name] = climb(shape, max(1, rounds // 2), seconds)
        if OUTPUT.value:
            record.save(result, OUTPUT.value)
    print(table(result))


if __name__ == "__main__":
    run_main(main)
