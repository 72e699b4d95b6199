"""The run: rounds of asking and filtering, each recorded as one line, so that a run goes on.

A round asks for instructions, filters them, and makes an instance of each that is left: a label and
an input that fits it where the answer is one of a few labels (output first), otherwise an input, or
none, and an answer (input first). Examples are drawn from the seed tasks and from what was kept.
Round r depends on the seed, on r, on how many are asked for in it (the last of a limit: fewer), and
on what earlier rounds kept.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.align.self_instruct import filters, prompts
from llm_jax.align.self_instruct.journal import Journal
from llm_jax.align.self_instruct.report import write
from llm_jax.align.self_instruct.tasks import Task
from llm_jax.data.progress import bar
from llm_jax.decode.generate import Completion
from llm_jax.eval.output import write_json

ROUNDS, KEPT, REJECTED, SETTINGS = "rounds.jsonl", "kept.jsonl", "rejected.jsonl", "settings.json"
# Examples in a prompt: few, since reading them is most of the work.
SHOTS = 6  # instructions where more are asked for
OWN_SHOTS = 2  # of them, instructions that the model wrote itself
KIND_SHOTS = 2  # of each kind
INPUT_SHOTS = 2  # with an input, and one without
LABEL_SHOTS = 5


@dataclass(frozen=True)
class Options:
    """How a run asks; a run that goes on needs the same."""

    style: str = "auto"  # auto | base | chat
    seed: int = 0
    batch_size: int = 16  # completions at a time
    temperature: float = 0.8  # of instructions and inputs
    answer_temperature: float = 0.3  # of answers
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_similarity: float = 0.7  # ROUGE-L from which on an instruction is not new
    instruction_tokens: int = 64  # at most, of an instruction
    input_tokens: int = 64
    output_tokens: int = 192

    def __post_init__(self):
        for name in ("batch_size", "instruction_tokens", "input_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} has to be at least 1")
        if not 0 < self.max_similarity <= 1:
            raise ValueError(f"--max_similarity={self.max_similarity} has to be in (0, 1]")


def run(
    model: Any,
    seeds: Sequence[Task],
    folder: str | Path,
    *,
    target: int,
    limit: int = 0,
    options: Options | None = None,
    source: str = "",
) -> dict[str, Any]:
    """Generates until `target` tasks are kept, or `limit` completions have been asked for
    instructions (0: no limit). The same call goes on where an earlier one in `folder` ended.

    Writes into `folder`: kept.jsonl (Alpaca rows), rejected.jsonl (each with its stage, its rule and
    its text), rounds.jsonl (what each round did), report.md and report.json.

    Args:
      model: has `complete(prompts, **sampling)` and `tokenizer`, as `llm_jax.load` returns.
      source: the model's name, for the report.

    Returns:
      The content of report.json.

    Raises:
      ValueError: the folder holds a run with other options, seed tasks or another model.
    """
    options, folder = options or Options(), Path(folder)
    if target < 1:
        raise ValueError(f"--target={target} has to be at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder / SETTINGS, seeds, options, source)
    journal = Journal(folder, ROUNDS, _files)
    asks = Asker(model, options)
    kept = [Task(**row) for row in journal.all("kept")]
    known = filters.Similarity([t.instruction for t in [*seeds, *kept]])
    progress = bar("self-instruct", target, "task")
    progress.update(min(len(kept), target))
    asked = sum(line["asked"] for line in journal.lines)
    while len(kept) < target and (not limit or asked < limit):
        count = min(options.batch_size, limit - asked) if limit else options.batch_size
        made = _round(asks, seeds, kept, known, len(journal.lines), count)
        journal.write(made)
        new = [Task(**row) for row in made["kept"]]
        progress.update(min(len(new), target - len(kept)))
        asked, kept = asked + count, kept + new
    progress.close()
    return write(folder, journal.lines, seeds, kept, dataclasses.asdict(options), source)


def kept_tasks(folder: str | Path) -> list[Task]:
    """The tasks that a run in `folder` has kept."""
    journal = Journal(Path(folder), ROUNDS, _files)
    return [Task(**row) for row in journal.all("kept")]


class Asker:
    """Batches of prompts to completions. All batches of a stage have as many rows, so that few
    shapes are compiled."""

    def __init__(self, model: Any, options: Options):
        self.style = prompts.style(options.style, model.tokenizer)
        self.options, self._model = options, model
        self._tokens = {
            "instruction": options.instruction_tokens
            * (1 if isinstance(self.style, prompts.Chat) else prompts.MORE),
            "kind": options.instruction_tokens,
            "next": options.instruction_tokens,
            "input": options.input_tokens,
            "label": options.instruction_tokens,
            "labelled": options.input_tokens,
            "output": options.output_tokens,
            "answer": options.output_tokens,
        }

    def ask(self, stage: str, asked: Sequence[Any], number: int) -> list[Completion]:
        """A completion of each prompt; `number` makes the random seed."""
        o, out = self.options, []
        temperature = {"kind": 0.0, "output": o.answer_temperature, "answer": o.answer_temperature}
        words = np.random.SeedSequence([o.seed, number, *stage.encode()]).generate_state(1)
        for start in range(0, len(asked), o.batch_size):
            rows = list(asked[start : start + o.batch_size])
            done = self._model.complete(
                rows + rows[-1:] * (o.batch_size - len(rows)),
                max_new_tokens=self._tokens[stage],
                stop=self.style.stop(stage),
                temperature=temperature.get(stage, o.temperature),
                top_k=o.top_k,
                top_p=o.top_p,
                min_p=o.min_p,
                repetition_penalty=o.repetition_penalty,
                seed=int(words[0] >> 1) + start,
            )
            out += done[: len(rows)]
        return out


def _round(
    asks: Asker,
    seeds: Sequence[Task],
    kept: Sequence[Task],
    known: filters.Similarity,
    number: int,
    count: int,
) -> dict[str, Any]:
    """One round as a line of the journal; `known` gets the instructions that were kept."""
    style, rng = asks.style, np.random.default_rng([asks.options.seed, number])
    rejected: list[dict[str, str]] = []

    def reject(stage: str, rule: str, text: str, instruction: str = "") -> None:
        rejected.append({"stage": stage, "rule": rule, "text": text, "instruction": instruction})

    asked = [style.instruction(_mixed_shots(seeds, kept, rng)) for _ in range(count)]
    parsed, tasks = 0, []
    seen = filters.Similarity()  # of this round; those that fail later may come again
    for c in asks.ask("instruction", asked, number):
        found = style.parse_instructions(c.text, c.finish_reason == "stop")
        parsed += len(found)
        if not found:
            reject("instruction", "nothing to parse", c.text)
        for text, finished in found:
            limit = asks.options.max_similarity
            fault = filters.instruction_fault(text, finished, known, limit)
            if not fault and seen.highest(text) >= limit:
                fault = "similar"
            if fault:
                reject("instruction", fault, text)
                continue
            seen.add(text)
            tasks.append(Task(text, "", ""))

    tasks = _with_kind(asks, seeds, tasks, rng, number, reject)
    made = [
        *_labels_first(asks, seeds, [t for t in tasks if t.classification], rng, number, reject),
        *_input_first(asks, seeds, [t for t in tasks if not t.classification], rng, number, reject),
    ]
    for t in made:
        known.add(t.instruction)
    rows = [dataclasses.asdict(t) for t in made]
    return {"asked": count, "parsed": parsed, "kept": rows, "rejected": rejected}


def _mixed_shots(seeds: Sequence[Task], kept: Sequence[Task], rng: np.random.Generator) -> list:
    own = rng.choice(len(kept), min(OWN_SHOTS, len(kept)), replace=False) if kept else []
    given = rng.choice(len(seeds), min(SHOTS - len(own), len(seeds)), replace=False)
    shots = [*(kept[i] for i in own), *(seeds[i] for i in given)]
    return [shots[i] for i in rng.permutation(len(shots))]


def _drawn(tasks: Sequence[Task], n: int, rng: np.random.Generator) -> list[Task]:
    return [tasks[i] for i in rng.permutation(len(tasks))[:n]]


def _with_kind(asks, seeds, tasks, rng, number, reject) -> list[Task]:
    labelled = [t for t in seeds if t.classification]
    others = [t for t in seeds if not t.classification]
    asked = []
    for t in tasks:
        shots = _drawn(labelled, KIND_SHOTS, rng) + _drawn(others, KIND_SHOTS, rng)
        asked.append(asks.style.kind(t, _drawn(shots, len(shots), rng)))
    out = []
    for t, c in zip(tasks, asks.ask("kind", asked, number), strict=True):
        verdict = prompts.parse_kind(c.text)
        if verdict is None:
            reject("kind", "neither yes nor no", c.text, t.instruction)
        else:
            out.append(dataclasses.replace(t, classification=verdict))
    return out


def _input_first(asks, seeds, tasks, rng, number, reject) -> list[Task]:
    others = [t for t in seeds if not t.classification]
    having, lacking = [t for t in others if t.input], [t for t in others if not t.input]
    shots = []
    for _ in tasks:
        some = _drawn(having, INPUT_SHOTS, rng) + _drawn(lacking, 1, rng)
        shots.append(_drawn(some, len(some), rng))
    asked = [asks.style.input(t, s) for t, s in zip(tasks, shots, strict=True)]
    ready = []
    for t, s, c in zip(tasks, shots, asks.ask("input", asked, number), strict=True):
        text = prompts.parse_input(c.text)
        if fault := filters.input_fault(text, c.finish_reason == "stop", t.instruction):
            reject("input", fault, c.text, t.instruction)
        else:
            ready.append((dataclasses.replace(t, input=text), s))
    asked, out = [asks.style.output(t, s) for t, s in ready], []
    for (t, _), c in zip(ready, asks.ask("output", asked, number), strict=True):
        text = c.text.strip()
        finished = c.finish_reason == "stop"
        if fault := filters.output_fault(text, finished, t.instruction, t.input):
            reject("output", fault, c.text, t.instruction)
        else:
            out.append(dataclasses.replace(t, output=text))
    return out


def _labels_first(asks, seeds, tasks, rng, number, reject) -> list[Task]:
    examples = [t for t in seeds if t.classification and t.input]
    shots = [_drawn(examples, LABEL_SHOTS, rng) for _ in tasks]
    asked = [asks.style.label(t, s) for t, s in zip(tasks, shots, strict=True)]
    ready = []
    for t, s, c in zip(tasks, shots, asks.ask("label", asked, number), strict=True):
        text = c.text.strip()
        if fault := filters.output_fault(text, c.finish_reason == "stop", t.instruction, ""):
            reject("label", fault, c.text, t.instruction)
        else:
            ready.append((dataclasses.replace(t, output=text), s))
    asked, out = [asks.style.labelled(t, s) for t, s in ready], []
    for (t, _), c in zip(ready, asks.ask("labelled", asked, number), strict=True):
        text = prompts.parse_input(c.text)
        fault = filters.input_fault(text, c.finish_reason == "stop", t.instruction)
        if not fault and text and filters.words(text) == filters.words(t.output):
            fault = "repeats the label"
        if fault:
            reject("labelled", fault, c.text, t.instruction)
        else:
            out.append(dataclasses.replace(t, input=text))
    return out


def _files(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict]]:
    return {
        KEPT: [Task(**row).alpaca() for line in lines for row in line["kept"]],
        REJECTED: [row for line in lines for row in line["rejected"]],
    }


def _check_settings(path: Path, seeds: Sequence[Task], options: Options, source: str) -> None:
    rows = json.dumps([dataclasses.asdict(t) for t in seeds], sort_keys=True)
    now = {
        **dataclasses.asdict(options),
        "model": source,
        "seed_tasks": hashlib.sha256(rows.encode()).hexdigest()[:16],
    }
    if not path.exists():
        write_json(str(path), now)
        return
    then = json.loads(path.read_text("utf-8"))
    for name, value in now.items():
        if then.get(name) != value:
            raise ValueError(
                f"--output={path.parent} holds a run with {name}={then.get(name)!r}, and this one has "
                f"{value!r}; set it back or take another folder"
            )
