"""Progress of long work on data: a bar on a terminal, a line every so often without one."""

import sys
from typing import Any


def bar(label: str, total: int | None, unit: str) -> Any:
    """A tqdm bar that counts `unit`s and stays away from work that is done within a second."""
    from tqdm import tqdm

    every = 0.5 if sys.stderr.isatty() else 30
    return tqdm(desc=label, total=total, unit=unit, unit_scale=True, mininterval=every, delay=1)
