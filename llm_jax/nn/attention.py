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


def visible(mask: Mask, shape: Shape, q_slot_L: Array, k_slot_S: Array) -> Array | None:
    """bool [B or 1, L, S]: which keys each query sees; None: all of them.

    The slots are those of the queries and keys that `mask` describes, in its order.
    """
    q_slot, k_slot = q_slot_L[None, :, None], k_slot_S[None, None, :]
    ok = None
    if shape.causal:
        ok = k_slot <= q_slot
    if mask.segments is not None:
        q_seg, k_seg = mask.segments[0][:, :, None], mask.segments[1][:, None, :]
        same = (q_seg == k_seg) & (q_seg > 0)
        ok = same if ok is None else ok & same
    if shape.window:
        distance = q_slot - k_slot
        if mask.positions is not None:
            distance = mask.positions[0][:, :, None] - mask.positions[1][:, None, :]
        near = jnp.abs(distance) < shape.window
        ok = near if ok is None else ok & near
    return ok


def reference(
    q_BxLxHxDh: Array, k_BxSxKxDh: Array, v_BxSxKxDh: Array, mask: Mask, shape: Shape
) -> Array:
    """Plain softmax attention, differentiated by JAX: what the fast paths are tested against."""
    B, L, H, Dh = q_BxLxHxDh.shape
    S, K = k_BxSxKxDh.shape[1:3]
    q = q_BxLxHxDh.reshape(B, L, K, H // K, Dh)
    s = (
        jnp.einsum("blkgd,bskd->bkgls", q, k_BxSxKxDh, preferred_element_type=jnp.float32)
        * shape.scale
    )
    if shape.softcap:
        s = shape.softcap * jnp.tanh(s / shape.softcap)
    ok = visible(mask, shape, mask.start + jnp.arange(L), jnp.arange(S))
    if ok is not None:
        ok = ok[:, None, None]
        s = jnp.where(ok, s, MASKED)
    p = jax.nn.softmax(s, axis=-1)
    if ok is not None:
        p = jnp.where(jnp.any(ok, axis=-1, keepdims=True), p, 0.0)
    o = jnp.einsum("bkgls,bskd->blkgd", p.astype(v_BxSxKxDh.dtype), v_BxSxKxDh)
    return o.reshape(B, L, H, Dh)


# The "xla" path: batched matmuls with heads leading and a derivative of our own. Up to `block`
# queries the probabilities are kept for the backward pass. Past that, pairs of a query block and a
# key block go through one after the other with a running softmax (Dao et al. 2022), and the
# backward pass computes their probabilities again: no [L, S] array exists.


def _scores(q: Array, k: Array, shape: Shape) -> Array:
    """Capped float32 scores [B, K, G, L, S]."""
    B, K, G, L, Dh = q.shape
    s = jnp.einsum(
        "bkqd,bksd->bkqs", q.reshape(B, K, G * L, Dh), k, preferred_element_type=jnp.float32
    )
    s = s.reshape(B, K, G, L, k.shape[2]) * shape.scale
    return shape.softcap * jnp.tanh(s / shape.softcap) if shape.softcap else s


def _weighted(p: Array, v: Array) -> Array:
    """p [B, K, G, L, S] @ v [B, K, S, Dh] -> float32 [B, K, G, L, Dh]."""
    B, K, G, L, S = p.shape
    o = jnp.einsum(
        "bkqs,bksd->bkqd", p.reshape(B, K, G * L, S), v, preferred_element_type=jnp.float32
    )
    return o.reshape(B, K, G, L, -1)


def _gradients(
    p: Array,
    s: Array | None,
    ok: Array | None,
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    inner: Array,
    shape: Shape,
) -> tuple[Array, Array, Array]:
    """float32 (dq, dk, dv) of a block from its probabilities; `inner` is sum(do * o) per query."""
    B, K, G, L, S = p.shape
    rows = (B, K, G * L)
    flat_q, flat_do = q.reshape(*rows, -1), do.reshape(*rows, -1)
    dv = jnp.einsum(
        "bkqs,bkqd->bksd", p.reshape(*rows, S), flat_do, preferred_element_type=jnp.float32
    )
    dp = jnp.einsum("bkqd,bksd->bkqs", flat_do, v, preferred_element_type=jnp.float32)
    ds = p.astype(jnp.float32) * (dp.reshape(p.shape) - inner)
    if shape.softcap:
        ds = ds * (1.0 - jnp.square(s / shape.softcap))
        ds = ds if ok is None else jnp.where(ok, ds, 0.0)
    ds = (ds * shape.scale).astype(q.dtype).reshape(*rows, S)
    dq = jnp.einsum("bkqs,bksd->bkqd", ds, k, preferred_element_type=jnp.float32).reshape(q.shape)
    dk = jnp.einsum("bkqs,bkqd->bksd", ds, flat_q, preferred_element_type=jnp.float32)
    return dq, dk, dv


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _xla(q: Array, k: Array, v: Array, mask: Mask, shape: Shape) -> Array:
    return _xla_forward(q, k, v, mask, shape)[0]


def _xla_forward(q: Array, k: Array, v: Array, mask: Mask, shape: Shape) -> tuple:
    forward = _whole_forward if q.shape[3] <= shape.block else _blocks_forward
    o, kept = forward(q, k, v, mask, shape)
    return o, (q, k, v, mask, o, kept)


def _xla_backward(shape: Shape, residuals: tuple, do: Array) -> tuple:
    q, k, v, mask, o, kept = residuals
    inner = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1, keepdims=True)
    backward = _whole_backward if q.shape[3] <= shape.block else _blocks_backward
    dq, dk, dv = backward(q, k, v, mask, do, inner, kept, shape)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_xla.defvjp(_xla_forward, _xla_backward)


