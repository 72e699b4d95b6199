"""Conversations from files: four layouts, one list of messages, and every row that is not one named.

A row becomes `{"role": ..., "content": ...}` messages, whatever its layout:

    alpaca      {"instruction", "input", "output", "history": [[user, assistant], ...]}
    completion  {"prompt", "completion"}: texts, or lists of messages
    messages    {"messages": [{"role", "content"}, ...], "tools": [...]}, as OpenAI writes them
    sharegpt    {"conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llm_jax import corpus
from llm_jax.data import documents

LAYOUTS = ("alpaca", "completion", "messages", "sharegpt")
SUFFIXES = {".json", ".jsonl", ".ndjson", ".parquet"}  # what is read from a folder

# What a row is rejected for; the last two are of a run's length, not of the row.
RULES = {
    "invalid UTF-8": "its bytes are not UTF-8",
    "not JSON": "the line is not JSON",
    "unknown layout": "its keys are those of no layout, or not those of data.dialogue.layout",
    "wrong type": "something in it is not of the type that the layout has there",
    "lone surrogate": "half a character, which UTF-8 cannot hold",
    "missing role": "a turn does not say whose it is",
    "unknown role": "a turn is of a role that no template knows",
    "two turns in a row": "a user (or an assistant) speaks twice without the other between",
    "assistant first": "the assistant speaks before anybody has asked",
    "no answer": "there is no turn of an assistant",
    "empty answer": "a turn of the assistant has no text (and calls no tool)",
    "empty question": "a turn of the user has no text",
    "long turn": "a turn is longer than data.dialogue.max_turn_chars",
    # of preferences alone
    "no prompt": "no turn of the user (or of a tool) comes before the answers, or not the same",
    "one answer": "there is no other to compare it with",
    "equal answers": "two answers differ in white space at most",
    "unranked": "its scores (ranks, labels) are not numbers, or not one for each answer",
    "contradiction": "the rejected answer has the higher score",
    "refused by the template": "the chat template raises an error, or loses a turn's place",
    "refused by the tokenizer": "it cannot write the text, or writes another",
    "unwritten": "the template writes none of the assistant's words, or marks none",
    "too long": "it has more tokens than `length`, under data.dialogue.too_long=drop",
    "untrained": "within `length` there is no token of the assistant",
}
# The keys that tell a layout; a row with those of several is of the first.
_TOLD_BY = {
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "alpaca": {"instruction"},
    "completion": {"prompt", "completion"},
}
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """A conversation and where it stands.

    Attributes:
      messages: dicts with "role" (system, user, assistant, tool) and "content" text, or
        "tool_calls" in place of it; other keys of a row of messages are kept.
      source: the file, data set or embedded corpus.
      line: line number in a file of lines, number of the record elsewhere, from 1.
      tools: JSON schemas of the functions that may be called.
    """

    messages: tuple[dict[str, Any], ...]
    source: str
    line: int
    tools: tuple[dict[str, Any], ...] | None = None


class Rejected(NamedTuple):
    """A row that is no conversation."""

    source: str
    line: int
    rule: str  # of RULES
    detail: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.rule}: {self.detail}"


class Malformed(ValueError):
    """A row breaks a rule."""

    def __init__(self, rule: str, detail: str):
        super().__init__(f"{rule}: {detail}")
        self.rule, self.detail = rule, detail


def read(
    inputs: Sequence[str], *, layout: str = "auto", max_turn_chars: int = 200_000
) -> tuple[list[Conversation], list[Rejected]]:
    """All conversations of the inputs in order, and all rows that are none.

    Inputs are those of `documents.read`: .json (a list of rows), .jsonl, .parquet (each but
    .parquet also as .gz or .zst), folders, globs, `hf:NAME` and `embedded:questions`.

    Args:
      layout: one of LAYOUTS, for rows with its keys, whatever else they have; or "auto": as each
        row's keys tell.
      max_turn_chars: a longer turn is malformed.

    Raises:
      FileNotFoundError: an input that does not exist.
      ValueError: a file of another kind, a damaged list, no row at all.
    """
    found, rejected = [], []
    for item in documents.resolve(inputs, SUFFIXES):
        for line, row in rows_of(item):
            try:
                if isinstance(row, Malformed):
                    raise row
                messages, tools = parse(row, layout)
                empty = _is_completion(row, layout)
                check(messages, max_turn_chars, allow_empty_question=empty)
                found.append(Conversation(tuple(messages), item, line, tools))
            except Malformed as e:
                rejected.append(Rejected(item, line, e.rule, e.detail))
    if not found and not rejected:
        raise ValueError(f"no conversation in {', '.join(inputs)}: no rows (data.inputs)")
    return found, rejected


def counts(rejected: Iterable[Rejected]) -> dict[str, int]:
    """Rows by rule, the most frequent first."""
    return dict(Counter(r.rule for r in rejected).most_common())


# ---------------------------------------------------------------------------------------- layouts


def parse(row: Any, layout: str = "auto") -> tuple[list[dict], tuple | None]:
    """Messages and tools of a row. Raises Malformed."""
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise Malformed("wrong type", f"a row has to be an object, not {kind_of(row)}")
    used = _layout(row, layout)
    if used is None:
        wanted = "" if layout == "auto" else f", not those of {layout}"
        raise Malformed("unknown layout", f"its keys are {keys_of(row)}{wanted}")
    return _PARSERS[used](row), tools_of(row)


def _layout(row: dict, wanted: str) -> str | None:
    """The wanted layout if the row has its keys; of "auto" the first whose keys it has."""
    for layout, keys in _TOLD_BY.items():
        if wanted in ("auto", layout) and row.keys() >= keys:
            return layout
    return None


def _is_completion(row: Any, wanted: str) -> bool:
    """A prompt may be empty, for a text that starts from nothing; a question may not."""
    return isinstance(row, dict) and _layout(row, wanted) == "completion"


def tools_of(row: dict) -> tuple[dict, ...] | None:
    """JSON schemas of the functions that may be called. Raises Malformed."""
    tools = row.get("tools") or None
    if tools is None:
        return None
    if not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise Malformed("wrong type", "'tools' has to be a list of objects")
    return tuple(tools)


def asked(row: dict, key: str) -> dict:
    """The user's turn of an instruction under `key` and what may be given with it, its "input"."""
    message = {"role": "user", "content": text_of(row, key)}
    if row.get("input") is not None and (given := text_of(row, "input")).strip():
        # The Alpaca template writes the two under headings of their own, others the one text.
        message |= {"instruction": message["content"], "input": given}
        message["content"] = "\n\n".join(p for p in (message["content"], given) if p.strip())
    return message


