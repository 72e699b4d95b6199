"""Dense layers and embeddings, and what a mesh makes them send.

A matrix is cut along "embed" over the fully sharded axes and along its other axis over "tensor".
`read` takes the residual stream in (embed -> heads, mlp), `write` gives back to it (heads, mlp ->
embed). Between the two the stream is cut along its length over "tensor" too (Korthikanti et al.
2022). On a mesh both are fully manual shard_maps that send the least there is:

                  forward                         backward
    a matrix      all-gather over fsdp            the same again, reduce-scatter of its gradient
    read          all-gather of the stream        reduce-scatter of the stream's gradient
    write, embed  reduce-scatter into the stream  all-gather of the gradient

Matrices that read the same stream go through `read` together, so that it is gathered once.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax import sharding
from llm_jax.nn import weights
from llm_jax.nn.params import Constant, Normal, ParamSpec
from llm_jax.types import Array, PyTree

MERGED_FROM = 256  # tokens


def dense_specs(d_in: int, d_out: int, axes: tuple[str, str], std: float, bias: bool) -> PyTree:
    """A matrix [d_in, d_out] "w", and a "bias" [d_out] if asked for."""
    specs = {"w": ParamSpec((d_in, d_out), axes, Normal(std))}
    if bias:
        out = None if axes[1] == "embed" else axes[1]
        specs["bias"] = ParamSpec((d_out,), (out,), Constant(0.0))
    return specs


def read(ps: Sequence[PyTree], x_BxLxD: Array, outs: Sequence[str]) -> list[Array]:
    """x @ w + bias for each p, where w has the axes ("embed", out): [B, L, D] -> [B, L, d_out]."""
    mesh = sharding.ambient_mesh()
    plain = not any(isinstance(p["w"], weights.Weight) for p in ps)
    if mesh is None and plain and _merges(ps, x_BxLxD):
        return _merged(ps, x_BxLxD)
    if mesh is None or not plain:
        x_BxLxD = sharding.constrain(x_BxLxD, "batch", "length", None)
        return [
            sharding.constrain(
                _affine(_gathered(p, ("embed", out)), x_BxLxD), "batch", "length", out
            )
            for p, out in zip(ps, outs, strict=True)
        ]
    stream, length, batch = _stream_spec(x_BxLxD, mesh)
    fsdp = _cut("embed", mesh)

    def local(ps, x):
        if "tensor" in _names(stream[1]):
            x = jax.lax.all_gather(x, "tensor", axis=1, tiled=True)
        return [_product(p, x, fsdp, 0) for p in ps]

    specs = [_specs(p, ("embed", out), mesh) for p, out in zip(ps, outs, strict=True)]
    ys = [PartitionSpec(batch, length, *sharding.partition_spec((out,), mesh)) for out in outs]
    return sharding.over_mesh(local, (specs, stream), ys)(list(ps), x_BxLxD)


def write(p: PyTree, x_BxLxF: Array, axis: str) -> Array:
    """x @ w + bias, where w has the axes (axis, "embed"): [B, L, F] -> [B, L, D]."""
    mesh = sharding.ambient_mesh()
    if mesh is None or isinstance(p["w"], weights.Weight):
        x_BxLxF = sharding.constrain(x_BxLxF, "batch", "length", axis)
        return sharding.stream(_affine(_gathered(p, (axis, "embed")), x_BxLxF))
    stream, length, batch = _stream_spec(x_BxLxF, mesh)
    fsdp, cut = _cut("embed", mesh), bool(_cut(axis, mesh))
    inner = PartitionSpec(batch, length, *sharding.partition_spec((axis,), mesh))

    def local(p, x):
        y = _product({"w": p["w"]}, x, fsdp, 1)  # the bias counts once, after the sum
        if "tensor" in _names(stream[1]):
            y = jax.lax.psum_scatter(y, "tensor", scatter_dimension=1, tiled=True)
        elif cut:
            y = jax.lax.psum(y, "tensor")
        return y + p["bias"].astype(y.dtype)[None, None, :] if "bias" in p else y

    specs = (_specs(p, (axis, "embed"), mesh), inner)
    return sharding.over_mesh(local, specs, stream)(p, x_BxLxF)


def embed(table_VxD: Array, ids_BxL: Array, axis: str | None = "vocab") -> Array:
    """Rows of a table with the axes (axis, "embed"): [B, L] -> [B, L, D]."""
    mesh = sharding.ambient_mesh()
    if mesh is None or isinstance(table_VxD, weights.Weight):
        return sharding.stream(weights.rows(table_VxD, ids_BxL))
    stream, length, batch = _stream_spec(ids_BxL, mesh)
    fsdp, cut = _cut("embed", mesh), bool(axis and _cut(axis, mesh))

    def local(table, ids):
        table = sharding.gather_pieces(table, fsdp, 1)
        if not cut:
            rows = weights.rows(table, ids)
            if "tensor" not in _names(stream[1]):
                return rows
            size = ids.shape[1] // mesh.shape["tensor"]
            start = jax.lax.axis_index("tensor") * size
            return jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)
        ids = ids - jax.lax.axis_index("tensor") * table.shape[0]
        here = (ids >= 0) & (ids < table.shape[0])
        rows = jnp.where(here[:, :, None], weights.rows(table, jnp.where(here, ids, 0)), 0)
        if "tensor" in _names(stream[1]):
            return jax.lax.psum_scatter(rows, "tensor", scatter_dimension=1, tiled=True)
        return jax.lax.psum(rows, "tensor")

    specs = (sharding.partition_spec((axis, "embed"), mesh), PartitionSpec(batch, length))
    return sharding.over_mesh(local, specs, stream)(table_VxD, ids_BxL)


def _affine(p: PyTree, x_BxLxD: Array) -> Array:
    B, L, D = x_BxLxD.shape
    if isinstance(p["w"], weights.Weight) and sharding.ambient_mesh() is not None:
        return weights.affine(p, x_BxLxD)  # flattening would gather a length that is cut
    return weights.affine(p, x_BxLxD.reshape(B * L, D)).reshape(B, L, -1)  # fast on CPU


def _merges(ps: Sequence[PyTree], x_BxLxD: Array) -> bool:
    """Whether one matmul for all is faster. XLA:CPU does not merge matmuls of one input by itself;
    the copy of the matrices pays from so many tokens on."""
    tokens = x_BxLxD.shape[0] * x_BxLxD.shape[1]
    return len(ps) > 1 and sharding.platform() == "cpu" and tokens >= MERGED_FROM


def _merged(ps: Sequence[PyTree], x_BxLxD: Array) -> list[Array]:
    B, L, D = x_BxLxD.shape
    w = jnp.concatenate([p["w"].astype(x_BxLxD.dtype) for p in ps], axis=1)
    y = weights.matmul(w, x_BxLxD.reshape(B * L, D))
    parts = jax.lax.split(y, [p["w"].shape[1] for p in ps], axis=1)
    return [
        part.reshape(B, L, -1) + (p["bias"].astype(y.dtype)[None, None, :] if "bias" in p else 0)
        for p, part in zip(ps, parts, strict=True)
    ]


def _gathered(p: PyTree, axes: tuple[str, str]) -> PyTree:
    """p with its matrix whole along "embed", by a constraint; other leaves do that themselves."""
    if isinstance(p["w"], weights.Weight):
        return p
    return p | {"w": sharding.constrain(p["w"], *(None if a == "embed" else a for a in axes))}


def _product(p: PyTree, x: Array, over: tuple[str, ...], axis: int) -> Array:
    """x @ w + bias, with w's pieces along `axis` put together, and again in the backward pass: kept,
    the matrices of a whole model would be all that sharding saves, and those of a recomputed layer
    most of what the layer holds."""

    def f(p, x):
        return _affine(p | {"w": sharding.gather_pieces(p["w"], over, axis)}, x)

    keep = lambda primitive, *_, **__: primitive.name != "all_gather"  # noqa: E731
    return jax.checkpoint(f, policy=keep)(p, x) if over else f(p, x)


def _cut(axis: str, mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """The mesh axes that really cut a logical axis."""
    return tuple(a for a in sharding.RULES[axis] if mesh.shape[a] > 1)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def _specs(p: PyTree, axes: tuple[str, str], mesh: jax.sharding.AbstractMesh) -> PyTree:
    specs = {"w": sharding.partition_spec(axes, mesh)}
    if "bias" in p:
        out = None if axes[1] == "embed" else axes[1]
        specs["bias"] = sharding.partition_spec((out,), mesh)
    return specs


def _stream_spec(x: Array, mesh: jax.sharding.AbstractMesh) -> tuple[PartitionSpec, ...]:
    """(spec of the stream [B, L, D], its entry of the length inside a layer, that of the batch).

    An axis that does not divide (one prompt on a mesh of many, a decoded token) stays whole.
    """

    def fitting(axis: str, size: int) -> str | tuple[str, ...] | None:
        n = 1
        for a in sharding.RULES[axis]:
            n *= mesh.shape[a]
        return None if size % n else sharding.partition_spec((axis,), mesh)[0]

    batch, length = fitting("batch", x.shape[0]), fitting("length", x.shape[1])
    stream = fitting("stream_length", x.shape[1])
    return PartitionSpec(batch, length if stream is None else stream, None), length, batch
