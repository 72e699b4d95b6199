"""Dense layers, embeddings, norms, the MLP and dropout: pure functions next to their specs."""

import jax
import jax.numpy as jnp

from llm_jax import sharding
from llm_jax.config import GATED, ModelConfig
from llm_jax.nn import weights
from llm_jax.nn.params import Constant, Normal, ParamSpec
from llm_jax.types import Array, PyTree


def dense_specs(d_in: int, d_out: int, axes: tuple[str, str], std: float, bias: bool) -> PyTree:
    """A matrix [d_in, d_out] "w", and a "bias" [d_out] if asked for."""
    specs = {"w": ParamSpec((d_in, d_out), axes, Normal(std))}
    if bias:
        out = None if axes[1] == "embed" else axes[1]
        specs["bias"] = ParamSpec((d_out,), (out,), Constant(0.0))
    return specs


def dense(p: PyTree, x_BxLxD: Array, axes: tuple[str, str]) -> Array:
    """x @ w + bias over the last axis: [B, L, d_in] -> [B, L, d_out].

    `axes` are the logical axes of w. Its "embed" axis is gathered before the product (fully
    sharded data parallelism); its other axis stays cut (tensor parallelism). What reads the
    residual stream gathers its length, what writes to it leaves its length cut: `sharding.stream`.
    """
    w = p["w"]
    if not isinstance(w, weights.Weight):
        w = sharding.constrain(w, *(None if a == "embed" else a for a in axes))
    B, L, D = x_BxLxD.shape
    mesh = sharding.ambient_mesh()
    if axes[0] == "embed":
        x_BxLxD = sharding.constrain(x_BxLxD, "batch", "length", None)
    if mesh is not None and mesh.shape["context"] * mesh.shape["tensor"] > 1:
        y = weights.matmul(w, x_BxLxD)  # flattening would gather a length that is cut
    else:
        y = weights.matmul(w, x_BxLxD.reshape(B * L, D)).reshape(B, L, -1)  # twice as fast on CPU
    y = (
        sharding.stream(y)
        if axes[1] == "embed"
        else sharding.constrain(y, "batch", "length", axes[1])
    )
    if "bias" in p:
        y = y + p["bias"].astype(y.dtype)[None, None, :]
    return y


def embed(table_VxD: Array, ids_BxL: Array) -> Array:
    """Rows of the table: [B, L] -> [B, L, D]."""
    if not isinstance(table_VxD, weights.Weight):
        # Taking rows of a table that is cut along D would rematerialise it whole on each device.
        table_VxD = sharding.constrain(table_VxD, "vocab", None)
    rows_BxLxD = sharding.constrain(weights.rows(table_VxD, ids_BxL), "batch", "length", None)
    return sharding.stream(rows_BxLxD)


def norm_specs(cfg: ModelConfig, width: int) -> PyTree:
    """ "scale" (and "bias") [width]."""
    specs = {"scale": ParamSpec((width,), (None,), Constant(1.0))}
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
    y = y * p["scale"].astype(jnp.float32)[*lead, :]
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
    up = dense(p["up"], x_BxLxD, ("embed", "mlp"))
    match cfg.activation:
        case "gelu":
            h = jax.nn.gelu(up, approximate=True)
        case "gelu_erf":
            h = jax.nn.gelu(up, approximate=False)
        case "relu2":
            h = jnp.square(jax.nn.relu(up))
        case "swiglu":
            h = jax.nn.silu(dense(p["gate"], x_BxLxD, ("embed", "mlp"))) * up
        case "geglu":
            h = jax.nn.gelu(dense(p["gate"], x_BxLxD, ("embed", "mlp")), approximate=True) * up
        case other:
            raise ValueError(f"model.activation={other!r} is unknown")
    return dense(p["down"], h, ("mlp", "embed"))


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
