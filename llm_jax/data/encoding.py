"""Documents to token ids, in batches, with long documents cut where the tokens do not notice."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_jax.data.documents import Document

PIECE_CHARACTERS = 100_000  # a document longer than this is encoded in pieces
BATCH_CHARACTERS = 4_000_000  # text per call of the tokenizer, which spreads it over threads


@dataclass(frozen=True)
class Piece:
    """Part of a document as it is encoded.

    Attributes:
      before: the character that stands before it in its document, "" where it is the first piece.
      begins: the stream of documents begins a new one here, whole or cut.
    """

    text: str
    source: str
    first: bool
    last: bool
    before: str
    begins: bool


def pieces(documents: Iterable[Document], limit: int = PIECE_CHARACTERS) -> Iterator[Piece]:
    """Documents cut into pieces of at most `limit` characters.

    Where the cuts are depends on the text alone, not on how it came in pieces.
    """
    buffer, before, begins, first, inside = "", "", True, True, False
    for document in documents:
        if not inside:
            buffer, before, begins, first = "", "", True, document.first
        buffer += document.text
        inside, at = not document.last, 0
        while len(buffer) - at > limit:
            end = at + _cut(buffer[at : at + limit + 1])
            yield Piece(buffer[at:end], document.source, first, False, before, begins)
            before, begins, first, at = buffer[end - 1], False, False, end
        buffer = buffer[at:]
        if document.last:
            yield Piece(buffer, document.source, first, True, before, begins)
    if inside and buffer:
        yield Piece(buffer, document.source, first, False, before, begins)


def _cut(text: str) -> int:
    """Where to cut text that is one character too long: at most len(text) - 1.

    Best between two lines without white space around the line end: byte-level BPE joins white
    space, and no tokenizer joins a line end with the letters of both lines. Then after any line
    end, then before a space, where words begin.
    """
    low, high = len(text) // 2, len(text) - 1
    i = text.rfind("\n", low, high)
    while i > 0:
        if not text[i - 1].isspace() and not text[i + 1].isspace():
            return i + 1
        i = text.rfind("\n", low, i)
    i = text.rfind("\n", low, high)
    if i >= 0:
        return i + 1
    i = text.rfind(" ", low, high)
    return i if i > 0 else high


def batches(items: Iterable[Piece], characters: int = BATCH_CHARACTERS) -> Iterator[list[Piece]]:
    """Pieces in groups of about `characters`."""
    group, size = [], 0
    for item in items:
        group.append(item)
        size += len(item.text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


class Encoder:
    """Encodes pieces so that the ids of a document's pieces joined are those of the document.

    Some tokenizers treat the start of a text in a special way (Llama 2's puts a space before it).
    Then a later piece is encoded with the character before it, whose ids are taken off again.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        a, b = tokenizer.encode("a\n"), tokenizer.encode("b\n")
        self.minds_start = list(a) + list(b) != list(tokenizer.encode("a\nb\n"))
        self._heads: dict[str, list[int]] = {}

    def __call__(self, group: list[Piece]) -> list[np.ndarray]:
        """Ids [n] int32 of each piece."""
        if not self.minds_start:
            return self.tokenizer.encode_batch([p.text for p in group])
        found = self.tokenizer.encode_batch([p.before + p.text for p in group])
        return [self._without(p, ids) if p.before else ids for p, ids in zip(group, found)]

    def _without(self, piece: Piece, ids: np.ndarray) -> np.ndarray:
        if piece.before not in self._heads:
            self._heads[piece.before] = list(self.tokenizer.encode(piece.before))
        head = self._heads[piece.before]
        if ids[: len(head)].tolist() == head:
            return ids[len(head) :]
        return np.asarray(self.tokenizer.encode(piece.text), np.int32)  # the cut is in a token