def _alpaca(row: dict) -> list[dict]:
    messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": text_of(row, "system")})
    history = row.get("history") or []
    if not isinstance(history, list):
        raise Malformed("wrong type", f"'history' is {kind_of(history)}, not a list of pairs")
    for pair in history:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(t) is str for t in pair)):
            raise Malformed("wrong type", "'history' has to be of [user, assistant] pairs of texts")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    if "output" not in row:
        raise Malformed("no answer", f"no 'output'; its keys are {keys_of(row)}")
    messages.append(asked(row, "instruction"))
    messages.append({"role": "assistant", "content": text_of(row, "output")})
    return messages


def _completion(row: dict) -> list[dict]:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return turns_of([*row["prompt"], *row["completion"]])
    return [
        {"role": "user", "content": text_of(row, "prompt")},
        {"role": "assistant", "content": text_of(row, "completion")},
    ]


def _messages(row: dict) -> list[dict]:
    return turns_of(row["messages"])


def _sharegpt(row: dict) -> list[dict]:
    messages = turns_of(row["conversations"])
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": text_of(row, "system")})
    return messages


_PARSERS = {
    "alpaca": _alpaca,
    "completion": _completion,
    "messages": _messages,
    "sharegpt": _sharegpt,
}


def turns_of(turns: Any) -> list[dict]:
    """Turns of OpenAI's keys (role, content) or of ShareGPT's (from, value)."""
    if not isinstance(turns, list):
        raise Malformed("wrong type", f"the turns are {kind_of(turns)}, not a list")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise Malformed("wrong type", f"turn {number} is {kind_of(turn)}, not an object")
        name = turn.get("role", turn.get("from"))
        if name is None:
            raise Malformed("missing role", f"turn {number}; its keys are {keys_of(turn)}")
        if not isinstance(name, str) or name not in _ROLES:
            raise Malformed("unknown role", f"turn {number} is of {name!r}"[:200])
        role = _ROLES[name]
        named = ("role", "from", "content", "value")
        kept = {k: v for k, v in turn.items() if k not in named and v is not None}
        text = _content(turn.get("content", turn.get("value")), number)
        if text is None and not (role == "assistant" and kept.get("tool_calls")):
            raise Malformed(
                "wrong type", f"turn {number} has no text; its keys are {keys_of(turn)}"
            )
        messages.append({"role": role, "content": text or "", **kept})
    return messages


def _content(value: Any, number: int) -> str | None:
    """Text of a turn; OpenAI's list of text parts is one text."""
    if isinstance(value, list):
        if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
            raise Malformed("wrong type", f"turn {number} has parts that are not text")
        return "".join(p["text"] for p in value)
    if value is not None and not isinstance(value, str):
        raise Malformed("wrong type", f"turn {number} is {kind_of(value)}, not text")
    return value


def text_of(row: dict, key: str) -> str:
    if not isinstance(row[key], str):
        raise Malformed("wrong type", f"{key!r} is {kind_of(row[key])}, not text")
    return row[key]


