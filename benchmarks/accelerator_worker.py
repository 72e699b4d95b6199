"""One measurement of `benchmarks.accelerator` in a process of its own: its memory peak is its own,
and when it runs out of memory nothing else ends.

    python -m benchmarks.accelerator_worker PART '{"toy": true, ...}'

The last line of its output is JSON.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks import ceilings
from benchmarks.record import spread

# Where a row of the batch table was chosen; less memory means fewer rows to start from.
REFERENCE_BYTES = 140e9
# name -> recipe, preset, rows on REFERENCE_BYTES, changes. Small models keep all activations, as
# recomputing costs time; layers are unrolled where that compiles in a minute.
MODELS = {
    "gpt2-124m": ("gpt2_124m", "gpt2", 64, {"model.remat": "none"}),
    "gpt2-350m": ("gpt2_124m", "gpt2-medium", 48, {"model.remat": "none"}),
    "gpt2-1.5b": ("gpt2_1b5", "gpt2-xl", 16, {"model.remat": "none", "model.scan": True}),
    "llama-1b": ("llama_1b", "llama3.2-1b", 16, {"model.remat": "none", "model.scan": False}),
    "llama-3b": (
        "llama_1b",
        "",  # the shape of Llama 3.2 3B, below
        16,
        {
            "model.d_model": 3072,
            "model.n_layers": 28,
            "model.n_heads": 24,
            "model.kv_heads": 8,
            "model.d_ff": 8192,
            "model.scan": True,
            "model.remat": "attention",
            "optimizer.moment_dtype": "bfloat16",
        },
    ),
}
TOY = {
    "batch_size": 4,
    "length": 128,
    "model.d_model": 32,
    "model.n_layers": 2,
    "model.n_heads": 4,
    "model.kv_heads": 2,
    "model.d_ff": 64,
    "model.vocab_size": 256,
    "model.max_length": 128,
    "model.dtype": "float32",
}


def configure(name: str, rows: int, toy: bool) -> tuple[Any, list[str]]:
    """(frozen TrainConfig of a model of the table, keys that this version does not have)."""
    import importlib

    from llm_jax import config as configs
    from llm_jax.models.presets import preset

    recipe, architecture, _, changes = MODELS[name]
    cfg = importlib.import_module(f"configs.{recipe}").get_config()
    if architecture:
        cfg.model = preset(architecture)
    changes = {
        "batch_size": rows,
        "mesh": configs.MeshConfig(),
        "data.isolate_documents": False,
        "model.dtype": "bfloat16",
        "model.scan": False,
        **changes,
        **(TOY if toy else {}),
    }
    fields = {f.name for f in dataclasses.fields(configs.OptimizerConfig)}
    absent = [k for k in changes if k.startswith("optimizer.") and k.split(".")[1] not in fields]
    configs.override(cfg, {k: v for k, v in changes.items() if k not in absent})
    configs.resolve_model(cfg.model, vocab_size=50_257, length=cfg.length, backend="gpu")
    configs.validate(cfg)
    return configs.freeze(cfg), absent


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Speed, utilisation and memory of the real train step on random tokens."""
    import jax
    import numpy as np

    from llm_jax import sharding
    from llm_jax.nn import params as nn_params
    from llm_jax.train import metrics, program
    from llm_jax.types import Batch

    cfg, absent = configure(spec["model"], spec["rows"], spec["toy"])
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    rng = np.random.default_rng(0)
    shape = (cfg.batch_size, cfg.length)
    tokens = rng.integers(0, cfg.model.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
    rows = Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=np.ones(shape, np.float32),
        bytes=np.full(shape, 4, np.int32),
    )
    groups, group = (3, 2) if spec["toy"] else (6, 4)
    with jax.set_mesh(mesh):
        built = program.build(cfg, mesh)
        state = jax.block_until_ready(built.init(jax.random.key(0)))
        batch = program.put(rows, mesh, cfg.accumulation)
        start = time.perf_counter()
        step = built.step.lower(state, batch).compile()
        compiled = time.perf_counter() - start
        for _ in range(3):
            state, said = step(state, batch)
        jax.block_until_ready(said)
        taken = []
        for _ in range(groups):
            start = time.perf_counter()
            for _ in range(group):
                state, said = step(state, batch)
            jax.block_until_ready((state, said))
            taken.append((time.perf_counter() - start) / group)
    loss, bad = float(said["loss"]), int(state.bad_steps)
    if bad or not np.isfinite(loss):
        raise RuntimeError(f"{spec['model']}: loss {loss}, {bad} bad steps: its speed says nothing")
    per_token = metrics.train_flops_per_token(built.specs, cfg.model, cfg.length)
    m = cfg.model
    causal = per_token - 6 * m.n_layers * m.n_heads * m.head_dim * cfg.length
    speeds = [cfg.batch_size * cfg.length / s for s in taken]
    speed = spread(speeds)
    peak = metrics.peak_flops(jax.devices()[0])
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "parameters": nn_params.count(built.specs),
        "rows": cfg.batch_size,
        "length": cfg.length,
        "remat": m.remat,
        "scan": m.scan,
        "moment_dtype": getattr(cfg.optimizer, "moment_dtype", "float32"),
        "keys_that_do_not_exist": absent,
        "compile_seconds": compiled,
        "step_milliseconds": spread([1e3 * s for s in taken]),
        "tokens_per_second": speed,
        "mfu_full": speed["median"] * per_token / peak,
        "mfu_causal": speed["median"] * causal / peak,
        "model_tflops": speed["median"] * per_token / 1e12,
        "hbm_peak_bytes": memory.get("peak_bytes_in_use"),
        "loss": loss,
    }


