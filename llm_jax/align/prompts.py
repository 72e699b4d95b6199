"""Prompts from files of anything that has them: conversations, preferences, or prompts alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_jax.config import DialogueConfig
from llm_jax.data import comparisons, conversations, documents, preferences
from llm_jax.data.conversations import SUFFIXES, Malformed, Rejected
from llm_jax.data.prepare import EVAL
from llm_jax.train import checkpoint

Messages = list[dict[str, Any]]
MAX_TURN_CHARS = DialogueConfig().max_turn_chars


def read(inputs: Sequence[str], *, limit: int = 0) -> tuple[list[Messages], list[Rejected]]:
    """The first `limit` (0: all) distinct prompts of the inputs, in order, and rows without one.

    Inputs are those of `conversations.read` and `preferences.read`. A row is a preference, whose
    prompt is taken; a conversation, taken up to its last answer; or a `prompt`, a text or a list of
    messages. Rows with tools are left out.

    Raises:
      FileNotFoundError: an input that does not exist.
      ValueError: a file of another kind, a damaged list, no prompt at all.
    """
    found: dict[str, Messages] = {}
    rejected: list[Rejected] = []
    for item in documents.resolve(inputs, SUFFIXES):
        kind = "preferences" if item == "embedded:preferences" else "conversations"
        for line, row in conversations.rows_of(item, kind):
            if limit and len(found) >= limit:
                break
            try:
                if isinstance(row, Malformed):
                    raise row
                prompt = prompt_of(row)
            except Malformed as e:
                rejected.append(Rejected(item, line, e.rule, e.detail))
                continue
            found.setdefault(json.dumps([(m["role"], m["content"]) for m in prompt]), prompt)
    if not found:
        why = f"; {rejected[0]}" if rejected else ": no rows"
        raise ValueError(f"no prompt in {', '.join(inputs)}{why} (--input)")
    return list(found.values()), rejected


def held_out(run: str | Path) -> list[Messages]:
    """The distinct prompts that a run of reward or dpo holds out, in order, read from its data anew.

    Raises:
      FileNotFoundError: no run there, or its data is gone.
      ValueError: a run of another kind, or one that holds nothing out.
    """
    data = checkpoint.load_config(run).data
    if data.format != "preference":
        raise ValueError(f"{run} was not trained on preferences; give --input")
    rows = [row for part in comparisons.read(data) if part.kind == EVAL for row in part.rows]
    if not rows:
        raise ValueError(f"{run} holds nothing out (data.eval_fraction=0); give --input")
    return [list(prompt) for prompt in {row.key: row.prompt for row in rows}.values()]


def prompt_of(row: Any) -> Messages:
    """The messages of a row that an answer goes on from. Raises Malformed."""
    try:
        preference = preferences.parse(row)
        prompt, tools = list(preference.prompt), preference.tools
    except Malformed as e:
        if e.rule != "unknown layout" and isinstance(row, dict):
            raise
        if isinstance(row, dict) and "prompt" in row and "completion" not in row:
            given = row["prompt"]
            turns = [{"role": "user", "content": given}] if isinstance(given, str) else given
            row = {**row, "messages": turns}
        prompt, tools = conversations.parse(row)
    while prompt and prompt[-1]["role"] not in ("user", "tool"):
        prompt = prompt[:-1]
    if tools:
        raise Malformed("tools", "what is sampled here calls no tools")
    if not prompt or not prompt[-1]["content"].strip():
        raise Malformed("no prompt", "there is nothing that the last answer answers")
    answered = [*prompt, {"role": "assistant", "content": "."}]
    conversations.check(answered, MAX_TURN_CHARS, allow_empty_question=False)
    return prompt
