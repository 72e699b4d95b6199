"""Norms, the MLP and dropout: pure functions next to their specs."""

import math

import jax
import jax.numpy as jnp

from llm_jax.config import GATED, ModelConfig
from llm_jax.nn.dense import dense_specs, read, write
from llm_jax.nn.params import Constant, ParamSpec
from llm_jax.types import Array, PyTree


def norm_specs(cfg: ModelConfig, width: int) -> PyTree:
    """ "scale" (and "bias") [width]."""
    start = 0.0 if cfg.norm_unit_offset else 1.0
    specs = {"scale": ParamSpec((width,), (None,), Constant(start))}
    if cfg.norm == "layernorm" and cfg.norm_bias:
        specs["bias"] = ParamSpec((width,), (None,), Constant(0.0))
    return specs


def norm(p: PyTree, x: Array, cfg: ModelConfig) -> Array:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the last axis, in float32."""
    lead = (None,) * (x.ndim - 1)
    x32 = x.astype(jnp.float32)
    if cfg.norm == "layernorm":
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + cfg.norm_eps)
    scale = p["scale"].astype(jnp.float32)[*lead, :]
    y = y * (1.0 + scale if cfg.norm_unit_offset else scale)
    if "bias" in p:
        y = y + p["bias"].astype(jnp.float32)[*lead, :]
    return y.astype(x.dtype)


def mlp_specs(cfg: ModelConfig, out_std: float, d_ff: int = 0) -> PyTree:
    """ "up" and "down", and "gate" for gated activations; `d_ff` replaces the config's."""
    D, F = cfg.d_model, d_ff or cfg.d_ff
    specs = {
        "up": dense_specs(D, F, ("embed", "mlp"), cfg.init_std, cfg.mlp_bias),
        "down": dense_specs(F, D, ("mlp", "embed"), out_std, cfg.mlp_bias),
    }
    if cfg.activation in GATED:
        specs["gate"] = dense_specs(D, F, ("embed", "mlp"), cfg.init_std, cfg.mlp_bias)
    return specs


def mlp(p: PyTree, x_BxLxD: Array, cfg: ModelConfig) -> Array:
    """Feed-forward layer; SwiGLU and GeGLU are Shazeer's (2020), ReLU^2 is So et al.'s (2021)."""
    if cfg.activation in GATED:
        up, gate = read([p["up"], p["gate"]], x_BxLxD, ["mlp", "mlp"])
    else:
        (up,) = read([p["up"]], x_BxLxD, ["mlp"])
    match cfg.activation:
        case "gelu":
            h = jax.nn.gelu(up, approximate=True)
        case "gelu_erf":
            # jax.nn.gelu goes through erfc, which XLA:CPU computes at half the speed of erf.
            h = 0.5 * up * (1.0 + jax.lax.erf(up * math.sqrt(0.5)))
        case "relu2":
            h = jnp.square(jax.nn.relu(up))
        case "swiglu":
            h = jax.nn.silu(gate) * up
        case "geglu":
            h = jax.nn.gelu(gate, approximate=True) * up
        case other:
            raise ValueError(f"model.activation={other!r} is unknown")
    return write(p["down"], h, "mlp")


def dropout(x_BxLxD: Array, keys_B: Array | None, rate: float, salt: int) -> Array:
    """Inverted dropout with one key per row, so that it depends on no mesh and no micro-batch.

    `salt` tells the places of one layer apart; without keys (evaluation) nothing is dropped.
    """
    if keys_B is None or rate == 0.0:
        return x_BxLxD
    keep = jax.vmap(
        lambda key: jax.random.bernoulli(jax.random.fold_in(key, salt), 1 - rate, x_BxLxD.shape[1:])
    )(keys_B)
    return jnp.where(keep, x_BxLxD / (1 - rate), 0).astype(x_BxLxD.dtype)
