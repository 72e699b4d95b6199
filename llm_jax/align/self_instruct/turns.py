"""Second turns: the model writes what a user would ask next about a task, and answers it."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.align.self_instruct import filters, prompts
from llm_jax.align.self_instruct.journal import Journal
from llm_jax.align.self_instruct.rounds import Asker, Options
from llm_jax.align.self_instruct.tasks import Task
from llm_jax.data.progress import bar
from llm_jax.eval.output import write_json

TURNS, CONVERSATIONS, REJECTED = "turns.jsonl", "conversations.jsonl", "rejected_turns.jsonl"
SHOTS = 3


def write_turns(
    model: Any,
    tasks: Sequence[Task],
    seeds: Sequence[Task],
    folder: str | Path,
    options: Options | None = None,
) -> dict[str, Any]:
    """Second turns for `tasks` into `folder`: conversations.jsonl (messages layout) and
    rejected_turns.jsonl. The same call, or one with more tasks, goes on where an earlier one ended.

    Returns:
      asked, kept and rejected ([{"stage", "rule", "count"}]), which turns.json holds too.
    """
    options, folder = options or Options(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder, TURNS, _files)
    done = sum(line["asked"] for line in journal.lines)
    progress = bar("second turns", len(tasks), "task")
    progress.update(min(done, len(tasks)))
    while done < len(tasks):
        some = tasks[done : done + options.batch_size]
        made, rejected = second_turns(model, some, seeds, options, len(journal.lines))
        journal.write({"asked": len(some), "kept": made, "rejected": rejected})
        done += len(some)
        progress.update(len(some))
    progress.close()
    counted = Counter((r["stage"], r["rule"]) for r in journal.all("rejected"))
    counts = {
        "asked": done,
        "kept": len(journal.all("kept")),
        "rejected": [{"stage": s, "rule": r, "count": n} for (s, r), n in counted.most_common()],
    }
    write_json(str(folder / "turns.json"), counts)
    return counts


def second_turns(
    model: Any, tasks: Sequence[Task], seeds: Sequence[Task], options: Options, number: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Conversations of two turns from tasks of one, and what was rejected.

    The question passes the rules of instructions, so it is no repetition of the first one; the
    answer those of answers. `number` makes the random seed.

    Returns:
      ({"messages": [...]} of user, assistant, user, assistant each; rejections with stage, rule,
      text and instruction).

    Raises:
      ValueError: no seed task has a follow_up.
    """
    examples = [t for t in seeds if t.follow_up]
    if not examples:
        raise ValueError("--input: no seed task has a 'follow_up'; generated turns need an example")
    asks, rng = Asker(model, options), np.random.default_rng([options.seed, number])
    rejected, ready, out = [], [], []

    def reject(stage: str, rule: str, text: str, task: Task) -> None:
        rejected.append(
            {"stage": stage, "rule": rule, "text": text, "instruction": task.instruction}
        )

    asked = []
    for t in tasks:
        shots = [examples[i] for i in rng.permutation(len(examples))[:SHOTS]]
        asked.append(asks.style.next([prompts.with_input(t), t.output], shots))
    for t, c in zip(tasks, asks.ask("next", asked, number), strict=True):
        text, first = c.text.strip(), filters.Similarity([t.instruction, t.output])
        finished = c.finish_reason == "stop"
        fault = filters.instruction_fault(text, finished, first, options.max_similarity)
        if fault:
            reject("next", fault, c.text, t)
        else:
            ready.append((t, text))
    asked = [asks.style.answer([prompts.with_input(t), t.output, text]) for t, text in ready]
    for (t, text), c in zip(ready, asks.ask("answer", asked, number), strict=True):
        answer, finished = c.text.strip(), c.finish_reason == "stop"
        fault = filters.output_fault(answer, finished, text, prompts.with_input(t))
        if not fault and filters.words(answer) == filters.words(t.output):
            fault = "repeats the first answer"
        if fault:
            reject("answer", fault, c.text, t)
            continue
        turns = (prompts.with_input(t), t.output, text, answer)
        roles = ("user", "assistant", "user", "assistant")
        messages = [{"role": r, "content": x} for r, x in zip(roles, turns, strict=True)]
        out.append({"messages": messages})
    return out, rejected


def _files(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict]]:
    return {
        CONVERSATIONS: [row for line in lines for row in line["kept"]],
        REJECTED: [row for line in lines for row in line["rejected"]],
    }
