"""safetensors files: tensors read a few rows at a time, and written one after the other.

A file is 8 bytes (length of the header, little endian), the header (JSON: name -> dtype, shape and
offsets) and the data. A folder has one `model.safetensors`, or several files and an index
`model.safetensors.index.json` that says which tensor is in which. Read here and not by the
library: its numpy side knows no bfloat16, and a map of the file would count as host memory.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
SIZES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MAX_HEADER = 100_000_000  # bytes; the format's own limit


class Place(NamedTuple):
    """Where a tensor's data lies."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # offset in the file, bytes


class Source:
    """The tensors of a file or a folder.

    Attributes:
      shapes: name -> shape.
      where: the path, for messages.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        self.where = str(path)
        self._files: dict[Path, object] = {}
        self._places: dict[str, Place] = {}
        for file, names in _files(path).items():
            found = _header(file)
            if names is not None and (absent := sorted(names - found.keys())):
                raise ValueError(f"{file} has no tensor {absent[0]!r}, which {INDEX} places there")
            for name, place in found.items():
                if name in self._places:
                    raise ValueError(
                        f"the tensor {name!r} is in {self._places[name].path.name} and in {file.name}"
                    )
                self._places[name] = place
        self.shapes = {name: place.shape for name, place in self._places.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start to stop of the leading axis, in the stored type; a scalar as it is."""
        place = self._places[name]
        if place.dtype not in DTYPES:
            raise ValueError(
                f"{place.path}: {name!r} has the type {place.dtype}; readable are {', '.join(DTYPES)}"
            )
        dtype = np.dtype(DTYPES[place.dtype])
        row = math.prod(place.shape[1:]) * dtype.itemsize
        length = place.shape[0] if place.shape else 1
        stop = length if stop is None else stop
        if place.path not in self._files:
            self._files[place.path] = open(place.path, "rb")
        file = self._files[place.path]
        file.seek(place.start + start * row)
        content = np.empty((stop - start, *place.shape[1:]), dtype)
        view = memoryview(content.reshape(-1).view(np.uint8))
        if file.readinto(view) != len(view):
            raise ValueError(f"{place.path} is truncated within {name!r}; copy it again")
        return content if place.shape else content.reshape(())

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def _files(path: Path) -> dict[Path, set[str] | None]:
    """The files to read, and for a sharded model the tensors that the index places in each."""
    if path.is_file():
        return {path: None}
    if (path / INDEX).is_file():
        try:
            placed = json.loads((path / INDEX).read_bytes())["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path / INDEX} is damaged: no weight_map in it") from None
        files: dict[Path, set[str] | None] = {}
        for name, file in placed.items():
            files.setdefault(path / file, set()).add(name)
        absent = sorted(file.name for file in files if not file.is_file())
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise FileNotFoundError(f"{path}: {absent[0]}{more} of {len(files)} files is missing")
        return files
    if (path / SINGLE).is_file():
        return {path / SINGLE: None}
    if list(path.glob("*.bin")) or list(path.glob("*.pth")):
        raise ValueError(
            f"{path} has weights as pickles only; save them as safetensors "
            "(model.save_pretrained(DIR) of transformers does)"
        )
    raise FileNotFoundError(f"{path}: no {SINGLE} and no {INDEX} there")


def _header(path: Path) -> dict[str, Place]:
    size = path.stat().st_size
    try:
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError("no header")
            header = json.loads(f.read(length), object_pairs_hook=_unique)
        places = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
            kind = entry["dtype"]
            item = SIZES.get(kind) or np.dtype(DTYPES[kind]).itemsize
            if stop - start != math.prod(shape) * item:
                raise ValueError(f"{name} has {stop - start} bytes for {kind} {shape}")
            places[name] = (Place(path, kind, shape, 8 + length + start), 8 + length + stop)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is not a whole safetensors file ({e})") from None
    end = max((stop for _, stop in places.values()), default=0)
    if end > size:
        raise ValueError(f"{path} is truncated: {size:,} bytes of {end:,}; copy it again")
    return {name: place for name, (place, _) in places.items()}


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object whose keys all differ."""
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is in it twice")
    return out


class Tensor(NamedTuple):
    """A tensor to write; `content()` makes its values when their turn comes."""

    name: str
    shape: tuple[int, ...]
    content: Callable[[], np.ndarray]


def write(folder: Path, tensors: Sequence[Tensor], *, dtype: str, shard_bytes: int) -> list[str]:
    """Writes the tensors into `folder`, in files of at most `shard_bytes` (or one tensor); returns
    the files' names. No two tensors are in memory at a time."""
    kind = {np.dtype(d): name for name, d in DTYPES.items()}[np.dtype(dtype)]
    item = np.dtype(dtype).itemsize
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        n = math.prod(tensor.shape) * item
        if shards[-1] and size + n > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += n
    if len(shards) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, np.dtype(dtype), kind)
    if len(shards) > 1:
        total = sum(math.prod(t.shape) * item for t in tensors)
        placed = {t.name: n for n, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        names.append(INDEX)
    return names


def _write_file(path: Path, tensors: Iterable[Tensor], dtype: np.dtype, kind: str) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        end = at + math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with open(path, "wb") as f:
        f.write(len(content).to_bytes(8, "little") + content)
        for tensor in tensors:
            values = np.ascontiguousarray(tensor.content().astype(dtype, copy=False))
            if values.shape != tuple(tensor.shape):
                raise ValueError(f"{tensor.name}: {values.shape} instead of {tensor.shape}")
            f.write(values.reshape(-1).view(np.uint8).data)
        f.flush()
        os.fsync(f.fileno())
