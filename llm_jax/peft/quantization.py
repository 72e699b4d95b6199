"""Quantisation of a parameter tree: matrices -> the leaves of nn/quantized.py, one at a time."""

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.nn import quantized, weights
from llm_jax.nn.params import flatten, unflatten
from llm_jax.types import Array, PyTree

LINEAR = r"/(attn|mlp)/\w+/w$"  # the matrices of the layers
NAMES = "int8-row, int8-channel, int8-tensor, nf4-64, nf4-64-double, int4-64, int3-128"


@dataclass(frozen=True)
class Scheme:
    """How a matrix is held.

    Attributes:
      levels: "absmax" (int8 with a scale per `per`), "nf4" or "linear" (with a constant per block).
      per: tensor, row (input) or channel (output), of absmax.
      bits, block: width of a code and weights that share a constant, of the other two.
      double: the constants are quantised too.
    """

    levels: str
    per: str = ""
    bits: int = 8
    block: int = 0
    double: bool = False

    @property
    def name(self) -> str:
        """What `parse` reads."""
        if self.levels == "absmax":
            return f"int8-{self.per}"
        kind = "nf4" if self.levels == "nf4" else f"int{self.bits}"
        return f"{kind}-{self.block}{'-double' * self.double}"

    def quantize(self, w_DxF: Array) -> quantized.Int8 | quantized.Blockwise:
        """The leaf of one matrix."""
        if self.levels == "absmax":
            return quantized.int8(w_DxF, self.per)
        return quantized.blockwise(
            w_DxF, self.levels, bits=self.bits, block=self.block, double=self.double
        )


def parse(name: str) -> Scheme:
    """A scheme from its name: int8-PER, or nf4-BLOCK, intK-BLOCK (K 2 to 8) with or without -double.

    Raises:
      ValueError: no such scheme; the message lists examples.
    """
    if m := re.fullmatch(rf"int8-({'|'.join(quantized.SCALES)})", name):
        return Scheme("absmax", per=m[1])
    if (m := re.fullmatch(r"(nf4|int[2-8])-([1-9]\d*)(-double)?", name)) is None:
        raise ValueError(f"{name!r} is no quantisation scheme; there are for example {NAMES}")
    levels, bits = ("nf4", 4) if m[1] == "nf4" else ("linear", int(m[1][3:]))
    return Scheme(levels, bits=bits, block=int(m[2]), double=bool(m[3]))


def quantize_tree(
    params: PyTree,
    specs: PyTree,
    scheme: Scheme,
    targets: str = LINEAR,
    *,
    delete: bool = False,
) -> PyTree:
    """The tree with quantised leaves for the matrices in whose paths `targets` is found.

    Vectors stay. One leaf is worked on at a time; `delete` frees each original right after it (not
    inside a jitted function), so that little more than one matrix is there twice.

    Raises:
      ValueError: no matrix matches, or one is a leaf already, or what matches has more axes than a
        matrix (experts).
    """
    declared, out = flatten(specs), {}
    found = False
    for path, w in flatten(params).items():
        stacked = declared[path].axes[:1] == ("layer",)
        rank = len(declared[path].shape) - stacked
        if rank < 2 or not re.search(targets, path):
            out[path] = w
            continue
        if isinstance(w, weights.Weight):
            raise ValueError(f"{path} is a {type(w).__name__} already and cannot be quantised")
        if rank > 2:
            raise ValueError(f"{path} {w.shape} is no matrix; leave it out of targets={targets!r}")
        out[path] = _quantize(w, scheme, stacked)
        found = True
        if delete and not isinstance(w, jax.core.Tracer):
            jax.block_until_ready(out[path])
            w.delete()
    if not found:
        raise ValueError(f"targets={targets!r} is found in the path of no matrix")
    return unflatten(out)


@partial(jax.jit, static_argnames=("scheme", "stacked"))
def _quantize(w: Array, scheme: Scheme, stacked: bool) -> PyTree:
    return jax.vmap(scheme.quantize)(w) if stacked else scheme.quantize(w)


def dequantize_tree(params: PyTree, dtype: str = "float32") -> PyTree:
    """The tree with plain arrays in place of all leaves that are objects."""
    return jax.tree.map(
        lambda w: w.dequantize(dtype) if weights.is_weight(w) else w,
        params,
        is_leaf=weights.is_weight,
    )


class Errors(NamedTuple):
    """What quantising a matrix did to it."""

    rms: float  # root mean square of the differences
    levels: int  # that there are
    used_levels: int  # that some weight has
    saturated: float  # share of the weights at the lowest or the highest level


def errors(w: Array, leaf: quantized.Int8 | quantized.Blockwise) -> Errors:
    """Compares a matrix with its quantised leaf. One outlier under a scale for all wastes levels;
    with a constant per block it spoils its own block alone."""
    if isinstance(leaf, quantized.Int8):
        codes, n = np.asarray(leaf.codes, np.int32) + 127, 255
    else:
        codes, n = np.asarray(leaf.indices()), len(quantized.table(leaf.levels, leaf.bits))
    apart = np.asarray(leaf.dequantize(jnp.float32), np.float64) - np.asarray(w, np.float64)
    ends = (codes == 0) | (codes == n - 1)
    return Errors(float(np.sqrt(np.mean(apart**2))), n, len(np.unique(codes)), float(np.mean(ends)))


def nbytes(params: PyTree) -> int:
    """Bytes of all arrays of a tree."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(params))
