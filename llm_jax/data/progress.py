"""Progress of long work on data: a bar on a terminal, a line every so often without one."""

import sys
from typing import Any, TextIO


def bar(label: str, total: int | None, unit: str) -> Any:
    """A tqdm bar that counts `unit`s and stays away from work that is done within a second."""
    from tqdm import tqdm

    options = {"mininterval": 0.5} if sys.stderr.isatty() else {"mininterval": 30, "ncols": 100}
    file = sys.stderr if sys.stderr.isatty() else _Lines(sys.stderr)
    return tqdm(desc=label, total=total, unit=unit, unit_scale=True, delay=1, file=file, **options)


class _Lines:
    """What tqdm draws over and over, as lines of a log."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, text: str) -> None:
        if text.strip():
            self._file.write(text.strip() + "\n")

    def flush(self) -> None:
        self._file.flush()
