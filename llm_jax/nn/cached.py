"""Attention over a cache of keys and values: what decoding does once a token and layer.

There the time goes into reading the weights and the cache, so nothing may copy either. Keys and
values enter their matmuls as they are stored. A cache comes in one of two forms: stacked leaves
[M, B, K, S, Dh], out of which a layer has to be cut, or, where layers run in a loop on one device,
a queue with an entry a layer. Keys and values are held in the type that the model computes in, or
as int8 with a scale for each row, head and slot; then one layer's at a time are made plain.
"""

import math

import jax
import jax.numpy as jnp

from llm_jax import sharding
from llm_jax.nn.blockwise import MASKED, Mask, Shape, visible
from llm_jax.types import Array, PyTree


def empty(shapes: dict[str, tuple[int, ...]], dtype: str) -> PyTree:
    """Zeros for stacked keys and values "k", "v" of the given shapes; for int8 also "k_scale" and
    "v_scale" [M, B, K, S, 1]."""

    def zeros(shape: tuple[int, ...], dtype: str) -> Array:
        return sharding.constrain(jnp.zeros(shape, dtype), None, "batch", "kv_heads", None, None)

    layers = {name: zeros(shape, dtype) for name, shape in shapes.items()}
    if dtype == "int8":
        layers |= {f"{n}_scale": zeros((*s[:-1], 1), "float32") for n, s in shapes.items()}
    return layers


def queue(cache: PyTree, n_layers: int) -> tuple[PyTree, ...]:
    """Stacked keys and values [M, B, K, S, Dh] -> a tuple of one tree of leaves [B * K, S, Dh] a layer.

    Rows and heads share an axis: for one row XLA would drop the axis of rows in front of the matmul
    and copy the cache to do so.
    """
    split = jax.tree.map(lambda x: jax.lax.split(x, [1] * n_layers, axis=0), cache)
    return tuple(
        {name: pieces[i].reshape(-1, *pieces[i].shape[3:]) for name, pieces in split.items()}
        for i in range(n_layers)
    )


def append(
    k_BxLxKxDh: Array, v_BxLxKxDh: Array, cache: PyTree, start: Array, i: Array
) -> tuple[Array, Array, PyTree]:
    """Writes the new keys and values of layer `i` at slot `start`.

    Returns the layer's whole keys and values [B, K, S, Dh] or [B * K, S, Dh], and the cache. In a
    queue the layer whose turn it is stands first and goes to the end, so that after all layers they
    stand as before.
    """
    new = {"k": k_BxLxKxDh.transpose(0, 2, 1, 3), "v": v_BxLxKxDh.transpose(0, 2, 1, 3)}
    layer = cache[0] if isinstance(cache, tuple) else cache
    if "k_scale" in layer:
        new = _quantized(new)
    write = jax.lax.dynamic_update_slice
    if isinstance(cache, tuple):
        own = {
            n: write(layer[n], x.reshape(-1, *x.shape[2:]).astype(layer[n].dtype), (0, start, 0))
            for n, x in new.items()
        }
        cache = (*cache[1:], own)
    else:
        cache = {
            n: write(cache[n], x[None].astype(cache[n].dtype), (i, 0, 0, start, 0))
            for n, x in new.items()
        }
        own = {n: jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for n, x in cache.items()}
    if "k_scale" in own:
        own = {n: own[n].astype(jnp.float32) * own[f"{n}_scale"] for n in ("k", "v")}
    return own["k"].astype(k_BxLxKxDh.dtype), own["v"].astype(v_BxLxKxDh.dtype), cache


def _quantized(new: PyTree) -> PyTree:
    """Keys and values [..., Dh] as round(127 x / max|x|) of each vector, and the scales [..., 1]."""
    out = {}
    for name, x in new.items():
        x = x.astype(jnp.float32)
        top = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        out[name] = jnp.round(127.0 * x / jnp.where(top == 0, 1.0, top))
        out[f"{name}_scale"] = top / 127.0
    return out


def attend(q_BxLxHxDh: Array, k: Array, v: Array, mask: Mask, shape: Shape) -> Array:
    """Softmax attention of few queries over the whole cache, k and v [B, K, S, Dh] or [B * K, S, Dh].

    Makes the scores [B, H, L, S]; the result [B, L, H, Dh] is that of `blockwise.reference`.
    """
    B, L, H, Dh = q_BxLxHxDh.shape
    *lead, S, _ = k.shape
    K = math.prod(lead) // B
    heads = (B, K, H // K, L)
    q = q_BxLxHxDh.reshape(B, L, K, H // K, Dh).transpose(0, 2, 3, 1, 4).reshape(*lead, -1, Dh)
    s = jnp.einsum("...qd,...sd->...qs", q, k, preferred_element_type=jnp.float32)
    s = s.reshape(*heads, S) * shape.scale
    if shape.softcap:
        s = shape.softcap * jnp.tanh(s / shape.softcap)
    ok = visible(mask, shape, mask.start + jnp.arange(L), jnp.arange(S))
    ok = jnp.ones((1, L, S), bool) if ok is None else ok
    ok = ok[:, None, None]
    s = jnp.where(ok, s, MASKED)
    p = jnp.where(ok, jnp.exp(s - jnp.max(s, axis=-1, keepdims=True)), 0.0)
    p = p / jnp.maximum(jnp.sum(p, axis=-1, keepdims=True), 1e-30)  # padding sees nobody: 0
    p = p.astype(v.dtype).reshape(*lead, -1, S)
    o = jnp.einsum("...qs,...sd->...qd", p, v, preferred_element_type=jnp.float32)
    return o.astype(q.dtype).reshape(*heads, Dh).transpose(0, 3, 1, 2, 4).reshape(B, L, H, Dh)
