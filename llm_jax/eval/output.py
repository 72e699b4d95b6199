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


class Kept:
    """Measurements by name in a JSON file, each of them there as soon as it has been made, so that
    the same command goes on where it stopped.

    Attributes:
      items: {name: plain values}; those of earlier runs first.

    Raises:
      ValueError: the file holds measurements that were made with other settings; `flag` is what to
        choose anew.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any], flag: str):
        self._path = os.path.expanduser(path)
        self.settings = json.loads(json.dumps(_finite(settings)))
        self.items: dict[str, Any] = {}
        if not os.path.exists(self._path):
            return
        with open(self._path, encoding="utf-8") as file:
            found = json.load(file)
        known, now = found.get("settings", {}), self.settings
        if changed := [k for k in now | known if now.get(k) != known.get(k)]:
            raise ValueError(
                f"{self._path} has measurements that differ in {', '.join(changed)}; choose another "
                f"{flag}"
            )
        self.items = found["items"]

    def add(self, name: str, item: Any) -> None:
        """Keeps a measurement, and writes the file."""
        self.items[name] = item
        write_json(self._path, {"settings": self.settings, "items": self.items})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
