"""A file of one line a round from which a run goes on, and the files that follow from it."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_jax.eval.output import replacing

Files = Callable[[Sequence[dict[str, Any]]], dict[str, list[dict[str, Any]]]]


class Journal:
    """`folder`/`name`, and the JSONL files that `files` makes of its lines: {name: rows}.

    A line that was cut short when a run was killed is dropped; its round is done again.
    """

    def __init__(self, folder: Path, name: str, files: Files):
        self._path, self._folder, self._files = folder / name, folder, files
        text = self._path.read_text("utf-8") if self._path.exists() else ""
        # Not splitlines: it also splits at U+2028. The last piece is empty, or cut short.
        self.lines = [json.loads(line) for line in text.split("\n")[:-1]]
        for path, rows in [(self._path, self.lines), *self._derived(self.lines)]:
            with replacing(str(path)) as file:
                file.writelines(_line(row) for row in rows)

    def all(self, key: str) -> list[Any]:
        """The entries of all rounds under a key."""
        return [row for line in self.lines for row in line[key]]

    def write(self, line: dict[str, Any]) -> None:
        """One more round. What follows from it is written first and made anew by the next run, so
        that a whole line means that all of it is there."""
        for path, rows in [*self._derived([line]), (self._path, [line])]:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(_line(row) for row in rows)
                file.flush()
                os.fsync(file.fileno())
        self.lines.append(line)

    def _derived(self, lines: Sequence[dict[str, Any]]) -> list[tuple[Path, list[dict[str, Any]]]]:
        return [(self._folder / name, rows) for name, rows in self._files(lines).items()]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
