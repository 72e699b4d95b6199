"""Weight leaves: what `dense` and `embed` accept where a parameter tree has a matrix.

A leaf is an array, or an object with the three methods of `Weight` (low-rank, quantised, masked,
with an adapter). It is consumed inside the layer: merging a whole tree before the scan over layers
would cost several times the temporary memory.
"""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp

from llm_jax.types import Array


@runtime_checkable
class Weight(Protocol):
    """A matrix of shape [D_in, D_out] (or [rows, D] for a table) that is not a plain array."""

    shape: tuple[int, ...]

    def matmul(self, x: Array) -> Array:
        """x [..., D_in] -> [..., D_out]."""

    def rows(self, ids: Array) -> Array:
        """ids [...] -> [..., D]."""

    def dequantize(self, dtype: Any) -> Array:
        """The plain array."""


def matmul(w: Array | Weight, x: Array) -> Array:
    """x [..., D_in] times w, in x's type."""
    if isinstance(w, Weight):
        return w.matmul(x)
    return jnp.matmul(x, w.astype(x.dtype))


def rows(w: Array | Weight, ids: Array) -> Array:
    """Rows of a table."""
    if isinstance(w, Weight):
        return w.rows(ids)
    return jnp.take(w, ids, axis=0, mode="clip")


def dequantize(w: Array | Weight, dtype: Any) -> Array:
    """A plain array of the given type."""
    return w.dequantize(dtype) if isinstance(w, Weight) else w.astype(dtype)
