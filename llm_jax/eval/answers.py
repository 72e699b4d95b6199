"""Answers out of generated text, and when two of them are the same.

The two extractions and the comparison of GSM8K are those of lm-evaluation-harness' task `gsm8k`
(version 3): strict wants the "#### 42" of the data set, flexible takes the last number.
"""

import re
from collections.abc import Callable

STRICT = re.compile(r"#### (-?[0-9.,]+)")
NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
LETTER = re.compile(r"\banswer\s*(?:is|:)?\s*\(?([A-Z])\b\)?", re.IGNORECASE)


def strict_number(text: str) -> str | None:
    """The first number behind "#### ", as it is written."""
    found = STRICT.search(text)
    return found[1].strip() if found else None


def last_number(text: str) -> str | None:
    """The last number, as it is written; "$1,000." counts as one."""
    found = NUMBER.findall(text)
    return found[-1].strip() if found else None


def letter(text: str) -> str | None:
    """The letter of "the answer is (B)", else of a text that begins with a lone letter."""
    found = LETTER.search(text) or re.match(r"\s*\(?([A-Z])\b", text)
    return found[1].upper() if found else None


def first_line(text: str) -> str | None:
    """The first line with something in it."""
    return text.strip().split("\n")[0].strip() or None


def whole(text: str) -> str | None:
    """All of it, without the white space around."""
    return text.strip() or None


EXTRACTIONS: dict[str, Callable[[str], str | None]] = {
    "strict": strict_number,
    "flexible": last_number,
    "letter": letter,
    "first_line": first_line,
    "exact": whole,
}


def normalize_number(text: str) -> str:
    """Without thousands commas, dollar signs, what stands before "#### " and a final full stop."""
    text = text.replace(",", "").replace("$", "")
    return re.sub(r"\.$", "", re.sub(r"(?s).*#### ", "", text)).lower()


def matches(answer: str | None, reference: str, *, numbers: bool) -> bool:
    """Exact match; of `numbers` after `normalize_number`, of other text up to its case."""
    if answer is None:
        return False
    if numbers:
        return normalize_number(answer) == normalize_number(reference)
    return answer.strip().lower() == reference.strip().lower()