def _whole_visible(q: Array, k: Array, mask: Mask, shape: Shape) -> Array | None:
    ok = visible(mask, shape, mask.start + jnp.arange(q.shape[3]), jnp.arange(k.shape[2]))
    return None if ok is None else ok[:, None, None]


def _whole_forward(q: Array, k: Array, v: Array, mask: Mask, shape: Shape) -> tuple[Array, Array]:
    s, ok = _scores(q, k, shape), _whole_visible(q, k, mask, shape)
    s = s if ok is None else jnp.where(ok, s, MASKED)
    p = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True))
    if mask.segments is not None:
        p = jnp.where(ok, p, 0.0)  # padding sees nobody
    p = (p / jnp.maximum(jnp.sum(p, axis=-1, keepdims=True), 1e-30)).astype(v.dtype)
    return _weighted(p, v).astype(q.dtype), p


def _whole_backward(q, k, v, mask, do, inner, p, shape) -> tuple[Array, Array, Array]:
    s, ok = (
        (_scores(q, k, shape), _whole_visible(q, k, mask, shape)) if shape.softcap else (None, None)
    )
    return _gradients(p, s, ok, q, k, v, do, inner, shape)


class _Blocks(NamedTuple):
    """Inputs padded to whole blocks, and the pairs (query block, key block) that can see each other."""

    size: int
    q: Array
    k: Array
    v: Array
    mask: Mask
    n_keys: int
    pairs: tuple[Array, Array]

    def part(self, i: Array, j: Array, shape: Shape) -> tuple[Array, Array, Array, Array]:
        """q, k, v and visibility [B or 1, 1, 1, size, size] of a pair."""
        at = lambda x, n, axis: jax.lax.dynamic_slice_in_dim(x, n * self.size, self.size, axis)  # noqa: E731
        sides = [None if x is None else (at(x[0], i, 1), at(x[1], j, 1)) for x in self.mask[:2]]
        q_slot = self.mask.start + i * self.size + jnp.arange(self.size)
        k_slot = j * self.size + jnp.arange(self.size)
        ok = (k_slot < self.n_keys)[None, None, :]
        if (more := visible(Mask(*sides), shape, q_slot, k_slot)) is not None:
            ok = ok & more
        return at(self.q, i, 3), at(self.k, j, 2), at(self.v, j, 2), ok[:, None, None]


