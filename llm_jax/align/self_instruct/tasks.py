"""Tasks, and the seed tasks that generation starts from."""

import json
from dataclasses import dataclass
from pathlib import Path

SEED_TASKS = Path(__file__).parents[1] / "seed_tasks.jsonl"  # twenty of our own


@dataclass(frozen=True)
class Task:
    """An instruction with one instance of it."""

    instruction: str  # one line
    input: str  # empty: the instruction needs none
    output: str
    classification: bool = False  # the answer is one of a few labels
    follow_up: str = ""  # what a user might ask next; an example for generated turns

    def alpaca(self) -> dict[str, str]:
        """The row of an Alpaca file, which instruction tuning reads."""
        return {"instruction": self.instruction, "input": self.input, "output": self.output}


def read_tasks(path: str | Path) -> list[Task]:
    """Seed tasks of a JSONL file: instruction, output, and perhaps input, classification, follow_up.

    Raises:
      ValueError: a line that is no such object, fewer than 8 tasks, or none with an input, without
        one, or of classification: prompts show examples of each.
    """
    tasks = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                tasks.append(_task(line, f"{path}, line {number}"))
    if len(tasks) < 8:
        raise ValueError(f"--input={path}: {len(tasks)} seed tasks; at least 8 are needed")
    kinds = {
        "with an input": [t for t in tasks if t.input and not t.classification],
        "without an input": [t for t in tasks if not t.input and not t.classification],
        "of classification with an input": [t for t in tasks if t.input and t.classification],
    }
    if missing := [kind for kind, some in kinds.items() if not some]:
        raise ValueError(f"--input={path}: no seed task {missing[0]}; add one")
    return tasks


def _task(line: str, where: str) -> Task:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise ValueError(f"{where}: not JSON ({e.msg})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a task has to be an object")
    texts = {}
    for key in ("instruction", "input", "output", "follow_up"):
        value = row.get(key, "")
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key!r} has to be a text")
        texts[key] = value.strip()
    for key in ("instruction", "output"):
        if not texts[key]:
            raise ValueError(f"{where}: {key!r} is missing or empty")
    texts["instruction"] = " ".join(texts["instruction"].split())
    return Task(**texts, classification=bool(row.get("classification", False)))
