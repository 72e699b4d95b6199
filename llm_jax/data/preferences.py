"""Preferences from files: six layouts, one prompt with labelled answers, and every row that is none named.

    dialogues  {"chosen", "rejected"}: texts of "\\n\\nHuman: " and "\\n\\nAssistant: " turns, as
               Anthropic's HH has them, or lists of messages; the prompt is what they share
    judged     {"prompt", "completion" | "response" | "answer", "label": true | false}
    pairs      {"prompt", "chosen", "rejected"}: texts, messages or lists of them; answers in
               messages may contain the prompt again
    rankings   {"prompt", "answers" | "responses" | "completions": [...]} and one of "ranks" (1 is
               best), "scores" and "ratings" (higher is better), or none: best first. Answers may be
               objects with their own, {"answer" | "response" | "completion" | "text", "rank" |
               "score" | "rating" | "overall_score"}, as those of UltraFeedback and Nectar
    ratings    {"prompt", "completion" | "response" | "answer", "score" | "rating": number}
    sharegpt   {"conversations": [{"from", "value"}, ...], "chosen", "rejected"}

A "question" or an "instruction" (with its "input") may stand in place of a "prompt", a "system" text
before all, "tools" as in a conversation. A prompt of "Human:" and "Assistant:" turns is read as such.
Of two answers with "score_chosen" and "score_rejected" (or "chosen_score" and "rejected_score", or
"chosen-rating" and "rejected-rating") these are the labels; with a "margin" it is that of the chosen
answer, and 0 the other's. A key whose value is null counts as absent.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llm_jax.data import documents
from llm_jax.data.conversations import (
    SUFFIXES,
    Malformed,
    Rejected,
    asked,
    check,
    keys_of,
    kind_of,
    rows_of,
    text_of,
    tools_of,
    turns_of,
)

LAYOUTS = ("dialogues", "judged", "pairs", "rankings", "ratings", "sharegpt")
KINDS = ("ranked", "judged", "rated")

_PROMPT = ("prompt", "question", "instruction")
_ANSWER = ("completion", "response", "answer")
_ANSWERS = ("answers", "responses", "completions")
_PAIR = (("chosen",), ("rejected",))
# The keys that tell a layout, one of each; a row with those of several is of the first.
_TOLD_BY = {
    "sharegpt": (("conversations",), *_PAIR),
    "pairs": (_PROMPT, *_PAIR),
    "dialogues": _PAIR,
    "rankings": (_PROMPT, _ANSWERS),
    "judged": (_PROMPT, _ANSWER, ("label",)),
    "ratings": (_PROMPT, _ANSWER, ("score", "rating")),
}
_LARGEST = 1e38  # of a label: differences of two are still finite as float32
_PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
)
# Of an answer that is an object with a number of its own.
_SAID = ("answer", "response", "completion", "text")
_NUMBERS = {"rank": "ranks", "score": "scores", "rating": "ratings", "overall_score": "scores"}

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Preference:
    """Answers to one prompt, and how good they are.

    Attributes:
      prompt: messages that all answers go on from; the last is of the user or of a tool.
      answers: of each the messages that go on from the prompt, the first and the last of the
        assistant; best first.
      labels: one for each answer, the higher the better: descending, ties side by side.
      kind: "ranked": only the order of labels means something, and of a margin their difference;
        "rated": labels are scores on a scale of all rows; "judged": they are 1.0 (good) and 0.0.
      source: the file, data set or embedded corpus.
      line: line number in a file of lines, number of the record elsewhere, from 1.
      tools: JSON schemas of the functions that may be called.
    """

    prompt: tuple[dict[str, Any], ...]
    answers: tuple[tuple[dict[str, Any], ...], ...]
    labels: tuple[float, ...]
    kind: str
    source: str
    line: int
    tools: tuple[dict[str, Any], ...] | None = None

    @functools.cached_property
    def key(self) -> str:
        """A digest of the prompt, the same for prompts that differ in white space around turns."""
        said = json.dumps([_said(self.prompt), self.tools])
        return hashlib.sha256(said.encode()).hexdigest()


class Pair(NamedTuple):
    """Two answers by their places, the preferred one first."""

    preferred: int
    other: int
    margin: float  # of the labels
    probability: float  # that `preferred` is: 1, or 1/2 of a tie


def read(
    inputs: Sequence[str], *, layout: str = "auto", max_turn_chars: int = 200_000
) -> tuple[list[Preference], list[Rejected]]:
    """All preferences of the inputs in order, and all rows that are none.

    Inputs are those of `conversations.read`, with `embedded:preferences` as what is embedded.

    Args:
      layout: one of LAYOUTS, for rows with its keys, whatever else they have; or "auto": as each
        row's keys tell.
      max_turn_chars: a longer turn is malformed.

    Raises:
      FileNotFoundError: an input that does not exist.
      ValueError: a file of another kind, a damaged list, no row at all, an unknown layout.
    """
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout={layout!r} is unknown; there are auto, {', '.join(LAYOUTS)}")
    found, rejected = [], []
    for item in documents.resolve(inputs, SUFFIXES):
        for line, row in rows_of(item, "preferences"):
            try:
                if isinstance(row, Malformed):
                    raise row
                preference = parse(row, layout, max_turn_chars=max_turn_chars)
                found.append(dataclasses.replace(preference, source=item, line=line))
            except Malformed as e:
                rejected.append(Rejected(item, line, e.rule, e.detail))
            except RecursionError:  # what could just be read is too deep to be compared
                rejected.append(Rejected(item, line, "wrong type", "objects are nested too deeply"))
    if not found and not rejected:
        raise ValueError(f"no preference in {', '.join(inputs)}: no rows (data.inputs)")
    return found, rejected


def ordered_pairs(labels: Sequence[float], *, ties: str = "drop") -> list[Pair]:
    """Each two answers once, the one with the higher label first.

    Args:
      ties: equal labels are no pair ("drop"), or one of margin 0 that is preferred by half ("half").

    Raises:
      ValueError: another value of `ties`.
    """
    if ties not in ("drop", "half"):
        raise ValueError(f"ties={ties!r} is neither drop nor half")
    pairs = []
    for i, j in itertools.combinations(range(len(labels)), 2):
        if labels[i] != labels[j]:
            first, second = (i, j) if labels[i] > labels[j] else (j, i)
            pairs.append(Pair(first, second, labels[first] - labels[second], 1.0))
        elif ties == "half":
            pairs.append(Pair(i, j, 0.0, 0.5))
    return pairs


def pair_rows(preference: Preference, *, ties: str = "drop") -> Iterator[dict[str, Any]]:
    """The pairs of a preference as rows of JSON, which `read` takes back; a tie has margin 0.

    Single answers have none. Raises ValueError as `ordered_pairs` does.
    """
    for pair in ordered_pairs(preference.labels, ties=ties):
        row = {
            "prompt": list(preference.prompt),
            "chosen": list(preference.answers[pair.preferred]),
            "rejected": list(preference.answers[pair.other]),
            "margin": pair.margin,
        }
        yield row | ({"tools": list(preference.tools)} if preference.tools else {})


def split(
    rows: Sequence[Preference], eval_fraction: float, *, seed: int = -1
) -> tuple[list[Preference], list[Preference]]:
    """(rows to train on, rows held out), each in data order; all rows of a prompt are on one side.

    `eval_fraction` is a share of the distinct prompts, rounded, but at least one if it is not 0.

    Args:
      seed: from 0 on, the prompts held out are drawn with it; -1: they are the last ones, in the
        order in which they first appear.

    Raises:
      ValueError: a fraction outside [0, 1), or one that leaves no prompt on a side.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"data.eval_fraction={eval_fraction} has to be in [0, 1)")
    keys = list(dict.fromkeys(row.key for row in rows))
    count = max(1, round(eval_fraction * len(keys))) if eval_fraction else 0
    if count and count >= len(keys):
        raise ValueError(
            f"data.eval_fraction={eval_fraction} holds out {count} of {len(keys)} distinct prompts, "
            "which leaves none to train on; lower it, or add rows with other prompts"
        )
    places = range(len(keys) - count, len(keys))
    if seed >= 0:
        places = np.random.default_rng(seed).choice(len(keys), count, replace=False)
    held_out = {keys[place] for place in places}
    train = [row for row in rows if row.key not in held_out]
    return train, [row for row in rows if row.key in held_out]


