"""One measurement of `benchmarks.compile` in a process of its own, whose caches are empty.

    python -m benchmarks.compile_worker compile '{"shape": {...}, "scan": true}'

The last line of its output is JSON. No flags here: tests and other benchmarks import it.
"""

import pathlib
import time
from typing import Any

from benchmarks import record

MOST_SCAN_GROWTH = 1.3  # seconds at 96 scanned layers over those at 8
MOST_WARM_OVER_COLD = 0.25

# The events that jax reports the work of a program's start with.
PHASES = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",  # or the reading of the cache
}


def make_config(shape: dict[str, int], changes: dict[str, Any] | None = None):
    """A frozen train config: AdamW, a decoder of this shape, `changes` on top by dotted path."""
    import jax

    from llm_jax import config as configs

    cfg = configs.TrainConfig(batch_size=shape["batch"], length=shape["length"], steps=100_000)
    sizes = {
        "model.n_layers": shape["layers"],
        "model.n_heads": shape["heads"],
        "model.d_model": shape["width"],
    }
    configs.override(cfg, sizes | (changes or {}))
    configs.resolve_model(
        cfg.model,
        vocab_size=shape["vocab"],
        length=shape["length"],
        backend=jax.default_backend(),
    )
    configs.validate(cfg)
    return configs.freeze(cfg)


def random_batch(cfg, mesh):
    """Random tokens as the loader's batches are laid out, put on the mesh."""
    import numpy as np

    from llm_jax.train.program import put
    from llm_jax.types import Batch

    rows = (cfg.batch_size, cfg.length)
    ids = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (2, *rows)).astype(np.int32)
    batch = Batch(
        tokens=ids[0],
        segments=np.ones(rows, np.int32),
        positions=np.tile(np.arange(cfg.length, dtype=np.int32), (cfg.batch_size, 1)),
        targets=ids[1],
        weights=np.ones(rows, np.float32),
        bytes=np.ones(rows, np.int32),
    )
    return put(batch, mesh, cfg.accumulation)


def peak_megabytes() -> float:
    """The largest memory that this process held so far (VmHWM)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(int(x.split()[1]) for x in lines if x.startswith("VmHWM"))
    return kilobytes / 1024


def compile_step(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds to trace, lower and compile the train step, without any cache; peak memory, MB."""
    import jax

    from llm_jax import sharding
    from llm_jax.train.program import abstract_batch, abstract_state, build

    jax.config.update("jax_enable_compilation_cache", False)
    cfg = make_config(spec["shape"], {"model.scan": spec["scan"]})
    mesh = sharding.make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        program = build(cfg, mesh)
        state, batch = abstract_state(program), abstract_batch(cfg, mesh)
        before = peak_megabytes()
        start = time.perf_counter()
        lowered = program.step.lower(state, batch)
        middle = time.perf_counter()
        lowered.compile()
        end = time.perf_counter()
    return {
        "trace_seconds": middle - start,
        "compile_seconds": end - middle,
        "peak_megabytes": peak_megabytes(),
        "peak_megabytes_before": before,
    }


def start(spec: dict[str, Any]) -> dict[str, Any]:
    """From the start of a process to the end of its first step, with the cache of compiled
    programs in `spec["cache"]`, as a training run has it.

    `build_seconds` counts from the end of the imports; `phases` are the parts of it in which jax
    traces, lowers and compiles (or reads the cache), over all programs; `programs` are the names
    and compile seconds of each.
    """
    import jax

    from llm_jax import sharding
    from llm_jax.train import environment
    from llm_jax.train.program import build

    jax.devices()  # starting the backend is not the program's work
    phases, programs = dict.fromkeys(PHASES.values(), 0.0), []
    counts = {"hits": 0, "misses": 0}

    def listen(event: str, seconds: float, **more: Any) -> None:
        if event in PHASES:
            phases[PHASES[event]] += seconds
        if PHASES.get(event) == "compile":
            programs.append([str(more.get("fun_name", "")), seconds])

    def count(event: str, **_: Any) -> None:
        for name in counts:
            counts[name] += event == f"/jax/compilation_cache/cache_{name}"

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.monitoring.register_event_listener(count)
    jax.config.update("jax_compilation_cache_dir", None)  # nor one that the environment names
    environment.use_compilation_cache(spec["cache"])
    if spec["keep_all"]:  # of a toy, whose programs compile too fast to be kept
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    begin, times = time.perf_counter(), {}
    cfg = make_config(spec["shape"], {"model.scan": spec["scan"]})
    mesh = sharding.make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        program = build(cfg, mesh)
        times["build"] = time.perf_counter() - begin
        state = jax.block_until_ready(program.init(jax.random.key(0)))
        times["init"] = time.perf_counter() - begin - sum(times.values())
        batch = random_batch(cfg, mesh)
        times["put"] = time.perf_counter() - begin - sum(times.values())
        state, metrics = program.step(state, batch)
        loss = float(metrics["loss"])
        times["step"] = time.perf_counter() - begin - sum(times.values())
    return {
        "process_seconds": time.time() - spec["began"],
        "build_seconds": sum(times.values()),
        "parts": times,
        "phases": phases,
        "programs": programs,
        "cache": counts,
        "loss": loss,
    }


# What the benchmark makes of them --------------------------------------------------------------


def point(layers: int, scan: bool, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The results of `compile_step` in several processes as one."""
    keys = ("trace_seconds", "compile_seconds", "peak_megabytes", "peak_megabytes_before")
    spreads = {key: record.spread([run[key] for run in runs]) for key in keys}
    return {"layers": layers, "how": "scan" if scan else "unrolled"} | spreads


def scan_growth(points: list[dict[str, Any]], few: int, many: int) -> float | None:
    """Seconds to trace, lower and compile `many` scanned layers over those of `few`; None if one
    of them was not measured."""
    seconds = {
        p["layers"]: p["trace_seconds"]["median"] + p["compile_seconds"]["median"]
        for p in points
        if p["how"] == "scan"
    }
    return seconds[many] / seconds[few] if {few, many} <= set(seconds) else None


def both_starts(layers: int, scan: bool, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The cold and warm results of `start` in several pairs of processes as one.

    `seconds` has the whole ("process"), what follows the imports ("build"), and of that what jax
    spends on tracing, lowering and compiling; `warm_programs` names what was compiled or read.
    """

    def compared(read) -> dict[str, Any]:
        cold, warm = ([read(run[side]) for run in runs] for side in ("cold", "warm"))
        return {
            "cold": record.spread(cold),
            "warm": record.spread(warm),
            "ratio": record.ratio(warm, cold),
        }

    seconds = {
        "process": compared(lambda r: r["process_seconds"]),
        "build": compared(lambda r: r["build_seconds"]),
    }
    for phase in PHASES.values():
        seconds[f"build: {phase}"] = compared(lambda r, phase=phase: r["phases"][phase])
    return {
        "layers": layers,
        "how": "scan" if scan else "unrolled",
        "seconds": seconds,
        "cold_programs": runs[0]["cold"]["programs"],
        "warm_programs": runs[0]["warm"]["programs"],
        "warm_cache": runs[0]["warm"]["cache"],
    }


def missed(result: dict) -> list[str]:
    """What lies outside of the bounds, in words."""
    bounds = {"scan_growth_8_to_96": MOST_SCAN_GROWTH, "warm_over_cold": MOST_WARM_OVER_COLD}
    return [
        f"{name} is {result[name]:.2f}, bound {most}"
        for name, most in bounds.items()
        if result[name] is not None and result[name] >= most
    ]


if __name__ == "__main__":
    record.serve({"compile": compile_step, "start": start})