def _cut(q: Array, k: Array, v: Array, mask: Mask, shape: Shape) -> _Blocks:
    size, L, S = shape.block, q.shape[3], k.shape[2]
    n, m = -(-L // size), -(-S // size)

    def pad(x: Array, axis: int, to: int) -> Array:
        return jnp.pad(x, [(0, to - x.shape[a] if a == axis else 0) for a in range(x.ndim)])

    sides = [
        None if x is None else (pad(x[0], 1, n * size), pad(x[1], 1, m * size)) for x in mask[:2]
    ]
    pairs = [(i, j) for i in range(n) for j in range(m)]
    if isinstance(mask.start, int):  # otherwise unknown before it runs
        first = lambda i: mask.start + i * size  # noqa: E731
        if shape.causal:
            pairs = [(i, j) for i, j in pairs if j * size < first(i) + size]
        if shape.window and shape.causal:
            pairs = [(i, j) for i, j in pairs if first(i) - (j * size + size - 1) < shape.window]
    i, j = (jnp.array(x, jnp.int32) for x in zip(*pairs, strict=True))
    q, k, v = pad(q, 3, n * size), pad(k, 2, m * size), pad(v, 2, m * size)
    return _Blocks(size, q, k, v, Mask(*sides, mask.start), S, (i, j))


def _blocks_forward(q: Array, k: Array, v: Array, mask: Mask, shape: Shape) -> tuple[Array, Array]:
    cut = _cut(q, k, v, mask, shape)

    def body(carry, pair):
        i, j = pair
        q_b, k_b, v_b, ok = cut.part(i, j, shape)
        o, top, z = (jax.lax.dynamic_slice_in_dim(x, i * cut.size, cut.size, 3) for x in carry)
        s = jnp.where(ok, _scores(q_b, k_b, shape), MASKED)
        new_top = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
        p = jnp.where(ok, jnp.exp(s - new_top), 0.0)
        fade = jnp.exp(top - new_top)
        o = o * fade + _weighted(p.astype(v.dtype), v_b)
        new = (o, new_top, z * fade + jnp.sum(p, axis=-1, keepdims=True))
        update = jax.lax.dynamic_update_slice_in_dim
        return tuple(update(x, y, i * cut.size, 3) for x, y in zip(carry, new, strict=True)), None

    vector = (*cut.q.shape[:4], 1)
    start = (jnp.zeros(cut.q.shape, jnp.float32), jnp.full(vector, MASKED), jnp.zeros(vector))
    (o, top, z), _ = jax.lax.scan(body, start, cut.pairs)
    z = jnp.maximum(z, 1e-30)
    return (o / z).astype(q.dtype)[:, :, :, : q.shape[3]], top + jnp.log(z)


def _blocks_backward(q, k, v, mask, do, inner, log_z, shape) -> tuple[Array, Array, Array]:
    cut = _cut(q, k, v, mask, shape)
    pad = [(0, 0)] * 3 + [(0, cut.q.shape[3] - q.shape[3]), (0, 0)]
    do, inner = jnp.pad(do, pad), jnp.pad(inner, pad)

    def body(carry, pair):
        i, j = pair
        q_b, k_b, v_b, ok = cut.part(i, j, shape)
        rows = lambda x: jax.lax.dynamic_slice_in_dim(x, i * cut.size, cut.size, 3)  # noqa: E731
        s = _scores(q_b, k_b, shape)
        p = jnp.where(ok, jnp.exp(s - rows(log_z)), 0.0).astype(v.dtype)
        new = _gradients(p, s, ok, q_b, k_b, v_b, rows(do), rows(inner), shape)
        out = []
        for total, part, n, axis in zip(carry, new, (i, j, j), (3, 2, 2), strict=True):
            old = jax.lax.dynamic_slice_in_dim(total, n * cut.size, cut.size, axis)
            out.append(jax.lax.dynamic_update_slice_in_dim(total, old + part, n * cut.size, axis))
        return tuple(out), None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (cut.q, cut.k, cut.v))
    (dq, dk, dv), _ = jax.lax.scan(body, start, cut.pairs)
    return dq[:, :, :, : q.shape[3]], dk[:, :, : k.shape[2]], dv[:, :, : k.shape[2]]


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
    return {"xla": xla, "cudnn": cudnn, "reference": reference}[implementation](
        q, k, v, mask, shape
    )


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


def layer(
    p: PyTree, x_BxLxD: Array, side: PyTree, cache: PyTree | None, i: Array, cfg: ModelConfig
):
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
