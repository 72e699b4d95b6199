"""N-gram overlap of an evaluation set with a corpus: which of its items stand there, and how much.

The set is small and the corpus is not: the n-grams of the set are kept, and the corpus runs past
them once. Words are runs of letters, digits and underscores in lower case, so that neither case,
white space nor punctuation hides a copy; a script without spaces is one word a run, which only long
copies match.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from llm_jax.data.documents import Document

_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses no bit


@dataclass
class ItemOverlap:
    """What of one evaluation item a corpus holds; shares are of the item's words.

    Attributes:
      words: number of words.
      matched: of the item's n-grams those that the corpus has, in words where they begin.
      covered: share of words inside a matched `coverage_n`-gram (Llama 3's measure).
      longest: share of the longest run of words all of whose `coverage_n`-grams the corpus has: an
        upper bound of the longest common substring.
      source: the file of the first match, or None.
    """

    words: int
    matched: list[int] = field(default_factory=list)
    covered: float = 0.0
    longest: float = 0.0
    source: str | None = None


@dataclass
class Overlap:
    """What a corpus holds of an evaluation set.

    Attributes:
      items: one for each text, in order.
      n, coverage_n: lengths of the n-grams, in words.
      documents, words: of the corpus that was read.
    """

    items: list[ItemOverlap]
    n: int
    coverage_n: int
    documents: int
    words: int

    @property
    def contaminated(self) -> list[int]:
        """Items that share an n-gram with the corpus (GPT-3's rule)."""
        return [i for i, item in enumerate(self.items) if item.matched]

    @property
    def too_short(self) -> list[int]:
        """Items of fewer than n words: the rule can say nothing of them."""
        return [i for i, item in enumerate(self.items) if item.words < self.n]


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation: "It's 3 p.m." -> it, s, 3, p, m."""
    return _WORD.findall(text.lower())


def overlap(
    texts: Sequence[str], corpus: Iterable[Document], *, n: int = 13, coverage_n: int = 8
) -> Overlap:
    """Looks for the n-grams of evaluation texts in a corpus (`data.documents.read`).

        item    the quick brown fox jumps over the lazy dog
        corpus  "... A quick brown fox jumps. Over there ..."
        n = 4:  quick brown fox jumps, brown fox jumps over        (5 of 9 words covered)

    GPT-3 calls an item contaminated that shares a 13-gram with the corpus, Llama 3 one of whose
    words a large share (chosen for each data set) lies inside shared 8-grams. No n-gram reaches
    over the end of a document. Memory is that of the evaluation set.

    Source: Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C; Grattafiori et
    al. 2024, "The Llama 3 Herd of Models", section 5.1.4.

    Raises:
      ValueError: no text, or n-grams of no word.
    """
    if not len(texts):
        raise ValueError("there is no evaluation text to look for; change --input")
    if n < 1 or coverage_n < 1:
        raise ValueError(f"n-grams of {min(n, coverage_n)} words: --ngram has to be 1 or more")
    numbers: dict[str, int] = {}  # word -> number from 1; 0 is a word that no item has
    items = [
        np.array([numbers.setdefault(word, len(numbers) + 1) for word in words_of(text)], np.uint64)
        for text in texts
    ]
    tables = {size: _NGrams(items, size) for size in {n, coverage_n}}
    sources: dict[int, str] = {}
    count_documents = count_words = 0
    for words, document in _runs(corpus, max(n, coverage_n) - 1):
        ids = np.fromiter((numbers.get(word, 0) for word in words.all), np.uint64, len(words.all))
        count_words += len(words.all) - words.again
        count_documents += document.last
        for size, table in tables.items():
            for item in table.find(ids):
                if size == n:
                    sources.setdefault(item, document.source)
    found = [ItemOverlap(words=len(item), source=sources.get(i)) for i, item in enumerate(items)]
    for i, item in enumerate(found):
        item.matched = np.flatnonzero(tables[n].matched(i)).tolist()
        inside = tables[coverage_n].matched(i)
        if item.words:
            item.covered = float(_covered(inside, coverage_n, item.words).mean())
            item.longest = _longest(inside, coverage_n) / item.words
    return Overlap(found, n, coverage_n, count_documents, count_words)


def summary(found: Overlap, texts: Sequence[str]) -> dict:
    """A result for JSON: shares of the whole set, then every item that the corpus has a part of."""
    covered = [item.covered for item in found.items]
    return {
        "items": len(found.items),
        "ngram": found.n,
        "coverage_ngram": found.coverage_n,
        "corpus_documents": found.documents,
        "corpus_words": found.words,
        "contaminated": len(found.contaminated),
        "too_short": len(found.too_short),
        "mean_covered": float(np.mean(covered)),
        "found": [
            {
                "item": i,
                "ngrams": len(item.matched),
                "covered": item.covered,
                "longest": item.longest,
                "words": item.words,
                "source": item.source,
                "text": texts[i][:200],
            }
            for i, item in enumerate(found.items)
            if item.matched or item.covered
        ],
    }


def render(result: dict, most: int = 10) -> str:
    """The text of a `summary`, with the items that are covered most."""
    n, c = result["ngram"], result["coverage_ngram"]
    lines = [
        f"n-gram overlap of {result['items']} items with {result['corpus_documents']:,} documents of "
        f"{result['corpus_words']:,} words",
        f"  {result['contaminated']} items share a run of {n} words with the corpus (GPT-3's rule)"
        + (f"; {result['too_short']} are shorter than that" if result["too_short"] else ""),
        f"  {result['mean_covered']:.1%} of an item's words lie in shared runs of {c}, on average "
        "(Llama 3's measure)",
    ]
    worst = sorted(result["found"], key=lambda item: (-item["covered"], -item["ngrams"]))[:most]
    for item in worst:
        text = " ".join(item["text"].split())[:60]
        lines.append(
            f"  item {item['item']}: {item['covered']:.0%} covered, longest run "
            f"{item['longest']:.0%}, {item['source'] or f'fewer than {n} words'}: {text}"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class _Words:
    all: list[str]
    again: int  # of them at the start, those of the piece before


def _runs(corpus: Iterable[Document], carry: int) -> Iterator[tuple[_Words, Document]]:
    """The words of each piece of a document after the last `carry` words of the piece before.

    A word that the end of a piece cuts is kept for the next one.
    """
    before: list[str] = []
    rest = ""
    for piece in corpus:
        if piece.first:
            before, rest = [], ""
        text, rest = rest + piece.text, ""
        if not piece.last:
            end = re.search(r"\w*\Z", text).start()
            text, rest = text[:end], text[end:]
        words = before + words_of(text)
        yield _Words(words, len(before)), piece
        before = words[-carry:] if carry else []


class _NGrams:
    """The n-grams of all items, found in a corpus by hash and then compared word by word."""

    def __init__(self, items: list[np.ndarray], n: int):
        self.n = n
        sizes = [max(len(item) - n + 1, 0) for item in items]
        rows = [np.lib.stride_tricks.sliding_window_view(i, n) for i in items if len(i) >= n]
        rows = np.concatenate(rows) if rows else np.zeros((0, n), np.uint64)
        self.grams, self.of = np.unique(rows, axis=0, return_inverse=True)
        self.of = self.of.reshape(-1)
        self.hashes = _hashes(self.grams.reshape(-1), n)[::n] if len(self.grams) else _EMPTY
        self.order = np.argsort(self.hashes, kind="stable")
        self.hashes = self.hashes[self.order]
        self.seen = np.zeros(len(self.grams), bool)
        self.bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.owner = np.repeat(np.arange(len(items)), sizes)
        self.places = np.argsort(self.of, kind="stable")  # of the first n-gram, of the second, ...
        self.place_bounds = np.searchsorted(self.of[self.places], np.arange(len(self.grams) + 1))

    def find(self, ids: np.ndarray) -> list[int]:
        """Marks the n-grams that a run of the corpus has; returns the items that own new ones."""
        if len(ids) < self.n or not len(self.grams):
            return []
        hashes = _hashes(ids, self.n)
        at = np.searchsorted(self.hashes, hashes)
        hits = np.flatnonzero(self.hashes[np.minimum(at, len(self.hashes) - 1)] == hashes)
        # Equal hashes of different n-grams stand next to each other: 64 bits make them so rare
        # that only the first is compared.
        gram = self.order[at[hits]]
        rows = np.lib.stride_tricks.sliding_window_view(ids, self.n)[hits]
        gram = np.unique(gram[(rows == self.grams[gram]).all(axis=1)])
        new = gram[~self.seen[gram]]
        self.seen[new] = True
        owners = set()
        for begin, end in zip(self.place_bounds[new], self.place_bounds[new + 1], strict=True):
            owners.update(self.owner[self.places[begin:end]].tolist())
        return sorted(owners)

    def matched(self, item: int) -> np.ndarray:
        """Which n-grams of an item were found: bool [words - n + 1]."""
        return self.seen[self.of[self.bounds[item] : self.bounds[item + 1]]]


_EMPTY = np.zeros(0, np.uint64)


def _hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """A hash of each run of n ids: Σ ids[i + k] · BASE^(n - 1 - k) modulo 2^64, Horner's way."""
    count = len(ids) - n + 1
    out = np.zeros(count, np.uint64)
    for k in range(n):
        out = out * _BASE + ids[k : k + count]
    return out


def _covered(matched: np.ndarray, n: int, words: int) -> np.ndarray:
    """Which of an item's words lie inside a matched n-gram: bool [words]."""
    edges = np.zeros(words + 1, np.int64)
    begins = np.flatnonzero(matched)
    edges[begins] += 1
    np.subtract.at(edges, begins + n, 1)
    return np.cumsum(edges)[:-1] > 0


def _longest(matched: np.ndarray, n: int) -> int:
    """Words of the longest run all of whose n-grams are matched; 0 without a match."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], matched, [False]]).astype(np.int8)))
    lengths = edges[1::2] - edges[::2]
    return int(lengths.max()) + n - 1 if len(lengths) else 0