def kind_of(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def keys_of(row: dict) -> str:
    return ", ".join(repr(k) for k in row)[:200] or "none"


# ------------------------------------------------------------------------------------------ rules


def check(messages: list[dict], max_turn_chars: int, *, allow_empty_question: bool) -> None:
    """Raises Malformed for what no model should learn from."""
    before = None  # the role that spoke last; systems and tools may come in between
    for number, message in enumerate(messages, 1):
        role, text = message["role"], message["content"]
        if len(text) > max_turn_chars:
            raise Malformed("long turn", f"turn {number} has {len(text):,} characters")
        _check_surrogates(message, number)
        if role == "user":
            if before == "user":
                raise Malformed("two turns in a row", f"turn {number} is the user's again")
            if not text.strip() and not allow_empty_question:
                raise Malformed("empty question", f"turn {number}")
        if role == "assistant":
            if before is None:
                raise Malformed("assistant first", f"turn {number}")
            if before == "assistant":
                raise Malformed("two turns in a row", f"turn {number} is the assistant's again")
            if not text.strip() and not message.get("tool_calls"):
                raise Malformed("empty answer", f"turn {number}")
        before = before if role == "system" else role
    if not any(m["role"] == "assistant" for m in messages):
        raise Malformed("no answer", f"{len(messages)} turns, none of the assistant")


def _check_surrogates(message: dict, number: int) -> None:
    text = message["content"]
    if len(message) > 2:  # what else a turn holds may be rendered too
        text += json.dumps(message, ensure_ascii=False)
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise Malformed(
            "lone surrogate", f"U+{ord(e.object[e.start]):04X} in turn {number}"
        ) from None


# ------------------------------------------------------------------------------------------- rows


_EMBEDDED = {"conversations": "embedded:questions", "preferences": "embedded:preferences"}


def rows_of(item: str, kind: str = "conversations") -> Iterator[tuple[int, Any]]:
    """(number, row) of an input; a Malformed in place of a row that cannot be read.

    `kind` is conversations or preferences: which corpus may be embedded, and what errors speak of.
    """
    if item.startswith("embedded:"):
        if item != _EMBEDDED[kind]:
            held = next((k for k, name in _EMBEDDED.items() if name == item), "a text")
            raise ValueError(f"{item}: {held}, not {kind}; there is {_EMBEDDED[kind]}")
        if kind == "preferences":
            keys, found = ("prompt", "chosen", "rejected"), corpus.preferences()
        else:
            keys, found = ("prompt", "completion"), corpus.questions()
        for number, (_, *texts) in enumerate(found, 1):
            yield number, dict(zip(keys, texts, strict=True))
    elif item.startswith("hf:"):
        yield from enumerate(documents.hugging_face_rows(item), 1)
    elif (suffix := documents.suffix_of(item)) in (".jsonl", ".ndjson"):
        for number, _, line in documents.lines(item):
            if line.strip():
                yield number, _json(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    elif suffix == ".json":
        yield from enumerate(_list(item), 1)
    elif suffix == ".parquet":
        yield from enumerate(documents.parquet_rows(item), 1)
    else:
        raise ValueError(f"{item}: {kind} are in {', '.join(sorted(SUFFIXES))} files (data.inputs)")


def _json(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as e:
        return Malformed("invalid UTF-8", f"byte 0x{line[e.start]:02x} at place {e.start + 1}")
    except (ValueError, RecursionError) as e:  # a number of thousands of digits, a deep nesting too
        return Malformed("not JSON", f"{e}"[:200])


def _list(path: str) -> Iterator[Any]:
    """Rows of a JSON array, or a single row."""
    content = b"".join(documents.chunks(path)).removeprefix(b"\xef\xbb\xbf")
    # Bytes that are not UTF-8 become lone surrogates U+DC80 to U+DCFF, so that only their rows
    # are lost.
    text = content.decode(errors="surrogateescape")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as e:
        if e.msg == "Extra data" and "\n" in text[: e.pos] and "\n" not in text[: e.pos].strip():
            raise ValueError(f"{path}: one row a line, not a list; rename it to .jsonl") from None
        raise ValueError(f"{path}:{e.lineno}: not JSON ({e.msg}); the list is damaged") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON ({e}); the list is damaged") from None
    damaged = not text.isascii() and any("\udc80" <= c <= "\udcff" for c in text)
    for row in rows if isinstance(rows, list) else [rows]:
        if damaged and (byte := _escaped_byte(row)):
            yield Malformed("invalid UTF-8", f"byte 0x{byte:02x}")
        else:
            yield row


def _escaped_byte(row: Any) -> int | None:
    """A byte that was not UTF-8; a surrogate that JSON spells `\\udc80` is taken for one too."""
    for c in json.dumps(row, ensure_ascii=False):
        if "\udc80" <= c <= "\udcff":
            return ord(c) - 0xDC00
    return None
