"""Ring attention (Liu et al. 2023, arXiv 2310.01889): rows cut along their length over devices.

Keys and values travel round the "context" axis of the mesh; what a device's queries find in each
stretch of keys is merged by the softmax denominators. The backward pass goes round again and
computes the probabilities anew, and the gradients of keys and values travel with them.

Causal rows would leave the devices of their beginning idle. So, for the time of attention, c
devices share 2c stretches of a row like this (Llama 3, arXiv 2407.21783, section 3.3.2), c = 3:

    outside  device 0: 0 1   device 1: 2 3   device 2: 4 5
    inside   device 0: 0 5   device 1: 1 4   device 2: 2 3

At home a device works on (low, low), (high, low) and (high, high), the first and last of them
causal. Keys from device j then meet device i's high stretch with their low one, and besides
(low, low) if j < i or (high, high) if j > i: two blocks in every step, nothing masked.

The work within a block is `blockwise`'s plain XLA matmuls with a running softmax, on every
backend: neither cuDNN nor a kernel of one's own.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax import sharding
from llm_jax.nn.blockwise import MASKED, Mask, Shape, blocks_backward, blocks_forward
from llm_jax.types import Array, PyTree

AXIS = "context"
QUERIES, KEYS = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)
TOKENS, LOG_Z = ("batch", "length"), (None, "batch", "kv_heads", None, "length", None)


def context_size() -> int:
    """Devices that the ambient mesh cuts rows over; 1 without a mesh."""
    mesh = sharding.ambient_mesh()
    return 1 if mesh is None else mesh.shape[AXIS]


def ring(
    q_BxLxHxDh: Array, k_BxSxKxDh: Array, v_BxSxKxDh: Array, mask: Mask, shape: Shape
) -> Array:
    """Attention over a mesh with context > 1; same arguments and result as `reference`.

    Raises:
      ValueError: the mesh does not cut rows, or not into equal stretches, or the call is cached.
    """
    n, L, S = context_size(), q_BxLxHxDh.shape[1], k_BxSxKxDh.shape[1]
    if n == 1:
        raise ValueError(
            "model.attention=ring needs mesh.context > 1, not 1; use model.attention=auto"
        )
    if mask.cached:
        raise ValueError("model.attention=ring cannot do a cached call; use model.attention=auto")
    if mask.parents is not None:
        raise ValueError(
            "mesh.context > 1: a ring cannot do answers that share their prompt's tokens; set "
            "data.preference.shared_prompt=False"
        )
    if shape.causal and L != S:
        raise ValueError(f"causal ring attention of {L} queries needs as many keys, not {S}")
    plan = _plan(n, L, shape)
    for length in (L, S):
        if length % (n * plan.pieces):
            times = "2 * " if plan.zigzag else ""
            raise ValueError(
                f"length={length} is not divisible by {times}mesh.context ({times}{n}), into which "
                "ring attention cuts it; change one of them"
            )
    positions = mask.positions if shape.window else None
    if shape.window and positions is None:
        slots = (jnp.arange(length)[None] for length in (L, S))
        positions = tuple(jnp.broadcast_to(x, (q_BxLxHxDh.shape[0], x.shape[1])) for x in slots)
    sides = (mask.segments, positions)
    return _ring(q_BxLxHxDh, k_BxSxKxDh, v_BxSxKxDh, sides, shape, plan)


class _Plan(NamedTuple):
    """How a row is shared out, and how far keys travel."""

    size: int  # devices in the ring
    steps: int  # until keys have met all queries that may see them
    zigzag: bool

    @property
    def pieces(self) -> int:
        """Stretches of a row on each device."""
        return 2 if self.zigzag else 1


def _plan(size: int, length: int, shape: Shape) -> _Plan:
    if not shape.causal:
        return _Plan(size, size, zigzag=False)
    if shape.window and 2 * shape.window <= length:
        # Every query sees a window of the same length: devices are balanced as they are, and
        # keys that no window reaches need not come.
        steps_back = -(-(shape.window - 1) // -(-length // size))
        return _Plan(size, 1 + steps_back, zigzag=False)
    return _Plan(size, size, zigzag=True)


class _Block(NamedTuple):
    """A stretch of queries and one of keys that meet in a step."""

    queries: Array | int  # which of this device's
    keys: Array | int  # which of those that have come
    causal: bool
    start: Array | int = 0  # slots from the first key to the first query, if causal
    exists: Array | bool = True  # False: the ring has wrapped round, these keys lie ahead


def _blocks(plan: _Plan, shape: Shape, t: Array | int, S: int) -> list[_Block]:
    """The blocks of step t, with S keys each."""
    i = jax.lax.axis_index(AXIS)
    if not plan.zigzag:
        return [_Block(0, 0, shape.causal, t * S, i >= t if shape.causal else True)]
    if isinstance(t, int) and t == 0:
        return [_Block(0, 0, True), _Block(1, 0, False), _Block(1, 1, True)]
    past = jnp.where((i - t) % plan.size < i, 0, 1)  # the keys' device came before this one: low
    return [_Block(1, 0, False), _Block(past, past, False)]


# Moving things ---------------------------------------------------------------------------------


def _shift(tree: PyTree, size: int, by: int = 1) -> PyTree:
    """What the device `by` places before this one holds."""
    return jax.lax.ppermute(tree, AXIS, [(d, (d + by) % size) for d in range(size)])


def _routes(size: int) -> list[list[tuple[int, int]]]:
    """(from, to) of the devices' first and second stretches: those with even and odd numbers."""
    return [
        [(d, min(n, 2 * size - 1 - n)) for d, n in enumerate(range(parity, 2 * size, 2))]
        for parity in (0, 1)
    ]


