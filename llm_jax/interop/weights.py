"""Weights of theirs into sharded parameters of ours and back, a few rows at a time.

A parameter is filled shard by shard, and each shard from slices of their tensors: the host holds
what becomes the result on it, and CHUNK bytes. Nothing depends on how many devices there are.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from llm_jax import sharding
from llm_jax.config import ModelConfig
from llm_jax.interop.names import OURS, UNUSED, Part
from llm_jax.interop.safetensors import Tensor
from llm_jax.nn.params import flatten, unflatten
from llm_jax.types import Array, PyTree

CHUNK = 16_000_000  # bytes read at a time
Hold = Callable[[str, Array], PyTree]  # (path, parameter) -> the leaf that is kept of it
ALIGNMENT = 64  # bytes; a CPU device takes such a buffer over as it is


class Source(Protocol):
    """Tensors under Hugging Face's names, read by rows: a safetensors folder, a GGUF file, ..."""

    shapes: dict[str, tuple[int, ...]]
    where: str

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start to stop of the leading axis."""


def load(
    source: Source,
    parts: Sequence[Part],
    specs: PyTree,
    mesh: jax.sharding.Mesh,
    *,
    dtype: str = "float32",
    exact: re.Pattern | None = None,
    ignored: str = "",
    hold: Hold | None = None,
) -> PyTree:
    """The parameter tree of `specs`, cut for `mesh`, from the tensors of `source`.

    Parameters whose paths match `exact` stay in float32 whatever `dtype` is. `ignored` is a pattern
    of further names that belong to what is not imported. `hold` makes a leaf of each parameter as it
    comes (quantised, say), so that the whole model is never there as it was.

    Raises:
      ValueError: a tensor that is missing, unknown, or of another shape.
    """
    check(source, parts, ignored)
    by_path: dict[str, list[Part]] = {}
    for part in parts:
        by_path.setdefault(part.path, []).append(part)
    flat = flatten(specs)

    def parameter(path: str) -> Array:
        spec, kind = flat[path], "float32" if exact and exact.search(path) else dtype
        where = sharding.named(spec.axes, mesh)
        own = [] if path in OURS else by_path[path]  # theirs has no such number: 0
        found = _parameter(source, own, spec.shape, where, kind)
        return hold(path, found) if hold else found

    return unflatten({path: parameter(path) for path in flat})


def check(source: Source, parts: Sequence[Part], ignored: str = "") -> None:
    """Raises ValueError unless `source` has each part's tensor in its shape, and no other."""
    wanted = {part.name: part.shape for part in parts}
    for name, shape in wanted.items():
        if name not in source.shapes:
            raise ValueError(
                f"{source.where} has no tensor {name!r}, which its config.json asks for"
            )
        if tuple(source.shapes[name]) != tuple(shape):
            raise ValueError(
                f"{source.where}: {name!r} has shape {tuple(source.shapes[name])}, but config.json "
                f"makes it {tuple(shape)}"
            )
    skipped = re.compile("|".join([*UNUSED, *([ignored] if ignored else [])]))
    unknown = [n for n in source.shapes if n not in wanted and not skipped.search(n)]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(
            f"{source.where} has a tensor {unknown[0]!r}{more} that the architecture of its "
            "config.json does not have"
        )


def _parameter(
    source: Source, parts: list[Part], shape: tuple[int, ...], to: Any, dtype: str
) -> Array:
    """One parameter, from its parts."""
    shards, seen = [], {}
    for device, index in to.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds not in seen:  # copies of a shard are read once
            seen = {bounds: _shard(source, parts, bounds, np.dtype(dtype))}
        shards.append(jax.device_put(seen[bounds], device))
        shards[-1].block_until_ready()
    return jax.make_array_from_single_device_arrays(shape, to, shards)


