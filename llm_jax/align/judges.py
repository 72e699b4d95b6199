"""Judges of answers: whole conversations to numbers, the higher the better.

A rule judges by the answer's text alone. It is named `rule:NAME` or `rule:NAME:ARGUMENT`:

    shorter         minus its characters
    longer          its characters
    contains:TEXT   1 if TEXT stands in it, else 0
    lacks:TEXT      0 if TEXT stands in it, else 1
    matches:REGEX   1 if a regular expression of Python finds something in it, else 0
    ends            1 if it ends as a sentence does, else 0
    unique_words    share of its words that are different ones; 0 without a word
"""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Conversations, each ending with the assistant's answer, to float64 [conversations].
Judge = Callable[[Sequence[Sequence[dict[str, Any]]]], np.ndarray]

PREFIX = "rule:"
_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"[.!?…。！？]['\"”’)\]*]*\s*$")


def _unique_words(text: str) -> float:
    words = _WORD.findall(text.lower())
    return len(set(words)) / len(words) if words else 0.0


def _expression(argument: str) -> re.Pattern:
    try:
        return re.compile(argument)
    except re.error as e:
        raise ValueError(f"{PREFIX}matches:{argument} is no regular expression: {e}") from None


def _matches(argument: str) -> Callable[[str], float]:
    expression = _expression(argument)
    return lambda text: expression.search(text) is not None


# Without an argument: text to a number. With one: argument to such a function.
_PLAIN: dict[str, Callable[[str], float]] = {
    "shorter": lambda text: -len(text),
    "longer": len,
    "ends": lambda text: _SENTENCE_END.search(text) is not None,
    "unique_words": _unique_words,
}
_WITH_ARGUMENT: dict[str, Callable[[str], Callable[[str], float]]] = {
    "contains": lambda wanted: lambda text: wanted in text,
    "lacks": lambda unwanted: lambda text: unwanted not in text,
    "matches": _matches,
}


def is_rule(spec: str) -> bool:
    """Whether `spec` names a rule, and not a reward model."""
    return spec.startswith(PREFIX)


def rule(spec: str) -> Judge:
    """The judge that `rule:NAME` or `rule:NAME:ARGUMENT` names; all after the second colon is the
    argument.

    Raises:
      ValueError: no such rule, an argument too few or too many, or one that is no regular
        expression.
    """
    name, colon, argument = spec.removeprefix(PREFIX).partition(":")
    known = [*_PLAIN, *_WITH_ARGUMENT]
    if not is_rule(spec) or name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {PREFIX}{near[0]}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"--judge={spec}: no such rule; {hint}")
    if name in _WITH_ARGUMENT:
        if not argument:
            raise ValueError(f"--judge={spec} needs an argument: {PREFIX}{name}:TEXT")
        return _of_answers(_WITH_ARGUMENT[name](argument))
    if colon:
        raise ValueError(f"--judge={spec}: {PREFIX}{name} takes no argument; drop {argument!r}")
    return _of_answers(_PLAIN[name])


def _of_answers(value: Callable[[str], float]) -> Judge:
    def judge(conversations: Sequence[Sequence[dict[str, Any]]]) -> np.ndarray:
        return np.array([float(value(messages[-1]["content"])) for messages in conversations])

    return judge


def score(
    judge: Judge, prompts: Sequence[Sequence[dict[str, Any]]], answers: Sequence[Sequence[str]]
) -> np.ndarray:
    """Scores of the texts of n answers to each prompt: float64 [prompts, n].

    The judge sees all of them in one call.

    Raises:
      ValueError: prompts with other numbers of answers, or a judge that does not give each
        conversation one finite number.
    """
    n = len(answers[0]) if len(answers) else 0
    if len(answers) != len(prompts) or any(len(group) != n for group in answers):
        raise ValueError(f"{len(prompts)} prompts need as many groups of answers, all of one size")
    conversations = [
        [*messages, {"role": "assistant", "content": text}]
        for messages, group in zip(prompts, answers, strict=True)
        for text in group
    ]
    scores = np.asarray(judge(conversations), np.float64)
    if scores.shape != (len(conversations),):
        raise ValueError(
            f"the judge gave {len(conversations)} conversations scores of shape {scores.shape}"
        )
    if not np.isfinite(scores).all():
        raise ValueError(
            f"the judge gave {np.sum(~np.isfinite(scores))} scores that are not finite"
        )
    return scores.reshape(len(prompts), n)
