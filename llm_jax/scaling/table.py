"""A delimited text file as columns of text, and conditions that select rows of it.

Nothing is guessed about the meaning of a cell: a number is what `float` reads (no thousands
separators, no units), and whatever else stands where a number is needed is an error that names the
line.
"""

import csv
import difflib
import hashlib
import io
import operator
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

DELIMITERS = ",;\t|"
MISSING = ("", "nan", "na", "n/a", "none", "null", "-", "inf", "-inf", "+inf")
COMPARE = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION = re.compile(r"\s*(.+?)\s*(!=|<=|>=|==|=|<|>)\s*(.*?)\s*$")


@dataclass(frozen=True)
class Table:
    """Columns of text of equal length.

    Attributes:
      path: the file they came from.
      columns: column name -> cells.
      lines: number of the line in the file that each row begins at.
      sha256: of the whole file.
    """

    path: Path
    columns: dict[str, list[str]]
    lines: list[int]
    sha256: str

    def __len__(self) -> int:
        return len(self.lines)

    def take(self, rows: Sequence[int]) -> "Table":
        """These rows only."""
        columns = {name: [cells[i] for i in rows] for name, cells in self.columns.items()}
        return replace(self, columns=columns, lines=[self.lines[i] for i in rows])

    def column(self, name: str, flag: str) -> list[str]:
        """The cells of a column; `flag` is what asked for it.

        Raises:
          ValueError: there is none of that name; the message names the nearest.
        """
        if name in self.columns:
            return self.columns[name]
        near = difflib.get_close_matches(name, self.columns, n=1)
        near = near or [c for c in self.columns if c.lower() == name.lower()]
        hint = f"did you mean {near[0]!r}? " if near else ""
        there = ", ".join(repr(c) for c in self.columns)
        raise ValueError(f"{flag}: {self.path.name} has no column {name!r}; {hint}it has {there}")

    def numbers(self, name: str, flag: str) -> np.ndarray:
        """A column as float64; empty cells and words such as nan or null become NaN.

        Raises:
          ValueError: no such column, or a cell that is neither a number nor empty.
        """
        values = np.empty(len(self))
        for i, cell in enumerate(self.column(name, flag)):
            value = number(cell)
            if value is None:
                raise ValueError(
                    f"{self.path.name}, line {self.lines[i]}, column {name!r}: {cell!r} is not a "
                    "plain number; thousands separators, decimal commas and units are not read "
                    "(write 70e9, not 70B or 70,000,000,000)"
                )
            values[i] = value
        return values


def number(cell: str) -> float | None:
    """The number in a cell; NaN where it says that there is none, None where it is other text."""
    cell = cell.strip()
    if cell.lower() in MISSING:
        return np.nan
    try:
        # Python reads 1_000 as a thousand, no other program does.
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def read(path: str | os.PathLike) -> Table:
    """Reads a file of a header line and rows, with commas, semicolons, tabs or bars between cells.

    Raises:
      FileNotFoundError: no such file, or a folder without runs.csv.
      ValueError: not a text file, no header, no rows, or a row of another length than the header.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "runs.csv").is_file():
            raise FileNotFoundError(f"--input={path}: a folder without runs.csv")
        path = path / "runs.csv"
    if not path.is_file():
        raise FileNotFoundError(f"--input={path}: no such file")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"--input={path}: not a CSV file (not UTF-8 text)") from e
    if "\x00" in text:
        raise ValueError(f"--input={path}: not a CSV file (it has zero bytes)")
    if not text.strip():
        raise ValueError(f"--input={path}: the file is empty")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
    rows, lines, start = [], [], 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append([cell.strip() for cell in row])
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as e:
        raise ValueError(f"--input={path}, line {start}: not a CSV file ({e})") from e
    header, rows, lines = rows[0], rows[1:], lines[1:]
    _check_header(path, header)
    if not rows:
        raise ValueError(f"--input={path}: a header and no rows")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise ValueError(
                f"--input={path}, line {line}: {len(row)} cells, but the header has {len(header)}"
            )
    columns = {name: [row[j] for row in rows] for j, name in enumerate(header)}
    return Table(path, columns, lines, hashlib.sha256(content).hexdigest())


def _delimiter(text: str) -> str:
    header = re.sub(r'"[^"]*"', "", text.lstrip().partition("\n")[0])
    return max(DELIMITERS, key=header.count)


def _check_header(path: Path, header: list[str]) -> None:
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise ValueError(f"--input={path}: two columns are named {twice[0]!r}; rename one")
    if all(number(name) is not None for name in header):
        raise ValueError(
            f"--input={path}: the first line has numbers only; a header with names is needed"
        )


def select(table: Table, conditions: Sequence[str], flag: str = "--where") -> Table:
    """The rows that meet every condition `column=value` (or !=, <, <=, >, >=).

    A string may hold several, separated by commas. Numbers are compared as numbers (1e9 = 1000000000),
    anything else as text; < and > need numbers, and a cell without one is not selected.

    Raises:
      ValueError: no condition in the text, an unknown column, a value that no row has, or no row
        that meets all.
    """
    keep = np.ones(len(table), bool)
    parts = [c for text in conditions for c in re.split(r",(?=[^,]*?[=<>])", text) if c.strip()]
    for part in parts:
        match = _CONDITION.match(part)
        if not match:
            raise ValueError(f"{flag}={part}: not a condition such as train_set=c4 or D>=1e9")
        name, sign, value = match.groups()
        meets = _meets(table, name, sign, value, f"{flag}={part}")
        if sign in ("=", "==") and not meets.any():
            raise ValueError(f"{flag}={part}: no row has it; {_values(table, name)}")
        keep &= meets
    if not keep.any():
        raise ValueError(
            f"{flag}={','.join(parts)}: none of {len(table)} rows meets all conditions"
        )
    return table.take(np.flatnonzero(keep).tolist()) if parts else table


def _meets(table: Table, name: str, sign: str, value: str, flag: str) -> np.ndarray:
    compare, wanted = COMPARE[sign], number(value)
    if sign not in ("=", "==", "!=") and (wanted is None or np.isnan(wanted)):
        raise ValueError(f"{flag}: {value!r} is not a number, and {sign} compares numbers")
    found = np.zeros(len(table), bool)
    for i, cell in enumerate(table.column(name, flag)):
        have = number(cell)
        if wanted is None or np.isnan(wanted) or have is None or np.isnan(have):
            found[i] = sign in ("=", "==", "!=") and compare(cell, value)
        else:
            found[i] = compare(have, wanted)
    return found


def _values(table: Table, name: str) -> str:
    values = list(dict.fromkeys(table.columns[name]))
    shown = ", ".join(repr(v) for v in values[:8])
    return f"{name!r} is {shown}" + (f" and {len(values) - 8} more" if len(values) > 8 else "")
