"""Quantised matrices as weight leaves: absmax int8, and k-bit codes with a constant per block.

Both keep codes and scales only. A product makes the plain matrix of one layer and drops it again,
in the backward pass once more: no copy of a model in floating point ever exists. Codes and scales
are never differentiated.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import sharding
from llm_jax.types import Array

# NormalFloat 4 (Dettmers et al. 2023, appendix E): quantiles of a normal distribution.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
SCALES = ("tensor", "row", "channel")
# Half-way cases are moved by rounding; within this much of the constant they count as such.
TIE = 2.0**-21
CONSTANTS_BLOCK = 256  # double quantisation (Dettmers et al. 2023, section 3)


def table(levels: str | Sequence[float], bits: int) -> tuple[float, ...]:
    """The levels of "nf4", of "linear" (2^bits - 1 evenly spaced ones, -1 to 1 with a 0), or given."""
    if levels == "nf4":
        return NF4
    if levels == "linear":
        top = 2 ** (bits - 1) - 1
        return tuple(i / top for i in range(-top, top + 1))
    return tuple(float(v) for v in levels)


# Absmax int8 -----------------------------------------------------------------------------------


@flax.struct.dataclass
class Int8:
    """codes * scale, one scale for the matrix, for each row (input) or each channel (output)."""

    codes: Array  # int8 [D_in, D_out]
    scale: Array  # float32 [1, 1], [D_in, 1] or [1, D_out]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(np.shape(self.codes))

    def matmul(self, x: Array) -> Array:
        """x [..., D_in] -> [..., D_out]; the scales are multiplied to x or to the product."""
        return _product(self, x)

    def forward(self, x: Array) -> Array:
        """The product, from codes in x's type, which holds them exactly."""
        per_row = self.scale.shape[0] > 1
        x = _times(x, self.scale.T) if per_row else x
        y = jnp.matmul(x, self.codes.astype(x.dtype), preferred_element_type=jnp.float32)
        return (y if per_row else _times(y, self.scale)).astype(x.dtype)

    def backward(self, g: Array) -> Array:
        """The product with the transposed matrix."""
        return Int8(self.codes.T, self.scale.T).forward(g)

    def rows(self, ids: Array) -> Array:
        """ids [...] -> float32 [..., D_out]."""
        codes = jnp.take(self.codes, ids, axis=0, mode="clip").astype(jnp.float32)
        if self.scale.shape[0] == 1:
            return _times(codes, self.scale)
        return codes * jnp.take(self.scale, ids, axis=0, mode="clip")

    def dequantize(self, dtype: Any) -> Array:
        """The plain matrix."""
        return (self.codes.astype(jnp.float32) * self.scale).astype(dtype)

    def layout(self, axes: tuple[str | None, ...]) -> "Int8":
        """Codes are cut as the matrix is, scales along the axis that they have."""
        sizes = self.scale.shape
        n = len(sizes) - 2
        return Int8(
            codes=axes,
            scale=(
                *axes[:n],
                *(a if s > 1 else None for a, s in zip(axes[n:], sizes[n:], strict=True)),
            ),
        )


@partial(jax.jit, static_argnames="per")
def int8(w: Array, per: str) -> Int8:
    """round(127 w / max|w|), the maximum over all of w [D_in, D_out] or over a row or a channel.

    Raises:
      ValueError: `per` is not one of SCALES.
    """
    if per not in SCALES:
        raise ValueError(f"{per!r} is not one of {', '.join(SCALES)}")
    axis = {"tensor": (0, 1), "row": 1, "channel": 0}[per]
    w = w.astype(jnp.float32)
    top = jnp.max(jnp.abs(w), axis=axis, keepdims=True)
    codes = jnp.round(127.0 * w / jnp.where(top == 0, 1.0, top))
    return Int8(codes.astype(jnp.int8), top / 127.0)


