"""Softmax attention in plain XLA: the reference, and matmuls over whole rows or over blocks.

Inside, heads lead and query heads are grouped by the key head that they share, [B, K, G, L, Dh],
so that one batched matmul serves MHA, GQA and MQA without repeating keys. Causality is by cache
slot (a row is written in order); packed documents are kept apart by their segments; the sliding
window counts positions.
"""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.types import Array, PyTree

MASKED = -1e30  # finite, so that a row without any key gives 0 and not NaN
EVERYONE = -1  # the segment of keys that all documents of a row see: a trained prefix
# Rows that are worked on whole go through in strips of queries, each with the keys up to its end.
# Four leave out 3/8 of the work; more make matmuls that are too small.
MAX_STRIPS, MIN_STRIP = 4, 64


class Mask(NamedTuple):
    """Who may see whom. `segments` and `positions` are (queries [B, L], keys [B, S]) or None, which
    says that each row is one document whose slots are its positions. Within a document positions
    run as the slots do: blocks that a window cannot reach are left out by slot, unless there are
    `parents`, the segments that those of the queries go on from and see as well."""

    segments: tuple[Array, Array] | None = None
    positions: tuple[Array, Array] | None = None
    start: Array | int = 0  # slot of the first query
    parents: Array | None = None  # [B, L]; a segment's own number where it goes on from none

    @property
    def cached(self) -> bool:
        """Whether the queries are not known to start at slot 0."""
        return not (isinstance(self.start, int) and self.start == 0)


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
        same = (q_seg == k_seg) | (k_seg == EVERYONE)
        if mask.parents is not None:
            same |= mask.parents[:, :, None] == k_seg
        same &= q_seg > 0
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
# queries the exponentials are kept for the backward pass. Past that, pairs of a query block and a
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
    forward = _whole_forward if q.shape[3] <= shape.block else blocks_forward
    o, kept = forward(q, k, v, _known_start(mask), shape)
    o = o.astype(q.dtype)
    return o, (q, k, v, mask, o, kept)


def _xla_backward(shape: Shape, residuals: tuple, do: Array) -> tuple:
    q, k, v, mask, o, kept = residuals
    inner = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1, keepdims=True)
    backward = _whole_backward if q.shape[3] <= shape.block else blocks_backward
    dq, dk, dv = backward(q, k, v, _known_start(mask), do, inner, kept, shape)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_xla.defvjp(_xla_forward, _xla_backward)


def _known_start(mask: Mask) -> Mask:
    """None, which stays static through the custom derivative, back to slot 0. Every other start is
    an array: JAX hands some on as integers, in one of the two passes alone."""
    return mask._replace(start=0 if mask.start is None else jnp.asarray(mask.start))


class _Strip(NamedTuple):
    """Queries [first:end] and the keys [low:high] that one of them at least can see."""

    first: int
    end: int
    low: int
    high: int

    def part(self, q: Array, k: Array, v: Array, mask: Mask, shape: Shape) -> tuple:
        """q, k, v and visibility (bool [B or 1, 1, 1, queries, keys] or None) of the strip."""
        rows, keys = slice(self.first, self.end), slice(self.low, self.high)
        sides = [None if x is None else (x[0][:, rows], x[1][:, keys]) for x in mask[:2]]
        q_slot, k_slot = jnp.arange(self.first, self.end), jnp.arange(self.low, self.high)
        parents = None if mask.parents is None else mask.parents[:, rows]
        ok = visible(Mask(*sides, parents=parents), shape, mask.start + q_slot, k_slot)
        ok = None if ok is None else ok[:, None, None]
        return q[:, :, :, rows], k[:, :, keys], v[:, :, keys], ok


