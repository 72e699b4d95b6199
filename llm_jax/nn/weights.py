"""Weight leaves: what `dense` and `embed` accept where a parameter tree has a matrix.

A leaf is an array, or an object with the methods of `Weight` (low-rank, quantised, masked, with an
adapter). It is consumed inside the layer: merging a whole tree before the scan over layers would
cost several times the temporary memory. Of the layers' leaves every array leads with the layer
axis, so that a scan over layers, or a cut of one layer, goes through a leaf as through an array.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from llm_jax.types import Array, PyTree


@runtime_checkable
class Weight(Protocol):
    """A matrix of shape [D_in, D_out] (or [rows, D] for a table) that is not a plain array.

    A leaf may also have `after(y)`, which it does to its product once the bias has been added (a
    bottleneck adapter), and `seeded(keys_B)`, itself with a key for each row of the batch (dropout
    in training).
    """

    shape: tuple[int, ...]

    def matmul(self, x: Array) -> Array:
        """x [..., D_in] -> [..., D_out]."""

    def rows(self, ids: Array) -> Array:
        """ids [...] -> [..., D]."""

    def dequantize(self, dtype: Any) -> Array:
        """The plain array."""

    def layout(self, axes: tuple[str | None, ...]) -> "Weight":
        """The same object with a tuple of logical axes for each array: `axes` are the matrix's."""


def is_weight(leaf: Any) -> bool:
    """Whether a leaf is an object; for `tree.map(..., is_leaf=)`."""
    return isinstance(leaf, Weight)


def matmul(w: Array | Weight, x: Array) -> Array:
    """x [..., D_in] times w, in x's type."""
    if isinstance(w, Weight):
        return w.matmul(x)
    return jnp.matmul(x, w.astype(x.dtype))


def affine(p: PyTree, x: Array) -> Array:
    """x @ w + bias of a p with "w" and perhaps "bias", and what the leaf does after that."""
    y = matmul(p["w"], x)
    if "bias" in p:
        y = y + p["bias"].astype(y.dtype)[(None,) * (y.ndim - 1)]
    return p["w"].after(y) if hasattr(p["w"], "after") else y


def rows(w: Array | Weight, ids: Array) -> Array:
    """Rows of a table."""
    if isinstance(w, Weight):
        return w.rows(ids)
    return jnp.take(w, ids, axis=0, mode="clip")


def dequantize(w: Array | Weight, dtype: Any) -> Array:
    """A plain array of the given type."""
    return w.dequantize(dtype) if isinstance(w, Weight) else w.astype(dtype)


def seeded(params: PyTree, keys_B: Array | None) -> PyTree:
    """The parameters of a layer whose leaves drop out with these keys, one per row; None: evaluation."""
    if keys_B is None:
        return params
    return jax.tree.map(
        lambda w: w.seeded(keys_B) if hasattr(w, "seeded") else w, params, is_leaf=is_weight
    )
