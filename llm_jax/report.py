"""The one renderer of report.md and its plots: for training runs, sweeps and data alike.

A report is a title and a sequence of blocks (`Text`, `Table`, `Code`, `Plot`); `write_report` turns
them into Markdown with PNG plots beside it. The same blocks give the same bytes.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.plots import Contours, Mark, Plot, Series, check_plot, replace_file, save_plot

__all__ = [
    "Block", "Code", "Contours", "Mark", "Plot", "Series", "Table", "Text",
    "format_number", "read_metrics", "save_plot", "write_report",
]  # fmt: skip


@dataclass(frozen=True)
class Text:
    """Markdown, taken as it is (`## Heading`, paragraphs, lists)."""

    markdown: str


@dataclass(frozen=True)
class Code:
    """Text shown as it is: a sample, a command, a config."""

    text: str
    caption: str = ""
    language: str = ""


@dataclass(frozen=True)
class Table:
    """One row per mapping; columns in order of first appearance unless `columns` picks them."""

    rows: Sequence[Mapping[str, Any]]
    caption: str = ""
    columns: Sequence[str] | None = None


Block = Text | Code | Table | Plot


def write_report(
    directory: str | os.PathLike, title: str, blocks: Sequence[Block], *, name: str = "report.md"
) -> Path:
    """Writes `directory/<name>` and `directory/plots/*.png`; returns the path of the former.

    A report that is already there is replaced in one move, so a reader never sees half of one.

    Raises:
      ValueError: two plots of one name, a name that is no plain file name, an unknown style or
        scale, or a series whose x and y differ in length.
      TypeError: a block of another kind.
    """
    directory = Path(directory)
    plots = [block for block in blocks if isinstance(block, Plot)]
    seen: set[str] = set()
    for plot in plots:
        check_plot(plot)
        if plot.name in seen:
            raise ValueError(f"two plots are named {plot.name!r}; every plot needs its own name")
        seen.add(plot.name)
    text = "\n\n".join([f"# {title}", *(_markdown(block) for block in blocks)]) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        save_plot(plot, directory / "plots" / f"{plot.name}.png")
    path = directory / name
    replace_file(path, text.encode("utf-8", errors="backslashreplace"))
    return path


def read_metrics(path: str | os.PathLike) -> dict[str, list]:
    """Reads a metrics.jsonl file into columns of equal length; what a line lacks is None.

    The last line may be cut short (a process was killed while it wrote) and is then left out. Where
    `step` falls back, a run was resumed from a checkpoint: the lines it repeats replace the old.

    Raises:
      ValueError: a broken line before the last, or a line that is no JSON object.
    """
    rows: list[dict] = []
    # Not splitlines: it also splits at U+2028, which a sample in a JSON string may hold.
    lines = Path(path).read_text("utf-8", errors="replace").rstrip().split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not JSON ({e.msg}); remove the line") from e
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object; remove the line")
        if rows and "step" in row and rows[-1].get("step", row["step"]) > row["step"]:
            rows = [old for old in rows if old.get("step", -1) < row["step"]]
        rows.append(row)
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [row.get(key) for row in rows] for key in keys}


def format_number(value: Any) -> str:
    """Four significant digits, thousands separated, whole numbers in full, extremes as 1.2e-05.

    Anything that is no number becomes its `str`; None, for what was not measured, becomes a dash.
    """
    value = _plain(value)
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{int(value):,}"
    if not isinstance(value, Real):
        return str(value)
    value = float(value)
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e13:
        return f"{value:.3e}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def _markdown(block: Block) -> str:
    if isinstance(block, Text):
        return block.markdown.strip("\n")
    caption = f"**{block.caption}**\n\n" if getattr(block, "caption", "") else ""
    if isinstance(block, Code):
        text = _printable(block.text)
        longest = max((len(run) for run in re.findall("`{3,}", text)), default=2)
        fence = "`" * (longest + 1)
        return f"{caption}{fence}{block.language}\n{text}\n{fence}"
    if isinstance(block, Table):
        return caption + _table(block)
    if isinstance(block, Plot):
        image = f"![{block.title or block.name}](plots/{block.name}.png)"
        return f"{image}\n\n{block.caption}" if block.caption else image
    raise TypeError(f"a report has blocks of {Block}, not {type(block).__name__}")


def _table(table: Table) -> str:
    columns = table.columns or list(dict.fromkeys(key for row in table.rows for key in row))
    if not columns:
        return "(no rows)"

    def cell(value: Any) -> str:
        return " ".join(_printable(format_number(value)).replace("|", r"\|").split())

    def is_number(value: Any) -> bool:
        return value is None or isinstance(_plain(value), Real)

    rule = ["---:" if all(is_number(r.get(c)) for r in table.rows) else ":---" for c in columns]
    body = [[cell(row[c]) if c in row else "" for c in columns] for row in table.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [[cell(c) for c in columns], rule, *body])


def _plain(value: Any) -> Any:
    """The Python number in a scalar of numpy or jax; anything else as it is."""
    return value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value


def _printable(text: str) -> str:
    """Control characters, which a model may well emit, as their escapes."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda m: f"\\x{ord(m[0]):02x}", text)
