"""Parameters declared once, as data.

From a tree of `ParamSpec` follow initialisation, abstract shapes, shardings, counts, and the
decay, freeze and import tables. Trees are nested dicts; a parameter's path is its keys joined by
"/", such as "layers/attn/q/w".
"""

import hashlib
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from llm_jax import sharding
from llm_jax.types import Array, PyTree


@dataclass(frozen=True)
class Normal:
    """Gaussian with mean 0."""

    std: float

    def __call__(self, key: Array, shape: Sequence[int], dtype: Any) -> Array:
        return self.std * jax.random.normal(key, shape, dtype)


@dataclass(frozen=True)
class Uniform:
    """Evenly between -bound and bound."""

    bound: float

    def __call__(self, key: Array, shape: Sequence[int], dtype: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -self.bound, self.bound)


@dataclass(frozen=True)
class Constant:
    """Every entry the same."""

    value: float

    def __call__(self, key: Array, shape: Sequence[int], dtype: Any) -> Array:
        return jnp.full(shape, self.value, dtype)


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, the logical axis of each dimension, its start, its master type, and
    a factor on its learning rate."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable[[Array, Sequence[int], Any], Array]
    dtype: Any = jnp.float32
    rate: float = 1.0

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in rank")


def _is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def map_specs(f: Callable[[ParamSpec], Any], specs: PyTree) -> PyTree:
    """`tree.map` whose leaves are ParamSpecs."""
    return jax.tree.map(f, specs, is_leaf=_is_spec)


def flatten(tree: PyTree) -> dict[str, Any]:
    """{path: leaf} of a nested dict."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: dict[str, Any]) -> PyTree:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def stacked(specs: PyTree, n_layers: int) -> PyTree:
    """The specs of one layer -> those of n_layers of them, stacked on a leading "layer" axis."""
    return map_specs(
        lambda s: replace(s, shape=(n_layers, *s.shape), axes=("layer", *s.axes)), specs
    )


def init(specs: PyTree, key: Array) -> PyTree:
    """Initial values. A parameter's key depends on its path alone, not on its neighbours."""
    return unflatten(
        {
            path: s.init(jax.random.fold_in(key, zlib.crc32(path.encode())), s.shape, s.dtype)
            for path, s in flatten(specs).items()
        }
    )


def init_sharded(specs: PyTree, key: Array, mesh: jax.sharding.Mesh) -> PyTree:
    """Initial values, born with their shardings; the values do not depend on the mesh."""
    return jax.jit(lambda k: init(specs, k), out_shardings=shardings(specs, mesh))(key)


def abstract(specs: PyTree, mesh: jax.sharding.Mesh | None = None) -> PyTree:
    """ShapeDtypeStructs, with shardings if a mesh is given."""
    return map_specs(
        lambda s: jax.ShapeDtypeStruct(
            s.shape, s.dtype, sharding=sharding.named(s.axes, mesh) if mesh else None
        ),
        specs,
    )


def shardings(specs: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """NamedShardings, one for each parameter."""
    return map_specs(lambda s: sharding.named(s.axes, mesh), specs)


def count(specs: PyTree, *, embeddings: bool = True) -> int:
    """Number of parameters; without embeddings, tables of tokens and positions (an untied output
    head too) do not count, which is Kaplan et al.'s (2020) N."""
    return sum(
        math.prod(s.shape)
        for path, s in flatten(specs).items()
        if embeddings or not (path.startswith("embed/") or "vocab" in s.axes)
    )


@jax.jit
def digest(x: Array) -> Array:
    """uint32, of an array's values in bfloat16 and their places: the same on every mesh, and whether
    the array is held in float32 or in bfloat16."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    # Every product is modulo 2^32. No reshape: one of a cut array would gather it.
    places = jnp.zeros(x.shape, jnp.uint32)
    for dim in range(x.ndim):
        stride = np.uint32(math.prod(x.shape[dim + 1 :]) % 2**32)
        places += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * stride
    factors = places * np.uint32(2654435761) | np.uint32(1)
    return jnp.sum(bits.astype(jnp.uint32) * factors, dtype=jnp.uint32)


def fingerprint(params: PyTree) -> str:
    """Of all arrays and their paths, hex. `params` may hold `digest`s in place of arrays."""
    found = hashlib.sha256()
    for path, leaf in sorted(flatten(params).items()):
        value = int(leaf if jnp.issubdtype(leaf.dtype, jnp.uint32) else digest(leaf))
        found.update(f"{path} {value}\n".encode())
    return found.hexdigest()[:16]


def select(
    paths: Sequence[str], rules: Sequence[tuple[str, Any]], key: str, *, all_used: bool = True
) -> dict[str, Any]:
    """The value of the first rule (pattern, value) whose pattern is found in each path.

    Raises:
      ValueError: a path that no rule covers, or, with `all_used`, a pattern that finds no path (a
        typo); the message names the config `key`.
    """
    out, hits = {}, set()
    for path in paths:
        found = False
        for n, (pattern, value) in enumerate(rules):
            if re.search(pattern, path):
                hits.add(n)
                if not found:
                    out[path], found = value, True
        if not found:
            raise ValueError(
                f"{key} covers no rule for the parameter {path!r}; add ('.*', False) at its end"
            )
    for n, (pattern, _) in enumerate(rules):
        if all_used and n not in hits:
            raise ValueError(
                f"{key}: the pattern {pattern!r} matches no parameter; there are {', '.join(sorted(paths)[:6])}, ..."
            )
    return out
