"""A window of profiled steps, and where their time went by part of the model."""

import collections
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name=\"([^\"]*)\"")
SCOPE = re.compile(r"\b(embed|attention|mlp|head)\b")
COPIES = ("copy", "transpose_copy", "wrapped_broadcast", "wrapped_slice", "bitcast_copy")


class Row(NamedTuple):
    """The time of one kind of operation."""

    scope: str  # embed | attention | mlp | head | rest (optimizer, norms' sums, metrics)
    direction: str  # forward | backward | ""
    kind: str  # matmul | copies (moving or filling memory, no arithmetic) | other
    milliseconds: float  # of device time a step; operations that overlap all count
    share: float


def scopes(hlo: str) -> dict[str, str]:
    """Instruction -> the name that JAX gave it (its named scopes and primitive), from HLO text."""
    return dict(m.groups() for line in hlo.splitlines() if (m := INSTRUCTION.match(line)))


def summarise(folder: Path, hlo: str, steps: int) -> list[Row]:
    """Rows, the largest first, from the trace in a folder and the HLO text of the step in it.

    Raises:
      ValueError: the folder holds no trace, or no operation of that program in it.
    """
    traces = sorted(Path(folder).rglob("*.trace.json.gz"))
    if not traces:
        raise ValueError(f"{folder} holds no trace (*.trace.json.gz)")
    names = scopes(hlo)
    with gzip.open(traces[-1]) as f:
        events = json.load(f)["traceEvents"]
    total: collections.Counter = collections.Counter()
    for event in events:
        operation = event.get("args", {}).get("hlo_op") if event.get("ph") == "X" else None
        if operation is None or operation.startswith(("while", "call", "conditional")):
            continue  # these contain others
        name = names.get(operation, "")
        scope = SCOPE.search(name)
        direction = "backward" if "transpose(" in name else "forward"
        total[
            scope.group(1) if scope else "rest",
            direction if scope else "",
            _kind(operation, name),
        ] += event["dur"]
    if not total:
        raise ValueError(f"{traces[-1]} names no operation of a compiled program")
    whole = sum(total.values())
    return [
        Row(*key, milliseconds=t / 1000 / steps, share=t / whole) for key, t in total.most_common()
    ]


def _kind(operation: str, name: str) -> str:
    if name.endswith("dot_general") or operation.startswith("dot"):
        return "matmul"
    return "copies" if operation.startswith(COPIES) else "other"


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| part | pass | operations | ms a step | share |", "|---|---|---|---:|---:|"]
    for r in rows:
        lines.append(
            f"| {r.scope} | {r.direction} | {r.kind} | {r.milliseconds:,.2f} | {r.share:.1%} |"
        )
    return "\n".join(lines)


class Window:
    """Profiles `steps` steps of a run after its step `start`, into `folder`."""

    def __init__(self, folder: Path, start: int, steps: int):
        self.folder, self.start, self.steps = folder, start, steps
        self.open = False

    def before(self, step: int) -> None:
        """To be called before each step, 1-based."""
        if self.steps and step == self.start + 1:
            jax.profiler.start_trace(str(self.folder))
            self.open = True

    def after(self, step: int, metrics: dict, hlo: Callable[[], str]) -> str | None:
        """To be called after each step was dispatched; the table, once the window has closed.

        `hlo` gives the text of the compiled step.
        """
        if not self.open or step < self.start + self.steps:
            return None
        jax.block_until_ready(metrics)
        self.close()
        text = table(summarise(self.folder, hlo(), self.steps))
        (self.folder / "summary.md").write_text(text + "\n")
        return f"{text}\nprofile of {self.steps} steps, for xprof or Perfetto, in {self.folder}"

    def close(self) -> None:
        """Ends the trace, if one is open (a run that was stopped inside the window)."""
        if self.open:
            jax.profiler.stop_trace()
            self.open = False
