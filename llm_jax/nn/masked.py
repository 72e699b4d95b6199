"""Pruned matrices as weight leaves: with a mask that is given, or one that learned scores make."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.types import Array


class _Sparse:
    """What the two have in common: a matrix `w`, some of whose entries count as 0."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(np.shape(self.w))

    def matmul(self, x: Array) -> Array:
        """x [..., D_in] -> [..., D_out]."""
        return jnp.matmul(x, self.dequantize(x.dtype))

    def rows(self, ids: Array) -> Array:
        """ids [...] -> [..., D_out]."""
        return jnp.take(self.dequantize(self.w.dtype), ids, axis=0, mode="clip")


@flax.struct.dataclass
class Masked(_Sparse):
    """w * mask: what is pruned counts as 0 and gets no gradient."""

    w: Array  # [D_in, D_out]
    mask: Array  # bool, of the same shape

    def dequantize(self, dtype: Any) -> Array:
        """The matrix with zeros."""
        return jnp.where(self.mask, self.w, 0).astype(dtype)

    def layout(self, axes: tuple[str | None, ...]) -> "Masked":
        """Both arrays are cut as the matrix is."""
        return Masked(axes, axes)


@flax.struct.dataclass
class Scored(_Sparse):
    """w where its score is at least the threshold, else 0 (movement pruning, Sanh et al. 2020).

    The gradient goes straight through the comparison: a score's is that of the weight in use times
    the weight itself, also where that is pruned. So training raises the scores of weights that move
    away from 0, lowers those of weights that move towards it, and pruned weights may come back.
    """

    w: Array  # [D_in, D_out]
    scores: Array  # of the same shape
    threshold: Array  # scalar

    def dequantize(self, dtype: Any) -> Array:
        """The matrix with zeros; of stacked leaves, that of each layer."""
        threshold = self.threshold.reshape(self.threshold.shape + (1, 1))
        return _kept(self.w, self.scores, threshold).astype(dtype)

    def layout(self, axes: tuple[str | None, ...]) -> "Scored":
        """The matrices are cut alike."""
        return Scored(axes, axes, axes[:-2])


@jax.custom_vjp
def _kept(w: Array, scores: Array, threshold: Array) -> Array:
    return jnp.where(scores >= threshold, w, 0)


def _kept_forward(w, scores, threshold):
    return _kept(w, scores, threshold), (w, scores, threshold)


def _kept_backward(saved, g):
    w, scores, threshold = saved
    return jnp.where(scores >= threshold, g, 0), g * w, jnp.zeros_like(threshold)


_kept.defvjp(_kept_forward, _kept_backward)