# ---------------------------------------------------------------------------------------- layouts


def parse(row: Any, layout: str = "auto", *, max_turn_chars: int = 200_000) -> Preference:
    """The preference of a row, without its place. Raises Malformed."""
    if not isinstance(row, dict):
        raise Malformed("wrong type", f"a row has to be an object, not {kind_of(row)}")
    # Where rows of several layouts share a table, each has null under the keys of the others.
    row = {key: value for key, value in row.items() if value is not None}
    used = _layout(row, layout)
    if used is None:
        wanted = "" if layout == "auto" else f", not those of {layout}"
        raise Malformed("unknown layout", f"its keys are {keys_of(row)}{wanted}")
    if used == "rankings":
        row = _plain(row)
    tools = tools_of(row)
    prompt, answers = _apart(_opening(row, used), _given(row, used), marked=used == "dialogues")
    labels, kind = _labels(row, used, len(answers))
    if used == "rankings":
        answers, labels = _each_once(answers, labels)
    _check(prompt, answers, max_turn_chars)
    # `sorted` is stable: of equal labels the first stays the first.
    order = sorted(range(len(answers)), key=lambda i: -labels[i])
    return Preference(
        prompt=tuple(prompt),
        answers=tuple(tuple(answers[i]) for i in order),
        labels=tuple(labels[i] for i in order),
        kind=kind,
        source="",
        line=0,
        tools=tools,
    )


