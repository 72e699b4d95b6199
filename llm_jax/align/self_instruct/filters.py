"""The rules that a generated text has to pass; each returns the name of the rule it breaks, or None.

Rules of Wang et al. 2023 (section 2.2 and appendix A.3) and of what small models get wrong besides.
"""

import re
from collections.abc import Sequence

WORD = re.compile(r"[a-z0-9]+")  # what rouge-score counts as a word, of lower-case text
# Tasks that a model of text alone cannot do.
KEYWORDS = (
    "image", "images", "graph", "graphs", "picture", "pictures", "photo", "photos", "file", "files",
    "map", "maps", "draw", "plot", "go to", "video", "videos", "audio", "music", "flowchart",
    "diagram", "diagrams", "link", "click", "attached",
)  # fmt: skip
KEYWORD = re.compile(rf"\b({'|'.join(KEYWORDS)})\b", re.IGNORECASE)
# What belongs to a prompt or a template, not to a text.
ECHO = re.compile(
    r"^\s*(task\s*\d*|instruction|input|output|class label|user|assistant)\s*:|<\|\w+\|>|\ba new task\b",
    re.IGNORECASE | re.MULTILINE,
)
REFUSAL = re.compile(
    r"\b(as an ai|language model|i('m| am) sorry|i (can't|cannot|am unable to|don't have) "
    r"(access|assist|help|provide|see|view))",
    re.IGNORECASE,
)
INSTRUCTION_WORDS = (4, 150)
INPUT_WORDS = 200
OUTPUT_WORDS = 400


def words(text: str) -> list[str]:
    """The words that similarity is counted in."""
    return WORD.findall(text.lower())


class Similarity:
    """ROUGE-L F1 (Lin 2004) of a text with each of many, as rouge-score computes it without stemming.

    2 LCS / (n + m) of the words of both. The longest common subsequence is found a row of its table
    at a time, as the bits of one integer (Hyyrö 2004): a thousand texts take milliseconds.
    """

    def __init__(self, texts: Sequence[str] = ()):
        self._texts = [words(text) for text in texts]

    def add(self, text: str) -> None:
        """One more text to compare with."""
        self._texts.append(words(text))

    def all(self, text: str) -> list[float]:
        """The similarity with each text, 0 to 1."""
        mine = words(text)
        places: dict[str, int] = {}
        for i, word in enumerate(mine):
            places[word] = places.get(word, 0) | 1 << i
        full = (1 << len(mine)) - 1
        scores = []
        for other in self._texts:
            row = full
            for word in other:
                match = row & places.get(word, 0)
                row = (row + match | row - match) & full
            common, n = len(mine) - row.bit_count(), len(mine) + len(other)
            scores.append(2 * common / n if n else 0.0)
        return scores

    def highest(self, text: str) -> float:
        """The largest of `all`; 0 where there is nothing to compare with."""
        return max(self.all(text), default=0.0)


def instruction_fault(
    text: str, finished: bool, known: Similarity, max_similarity: float
) -> str | None:
    """The rule that an instruction breaks. `finished`: the model came to an end by itself."""
    count = len(text.split())
    if not text:
        return "empty"
    if not finished:
        return "truncated"
    if fault := _broken(text):
        return fault
    if "\n" in text:
        return "several lines"
    if not text[0].isascii():
        return "starts with non-ASCII"
    if not text[0].isalnum():
        return "starts with punctuation"
    if count < INSTRUCTION_WORDS[0]:
        return "too short"
    if count > INSTRUCTION_WORDS[1]:
        return "too long"
    if text.endswith((":", ",")):
        return "announces more"
    if KEYWORD.search(text):
        return "keyword"
    if text.lower().startswith("write a program"):  # models tend to it (Wang et al. 2023)
        return "write a program"
    similarity = known.highest(text)
    if similarity == 1.0:
        return "duplicate"
    return "similar" if similarity >= max_similarity else None


def input_fault(text: str, finished: bool, instruction: str) -> str | None:
    """The rule that an input breaks; an empty one says that there is none."""
    if not finished:
        return "truncated"
    if fault := _broken(text):
        return fault
    if text and words(text) == words(instruction):
        return "repeats the instruction"
    return "too long" if len(text.split()) > INPUT_WORDS else None


def output_fault(text: str, finished: bool, instruction: str, given: str) -> str | None:
    """The rule that an answer to an instruction and its input breaks."""
    if not text:
        return "empty"
    if not finished:
        return "truncated"
    if fault := _broken(text):
        return fault
    if not any(c.isalnum() for c in text):
        return "no word"
    if words(text) == words(instruction):
        return "repeats the instruction"
    if given and words(text) == words(given):
        return "repeats the input"
    if text.endswith(":"):
        return "announces more"
    if REFUSAL.search(text):
        return "refusal"
    return "too long" if len(text.split()) > OUTPUT_WORDS else None


def _broken(text: str) -> str | None:
    if "\ufffd" in text or any(not c.isprintable() and c not in "\n\t" for c in text):
        return "bad characters"
    if ECHO.search(text):
        return "echoes the prompt"
    return "repetition loop" if loops(text) else None


def loops(text: str) -> bool:
    """Whether words repeat without end: three times in a row with 8 words at least in all, or a
    line of three words or more three times."""
    found = text.lower().split()
    for period in range(1, len(found) // 3 + 1):
        run = 0
        for word, before in zip(found[period:], found, strict=False):
            run = run + 1 if word == before else 0
            if run >= 2 * period and run + period >= 8:
                return True
    lines = [line.strip().lower() for line in text.split("\n") if len(line.split()) >= 3]
    return any(lines.count(line) >= 3 for line in set(lines))
