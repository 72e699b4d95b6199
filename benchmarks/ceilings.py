"""What a device can do at most, and its attention implementations beside one another.

Functions for the worker processes of `benchmarks.accelerator`; JAX is imported in them.
"""

import json
import math
import time
from collections.abc import Callable
from typing import Any

from benchmarks.record import spread


def seconds(f: Callable[..., Any], *args: Any, calls: int, repeats: int) -> list[float]:
    """Seconds of f(*args), `repeats` times: each the mean of `calls` sent off one after another."""
    import jax

    for _ in range(2):  # the first compiles
        jax.block_until_ready(f(*args))
    measured = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = f(*args)
        jax.block_until_ready(result)
        measured.append((time.perf_counter() - start) / calls)
    return measured


def device() -> dict[str, Any]:
    """The device that JAX computes on, and its data sheet's peaks (None for a CPU)."""
    import jax

    from llm_jax import chips

    first = jax.devices()[0]
    chip = chips.by_kind(first.device_kind)
    known = chip is not None and chip.platform != "cpu"
    return {
        "kind": first.device_kind,
        "platform": first.platform,
        "chip": chip.name if known else first.platform,
        "hbm_bytes": (first.memory_stats() or {}).get("bytes_limit"),
        "peak_tflops": chip.peak_flops / chip.devices / 1e12 if known else None,
        "peak_gigabytes_per_second": chip.hbm_bandwidth / chip.devices / 1e9 if known else None,
    }


def ceilings(toy: bool) -> dict[str, Any]:
    """Bandwidth of copying an array on the device and speed of a large bfloat16 matmul."""
    import jax
    import jax.numpy as jnp

    elements, n = (2**18, 256) if toy else (2**29, 8192)
    often = {"calls": 2, "repeats": 3} if toy else {"calls": 10, "repeats": 7}
    x = jnp.zeros(elements, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)  # as an addition: XLA may return a plain copy's argument
    copied = [2 * x.nbytes / s / 1e9 for s in seconds(copy, x, **often)]
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    multiplied = [2 * n**3 / s / 1e12 for s in seconds(product, a, **often)]
    return {
        "copy_megabytes": elements * 2 / 1e6,
        "matmul_size": n,
        "copy_gigabytes_per_second": spread(copied),
        "matmul_tflops": spread(multiplied),
    }


# (rows, length, heads, key heads, head width, documents in a row)
ATTENTION = ((8, 1024, 12, 12, 64, 1), (4, 4096, 16, 16, 128, 1), (4, 4096, 16, 16, 128, 4))
TOY_ATTENTION = ((1, 128, 2, 1, 16, 1), (1, 128, 2, 2, 16, 2))
IMPLEMENTATIONS = ("cudnn", "pallas", "splash", "xla", "reference")


def attention(toy: bool) -> list[dict[str, Any]]:
    """Forward and backward of each implementation that the device has; the others' reasons.

    TFLOP/s count the causal half: 2 matmuls forward and 5 backward of L * L / 2 each, for one
    document in a row; with several, what is skipped is still counted as done.
    """
    import jax
    import jax.numpy as jnp

    from llm_jax.nn import fused
    from llm_jax.nn.attention import FUNCTIONS
    from llm_jax.nn.blockwise import Mask, Shape

    rows = []
    for B, L, H, K, Dh, documents in TOY_ATTENTION if toy else ATTENTION:
        keys = jax.random.split(jax.random.key(0), 4)
        sizes = ((B, L, H, Dh), (B, L, K, Dh), (B, L, K, Dh), (B, L, H, Dh))
        q, k, v, do = (
            jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, sizes, strict=True)
        )
        segments = jnp.broadcast_to(1 + jnp.arange(L) * documents // L, (B, L)).astype(jnp.int32)
        shape = Shape(scale=1 / math.sqrt(Dh))
        for name in IMPLEMENTATIONS:
            row = {"shape": [B, L, H, K, Dh], "documents": documents, "implementation": name}
            rows.append(row)
            mask = Mask() if documents == 1 else Mask((segments, segments))
            if name in fused.PLATFORMS and (why := fused.refuses(name, q, k, mask, shape)):
                row["refused"] = why
                continue

            def both(q, k, v, do, segments, name=name, documents=documents, shape=shape):
                mask = Mask() if documents == 1 else Mask((segments, segments))
                o, back = jax.vjp(lambda *a: FUNCTIONS[name](*a, mask, shape), q, k, v)
                return o, back(do)

            try:
                arrays = (q, k, v, do, segments)
                taken = seconds(jax.jit(both), *arrays, calls=2 if toy else 10, repeats=3)
            except Exception as e:  # a kernel that does not compile here is a result, too
                row["refused"] = f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
                continue
            flops = 7 * B * H * L * L * Dh
            row["milliseconds"] = spread([1e3 * s for s in taken])
            row["tflops"] = spread([flops / s / 1e12 for s in taken])
            print(json.dumps({"rows": rows}), flush=True)  # kept if time runs out
    return rows