def _layout(row: dict, wanted: str) -> str | None:
    """The wanted layout if the row has its keys; of "auto" the first whose keys it has."""
    for layout, told_by in _TOLD_BY.items():
        if wanted in ("auto", layout) and all(_first(row, keys) for keys in told_by):
            return layout
    return None


def _first(row: dict, keys: Sequence[str]) -> str | None:
    return next((key for key in keys if key in row), None)


def _opening(row: dict, layout: str) -> Messages:
    """What the row gives as prompt: of dialogues a system turn at most."""
    messages = []
    if layout == "sharegpt":
        messages = turns_of(row["conversations"])
    elif layout != "dialogues":
        key = _first(row, _PROMPT)
        if not isinstance(row[key], str):
            messages = _turns(row[key])
        elif re.match(r"\s*Human:", row[key]):
            messages = _marked("\n\n" + row[key].lstrip())
            if messages[-1] == {"role": "assistant", "content": ""}:
                messages.pop()  # the mark that an answer goes on from
        elif key == "prompt":
            messages = [{"role": "user", "content": row[key]}]
        else:
            messages = [asked(row, key)]
    if not messages and layout != "dialogues":
        raise Malformed("no prompt", "it has no turn")
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": text_of(row, "system")})
    return messages


def _given(row: dict, layout: str) -> list[Any]:
    """What the row gives as answers."""
    if layout in ("judged", "ratings"):
        return [row[_first(row, _ANSWER)]]
    if layout != "rankings":
        return [row["chosen"], row["rejected"]]
    key = _first(row, _ANSWERS)
    if not isinstance(row[key], list):
        raise Malformed("wrong type", f"{key!r} is {kind_of(row[key])}, not a list")
    if len(row[key]) < 2:
        raise Malformed("one answer", f"{key!r} has {len(row[key])}")
    return row[key]


def _plain(row: dict) -> dict:
    """A ranking whose answers have their numbers with them -> one that has them in a list."""
    key = _first(row, _ANSWERS)
    given = row[key]
    if not isinstance(given, list) or not all(
        isinstance(a, dict) and _first(a, _SAID) for a in given
    ):
        return row
    row = {**row, key: [a[_first(a, _SAID)] for a in given]}
    for own, name in _NUMBERS.items():
        if given and all(own in a for a in given):
            return {**row, name: [a[own] for a in given]}
    return row


def _each_once(answers: list[Messages], labels: list[float]) -> tuple[list[Messages], list[float]]:
    """Without repetitions of an answer that have its label: what samples of a model have."""
    kept = {(_said(a), x): i for i, (a, x) in reversed(list(enumerate(zip(answers, labels))))}
    places = sorted(kept.values()) if len(kept) > 1 else range(len(answers))
    return [answers[i] for i in places], [labels[i] for i in places]


def _turns(given: Any) -> Messages:
    return turns_of([given] if isinstance(given, dict) else given)


def _marked(text: str) -> Messages:
    """Turns of a text whose turns begin with "\n\nHuman:" or "\n\nAssistant:"."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip():
        where = "before the first" if parts else "without a"
        raise Malformed("missing role", f"text {where} mark such as 'Human:' after a blank line")
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[mark], "content": content.strip()} for mark, content in pairs]


def _apart(opening: Messages, given: list[Any], *, marked: bool) -> tuple[Messages, list[Messages]]:
    """The prompt and what goes on from it, of answers with or without the prompt before them.

    Answers that all come with it may share more of a conversation than the row calls its prompt.
    """
    prompts, answers, whole = [], [], True
    for one in given:
        if isinstance(one, str):
            turns = _marked(one) if marked else [{"role": "assistant", "content": one}]
        else:
            turns = _turns(one)
        repeats = marked or (bool(turns) and turns[0]["role"] != "assistant")
        prompt, answer = _without(opening, turns) if repeats else (opening, turns)
        whole = whole and repeats
        prompts.append(prompt)
        answers.append(answer)
    if any(_said(prompt) != _said(prompts[0]) for prompt in prompts):
        raise Malformed("no prompt", "the answers go on from different turns of the system")
    shared = _shared(answers) if whole and len(answers) > 1 else 0
    return prompts[0] + answers[0][:shared], [answer[shared:] for answer in answers]


def _without(opening: Messages, turns: Messages) -> tuple[Messages, Messages]:
    """Turns that begin with the prompt again: (prompt, the others). Either may have the system's."""
    system, asked_again = _systems(turns)
    own_system, wanted = _systems(opening)
    if _said(asked_again[: len(wanted)]) != _said(wanted):
        raise Malformed("no prompt", "an answer begins with another prompt than the row's")
    if system and own_system and _said(system) != _said(own_system):
        raise Malformed(
            "no prompt", "an answer begins with another turn of the system than the row's"
        )
    return (system or own_system) + wanted, asked_again[len(wanted) :]