def _strips(q: Array, k: Array, mask: Mask, shape: Shape) -> list[_Strip]:
    """Up to MAX_STRIPS strips of MIN_STRIP queries or more; one where nothing would be saved."""
    L, S = q.shape[3], k.shape[2]
    if not shape.causal or not isinstance(mask.start, int):
        return [_Strip(0, L, 0, S)]
    n = max(1, min(MAX_STRIPS, L // MIN_STRIP))
    cuts = [i * L // n for i in range(n + 1)]
    window = shape.window if mask.parents is None else 0
    return [
        _Strip(a, b, max(0, a - window + 1) if window else 0, min(b, S))
        for a, b in itertools.pairwise(cuts)
    ]


def _whole_forward(q: Array, k: Array, v: Array, mask: Mask, shape: Shape) -> tuple[Array, PyTree]:
    """float32 o and, per strip, what the backward pass needs: exp(s - max) in v's type and one over
    its sum. The sum is divided out of the output, which is smaller than the probabilities."""
    outputs, kept = [], []
    for strip in _strips(q, k, mask, shape):
        q_s, k_s, v_s, ok = strip.part(q, k, v, mask, shape)
        s = _scores(q_s, k_s, shape)
        s = s if ok is None else jnp.where(ok, s, MASKED)
        e = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True))
        if mask.segments is not None:
            e = jnp.where(ok, e, 0.0)  # padding sees nobody
        scale = 1.0 / jnp.maximum(jnp.sum(e, axis=-1, keepdims=True), 1e-30)
        e = e.astype(v.dtype)
        outputs.append(_weighted(e, v_s) * scale)
        kept.append((e, scale))
    return jnp.concatenate(outputs, axis=3) if len(outputs) > 1 else outputs[0], kept


def _whole_backward(q, k, v, mask, do, inner, kept, shape) -> tuple[Array, Array, Array]:
    dqs, dk, dv = [], 0.0, 0.0
    for strip, (e, scale) in zip(_strips(q, k, mask, shape), kept, strict=True):
        q_s, k_s, v_s, ok = strip.part(q, k, v, mask, shape)
        s = _scores(q_s, k_s, shape) if shape.softcap else None
        rows = slice(strip.first, strip.end)
        do_s = (do[:, :, :, rows].astype(jnp.float32) * scale).astype(do.dtype)
        inner_s = inner[:, :, :, rows] * scale
        dq, dk_s, dv_s = _gradients(e, s, ok, q_s, k_s, v_s, do_s, inner_s, shape)
        dqs.append(dq)
        around = [(0, 0), (0, 0), (strip.low, k.shape[2] - strip.high), (0, 0)]
        dk, dv = dk + jnp.pad(dk_s, around), dv + jnp.pad(dv_s, around)
    return jnp.concatenate(dqs, axis=3) if len(dqs) > 1 else dqs[0], dk, dv


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
        # Always 0, but only known with q: else JAX would see that masks are not differentiated, make
        # those of all pairs ahead of the loops and keep them, [pairs, B, H, size, size].
        zero = jnp.sum(self.q[:0]).astype(jnp.int32)
        i, j = i + zero, j + zero
        sides = [None if x is None else (at(x[0], i, 1), at(x[1], j, 1)) for x in self.mask[:2]]
        parents = None if self.mask.parents is None else at(self.mask.parents, i, 1)
        q_slot = self.mask.start + i * self.size + jnp.arange(self.size)
        k_slot = j * self.size + jnp.arange(self.size)
        ok = (k_slot < self.n_keys)[None, None, :]
        if (more := visible(Mask(*sides, parents=parents), shape, q_slot, k_slot)) is not None:
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
    if isinstance(mask.start, int):  # otherwise not known before it runs
        first = lambda i: mask.start + i * size  # noqa: E731
        if shape.causal:
            pairs = [(i, j) for i, j in pairs if j * size < first(i) + size]
        if shape.window and shape.causal and mask.parents is None:
            pairs = [(i, j) for i, j in pairs if first(i) - (j * size + size - 1) < shape.window]
    i, j = (jnp.array(x, jnp.int32) for x in zip(*pairs, strict=True))
    q, k, v = pad(q, 3, n * size), pad(k, 2, m * size), pad(v, 2, m * size)
    parents = None if mask.parents is None else pad(mask.parents, 1, n * size)
    return _Blocks(size, q, k, v, Mask(*sides, mask.start, parents), S, (i, j))


def blocks_forward(q: Array, k: Array, v: Array, mask: Mask, shape: Shape) -> tuple[Array, Array]:
    """float32 (o [B, K, G, L, Dh], log_z [B, K, G, L, 1]) of q [B, K, G, L, Dh] and k, v [B, K, S, Dh].

    log_z is the log of the softmax denominator; a query that sees no key has o = 0 and
    log_z = MASKED, and so no share where outputs over different keys are merged.
    """
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
    L = q.shape[3]
    return (o / z)[:, :, :, :L], (top + jnp.log(z))[:, :, :, :L]


def blocks_backward(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    do: Array,
    inner: Array,
    log_z: Array,
    shape: Shape,
) -> tuple[Array, Array, Array]:
    """float32 (dq, dk, dv) that come of these keys, which need not be all that `log_z` counts.

    `inner` [B, K, G, L, 1] is sum(do * o) and `log_z` the log of the denominator, over all keys.
    """
    cut = _cut(q, k, v, mask, shape)
    pad = [(0, 0)] * 3 + [(0, cut.q.shape[3] - q.shape[3]), (0, 0)]
    do, inner, log_z = (jnp.pad(x, pad) for x in (do, inner, log_z))

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
    mask = mask if mask.cached else mask._replace(start=None)
    o = _xla(q, k_BxSxKxDh.transpose(0, 2, 1, 3), v_BxSxKxDh.transpose(0, 2, 1, 3), mask, shape)
    return o.transpose(0, 3, 1, 2, 4).reshape(B, L, H, Dh)