def decode(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens/s of generation with bfloat16 weights, and the bound that reading them sets.

    The bound: each step reads every matrix once, and of each row's cache the slots written so far
    (their mean). The prefill is taken out by subtracting a call that stops after one token.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from llm_jax import models
    from llm_jax.nn import params as nn_params

    cfg = configure(spec["model"], 1, spec["toy"])[0].model
    specs = models.family(cfg.family).specs(cfg)

    def init(key: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(cfg.dtype), nn_params.init(specs, key))

    params = jax.jit(init)(jax.random.key(0))
    leaves = nn_params.flatten(params)
    # Of the tables only the output head is read whole; tied, it is the embedding.
    tables = sum(x.nbytes for path, x in leaves.items() if path.startswith("embed/"))
    head = leaves["embed/tokens"].nbytes if cfg.tied else 0
    weight_bytes = sum(x.nbytes for x in leaves.values()) - tables + head
    P, n = (32, 32) if spec["toy"] else (128, 256)
    slot_bytes = 2 * cfg.n_layers * cfg.kv_heads * cfg.head_dim * jnp.dtype(cfg.dtype).itemsize
    cache_bytes = slot_bytes * (P + n / 2)
    results = []
    for B in spec["rows"]:
        prompt = np.random.default_rng(0).integers(0, cfg.vocab_size, (B, P)).astype(np.int32)
        run = _generation(params, cfg, prompt, n)
        run(n)  # compiles
        first = spread([run(1) for _ in range(3)])
        speeds = [B * (n - 1) / (run(n) - first["median"]) for _ in range(3)]
        row = {
            "rows": B,
            "prompt": P,
            "new_tokens": n,
            "first_token_milliseconds": 1e3 * first["median"],
            "tokens_per_second": spread(speeds),
            "weight_bytes": weight_bytes,
            "cache_bytes_per_row": cache_bytes,
        }
        if spec.get("bandwidth"):
            bound = B * spec["bandwidth"] / (weight_bytes + B * cache_bytes)
            row["bound_tokens_per_second"] = bound
            row["share_of_bound"] = row["tokens_per_second"]["median"] / bound
        results.append(row)
        print(json.dumps({"rows": results}), flush=True)  # kept if time runs out
    return results


def _generation(params: Any, cfg: Any, prompt: Any, n: int) -> Callable[[int], float]:
    """A function that makes so many tokens, up to n, for each prompt [B, P], and says how long."""
    import jax
    import numpy as np

    from llm_jax.decode.generate import generate_tokens
    from llm_jax.decode.sampling import make_sampling

    B, P = prompt.shape
    keys, sampling = jax.random.split(jax.random.key(1), B), make_sampling()
    lengths, ends = np.full(B, P, np.int32), np.array([-1], np.int32)  # nothing ends a row

    def run(limit: int) -> float:
        fixed = (params, prompt, lengths, np.int32(limit), keys, sampling, ends, None)
        start = time.perf_counter()
        made = np.asarray(generate_tokens(*fixed, cfg=cfg, n_slots=n).lengths)
        taken = time.perf_counter() - start
        if (made != limit).any():
            raise RuntimeError(f"decoding made {made.tolist()} tokens, not {limit} each")
        return taken

    return run


def main(part: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The measurement, or {"out_of_memory": message}."""
    said: list[str] = []
    if spec["flags"] == "auto":
        from llm_jax.train import xla_flags

        said = xla_flags.apply()
    import jax

    try:
        match part:
            case "ceilings":
                result = {"device": ceilings.device(), **ceilings.ceilings(spec["toy"])}
            case "train":
                result = train(spec)
            case "attention":
                result = {"rows": ceilings.attention(spec["toy"])}
            case "decode":
                result = {"rows": decode(spec)}
            case _:
                raise ValueError(f"no part {part!r}")
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return {"out_of_memory": str(e).splitlines()[0][:300]}
    names = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_OPTIMIZATION_LEVEL")
    return {
        **result,
        "environment": {n: os.environ[n] for n in names if n in os.environ},
        "flags_added": said,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))), flush=True)
