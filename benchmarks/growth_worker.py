"""One measurement of `benchmarks.growth` in a process of its own, and what is computed from them.

    python -m benchmarks.growth_worker temporaries '{"shape": {...}, "lengths": [1024], ...}'

The last line of its output is JSON. No flags here: tests import it.
"""

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import record
from benchmarks.compile_worker import make_config, random_batch

MOST_EXPONENT = 1.1  # of step time over tokens
MOST_A_DOUBLING = 2.2  # temporaries, from lengths of 2k on
MOST_MEMORY_RANGE = 0.01  # of RssAnon over the last half of the steps, highest over lowest


def step_times(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of single train steps for each number of rows, in turn so that drift hits them all:
    `spec["rounds"]` times `spec["seconds"]` of steps each."""
    import jax

    from llm_jax import sharding
    from llm_jax.train.program import build

    steps, states, batches, init = {}, {}, {}, None
    times: dict[int, list[float]] = {rows: [] for rows in spec["batches"]}
    for rows in times:
        cfg = make_config(spec["shape"] | {"batch": rows}, {"model.scan": False})
        mesh = sharding.make_mesh(cfg.mesh)
        with jax.set_mesh(mesh):
            program = build(cfg, mesh)
            steps[rows], batches[rows] = program.step, random_batch(cfg, mesh)
            init = init or program.init  # the same for all: compiled once
            states[rows] = init(jax.random.key(0))
            for _ in range(2):  # the first one compiles
                states[rows], metrics = steps[rows](states[rows], batches[rows])
                metrics["loss"].block_until_ready()
    with jax.set_mesh(mesh):
        for _ in range(spec["rounds"]):
            for rows in times:
                begin = time.perf_counter()
                while True:
                    start = time.perf_counter()
                    states[rows], metrics = steps[rows](states[rows], batches[rows])
                    metrics["loss"].block_until_ready()
                    now = time.perf_counter()
                    times[rows].append(now - start)
                    if now - begin >= spec["seconds"]:
                        break
    return {"step_seconds": times}


def temporaries(spec: dict[str, Any]) -> dict[str, Any]:
    """Bytes of temporaries of the compiled train step at each length; nothing is run."""
    import jax

    from llm_jax import sharding
    from llm_jax.train.program import abstract_batch, abstract_state, build

    found = []
    for length in spec["lengths"]:
        start = time.perf_counter()
        cfg = make_config(
            spec["shape"] | {"length": length},
            {"model.remat": spec["remat"], "model.attention": "xla"},
        )
        mesh = sharding.make_mesh(cfg.mesh)
        with jax.set_mesh(mesh):
            program = build(cfg, mesh)
            inputs = abstract_state(program), abstract_batch(cfg, mesh)
            memory = program.step.lower(*inputs).compile().memory_analysis()
        found.append(
            {
                "length": length,
                "bytes": memory.temp_size_in_bytes,
                "compile_seconds": time.perf_counter() - start,
            }
        )
    return {"temporaries": found}


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Exponent a of seconds = c * sizes ** a, by least squares of the logarithms: 1 is linear."""
    return statistics.linear_regression(
        [math.log(x) for x in sizes], [math.log(y) for y in seconds]
    ).slope


def ratios(found: Sequence[dict[str, Any]]) -> list[float]:
    """Bytes at each length over those at the length before."""
    return [b["bytes"] / a["bytes"] for a, b in itertools.pairwise(found)]


def summarise(
    steps: int, memory: Sequence[tuple[float, int, float]], speeds: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    """A long run in numbers.

    Args:
      steps: of the run.
      memory: (seconds, last step that was logged, megabytes). What follows the last step, such as
        the report and its plots, is no training and does not count.
      speeds: (step, tokens/s); the first step compiles and does not count.
    """
    late = [held for _, step, held in memory if steps / 2 <= step < steps]
    if not late:
        raise RuntimeError(f"no look at the memory fell into the last half of {steps} steps")
    first = record.spread([speed for step, speed in speeds if 1 < step <= steps / 4])
    last = record.spread([speed for step, speed in speeds if step > 3 * steps / 4])
    return {
        "memory": [{"seconds": t, "step": step, "megabytes": held} for t, step, held in memory],
        "last_half": {"samples": len(late), "lowest": min(late), "highest": max(late)},
        "last_half_range": max(late) / min(late) - 1,
        "tokens_per_second": {"first_quarter": first, "last_quarter": last},
        "last_over_first": last["median"] / first["median"],
    }


def missed(result: dict) -> list[str]:
    """What lies outside of the bounds, in words."""
    out = []
    if (part := result.get("tokens")) and part["exponent"] > MOST_EXPONENT:
        out.append(f"step time grows as tokens ** {part['exponent']:.2f}, bound {MOST_EXPONENT}")
    for remat in ("none", "full"):
        points = result.get("length", {}).get(remat, {"points": [], "ratios": []})
        for (a, b), ratio in zip(
            itertools.pairwise(points["points"]), points["ratios"], strict=True
        ):
            if a["length"] >= 2048 and ratio > MOST_A_DOUBLING:
                out.append(
                    f"temporaries (remat {remat}) grow {ratio:.2f} x from length {a['length']} to "
                    f"{b['length']}, bound {MOST_A_DOUBLING}"
                )
    if part := result.get("steps"):
        if part["last_half_range"] > MOST_MEMORY_RANGE:
            out.append(
                f"memory of the last half of {part['steps']} steps varies by "
                f"{part['last_half_range']:.1%}, bound {MOST_MEMORY_RANGE:.0%}"
            )
        quarters = part["tokens_per_second"]
        first, last = (quarters[f"{name}_quarter"]["quartiles"] for name in ("first", "last"))
        if last[1] < first[0]:
            out.append(
                f"the last quarter runs at {part['last_over_first']:.3f} of the first one's "
                "tokens/s, and their quartile ranges do not meet"
            )
    return out


if __name__ == "__main__":
    record.serve({"step_times": step_times, "temporaries": temporaries})