def _swap_on_odd(a: Array, b: Array) -> tuple[Array, Array]:
    """Low stretches have the parity of their device's number, high ones the other."""
    odd = jax.lax.axis_index(AXIS) % 2 == 1
    return jnp.where(odd, b, a), jnp.where(odd, a, b)


def _rearrange(x: Array, plan: _Plan) -> Array:
    """[B, l, ...] of this device -> the stretches it works on, [pieces, B, l / pieces, ...]."""
    if not plan.zigzag:
        return x[None]
    parts = zip(jnp.split(x, 2, axis=1), _routes(plan.size), strict=True)
    even, odd = (jax.lax.ppermute(part, AXIS, route) for part, route in parts)
    return jnp.stack(_swap_on_odd(even, odd))


def _restore(x: Array, plan: _Plan) -> Array:
    """The inverse of `_rearrange`."""
    if not plan.zigzag:
        return x[0]
    parts = zip(_swap_on_odd(x[0], x[1]), _routes(plan.size), strict=True)
    back = [jax.lax.ppermute(part, AXIS, [(b, a) for a, b in route]) for part, route in parts]
    return jnp.concatenate(back, axis=1)


def _travel(work: Callable, state: PyTree, keys: PyTree, riders: PyTree, plan: _Plan) -> tuple:
    """Runs `state, riders = work(state, keys, riders, t)` for each step t; returns the last two.

    Keys move on by one device a step, sent off before the step's work on them; riders move with
    them, but changed by it.
    """
    shift = partial(_shift, size=plan.size)
    last = plan.steps - 1

    def step(carry: tuple, t: Array) -> tuple:
        state, keys, riders = carry
        following, riders = shift(keys), shift(riders)
        state, riders = work(state, keys, riders, t)
        return (state, following, riders), None

    following = shift(keys) if last else keys
    state, riders = work(state, keys, riders, 0)
    if last > 1:
        (state, following, riders), _ = jax.lax.scan(
            step, (state, following, riders), jnp.arange(1, last)
        )
    if last:
        state, riders = work(state, following, shift(riders), last)
    return state, riders


# Both passes -----------------------------------------------------------------------------------


def _group(x: Array, K: int) -> Array:
    """[pieces, B, L, H, n] -> [pieces, B, K, G, L, n]."""
    P, B, L, H, n = x.shape
    return x.reshape(P, B, L, K, H // K, n).transpose(0, 1, 3, 4, 2, 5)


def _ungroup(x: Array) -> Array:
    P, B, K, G, L, n = x.shape
    return x.transpose(0, 1, 4, 2, 3, 5).reshape(P, B, L, K * G, n)


def _at(tree: PyTree, i: Array | int) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _put(tree: PyTree, new: PyTree, i: Array | int) -> PyTree:
    update = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda x, y: update(x, y, i, 0), tree, new)


def _add(x: Array, new: Array, i: Array | int) -> Array:
    return _put(x, _at(x, i) + new, i)


def _inputs(q: Array, k: Array, v: Array, sides: tuple, plan: _Plan) -> tuple[PyTree, PyTree]:
    """(q, sides) and (k, v, sides), in stretches and with heads leading."""
    q, k, v, sides = jax.tree.map(partial(_rearrange, plan=plan), (q, k, v, sides))
    q_sides, k_sides = ([None if s is None else s[n] for s in sides] for n in (0, 1))
    heads_lead = lambda x: x.transpose(0, 1, 3, 2, 4)  # noqa: E731
    return (_group(q, k.shape[3]), q_sides), (heads_lead(k), heads_lead(v), k_sides)


