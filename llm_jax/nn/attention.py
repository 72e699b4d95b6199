"""Attention behind one dispatch, and the attention layer of a block.

Inside, heads lead and query heads are grouped by the key head that they share, [B, K, G, L, Dh],
so that one batched matmul serves MHA, GQA and MQA without repeating keys. Causality is by cache
slot (a row is written in order); packed documents are kept apart by their segments; the sliding
window counts positions.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax import sharding
from llm_jax.config import ModelConfig
from llm_jax.nn import layers, positions
from llm_jax.types import Array, PyTree

MASKED = -1e30  # finite, so that a row without any key gives 0 and not NaN


class Mask(NamedTuple):
    """Who may see whom. `segments` and `positions` are (queries [B, L], keys [B, S]) or None, which
    says that each row is one document whose slots are its positions."""

    segments: tuple[Array, Array] | None = None
    positions: tuple[Array, Array] | None = None
    start: Array | int = 0  # slot of the first query


class Shape(NamedTuple):
    """The static side of an attention call."""

    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    scale: float = 1.0
    block: int = 1024


def visible(mask: Mask, shape: Shape, q_range: tuple[int, int], n_keys: int) -> Array | None:
    """bool [B or 1, Lq, n_keys] for queries q_range and the first n_keys keys; None: all visible."""
    lo, hi = q_range
    q_slot = (mask.start + jnp.arange(lo, hi))[None, :, None]
    k_slot = jnp.arange(n_keys)[None, None, :]
    ok = None
    if shape.causal:
        ok = k_slot <= q_slot
    if mask.segments is not None:
        q_seg, k_seg = mask.segments[0][:, lo:hi, None], mask.segments[1][:, None, :n_keys]
        same = (q_seg == k_seg) & (q_seg > 0)
        ok = same if ok is None else ok & same
    if shape.window:
        if mask.positions is None:
            distance = q_slot - k_slot
        else:
            distance = mask.positions[0][:, lo:hi, None] - mask.positions[1][:, None, :n_keys]
        near = jnp.abs(distance) < shape.window
        ok = near if ok is None else ok & near
    return ok


def reference(q_BxLxHxDh: Array, k_BxSxKxDh: Array, v_BxSxKxDh: Array, mask: Mask, shape: Shape) -> Array:
    """Plain softmax attention, differentiated by JAX: what the fast paths are tested against."""
    B, L, H, Dh = q_BxLxHxDh.shape
    S, K = k_BxSxKxDh.shape[1:3]
    q = q_BxLxHxDh.reshape(B, L, K, H // K, Dh)
    s = jnp.einsum("blkgd,bskd->bkgls", q, k_BxSxKxDh, preferred_element_type=jnp.float32) * shape.scale
    if shape.softcap:
        s = shape.softcap * jnp.tanh(s / shape.softcap)
    ok = visible(mask, shape, (0, L), S)
    if ok is not None:
        ok = ok[:, None, None]
        s = jnp.where(ok, s, MASKED)
    p = jax.nn.softmax(s, axis=-1)
    if ok is not None:
        p = jnp.where(jnp.any(ok, axis=-1, keepdims=True), p, 0.0)
    o = jnp.einsum("bkgls,bskd->blkgd", p.astype(v_BxSxKxDh.dtype), v_BxSxKxDh)
    return o.reshape(B, L, H, Dh)


# The "xla" path: batched matmuls with heads leading and a derivative of our own. Up to `block`
# queries the probabilities are kept for the backward pass; past that, blocks of queries run one
# after the other against the keys they can see, and probabilities are recomputed.


def _blocks(mask: Mask, shape: Shape, L: int, S: int) -> list[tuple[int, int, int]]:
    """(first query, past the last query, keys they can see) of each block."""
    step = min(shape.block, L)
    sliceable = shape.causal and isinstance(mask.start, int)
    out = []
    for lo in range(0, L, step):
        hi = min(lo + step, L)
        out.append((lo, hi, min(mask.start + hi, S) if sliceable else S))
    return out


def _scores(q: Array, k: Array, mask: Mask, shape: Shape, block: tuple[int, int, int]) -> tuple:
    """Capped float32 scores [B, K, G, Lq, n] of a block, and who is visible."""
    B, K, G, Lq, Dh = q.shape
    flat = q.reshape(B, K, G * Lq, Dh)
    s = jnp.einsum("bkqd,bksd->bkqs", flat, k, preferred_element_type=jnp.float32)
    s = s.reshape(B, K, G, Lq, k.shape[2]) * shape.scale
    if shape.softcap:
        s = shape.softcap * jnp.tanh(s / shape.softcap)
    ok = visible(mask, shape, block[:2], block[2])
    return s, None if ok is None else ok[:, None, None]


def _forward_block(q: Array, k: Array, v: Array, mask: Mask, shape: Shape, block: tuple) -> tuple:
    """Output [B, K, G, Lq, Dh], probabilities and their log-denominator [B, K, G, Lq, 1]."""
    s, ok = _scores(q, k, mask, shape, block)
    if ok is not None:
        s = jnp.where(ok, s, MASKED)
    m = jnp.max(s, axis=-1, keepdims=True)
    p = jnp.exp(s - m)
    if ok is not None and mask.segments is not None:
        p = jnp.where(ok, p, 0.0)  # padding sees nobody
    z = jnp.maximum(jnp.sum(p, axis=-1, keepdims=True), 1e-30)
    p = (p / z).astype(v.dtype)
    B, K, G, Lq, S = p.shape
    o = jnp.einsum("bkqs,bksd->bkqd", p.reshape(B, K, G * Lq, S), v).reshape(q.shape)
    return o, p, m + jnp.log(z)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _xla(q: Array, k: Array, v: Array, mask: Mask, shape: Shape) -> Array:
    return _xla_forward(q, k, v, mask, shape)[0]


def _xla_forward(q: Array, k: Array, v: Array, mask: Mask, shape: Shape) -> tuple:
    blocks = _blocks(mask, shape, q.shape[3], k.shape[2])
    outs, kept = [], []
    for lo, hi, n in blocks:
        o, p, lse = _forward_block(q[:, :, :, lo:hi], k[:, :, :n], v[:, :, :n], mask, shape, (lo, hi, n))
        outs.append(o)
        kept.append(p if len(blocks) == 1 else lse)
    o = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=3)
    return o, (q, k, v, mask, o, kept)


def _xla_backward(shape: Shape, residuals: tuple, do: Array) -> tuple:
    q, k, v, mask, o, kept = residuals
    blocks = _blocks(mask, shape, q.shape[3], k.shape[2])
    dqs = []
    dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for (lo, hi, n), saved in zip(blocks, kept, strict=True):
        q_b, do_b, o_b = (x[:, :, :, lo:hi] for x in (q, do, o))
        k_b, v_b = k[:, :, :n], v[:, :, :n]
        s = None
        if len(blocks) > 1 or shape.softcap:
            s, ok = _scores(q_b, k_b, mask, shape, (lo, hi, n))
        if len(blocks) > 1:
            p = jnp.exp(s - saved)
            p = p.astype(v.dtype) if ok is None else jnp.where(ok, p, 0.0).astype(v.dtype)
        else:
            p = saved
        B, K, G, Lq, S = p.shape
        rows = (B, K, G * Lq)
        flat_q, flat_do = q_b.reshape(*rows, -1), do_b.reshape(*rows, -1)
        dv_b = jnp.einsum("bkqs,bkqd->bksd", p.reshape(*rows, S), flat_do, preferred_element_type=jnp.float32)
        dp = jnp.einsum("bkqd,bksd->bkqs", flat_do, v_b, preferred_element_type=jnp.float32)
        inner = jnp.sum(do_b.astype(jnp.float32) * o_b.astype(jnp.float32), axis=-1, keepdims=True)
        ds = p.astype(jnp.float32) * (dp.reshape(p.shape) - inner)
        if shape.softcap:
            ds = ds * (1.0 - jnp.square(s / shape.softcap))
            if ok is not None:
                ds = jnp.where(ok, ds, 0.0)
        ds = (ds * shape.scale).astype(q.dtype).reshape(*rows, S)
        dqs.append(jnp.einsum("bkqs,bksd->bkqd", ds, k_b).reshape(q_b.shape))
        dk_b = jnp.einsum("bkqs,bkqd->bksd", ds, flat_q, preferred_element_type=jnp.float32)
        if len(blocks) == 1:
            dk, dv = dk_b, dv_b
        else:
            dk, dv = dk.at[:, :, :n].add(dk_b), dv.at[:, :, :n].add(dv_b)
    dq = dqs[0] if len(dqs) == 1 else jnp.concatenate(dqs, axis=3)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_xla.defvjp(_xla_forward, _xla_backward)


def xla(q_BxLxHxDh: Array, k_BxSxKxDh: Array, v_BxSxKxDh: Array, mask: Mask, shape: Shape) -> Array:
    """Attention as batched matmuls; same arguments and result as `reference`."""
    B, L, H, Dh = q_BxLxHxDh.shape
    K = k_BxSxKxDh.shape[2]
    q = q_BxLxHxDh.reshape(B, L, K, H // K, Dh).transpose(0, 2, 3, 1, 4)
    o = _xla(q, k_BxSxKxDh.transpose(0, 2, 1, 3), v_BxSxKxDh.transpose(0, 2, 1, 3), mask, shape)
    return o.transpose(0, 3, 1, 2, 4).reshape(B, L, H, Dh)


def cudnn(q: Array, k: Array, v: Array, mask: Mask, shape: Shape) -> Array:
    """cuDNN's fused attention (NVIDIA GPUs); same arguments and result as `reference`."""
    if reason := cudnn_refuses(q, mask, shape):
        raise ValueError(f"model.attention=cudnn is not available: {reason}; use model.attention=auto")
    window = (shape.window - 1, 0) if shape.window else None
    return jax.nn.dot_product_attention(
        q, k, v, scale=shape.scale, is_causal=shape.causal, local_window_size=window, implementation="cudnn"
    )


