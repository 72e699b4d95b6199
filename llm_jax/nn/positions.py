"""Positions: rotary embeddings with context extension, and sinusoids."""

import math

import jax.numpy as jnp
import numpy as np

from llm_jax import config as configs
from llm_jax.config import ModelConfig
from llm_jax.types import Array


def rope_frequencies(cfg: ModelConfig) -> tuple[np.ndarray, float]:
    """Angles per position of each rotated pair, float64 [n], and the factor on cos and sin.

    linear: positions divided by the factor (Chen et al. 2023). ntk: a larger base, so that the
    lowest frequency is stretched by the factor and the highest not at all. yarn (Peng et al.
    2023): pairs that turn more than beta_fast times within the original context stay, those that
    turn less than beta_slow times are stretched, a ramp over the pairs lies between; attention is
    tempered by 0.1 ln(factor) + 1, as a factor on cos and sin. llama3 (Grattafiori et al. 2024):
    the same from rope_high_turns to rope_low_turns with a ramp over the turns, untempered.
    """
    rotated = int(cfg.head_dim * cfg.rope_fraction) // 2 * 2
    n = rotated // 2
    exponent = np.arange(n, dtype=np.float64) * 2 / max(rotated, 1)
    base, factor, scale = cfg.rope_theta, cfg.rope_factor, 1.0
    if cfg.rope_scaling == "ntk":
        base = base * factor ** (rotated / max(rotated - 2, 1))
    frequencies = base**-exponent
    if cfg.rope_scaling == "linear":
        frequencies = frequencies / factor
    elif cfg.rope_scaling == "yarn":

        def pair_that_turns(times: float) -> float:
            return n * math.log(cfg.rope_original_length / (times * 2 * math.pi)) / math.log(base)

        low = max(math.floor(pair_that_turns(cfg.yarn_beta_fast)), 0)
        high = min(math.ceil(pair_that_turns(cfg.yarn_beta_slow)), rotated - 1)
        ramp = np.clip((np.arange(n) - low) / max(high - low, 1e-3), 0.0, 1.0)
        frequencies = frequencies * (1 - ramp) + frequencies / factor * ramp
        scale = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        scale = cfg.yarn_attention_factor or scale
    elif cfg.rope_scaling == "llama3":
        turns = cfg.rope_original_length * frequencies / (2 * math.pi)
        span = cfg.rope_high_turns - cfg.rope_low_turns
        kept = np.clip((turns - cfg.rope_low_turns) / span, 0.0, 1.0)
        frequencies = frequencies * kept + frequencies / factor * (1 - kept)
    return frequencies, scale


def rope_tables(positions_BxL: Array, cfg: ModelConfig) -> tuple[tuple[Array, Array], ...]:
    """cos and sin, float32 [B, L, n], of n rotated pairs; where layers with a window turn by a base
    of their own (`cfg.rope_local_theta`), a second such pair, theirs."""
    tables = (rope_table(positions_BxL, *rope_frequencies(cfg)),)
    if not cfg.rope_local_theta:
        return tables
    local = configs.thaw(cfg)
    local.rope_theta, local.rope_scaling = cfg.rope_local_theta, "none"
    return (*tables, rope_table(positions_BxL, *rope_frequencies(local)))


def rope_table(
    positions_BxL: Array, frequencies: np.ndarray, scale: float = 1.0
) -> tuple[Array, Array]:
    """cos and sin, times `scale`: float32 [B, L, n] for n frequencies."""
    angles = (
        positions_BxL.astype(jnp.float32)[:, :, None] * frequencies.astype(np.float32)[None, None]
    )
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x_BxLxHxDh: Array, table: tuple[Array, Array], cfg: ModelConfig) -> Array:
    """Rotary position embedding (Su et al. 2021) of queries or keys, in float32."""
    cos, sin = (t[:, :, None, :] for t in table)
    n = cos.shape[-1]
    x = x_BxLxHxDh.astype(jnp.float32)
    turned, rest = x[..., : 2 * n], x[..., 2 * n :]
    if cfg.rope_interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    else:
        a, b = turned[..., :n], turned[..., n:]
        out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    if rest.shape[-1]:
        out = jnp.concatenate([out, rest], axis=-1)
    return out.astype(x_BxLxHxDh.dtype)


def sinusoids(positions_BxL: Array, width: int) -> Array:
    """Fixed position embeddings of Vaswani et al. (2017): float32 [B, L, width], sines then cosines."""
    n = width // 2
    frequencies = np.exp(-math.log(10_000.0) * np.arange(n) / max(n - 1, 1)).astype(np.float32)
    angles = positions_BxL.astype(jnp.float32)[:, :, None] * frequencies[None, None]
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(table, ((0, 0), (0, 0), (0, width - 2 * n)))