def _meet(queries: PyTree, keys: PyTree, block: _Block, shape: Shape) -> tuple:
    """q, k, v, mask and shape of a block, for `blockwise`."""
    (q, q_sides), (k, v, k_sides) = _at(queries, block.queries), _at(keys, block.keys)
    pairs = zip(q_sides, k_sides, strict=True)
    mask = Mask(*(None if a is None else (a, b) for a, b in pairs), block.start)
    # Blocks of equal size, so that none is mostly padding.
    longest = max(q.shape[3], k.shape[2])
    size = -(-longest // -(-longest // shape.block))
    return q, k, v, mask, shape._replace(causal=block.causal, block=size)


def _forward(q: Array, k: Array, v: Array, sides: tuple, *, shape: Shape, plan: _Plan):
    """(o [B, l, H, Dh], log_z [pieces, B, K, G, l / pieces, 1]) of one device."""
    dtype = q.dtype
    queries, keys = _inputs(q, k, v, sides, plan)
    S = keys[0].shape[3]

    def work(state, keys, riders, t):
        for block in _blocks(plan, shape, t, S):
            o, log_z = blocks_forward(*_meet(queries, keys, block, shape))
            log_z = jnp.where(block.exists, log_z, MASKED)
            old_o, old_z = _at(state, block.queries)
            new_z = jnp.logaddexp(old_z, log_z)
            new_o = old_o * jnp.exp(old_z - new_z) + o * jnp.exp(log_z - new_z)
            state = _put(state, (new_o, new_z), block.queries)
        return state, riders

    shape_z = (*queries[0].shape[:-1], 1)
    start = (jnp.zeros(queries[0].shape, jnp.float32), jnp.full(shape_z, MASKED, jnp.float32))
    (o, log_z), _ = _travel(work, start, keys, (), plan)
    return _restore(_ungroup(o.astype(dtype)), plan), log_z


def _backward(
    q: Array,
    k: Array,
    v: Array,
    sides: tuple,
    do: Array,
    inner: Array,
    log_z: Array,
    *,
    shape: Shape,
    plan: _Plan,
):
    """dq, dk, dv of one device, laid out as q, k, v."""
    dtypes = (q.dtype, k.dtype, v.dtype)
    queries, keys = _inputs(q, k, v, sides, plan)
    K, S = keys[0].shape[2:4]
    seen = (_group(_rearrange(do, plan), K), _group(_rearrange(inner, plan), K), log_z)

    def work(dq, keys, dkv, t):
        for block in _blocks(plan, shape, t, S):
            *inputs, inner_shape = _meet(queries, keys, block, shape)
            new = blocks_backward(*inputs, *_at(seen, block.queries), inner_shape)
            new_q, *new_kv = (jnp.where(block.exists, x, 0.0) for x in new)
            dq = _add(dq, new_q, block.queries)
            dkv = [_add(x, y, block.keys) for x, y in zip(dkv, new_kv, strict=True)]
        return dq, dkv

    zeros = partial(jnp.zeros_like, dtype=jnp.float32)
    dq, dkv = _travel(work, zeros(queries[0]), keys, [zeros(x) for x in keys[:2]], plan)
    dk, dv = _shift(dkv, plan.size, 1 - plan.steps)
    out = (_ungroup(dq), dk.transpose(0, 1, 3, 2, 4), dv.transpose(0, 1, 3, 2, 4))
    return tuple(_restore(x.astype(t), plan) for x, t in zip(out, dtypes, strict=True))


def _over_mesh(f: Callable, inputs: str, outputs: str, sides: PyTree) -> Callable:
    """f under a fully manual shard_map; a letter of "qksz" says how an argument is laid out."""
    mesh = sharding.ambient_mesh()
    axes = {"q": QUERIES, "k": KEYS, "z": LOG_Z}
    specs = {name: sharding.partition_spec(a, mesh) for name, a in axes.items()}
    specs["s"] = jax.tree.map(lambda _: sharding.partition_spec(TOKENS, mesh), sides)
    ins, outs = (tuple(specs[x] for x in names) for names in (inputs, outputs))
    return jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _ring(q: Array, k: Array, v: Array, sides: tuple, shape: Shape, plan: _Plan) -> Array:
    return _ring_forward(q, k, v, sides, shape, plan)[0]


def _ring_forward(q: Array, k: Array, v: Array, sides: tuple, shape: Shape, plan: _Plan) -> tuple:
    forward = partial(_forward, shape=shape, plan=plan)
    run = _over_mesh(forward, "qkks", "qz", sides)
    # By these names model.remat=attention finds all that the backward pass needs of this one.
    o, log_z = (checkpoint_name(x, "attention") for x in run(q, k, v, sides))
    return o, (q, k, v, sides, o, log_z)


def _ring_backward(shape: Shape, plan: _Plan, saved: tuple, do: Array) -> tuple:
    q, k, v, sides, o, log_z = saved
    inner = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1, keepdims=True)
    backward = partial(_backward, shape=shape, plan=plan)
    run = _over_mesh(backward, "qkksqqz", "qkk", sides)
    return *run(q, k, v, sides, do, inner, log_z), None


_ring.defvjp(_ring_forward, _ring_backward)
