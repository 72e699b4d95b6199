"""Attention behind one dispatch, and the attention layer of a block."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax import sharding
from llm_jax.config import ModelConfig
from llm_jax.nn import layers, positions
from llm_jax.nn.blockwise import Mask, Shape, reference, xla
from llm_jax.nn.dense import dense_specs, read, write
from llm_jax.nn.ring import context_size, ring
from llm_jax.types import Array, PyTree


def cudnn(q: Array, k: Array, v: Array, mask: Mask, shape: Shape) -> Array:
    """cuDNN's fused attention (NVIDIA GPUs); same arguments and result as `reference`."""
    if reason := cudnn_refuses(q, mask, shape):
        raise ValueError(
            f"model.attention=cudnn is not available: {reason}; use model.attention=auto"
        )
    window = (shape.window - 1, 0) if shape.window else None
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=shape.scale,
        is_causal=shape.causal,
        local_window_size=window,
        implementation="cudnn",
    )


def cudnn_refuses(q: Array, mask: Mask, shape: Shape) -> str:
    """Why cuDNN cannot do this call; empty if it can."""
    if sharding.platform() != "gpu":
        return f"the backend is {sharding.platform()}"
    if context_size() > 1:
        return f"mesh.context={context_size()} cuts rows along their length"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the compute type is {q.dtype}, not bfloat16"
    if shape.softcap:
        return "attention_softcap is set"
    if mask.segments is not None:
        return "rows hold several documents (data.isolate_documents)"
    if mask.cached:
        return "it is a cached call"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"head_dim={q.shape[-1]} is not a multiple of 8 up to 128"
    return ""


def attention(q: Array, k: Array, v: Array, mask: Mask, shape: Shape, implementation: str) -> Array:
    """Softmax attention: q [B, L, H, Dh], k and v [B, S, K, Dh] -> [B, L, H, Dh].

    `implementation` is a value of `model.attention`; auto takes the ring where mesh.context cuts
    rows, else cuDNN where it can do the call, else "xla", as for every cached call. One asked for
    by name is used or raises ValueError.
    """
    if implementation == "auto":
        if context_size() > 1 and not mask.cached:
            implementation = "ring"
        else:
            implementation = "xla" if cudnn_refuses(q, mask, shape) else "cudnn"
    functions = {"xla": xla, "cudnn": cudnn, "reference": reference, "ring": ring}
    o = functions[implementation](q, k, v, mask, shape)
    return o if implementation == "ring" else checkpoint_name(o, "attention")  # the ring names its


# The layer -----------------------------------------------------------------------------------


def specs(cfg: ModelConfig, out_std: float) -> PyTree:
    """Projections q, k, v, o and, with qk_norm, a norm per head for q and k."""
    D, H, K, Dh = cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.head_dim
    tree = {
        "q": dense_specs(D, H * Dh, ("embed", "heads"), cfg.init_std, cfg.qkv_bias),
        "k": dense_specs(D, K * Dh, ("embed", "kv_heads"), cfg.init_std, cfg.qkv_bias),
        "v": dense_specs(D, K * Dh, ("embed", "kv_heads"), cfg.init_std, cfg.qkv_bias),
        "o": dense_specs(H * Dh, D, ("heads", "embed"), out_std, cfg.out_bias),
    }
    if cfg.qk_norm:
        tree["q_norm"] = layers.norm_specs(cfg, Dh)
        tree["k_norm"] = layers.norm_specs(cfg, Dh)
    return tree


def layer(
    p: PyTree, x_BxLxD: Array, side: PyTree, cache: PyTree | None, i: Array, cfg: ModelConfig
):
    """Self-attention of layer `i`: (x [B, L, D], cache layers) -> the same.

    `side` holds the rotary table, and segments and positions of queries and keys; `cache` the
    stacked keys and values [M, B, K, S, Dh], written at slot side["start"].
    """
    B, L, _ = x_BxLxD.shape
    H, K, Dh = cfg.n_heads, cfg.kv_heads, cfg.head_dim
    q, k, v = read([p["q"], p["k"], p["v"]], x_BxLxD, ["heads", "kv_heads", "kv_heads"])
    q, k, v = q.reshape(B, L, H, Dh), k.reshape(B, L, K, Dh), v.reshape(B, L, K, Dh)
    if cfg.qk_norm:
        q, k = layers.norm(p["q_norm"], q, cfg), layers.norm(p["k_norm"], k, cfg)
    if side.get("rope") is not None:
        q, k = positions.rotate(q, side["rope"], cfg), positions.rotate(k, side["rope"], cfg)
    shape = Shape(True, cfg.window, cfg.attention_softcap, 1 / math.sqrt(Dh), cfg.attention_block)
    if cache is None:
        mask = Mask(side.get("segments"), side.get("positions"))
    else:
        k, v, cache = _through_cache(k, v, cache, side["start"], i)
        mask = Mask(side["segments"], side["positions"], side["start"])
    o = attention(q, k, v, mask, shape, cfg.attention)
    return write(p["o"], o.reshape(B, L, H * Dh), "heads"), cache


def _through_cache(k: Array, v: Array, cache: PyTree, start: Array, i: Array) -> tuple:
    """Writes new keys and values [B, L, K, Dh] of layer i; returns the layer's whole [B, S, K, Dh]."""
    out, whole = {}, []
    for name, new in (("k", k), ("v", v)):
        stored = cache[name]
        new = new.transpose(0, 2, 1, 3)[None].astype(stored.dtype)
        stored = jax.lax.dynamic_update_slice(stored, new, (i, 0, 0, start, 0))
        out[name] = stored
        whole.append(jax.lax.dynamic_index_in_dim(stored, i, keepdims=False).transpose(0, 2, 1, 3))
    return whole[0].astype(k.dtype), whole[1].astype(v.dtype), out


def cache_specs(cfg: ModelConfig, rows: int, length: int) -> PyTree:
    """Shape of the stacked keys and values, each [M, B, K, S, Dh]."""
    shape = (cfg.n_layers, rows, cfg.kv_heads, length, cfg.head_dim)
    return {"k": shape, "v": shape}
