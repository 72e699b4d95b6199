"""Tensors of a file of another project, read a few rows at a time in Hugging Face's layout.

The file is read with seek, not mapped: a map would count as memory of this process.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

CHUNK = 1 << 22  # numbers decoded at a time


class Tensor(NamedTuple):
    """How to read a tensor, and what its file's format did to it."""

    shape: tuple[int, ...]  # Hugging Face's
    rows: int  # as stored: of all leading axes together
    columns: int
    decode: Callable[[BinaryIO, int, int], np.ndarray]  # rows start to stop, [n, columns] float32
    head_dim: int = 0  # of rows whose rotary pairs lie side by side; 0 for all others
    transposed: bool = False
    added: float = 0.0


class Source:
    """The tensors of a file.

    Attributes:
      shapes: Hugging Face's name -> shape.
      where: the path, for messages.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]):
        self.where = str(path)
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._tensors = dict(tensors)
        self._file = open(path, "rb")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start to stop of the leading axis, float32."""
        tensor = self._tensors[name]
        stop = tensor.shape[0] if stop is None else stop
        if tensor.transposed:
            values = np.empty((stop - start, tensor.rows), np.float32)
            for first, last, rows in self._chunks(tensor, 0, tensor.rows):
                values[:, first:last] = rows[:, start:stop].T
        elif tensor.head_dim:
            # Stored pair by pair: 0, Dh/2, 1, Dh/2 + 1, … Whole heads are read and cut.
            size = tensor.head_dim
            first, last = start // size * size, -(-stop // size) * size
            pairs = self._rows(tensor, first, last).reshape(-1, size // 2, 2, tensor.columns)
            values = pairs.swapaxes(1, 2).reshape(last - first, -1)[start - first : stop - first]
        else:
            values = self._rows(tensor, start, stop)
        values = values.reshape(stop - start, *tensor.shape[1:])
        return values - np.float32(tensor.added) if tensor.added else values

    def _rows(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        values = np.empty((stop - start, tensor.columns), np.float32)
        for first, last, rows in self._chunks(tensor, start, stop):
            values[first - start : last - start] = rows
        return values

    def _chunks(self, tensor: Tensor, start: int, stop: int):
        step = max(1, CHUNK // tensor.columns)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            yield first, last, tensor.decode(self._file, first, last)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_bytes(file: BinaryIO, offset: int, size: int) -> np.ndarray:
    """`size` bytes of a file, uint8. Raises ValueError if it has fewer."""
    content = np.empty(size, np.uint8)
    file.seek(offset)
    if file.readinto(memoryview(content)) != size:
        raise ValueError(f"{file.name} is truncated; copy it again")
    return content
