"""The shape of a model that has a given number of parameters.

Width over depth matters little over a wide range (Kaplan et al. 2020, figure 5). Here it is between
40, the least of Hoffmann et al.'s (2022) 50 models, and 64 (GPT-2 124M) for narrow models, 128 (Llama
2 7B, GPT-3) for those from 2048 dimensions on. Widths go in eighths of a power of two, so that they,
the MLP's and the heads divide by what accelerators and meshes like.
"""

import math
from collections.abc import Iterator

from llm_jax import config as configs
from llm_jax import models
from llm_jax.config import GATED, ModelConfig
from llm_jax.scaling.parameters import CONVENTIONS

WIDEST = 65_536
CLOSE = 0.01  # models that miss by no more are equally good: the flattest is the fastest


def nearest(base: ModelConfig, n: float, counted: str, vocab_size: int) -> tuple[ModelConfig, int]:
    """(`base` in the shape that comes nearest to n parameters, what it has), counted by a key of
    `parameters.CONVENTIONS`.

    What is set in `base` stays in proportion: d_ff and experts' d_ff to d_model, kv_heads to
    n_heads. Models of fewer than 256 dimensions may be as flat as 4 layers.

    Raises:
      ValueError: an unknown convention, or nothing is within a third of n.
    """
    if counted not in CONVENTIONS:
        raise ValueError(f"--count={counted} is not one of {', '.join(CONVENTIONS)}")

    def size(model: ModelConfig) -> float:
        resolved = configs.thaw(model)
        configs.resolve_model(resolved, vocab_size=vocab_size, length=1, backend="cpu")
        return CONVENTIONS[counted](models.family(resolved.family).specs(resolved), resolved)

    found = []  # (how far it misses, layers, model, its size)
    for d_model in widths():
        one, two = (size(_shaped(base, d_model, layers)) for layers in (1, 2))
        if one > 2 * n and found:
            break
        fewest = max(2, math.ceil(d_model / min(max(64, d_model / 16), 128)))
        layers = 1 + round((n - one) / max(two - one, 1))
        model = _shaped(base, d_model, min(max(layers, fewest), max(8, d_model // 40)))
        has = size(model)
        found.append((abs(math.log(has / n)), model.n_layers, model, has))
    least = min(found, key=lambda f: f[0])[0]
    if least > math.log(4 / 3):
        has = min(found, key=lambda f: f[0])[3]
        raise ValueError(
            f"no model with {vocab_size:,} entries of vocabulary has about {n:.3g} parameters (by "
            f"--count={counted}); the nearest has {has:.3g}: change --vocab_size, --count or --budget"
        )
    *_, model, has = min((f for f in found if f[0] <= max(least, CLOSE)), key=lambda f: f[1])
    return model, round(has)


def widths() -> Iterator[int]:
    """64, 96, ... 256, 320, ... 512, 576, ... 1024, 1152, ... in eighths of a power of two."""
    d = 64
    while d <= WIDEST:
        yield d
        d += max(32 if d < 256 else 64, 2 ** (d.bit_length() - 1) // 8)


def _shaped(base: ModelConfig, d_model: int, n_layers: int) -> ModelConfig:
    model = configs.thaw(base)
    head_dim = 128 if d_model >= 2048 else 64 if d_model >= 256 else 32
    model.d_model, model.n_layers, model.head_dim = d_model, n_layers, 0
    model.n_heads = d_model // head_dim
    step = 256 if d_model >= 2048 else 64 if d_model >= 256 else 16
    ratio = (base.d_ff or base.d_model * (8 / 3 if base.activation in GATED else 4)) / base.d_model
    model.d_ff = max(round(ratio * d_model / step), 1) * step
    if base.kv_heads:
        model.kv_heads = _divisor(model.n_heads, model.n_heads * base.kv_heads / base.n_heads)
    if base.moe.d_ff:
        model.moe.d_ff = max(round(base.moe.d_ff / base.d_model * d_model / step), 1) * step
    if base.global_layers:
        model.global_layers = tuple(i for i in base.global_layers if i < n_layers)
    return model


def _divisor(n: int, near: float) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(math.log(d / near)))