def _systems(turns: Messages) -> tuple[Messages, Messages]:
    others = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    return turns[:others], turns[others:]


def _shared(answers: list[Messages]) -> int:
    """How many messages all begin with, up to a turn that each goes on from with an answer."""
    common = 0
    for turns in zip(*answers, strict=False):
        if len({_said([turn]) for turn in turns}) > 1:
            break
        common += 1
    for n in range(common, 0, -1):
        if answers[0][n - 1]["role"] in ("user", "tool"):
            if all(len(a) > n and a[n]["role"] == "assistant" for a in answers):
                return n
    return 0


def _said(messages: Sequence[dict]) -> tuple:
    """What tells messages apart: not white space around them, nor names and numbers of theirs."""
    calls = (json.dumps(m["tool_calls"]) if m.get("tool_calls") else "" for m in messages)
    return tuple((m["role"], m["content"].strip(), c) for m, c in zip(messages, calls, strict=True))


# ------------------------------------------------------------------------------- labels and rules


def _labels(row: dict, layout: str, n: int) -> tuple[list[float], str]:
    """Labels of the n answers as the row has them, and their kind. Raises Malformed."""
    if layout == "ratings":
        key = _first(row, ("score", "rating"))
        return [_number(row[key], key)], "rated"
    if layout == "judged":
        if row["label"] not in (0, 1):
            raise Malformed("unranked", "'label' is not true, false, 1 or 0")
        return [float(row["label"])], "judged"
    if layout == "rankings":
        return _ranking_labels(row, n)
    for keys in _PAIR_SCORES:
        if any(key in row for key in keys):
            labels = [_number(row.get(key), key) for key in keys]
            if labels[0] < labels[1]:
                raise Malformed(
                    "contradiction", f"{keys[0]} is {labels[0]:g}, {keys[1]} {labels[1]:g}"
                )
            return labels, "rated"
    margin = _number(row.get("margin", 1.0), "margin")
    if margin < 0:
        raise Malformed("contradiction", f"the margin is {margin:g}")
    return [margin, 0.0], "ranked"


def _ranking_labels(row: dict, n: int) -> tuple[list[float], str]:
    given = [key for key in ("ranks", "scores", "ratings") if key in row]
    if not given:
        return [float(n - 1 - i) for i in range(n)], "ranked"
    if len(given) > 1:
        raise Malformed("unranked", f"{' and '.join(given)} rank its answers; leave one of them")
    (key,) = given
    if not isinstance(row[key], list) or len(row[key]) != n:
        count = f"{len(row[key])} numbers" if isinstance(row[key], list) else kind_of(row[key])
        raise Malformed("unranked", f"{key!r} is {count} for {n} answers")
    numbers = [_number(x, key) for x in row[key]]
    return ([-x for x in numbers], "ranked") if key == "ranks" else (numbers, "rated")


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Malformed("unranked", f"{key!r} is {kind_of(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:  # JSON's whole numbers have no end
        number = math.inf
    if not abs(number) <= _LARGEST:  # of NaN too
        raise Malformed("unranked", f"{key!r} is {number}, which is no float32")
    return number


def _check(prompt: Messages, answers: list[Messages], max_turn_chars: int) -> None:
    """Raises Malformed for what no model should learn from."""
    if prompt and prompt[-1]["role"] not in ("user", "tool"):
        raise Malformed("no prompt", f"the prompt ends in a turn of the {prompt[-1]['role']}")
    for answer in answers:
        check([*prompt, *answer], max_turn_chars, allow_empty_question=False)
    for answer in answers:
        if not answer or answer[-1]["role"] != "assistant":
            end = f"ends in a turn of the {answer[-1]['role']}" if answer else "has no turn"
            raise Malformed("no answer", f"an answer {end}")
        if not prompt:
            raise Malformed("no prompt", "the answers share no turn of the user")
        if answer[0]["role"] != "assistant":
            raise Malformed("no prompt", f"an answer begins with a turn of the {answer[0]['role']}")
    if len({_said(answer) for answer in answers}) < len(answers):
        raise Malformed("equal answers", f"two of {len(answers)}")