def _shard(
    source: Source, parts: list[Part], bounds: tuple[tuple[int, int], ...], dtype: np.dtype
) -> np.ndarray:
    """The values of a parameter within `bounds`, (start, stop) along each axis."""
    buffer = _aligned([stop - start for start, stop in bounds], dtype)
    for part in parts:
        depth = len(part.index)
        lead, rest = bounds[:depth], bounds[depth:]
        if not all(start <= i < stop for i, (start, stop) in zip(part.index, lead, strict=True)):
            continue
        target = buffer[tuple(i - start for i, (start, _) in zip(part.index, lead, strict=True))]
        rest = tuple(
            (start, min(stop, size)) for (start, stop), size in zip(rest, part.size, strict=True)
        )
        _fill(source, part, target, rest)
    return buffer


def _fill(
    source: Source, part: Part, target: np.ndarray, bounds: tuple[tuple[int, int], ...]
) -> None:
    """Writes the piece of `part` within `bounds` to the start of `target`, in chunks of rows."""
    if any(stop <= start for start, stop in bounds):
        return
    if part.transposed:
        target, bounds = target.T, bounds[::-1]
    elif len(part.shape) > len(part.size):
        target, bounds = target[None], ((0, 1), *bounds)
    (first, last), inner = bounds[0], bounds[1:]
    columns = tuple(
        slice(start + o, stop + o) for (start, stop), o in zip(inner, part.offset[1:], strict=True)
    )
    row = int(np.prod(part.shape[1:], dtype=np.int64)) * 4
    step = max(CHUNK // max(row, 1), 1)
    place = tuple(slice(0, stop - start) for start, stop in inner)
    for at in range(first, last, step):
        end = min(at + step, last)
        rows = source.read(part.name, at + part.offset[0], end + part.offset[0])
        target[(slice(at - first, end - first), *place)] = rows[(slice(None), *columns)]


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """A zeroed array that a CPU device can use in place (0 in rows past the vocabulary)."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT
    return raw[skip : skip + size].view(dtype).reshape(shape)


def tensors(params: PyTree, parts: Sequence[Part], cfg: ModelConfig) -> list[Tensor]:
    """Their tensors in the order of `parts`, each made when it is asked for.

    Rotary pairs that lie beside each other in ours (`rope_interleaved`) become halves.
    """
    flat = flatten(params)
    by_name: dict[str, list[Part]] = {}
    for part in parts:
        by_name.setdefault(part.name, []).append(part)

    def content(pieces: list[Part]) -> np.ndarray:
        made = [_piece(flat[part.path], part, cfg) for part in pieces]
        if len(pieces) == 1:
            return made[0]
        whole = np.empty(pieces[0].shape, made[0].dtype)
        for part, values in zip(pieces, made, strict=True):
            whole[
                tuple(slice(o, o + n) for o, n in zip(part.offset, values.shape, strict=True))
            ] = values
        return whole

    return [
        Tensor(name, pieces[0].shape, lambda pieces=pieces: content(pieces))
        for name, pieces in by_name.items()
    ]


def _piece(leaf: Array, part: Part, cfg: ModelConfig) -> np.ndarray:
    if leaf.sharding.device_set == {jax.devices("cpu")[0]}:
        values = np.asarray(leaf)[part.index]  # no copy, nothing to compile
    else:
        values = np.asarray(jax.device_get(leaf[part.index]))
    values = values[tuple(slice(0, n) for n in part.size)]
    if cfg.rope_interleaved and cfg.positions == "rope":
        if re.search(r"attn/[qk](/w|/bias|_norm/scale)$", part.path):
            values = halves(values, cfg)
    values = values.T if part.transposed else values
    return values[None] if len(part.shape) > len(part.size) else values


def halves(values: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """The last axis [heads * Dh], its rotated pairs (0, 1), (2, 3), ... of each head brought into
    halves: (0, n), (1, n + 1), ..."""
    n = int(cfg.head_dim * cfg.rope_fraction) // 2
    order = np.concatenate([np.arange(n) * 2, np.arange(n) * 2 + 1, np.arange(2 * n, cfg.head_dim)])
    heads = values.reshape(*values.shape[:-1], -1, cfg.head_dim)
    return heads[..., order].reshape(values.shape)
