"""Data sets of many tasks as conversations: rows (`task_rows`) in phrasings (`task_templates`).

    {"id": "sst2-1f0c…", "task": "sst2", "template": 2, "messages": [
        {"role": "user", "content": "Review: a joy\\nSentiment:"},
        {"role": "assistant", "content": "positive"}],
     "choices": ["negative", "positive"], "answer": 1}

is a line of what `write` makes, which `data.conversations` reads. Of every data set a part is held
out, whole groups (articles, passages, twins) at a time, and what stands in it is nowhere in the
part for training. The part is the authors' own where they have one. Files that are themselves
somebody's evaluation set (`Task.from_evaluation`) are cut in two: after training on one half
a score on the whole file means nothing; score the held-out part.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_jax.data import task_rows, task_templates
from llm_jax.data.mixture import rates
from llm_jax.data.task_rows import Row, digest
from llm_jax.data.task_templates import Template

TRAIN, HELD_OUT = "train", "held_out"
PARTS = (TRAIN, HELD_OUT)


@dataclass(frozen=True)
class Task:
    """A data set and its phrasings.

    Attributes:
      cluster: tasks of one cluster are alike; to test on a new kind of task leave out all of them
        (Wei et al. 2022, section 2.2).
      templates: none where the rows are conversations already.
      from_evaluation: the file is the data set's evaluation part.
    """

    cluster: str
    rows: Callable[[Path], Iterator[Row]]
    templates: tuple[Template, ...] = ()
    from_evaluation: bool = False


TASKS: dict[str, Task] = {
    "sst2": Task("sentiment", task_rows.sst2, task_templates.SENTIMENT),
    "mrpc": Task("paraphrase", task_rows.mrpc, task_templates.PARAPHRASE),
    "stsb": Task("paraphrase", task_rows.stsb, task_templates.SIMILARITY),
    "rte": Task("inference", task_rows.rte, task_templates.ENTAILMENT),
    "cola": Task("grammar", task_rows.cola, task_templates.ACCEPTABILITY),
    "boolq": Task("reading", task_rows.boolq, task_templates.PASSAGE_YES_NO, True),
    "squad": Task("reading", task_rows.squad, task_templates.EXTRACTIVE, True),
    "arc_easy": Task("science", task_rows.arc_easy, task_templates.CHOICE_QUESTION, True),
    "arc_challenge": Task("science", task_rows.arc_challenge, task_templates.CHOICE_QUESTION, True),
    "piqa": Task("common sense", task_rows.piqa, task_templates.GOAL, True),
    "winogrande": Task("coreference", task_rows.winogrande, task_templates.GAP, True),
    "en_de": Task("translation", task_rows.en_de, task_templates.translation("German")),
    "en_fr": Task("translation", task_rows.en_fr, task_templates.translation("French")),
    "scitldr": Task("summaries", task_rows.scitldr, task_templates.SUMMARY),
    "gsm8k": Task("mathematics", task_rows.gsm8k, task_templates.MATHS),
    "wnut": Task("tagging", task_rows.wnut, task_templates.ENTITIES),
    "ewt_pos": Task("tagging", task_rows.ewt_pos, task_templates.PARTS_OF_SPEECH),
    "alpaca": Task("instructions", task_rows.alpaca),
    "lima": Task("instructions", task_rows.lima),
    "python_question": Task("python", task_rows.python_question, task_templates.PYTHON_QUESTION),
    "python_module": Task("python", task_rows.python_module, task_templates.PYTHON_MODULE),
}
EMBEDDED = ("python_question", "python_module")  # these need no files


@dataclass(frozen=True)
class Example:
    """A conversation of a task; `choices` only where the last answer is one of several."""

    id: str
    task: str
    template: int  # number of the phrasing; -1 where there is none
    messages: tuple[dict[str, str], ...]
    choices: tuple[str, ...] = ()
    answer: int = 0  # number of the right choice

    def to_json(self) -> dict[str, Any]:
        """What a line of the file holds."""
        out = {"id": self.id, "task": self.task, "template": self.template}
        out["messages"] = list(self.messages)
        return out | (
            {"choices": list(self.choices), "answer": self.answer} if self.choices else {}
        )


def split(name: str, rows: Iterable[Row], share: float = 0.1) -> tuple[dict[str, list[Row]], int]:
    """(part -> rows in order, rows left out because they came before or are held out).

    The authors' own parts are kept; of a single file the groups whose hash falls into the lower
    `share` are held out, which no other row changes: two tasks made of the same groups hold out the
    same ones.
    """
    parts: dict[str, dict[str, Row]] = {part: {} for part in PARTS}
    n = 0
    for row in rows:
        n, key, out = n + 1, row_id(name, row), row.held_out
        if out is None:
            out = digest(row.group or key) < share * 2**64
        parts[HELD_OUT if out else TRAIN].setdefault(key, row)
    for key in parts[HELD_OUT]:
        parts[TRAIN].pop(key, None)
    return {part: list(found.values()) for part, found in parts.items()}, n - sum(
        map(len, parts.values())
    )


def row_id(name: str, row: Row) -> str:
    """The name of what is asked: the same in every file and split; the right choice is no part."""
    asked = {k: v for k, v in row.fields.items() if k != "answer"}
    return f"{name}-{digest(asked, sorted(row.choices)):016x}"


def phrase(name: str, row: Row, number: int, seed: int, *, reversed_too: bool = True) -> Example:
    """A row in one of its task's phrasings, drawn by the seed and the row's number alone."""
    key = row_id(name, row)
    if row.messages:
        return Example(key, name, -1, tuple(row.messages))
    templates = TASKS[name].templates
    numbers = [
        i
        for i, t in enumerate(templates)
        if (reversed_too or not t.reverse) and t.gold in (None, row.gold)
    ]
    drawn = numbers[digest(seed, name, number) % len(numbers)]
    template = templates[drawn]
    choices = template.labels or row.choices
    values = dict(row.fields)
    if choices:
        listed = choices
        if template.letters:
            choices = tuple("ABCDEFGHIJ"[: len(choices)])
            listed = [f"{c}. {text}" for c, text in zip(choices, listed, strict=True)]
        else:
            listed = [f"- {text}" for text in listed]
        values["options"] = "\n".join(["Options:", *listed])
        values["answer"] = choices[row.gold]
    messages = (
        {"role": "user", "content": template.ask.format(**values)},
        {"role": "assistant", "content": template.answer.format(**values)},
    )
    scored = choices if not template.reverse else ()
    return Example(key, name, drawn, messages, scored, row.gold if scored else 0)


def examples(
    name: str,
    folder: str | os.PathLike,
    *,
    seed: int = 0,
    limit: int = 0,
    held_out_share: float = 0.1,
) -> tuple[dict[str, list[Example]], int]:
    """(part -> conversations, repeated rows left out) of a task.

    Held-out rows are never in a reversed phrasing, so that all of them are the task. `limit` keeps
    that many of each part, drawn by the seed; 0 keeps all, in the order of the files.

    Raises:
      ValueError: no such task.
      FileNotFoundError: `folder` lacks the task's files.
    """
    if name not in TASKS:
        raise ValueError(f"no task is named {name!r}; there are {', '.join(TASKS)}")
    parts, repeated = split(name, TASKS[name].rows(Path(folder)), held_out_share)
    out = {}
    for part, rows in parts.items():
        numbered = list(enumerate(rows))
        if limit and len(rows) > limit:
            numbered = sorted(numbered, key=lambda row: digest(seed, part, row[0]))[:limit]
        found = (phrase(name, row, i, seed, reversed_too=part == TRAIN) for i, row in numbered)
        # A phrasing of nothing teaches nothing, and is no conversation.
        out[part] = [e for e in found if all(m["content"].strip() for m in e.messages)]
    return out, repeated


def write(
    names: Sequence[str],
    folder: str | os.PathLike,
    output: str | os.PathLike,
    *,
    seed: int = 0,
    limit: int = 0,
    held_out_share: float = 0.1,
    cap: float = 0.0,
    temperature: float = 1.0,
) -> list[dict[str, Any]]:
    """Writes OUTPUT/train/TASK.jsonl and OUTPUT/held_out/TASK.jsonl; returns the mixture's table.

    A row for each task: task, cluster, phrasings, train and held_out (conversations), repeated (rows
    left out), capped (examples that count), rate (`mixture.rates`), and from_evaluation.
    """
    table = []
    for name in names:
        found, repeated = examples(
            name, folder, seed=seed, limit=limit, held_out_share=held_out_share
        )
        for part, rows in found.items():
            if not rows:
                raise ValueError(f"{name}: no row for the {part} part; change --held_out_share")
            _write_lines(Path(output) / part / f"{name}.jsonl", (e.to_json() for e in rows))
        task = TASKS[name]
        table.append(
            {
                "task": name,
                "cluster": task.cluster,
                "phrasings": len(task.templates),
                "train": len(found[TRAIN]),
                "held_out": len(found[HELD_OUT]),
                "repeated": repeated,
                "capped": int(min(len(found[TRAIN]), cap or len(found[TRAIN]))),
                "from_evaluation": task.from_evaluation,
            }
        )
    shares = rates({row["task"]: row["train"] for row in table}, cap=cap, temperature=temperature)
    return [{**row, "rate": shares[row["task"]]} for row in table]


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