def cudnn_refuses(q: Array, mask: Mask, shape: Shape) -> str:
    """Why cuDNN cannot do this call; empty if it can."""
    if jax.default_backend() != "gpu":
        return f"the backend is {jax.default_backend()}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the compute type is {q.dtype}, not bfloat16"
    if shape.softcap:
        return "attention_softcap is set"
    if mask.segments is not None:
        return "rows hold several documents (data.isolate_documents)"
    if not (isinstance(mask.start, int) and mask.start == 0):
        return "it is a cached call"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"head_dim={q.shape[-1]} is not a multiple of 8 up to 128"
    return ""


def attention(q: Array, k: Array, v: Array, mask: Mask, shape: Shape, implementation: str) -> Array:
    """Softmax attention: q [B, L, H, Dh], k and v [B, S, K, Dh] -> [B, L, H, Dh].

    `implementation` is a value of `model.attention`; auto takes cuDNN where it can do the call,
    else "xla". One asked for by name is used or raises ValueError.
    """
    if implementation == "auto":
        implementation = "xla" if cudnn_refuses(q, mask, shape) else "cudnn"
    return {"xla": xla, "cudnn": cudnn, "reference": reference}[implementation](q, k, v, mask, shape)


# The layer -----------------------------------------------------------------------------------


def specs(cfg: ModelConfig, out_std: float) -> PyTree:
    """Projections q, k, v, o and, with qk_norm, a norm per head for q and k."""
    D, H, K, Dh = cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.head_dim
    tree = {
        "q": layers.dense_specs(D, H * Dh, ("embed", "heads"), cfg.init_std, cfg.qkv_bias),
        "k": layers.dense_specs(D, K * Dh, ("embed", "kv_heads"), cfg.init_std, cfg.qkv_bias),
        "v": layers.dense_specs(D, K * Dh, ("embed", "kv_heads"), cfg.init_std, cfg.qkv_bias),
        "o": layers.dense_specs(H * Dh, D, ("heads", "embed"), out_std, cfg.out_bias),
    }
    if cfg.qk_norm:
        tree["q_norm"] = layers.norm_specs(cfg, Dh)
        tree["k_norm"] = layers.norm_specs(cfg, Dh)
    return tree


def layer(p: PyTree, x_BxLxD: Array, side: PyTree, cache: PyTree | None, i: Array, cfg: ModelConfig):
    """Self-attention of layer `i`: (x [B, L, D], cache layers) -> the same.

    `side` holds the rotary table, and segments and positions of queries and keys; `cache` the
    stacked keys and values [M, B, K, S, Dh], written at slot side["start"].
    """
    B, L, _ = x_BxLxD.shape
    H, K, Dh = cfg.n_heads, cfg.kv_heads, cfg.head_dim
    q = layers.dense(p["q"], x_BxLxD, ("embed", "heads")).reshape(B, L, H, Dh)
    k = layers.dense(p["k"], x_BxLxD, ("embed", "kv_heads")).reshape(B, L, K, Dh)
    v = layers.dense(p["v"], x_BxLxD, ("embed", "kv_heads")).reshape(B, L, K, Dh)
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
    o = checkpoint_name(o, "attention")
    o = sharding.constrain(o.reshape(B, L, H * Dh), "batch", "length", "heads")
    return layers.dense(p["o"], o, ("heads", "embed")), cache


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