def _times(x: Array, scale_1xD: Array) -> Array:
    """x [..., D] times a row of scales."""
    return (x * scale_1xD.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


# A constant per block -------------------------------------------------------------------------


@flax.struct.dataclass
class Blockwise:
    """k-bit codes of a table of levels, times a constant for each block of consecutive weights.

    Blocks run through the flattened matrix, row after row. Where a row is a whole number of blocks
    and of bytes, the arrays keep the rows apart, so that they can be cut and gathered by row;
    otherwise they are flat, and what the last block lacks is padding.
    """

    codes: Array  # uint8 [D_in, bytes of a row] or [bytes]
    constants: Any  # float32 [D_in, blocks of a row] or [blocks], or a Blockwise of that shape
    offset: Array | None  # float32 scalar that is added (the mean of twice quantised constants)
    size: tuple[int, ...] = flax.struct.field(pytree_node=False)  # shape of one layer's array
    levels: str | tuple[float, ...] = flax.struct.field(pytree_node=False)
    bits: int = flax.struct.field(pytree_node=False)
    block: int = flax.struct.field(pytree_node=False)

    @property
    def by_row(self) -> bool:
        """Whether the arrays keep rows apart."""
        return _by_row(self.size, self.bits, self.block)

    @property
    def stacked(self) -> bool:
        """Whether the arrays lead with a layer axis."""
        return len(np.shape(self.codes)) > (len(self.size) if self.by_row else 1)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*np.shape(self.codes)[: self.stacked], *self.size)

    def matmul(self, x: Array) -> Array:
        """x [..., D_in] -> [..., D_out]."""
        return _product(self, x)

    def forward(self, x: Array) -> Array:
        """The product, through the plain matrix."""
        return jnp.matmul(x, self.dequantize(x.dtype))

    def backward(self, g: Array) -> Array:
        """The product with the transposed matrix."""
        return jnp.matmul(g, self.dequantize(g.dtype).T)

    def rows(self, ids: Array) -> Array:
        """ids [...] -> float32 [..., D_out]; only the codes of these rows are read."""
        constants = _constants(self.constants)
        if self.by_row:
            codes = jnp.take(self.codes, ids, axis=0, mode="clip")
            constants = jnp.take(constants, ids, axis=0, mode="clip")
            return self._values(_unpack(codes, self.bits), constants)
        D = self.size[-1]
        ids = jnp.clip(ids, 0, self.size[0] - 1)
        place = ids[..., None] * D + jnp.arange(D).reshape((1,) * ids.ndim + (-1,))
        constants = jnp.take(constants, place // self.block, mode="clip")
        return jnp.take(self._table(), _code_at(self.codes, place, self.bits)) * constants

    def dequantize(self, dtype: Any) -> Array:
        """The plain matrix."""
        if self.stacked:
            return jax.vmap(lambda w: w.dequantize(dtype))(self)
        codes = _unpack(self.codes, self.bits)
        values = self._values(codes, _constants(self.constants))
        if not self.by_row:
            values = values[: int(np.prod(self.size))]
        return values.reshape(self.size).astype(dtype)

    def indices(self) -> Array:
        """The number of each weight's level, uint8, in the matrix's shape."""
        if self.stacked:
            return jax.vmap(lambda w: w.indices())(self)
        codes = _unpack(self.codes, self.bits)
        codes = codes if self.by_row else codes[: int(np.prod(self.size))]
        return codes.reshape(self.size)

    def layout(self, axes: tuple[str | None, ...]) -> "Blockwise":
        """Rows are cut as the matrix's are, where the arrays keep them apart; columns are not."""
        lead = axes[: len(axes) - len(self.size)]
        own = (*lead, *axes[len(lead) : -1], None) if self.by_row else (*lead, None)
        inner = isinstance(self.constants, Blockwise)
        return self.replace(
            codes=own,
            constants=self.constants.layout((*lead, *(None,) * len(self.constants.size)))
            if inner
            else own,
            offset=None if self.offset is None else lead,
        )

    def _table(self) -> Array:
        return jnp.array(table(self.levels, self.bits), jnp.float32)

    def _values(self, codes: Array, constants: Array) -> Array:
        """Codes [..., n] and constants [..., blocks] -> float32 [..., blocks * block]."""
        values = jnp.take(self._table(), codes.astype(jnp.int32), mode="clip")
        values = values.reshape(*constants.shape, self.block) * constants[..., None]
        values = values.reshape(*constants.shape[:-1], -1)
        return values if self.offset is None else values + self.offset


@partial(jax.jit, static_argnames=("levels", "bits", "block", "double"))
def blockwise(
    w: Array, levels: str | tuple[float, ...], *, bits: int, block: int, double: bool = False
) -> Blockwise:
    """w (of any shape, one layer's) as the nearest of `table(levels, bits)` times its block's maximum.

    Half-way between two levels is the upper one. `double` quantises the constants too, to 8 bits in
    blocks of 256 after their mean has been taken off (Dettmers et al. 2023).

    Raises:
      ValueError: more levels than `bits` can tell apart, levels out of order or outside [-1, 1],
        or a block without weights.
    """
    values = table(levels, bits)
    if not 2 <= bits <= 8 or len(values) > 2**bits:
        raise ValueError(f"{len(values)} levels do not fit {bits} bits (2 to 8)")
    if list(values) != sorted(set(values)) or max(map(abs, values)) > 1:
        raise ValueError(f"levels have to rise from -1 or more to 1 or less, not {values}")
    if block < 1:
        raise ValueError(f"a block of {block} weights; it has to be at least 1")
    by_row = _by_row(w.shape, bits, block)
    blocks = w.astype(jnp.float32)
    blocks = blocks if by_row else blocks.reshape(-1)
    group = np.lcm(block, _group(bits)[0])
    blocks = jnp.pad(blocks, [(0, 0)] * (blocks.ndim - 1) + [(0, -blocks.shape[-1] % group)])
    blocks = blocks.reshape(*blocks.shape[:-1], -1, block)
    constants = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = blocks / jnp.where(constants == 0, 1.0, constants)[..., None]
    codes = _nearest(scaled.reshape(*constants.shape[:-1], -1), values)
    if double:
        mean = jnp.mean(constants)
        constants = blockwise(constants - mean, "linear", bits=8, block=CONSTANTS_BLOCK).replace(
            offset=mean
        )
    levels = levels if isinstance(levels, str) else values
    return Blockwise(_pack(codes, bits), constants, None, tuple(w.shape), levels, bits, block)


def _constants(constants: Any) -> Array:
    return constants.dequantize(jnp.float32) if isinstance(constants, Blockwise) else constants


def _by_row(size: tuple[int, ...], bits: int, block: int) -> bool:
    return len(size) > 1 and size[-1] % np.lcm(block, _group(bits)[0]) == 0


def _nearest(x: Array, levels: tuple[float, ...]) -> Array:
    """Numbers of the nearest levels, uint8; x is in [-1, 1]."""
    between = [(a + b) / 2 - TIE for a, b in itertools.pairwise(levels)]
    if len(levels) > 32:
        return jnp.searchsorted(jnp.array(between, jnp.float32), x, side="right").astype(jnp.uint8)
    return sum(((x >= edge).astype(jnp.uint8) for edge in between), jnp.zeros(x.shape, jnp.uint8))


def _group(bits: int) -> tuple[int, int]:
    """(weights, bytes) of the smallest whole number of bytes."""
    return (8 // bits, 1) if 8 % bits == 0 else (8, bits)


def _pack(codes: Array, bits: int) -> Array:
    """uint8 codes [..., n] -> bytes: 8 / bits in a byte, the first in the lowest bits; of a width
    that does not divide 8, eight codes as `bits` bytes of one bit each."""
    weights, n_bytes = _group(bits)
    groups = codes.reshape(*codes.shape[:-1], -1, weights)
    if n_bytes == 1:
        shifts = jnp.arange(weights, dtype=jnp.uint8) * jnp.uint8(bits)
        packed = jnp.left_shift(groups, _trailing(shifts, groups.ndim))
        return jnp.sum(packed, axis=-1, dtype=jnp.uint8)
    place = _trailing(jnp.arange(8, dtype=jnp.uint8), groups.ndim)
    planes = [
        jnp.sum(((groups >> jnp.uint8(j)) & jnp.uint8(1)) << place, axis=-1, dtype=jnp.uint8)
        for j in range(bits)
    ]
    return jnp.stack(planes, axis=-1).reshape(*codes.shape[:-1], -1)


def _unpack(packed: Array, bits: int) -> Array:
    """The inverse of `_pack`."""
    weights, n_bytes = _group(bits)
    if bits == 8:
        return packed
    if n_bytes == 1:
        shifts = jnp.arange(weights, dtype=jnp.uint8) * jnp.uint8(bits)
        codes = (packed[..., None] >> _trailing(shifts, packed.ndim + 1)) & jnp.uint8(2**bits - 1)
        return codes.reshape(*packed.shape[:-1], -1)
    planes = packed.reshape(*packed.shape[:-1], -1, n_bytes)
    place = _trailing(jnp.arange(8, dtype=jnp.uint8), planes.ndim)
    codes = sum(
        ((planes[..., j, None] >> place) & jnp.uint8(1)) << jnp.uint8(j) for j in range(bits)
    )
    return codes.reshape(*packed.shape[:-1], -1)


def _code_at(packed: Array, place: Array, bits: int) -> Array:
    """Codes, int32, of the weights numbered `place` of flat packed codes."""
    weights, n_bytes = _group(bits)
    group, inner = place // weights, place % weights
    if n_bytes == 1:
        byte = jnp.take(packed, group, mode="clip").astype(jnp.int32)
        return (byte >> (inner * bits)) & (2**bits - 1)
    planes = [
        ((jnp.take(packed, group * n_bytes + j, mode="clip").astype(jnp.int32) >> inner) & 1) << j
        for j in range(bits)
    ]
    return sum(planes)


def _trailing(row: Array, ndim: int) -> Array:
    """A vector as the last of `ndim` axes."""
    return row.reshape((1,) * (ndim - 1) + (-1,))


# The product ----------------------------------------------------------------------------------


@jax.custom_vjp
def _product(w: Int8 | Blockwise, x: Array) -> Array:
    """x @ w, whose backward pass keeps the codes and makes the plain matrix anew."""
    return _after(x, w).forward(x)


def _product_forward(w, x):
    return _product(w, x), w


def _product_backward(w, g):
    return None, _after(g, w).backward(g)


_product.defvjp(_product_forward, _product_backward)


def _after(x: Array, w: Int8 | Blockwise) -> Int8 | Blockwise:
    """w, of which nothing can be computed before x is there.

    XLA would share one plain matrix between the two passes, or make those of all layers first. It
    drops barriers on a CPU before it orders the work, so there the codes depend on x in earnest.
    """
    w, x = jax.lax.optimization_barrier((w, x))
    if sharding.platform() != "cpu":
        return w
    never = x.ravel()[0].astype(jnp.float32) > jnp.inf
    return w.replace(codes=w.codes ^ never.astype(w.codes.dtype))
