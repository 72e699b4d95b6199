"""A table of finished training runs, which is all that a scaling law is fitted to."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llm_jax.scaling import table as tables

# Role -> what --columns may call it.
ROLES = {
    "N": ("n",),
    "D": ("d",),
    "C": ("c",),
    "loss": ("loss",),
    "unique": ("unique", "u_d"),
    "budget": ("budget",),
    "curve": ("run", "curve"),
}
FINISHED = {"finished", "ok"}  # what a column `status` says of a run that has its loss
FEWEST_ROWS = 4
FLOPS_FACTOR = 6.0
# Budgets that a table does not name: rows of one agree in FLOPs within this factor, and the gaps
# between budgets are at least twice as wide as the widest of them.
BUDGET_SPREAD = 1.25


@dataclass(frozen=True)
class Runs:
    """R runs, or points of training curves; float64 columns of length R.

    Attributes:
      n: parameters, by whichever convention the table counts.
      d: training tokens.
      c: training FLOPs; 6 n d unless the table has its own.
      loss: nats per token.
      budget: number of the IsoFLOP group that a run belongs to, int64 from 0 by rising compute;
        rows of one group share a budget up to rounding. None: the table is not made of budgets.
      curve: number of the training run that a row is a point of, int64; None: each row is a run.
      unique: distinct tokens, for laws of repeated data; None: every token was seen once.
      other: further numeric columns by name (learning rate, seed, width, ...).
    """

    n: np.ndarray
    d: np.ndarray
    c: np.ndarray
    loss: np.ndarray
    budget: np.ndarray | None = None
    curve: np.ndarray | None = None
    unique: np.ndarray | None = None
    other: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, rows: np.ndarray) -> "Runs":
        """The runs at these indices (or under this mask)."""

        def of(x):
            return None if x is None else x[rows]

        return Runs(
            n=self.n[rows],
            d=self.d[rows],
            c=self.c[rows],
            loss=self.loss[rows],
            budget=of(self.budget),
            curve=of(self.curve),
            unique=of(self.unique),
            other={k: v[rows] for k, v in self.other.items()},
        )


@dataclass(frozen=True)
class Source:
    """Where runs came from.

    Attributes:
      path: the file.
      sha256: of the whole file.
      columns: role -> column of the file.
      where: conditions that selected the rows.
      flops_factor: C = flops_factor * N * D wherever one of the three was not in the table.
      n_read: rows of the file; n_rows: rows that are left.
      warnings: what was dropped and what looks odd, one line each, `name: what`.
    """

    path: Path
    sha256: str
    columns: dict[str, str]
    where: list[str]
    flops_factor: float
    n_read: int
    n_rows: int
    warnings: list[str]


def parse_columns(text: str) -> dict[str, str]:
    """`N:Model Size,C:FLOPs,loss:loss` -> {role: column}; a bare `loss` is `loss:loss`.

    A comma inside a column's name is no separator unless a role follows it.

    Raises:
      ValueError: an unknown role (the message names the nearest), or one given twice.
    """
    names = {name: role for role, names in ROLES.items() for name in names}
    known = "|".join(map(re.escape, names))
    found: dict[str, str] = {}
    for part in re.split(rf",(?=\s*(?:\w+\s*:|(?:{known})\s*(?:,|$)))", text, flags=re.I):
        name, colon, column = (piece.strip().strip('"') for piece in part.partition(":"))
        if not name:
            continue
        role = names.get(name.lower())
        if role is None:
            near = difflib.get_close_matches(name.lower(), names, n=1)
            near = next((n for n in ("N", "D", "C", "loss", "U_D", "budget", "run")
                         if near and n.lower() == near[0]), "N:..., D:..., loss:...")  # fmt: skip
            raise ValueError(f"--columns: {name!r} is no role; did you mean {near}?")
        if role in found:
            raise ValueError(f"--columns: two columns for {name!r}")
        found[role] = column if colon else name
    return found


def default_columns(header: Sequence[str]) -> dict[str, str]:
    """The columns of a table that follows our names, such as the runs.csv of a sweep."""
    own = ("N", "D", "C", "loss", "U_D", "budget", "run", "curve")
    return parse_columns(",".join(name for name in own if name in header and (
        name != "run" or "curve" not in header)))  # fmt: skip


def read(
    path,
    columns: Mapping[str, str] | str | None = None,
    where: Sequence[str] = (),
    flops_factor: float | None = None,
) -> tuple[Runs, Source]:
    """Reads runs from any delimited file with a header.

    Rows without a finite loss, rows whose `status` is not finished, and rows that repeat another
    in every column are dropped with a warning.

    Args:
      path: a file, or a sweep's folder with runs.csv.
      columns: role -> column, or the text of --columns; None: columns named by role (N, D, C, loss,
        U_D, budget, run). Two of N, D, C suffice.
      where: conditions, see `table.select`.
      flops_factor: C / (N D) for the one of the three that is not there; None: 6.

    Raises:
      FileNotFoundError, ValueError: what is wrong with the file, the columns, the conditions or a
        value, in one line that names it.
    """
    table = tables.read(path)
    n_read, warnings = len(table), []
    if columns is None:
        columns = default_columns(list(table.columns))
    elif isinstance(columns, str):
        columns = parse_columns(columns)
    columns = dict(columns)
    _check_roles(table, columns)
    table = tables.select(table, where)
    table = _drop(table, warnings)
    loss = table.numbers(columns["loss"], "--columns")
    if not np.isfinite(loss).all():
        bad = np.flatnonzero(~np.isfinite(loss))
        warnings.append(
            f"no loss: {len(bad)} of {len(loss)} rows have no finite {columns['loss']!r} and are "
            f"left out (the first in line {table.lines[bad[0]]})"
        )
        table = table.take(np.flatnonzero(np.isfinite(loss)).tolist())
        loss = loss[np.isfinite(loss)]
    _positive(table, columns["loss"], loss)
    given = {}
    for role in ("N", "D", "C", "unique"):
        if role in columns:
            given[role] = table.numbers(columns[role], "--columns")
            _positive(table, columns[role], given[role])
    if len(table) < FEWEST_ROWS:
        raise ValueError(
            f"{table.path.name}: {len(table)} usable rows; a law needs at least {FEWEST_ROWS}"
        )
    factor = flops_factor or FLOPS_FACTOR
    n, d, c = _two_suffice(given, factor)
    used = set(columns.values())
    other = {}
    for name, cells in table.columns.items():
        values = [tables.number(cell) for cell in cells]
        if name not in used and name and None not in values:
            other[name] = np.array(values, float)
    runs = Runs(
        n=n, d=d, c=c, loss=loss,
        budget=_budgets(table, columns, c, n), curve=_curves(table, columns),
        unique=given.get("unique"), other=other,
    )  # fmt: skip
    warnings += doubts(runs, "C" in columns and len(given.keys() & {"N", "D", "C"}) == 3, factor)
    source = Source(
        path=table.path, sha256=table.sha256, columns=columns, where=list(where),
        flops_factor=factor, n_read=n_read, n_rows=len(runs), warnings=warnings,
    )  # fmt: skip
    return runs, source


def _check_roles(table: tables.Table, columns: Mapping[str, str]) -> None:
    there = ", ".join(map(repr, table.columns))
    example = '--columns="N:...,D:...,loss:..."'
    if "loss" not in columns:
        raise ValueError(f"{example} must name the loss; {table.path.name} has {there}")
    if len(columns.keys() & {"N", "D", "C"}) < 2:
        raise ValueError(
            f"{example} must name two of N (parameters), D (tokens), C (FLOPs); "
            f"{table.path.name} has {there}"
        )
    for role, name in columns.items():
        table.column(name, f"--columns={role}:{name}")


def _drop(table: tables.Table, warnings: list[str]) -> tables.Table:
    """Without failed runs and complete repetitions."""
    status = table.columns.get("status")
    if status is not None and not FINISHED.isdisjoint(status):
        keep = [i for i, word in enumerate(status) if word in FINISHED]
        if len(keep) < len(table):
            warnings.append(
                f"failed runs: {len(table) - len(keep)} of {len(table)} rows have another status "
                "than finished and are left out"
            )
            table = table.take(keep)
    rows = list(zip(*table.columns.values(), strict=True))
    first = {row: i for i, row in reversed(list(enumerate(rows)))}
    if len(first) < len(rows):
        again = next(i for i, row in enumerate(rows) if first[row] != i)
        warnings.append(
            f"duplicate rows: {len(rows) - len(first)} of {len(rows)} rows repeat another in every "
            f"column and are left out (the first in line {table.lines[again]})"
        )
        table = table.take(sorted(first.values()))
    return table


def _positive(table: tables.Table, name: str, values: np.ndarray) -> None:
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(bad):
        cell = table.columns[name][bad[0]]
        raise ValueError(
            f"{table.path.name}, line {table.lines[bad[0]]}, column {name!r}: {cell!r}; every value "
            f"must be above 0 ({len(bad)} rows are not; --where selects rows)"
        )


def _two_suffice(given: Mapping[str, np.ndarray], factor: float) -> tuple[np.ndarray, ...]:
    if "N" not in given:
        return given["C"] / (factor * given["D"]), given["D"], given["C"]
    if "D" not in given:
        return given["N"], given["C"] / (factor * given["N"]), given["C"]
    return given["N"], given["D"], given.get("C", factor * given["N"] * given["D"])


def _curves(table: tables.Table, columns: Mapping[str, str]) -> np.ndarray | None:
    if "curve" not in columns:
        return None
    cells = table.columns[columns["curve"]]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(cells))}
    # Where every row is a run of its own there are no curves to speak of.
    return np.array([numbers[cell] for cell in cells]) if len(numbers) < len(cells) else None


def _budgets(
    table: tables.Table, columns: Mapping[str, str], c: np.ndarray, n: np.ndarray
) -> np.ndarray | None:
    if "budget" not in columns:
        return find_budgets(c, n)
    cells = table.columns[columns["budget"]]
    if "" in cells:
        line = table.lines[cells.index("")]
        raise ValueError(f"{table.path.name}, line {line}: no {columns['budget']!r}")
    # Cells that are the same number are the same budget, however they are written.
    keys = [cell if tables.number(cell) is None else tables.number(cell) for cell in cells]
    middle = {k: np.median([x for x, key in zip(c, keys, strict=True) if key == k]) for k in keys}
    order = {key: i for i, key in enumerate(sorted(middle, key=middle.get))}
    return np.array([order[key] for key in keys])


def find_budgets(c: np.ndarray, n: np.ndarray) -> np.ndarray | None:
    """Recognises IsoFLOP groups: int64 [R] numbered by rising compute, or None.

    Log FLOPs are sorted and cut at every gap above some width; the smallest width counts for which
    rows of a group agree within BUDGET_SPREAD, all gaps between groups are at least twice the
    widest group, and four rows of five are in groups of three or more model sizes.
    """
    order = np.argsort(c, kind="stable")
    log_c, gaps = np.log(c[order]), np.diff(np.log(c[order]))
    for cut in np.geomspace(1e-9, np.log(BUDGET_SPREAD), 200):
        starts = np.concatenate([[0], 1 + np.flatnonzero(gaps > cut)])
        group = np.repeat(np.arange(len(starts)), np.diff([*starts, len(c)]))
        spread = np.max(np.maximum.reduceat(log_c, starts) - log_c[starts])
        if spread > np.log(BUDGET_SPREAD):
            return None
        if len(starts) > 1 and gaps[gaps > cut].min() < 2 * spread:
            continue
        sizes = np.bincount(np.unique(np.stack([group, n[order]]), axis=1)[0].astype(int))
        if np.mean(sizes[group] >= 3) >= 0.8:
            numbers = np.empty(len(c), np.int64)
            numbers[order] = group
            return numbers
    return None


def doubts(runs: Runs, own_flops: bool, factor: float) -> list[str]:
    """What about a table deserves a second look, one line each, `name: what`."""
    found = []

    def add(condition: bool, line: str) -> None:
        if condition:
            found.append(line)

    ratio = float(np.median(runs.c / (runs.n * runs.d)))
    add(
        own_flops and abs(ratio / factor - 1) > 0.1,
        f"own FLOPs: the median of C/(N D) is {ratio:.3g}, not {factor:g}; C is the table's, and "
        f"--flops_factor={ratio:.3g} gives N* and D* by that count",
    )
    add(
        runs.loss.min() > 20,
        f"loss: all are above 20 (the least is {runs.loss.min():.4g}), which looks like perplexity; "
        "a law needs nats per token, the logarithm of it",
    )
    add(
        runs.n.max() < 1e3,
        f"N: the largest is {runs.n.max():.4g}, which looks like millions or billions of parameters",
    )
    add(
        runs.d.max() < 1e5,
        f"D: the largest is {runs.d.max():.4g}, which looks like millions or billions of tokens",
    )
    same = len(runs) - len(np.unique(np.stack([runs.n, runs.d, runs.loss]), axis=1).T)
    add(same > 0, f"duplicate rows: {same} rows equal another in N, D and loss; they count twice")
    add(len(np.unique(runs.n)) == 1, "one model size: nothing depends on N")
    add(
        runs.budget is not None and runs.budget.max() == 0,
        "one budget only: how the optimum grows with compute cannot be seen",
    )
    return found
