"""Result files that are there whole or not at all."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def replacing(path: str) -> Iterator[TextIO]:
    """A text file that takes its name once it is complete; on an error nothing is left behind."""
    path = os.path.expanduser(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    unfinished = f"{path}.{os.getpid()}.tmp"
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            yield file
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(unfinished)


def write_json(path: str, value: Any) -> None:
    """Writes `value`; numbers that JSON lacks (the standard error of a single item) become null."""
    with replacing(path) as file:
        json.dump(_finite(value), file, indent=2)
        file.write("\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
