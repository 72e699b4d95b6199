"""The weights of a model as its decoding loop holds them: cut into layers before the first token.

Layers are stored stacked. Cut inside the loop, every weight would be copied once a token, and a
token costs little else than reading the weights: XLA does not move such cuts out of a loop.
"""

import jax

from llm_jax.nn.params import flatten, unflatten
from llm_jax.types import PyTree


def cut(params: PyTree, specs: PyTree) -> dict[str, PyTree]:
    """{path: leaf, or a tuple of the pieces [1, ...] of a stacked one}."""

    def pieces(leaf: PyTree) -> tuple[PyTree, ...]:
        arrays, tree = jax.tree.flatten(leaf)  # a weight leaf may be several arrays
        split = [jax.lax.split(x, [1] * x.shape[0], axis=0) for x in arrays]
        return tuple(tree.unflatten(layer) for layer in zip(*split, strict=True))

    stacked = {path for path, spec in flatten(specs).items() if spec.axes[:1] == ("layer",)}
    return {
        path: pieces(leaf) if path in stacked else leaf for path, leaf in flatten(params).items()
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
