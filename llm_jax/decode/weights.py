"""The weights of a model as its decoding loop holds them: cut into layers before the first token.

Layers are stored stacked. Cut inside the loop, every weight would be copied once a token, and a
token costs little else than reading the weights: XLA does not move such cuts out of a loop.
"""

import re

import flax.struct
import jax

from llm_jax import sharding
from llm_jax.nn.params import flatten, unflatten
from llm_jax.nn.weights import Weight
from llm_jax.types import Array, PyTree

DENSE = re.compile(r"/(q|k|v|o|up|gate|down)/w$")


@flax.struct.dataclass
class Transposed:
    """A matrix [D_in, D_out] that is stored transposed, as a `nn.weights.Weight`.

    XLA:CPU packs the right operand of a matmul anew in every call. For a few rows that costs more
    than the arithmetic, unless the right operand is the activations: w.T @ x.T takes 0.7 of the
    time of x @ w at 16 rows, and 0.8 at one.
    """

    w: Array  # [D_out, D_in]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.w.shape[:-2], self.w.shape[-1], self.w.shape[-2])

    def matmul(self, x: Array) -> Array:
        """x [N, D_in] -> [N, D_out]."""
        # The barriers keep XLA from turning it back into x @ w.
        x_DxN = jax.lax.optimization_barrier(x.T)
        return jax.lax.optimization_barrier(self.w.astype(x.dtype) @ x_DxN).T

    def rows(self, ids: Array) -> Array:
        """ids [...] -> [..., D_out]."""
        return self.w[:, ids].T

    def dequantize(self, dtype: str) -> Array:
        """The plain matrix."""
        return self.w.swapaxes(-1, -2).astype(dtype)

    def layout(self, axes: tuple[str | None, ...]) -> "Transposed":
        """Logical axes of the stored matrix."""
        return Transposed((*axes[:-2], axes[-1], axes[-2]))


def cut(params: PyTree, specs: PyTree) -> dict[str, PyTree]:
    """{path: leaf, or a tuple of the pieces [1, ...] of a stacked one}; dense ones transposed on a
    CPU."""
    transposes = sharding.platform() == "cpu"

    def pieces(path: str, leaf: PyTree) -> tuple[PyTree, ...]:
        if transposes and DENSE.search(path) and not isinstance(leaf, Weight) and leaf.ndim == 3:
            leaf = Transposed(leaf.swapaxes(1, 2))
        arrays, tree = jax.tree.flatten(leaf)  # a weight leaf may be several arrays
        split = [jax.lax.split(x, [1] * x.shape[0], axis=0) for x in arrays]
        return tuple(tree.unflatten(layer) for layer in zip(*split, strict=True))

    stacked = {path for path, spec in flatten(specs).items() if spec.axes[:1] == ("layer",)}
    return {
        path: pieces(path, leaf) if path in stacked else leaf
        for path, leaf in flatten(params).items()
    }


def joined(held: dict[str, PyTree]) -> PyTree:
    """The inverse of `cut`. A loop over layers cuts the result again, and XLA knows that the part
    cut out of joined pieces is the piece: nothing is computed."""
    join = lambda *pieces: jax.lax.concatenate(pieces, 0)  # noqa: E731
    return unflatten(
        {
            path: jax.tree.map(join, *leaf) if isinstance(leaf, tuple) else leaf
            for path, leaf in held.items()
        }
    )
