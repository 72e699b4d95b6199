"""Optimizer states kept in fewer bits: half the memory of AdamW's moments, rounded without bias."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.types import Array, PyTree


class Narrow(NamedTuple):
    """The state of `stored_as`."""

    count: Array  # int32 scalar, updates so far
    inner: PyTree


def stored_as(optimizer: optax.GradientTransformation, dtype: Any) -> optax.GradientTransformation:
    """The same optimizer, whose float32 states of the parameters' size are kept in `dtype`.

    The arithmetic stays float32; what is kept is rounded stochastically. Rounding to the nearest
    would freeze second moments: with b2 = 0.999 a step moves them by a thousandth, and bfloat16's
    neighbours are 0.4 to 0.8 % apart.
    """

    def init(params: PyTree) -> Narrow:
        state = jax.tree.map(
            lambda x: x.astype(dtype) if x.dtype == jnp.float32 and x.ndim else x,
            optimizer.init(params),
        )
        return Narrow(jnp.int32(0), state)

    def update(updates: PyTree, state: Narrow, params: PyTree | None = None, **more):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == dtype else x, state.inner)
        updates, new = optimizer.update(updates, wide, params, **more)
        inner = jax.tree.map(
            lambda x, old: round_stochastically(x, state.count) if old.dtype == dtype else x,
            new,
            state.inner,
        )
        return updates, Narrow(state.count + 1, inner)

    return optax.GradientTransformation(init, update)


def round_stochastically(x: Array, step: Array) -> Array:
    """float32 -> bfloat16, up or down with probabilities that make the mean exact.

    The coin is a hash of the number's own 32 bits and the step: it needs no key and costs a few
    integer operations. What bfloat16 holds exactly, infinities and NaNs stay what they are.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    h = (bits + step.astype(jnp.uint32) * jnp.uint32(0xC2B2AE3D)) * jnp.uint32(0x9E3779B1)
    h = (h ^ (h >> 15)) * jnp.uint32(0x85EBCA77)
    rounded = (bits + (h >> 16)) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
