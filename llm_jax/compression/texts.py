"""The texts that compressed models are measured and trained on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.data import documents

EMBEDDED = "embedded:docs"
HELD_OUT = 0.1  # of the embedded corpus: what pretraining holds out by default


class Texts(NamedTuple):
    """Texts, whole documents but for a limit."""

    texts: list[str]
    source: str  # in words
    tokens: int


def held_out(path: str, tokenizer: Any, limit_tokens: int = 0) -> Texts:
    """The texts of a file, folder or hf:NAME; of the embedded corpus the end.

    With a limit the last text is cut where it is reached.

    Raises:
      ValueError, FileNotFoundError: as `documents.read`.
    """
    texts = _whole(documents.read([path])) if path else _whole(_embedded(train=False))
    where = path or f"{EMBEDDED}, the last {HELD_OUT:.0%} of its characters"
    out, tokens = [], 0
    for text in texts:
        ids = tokenizer.encode(text)
        left = limit_tokens - tokens
        if limit_tokens and len(ids) > left:
            text = tokenizer.decode(ids[:left]).rstrip("\ufffd")
            ids = ids[:left]
        if text:
            out.append(text)
            tokens += len(ids)
        if limit_tokens and tokens >= limit_tokens:
            where += f", the first {tokens:,} tokens"
            break
    return Texts(out, where, tokens)


def training_ids(path: str, tokenizer: Any) -> np.ndarray:
    """int32 ids of all texts one after the other, with the end token in between; of the embedded
    corpus those of what is not held out."""
    texts = _whole(documents.read([path])) if path else _whole(_embedded(train=True))
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return np.concatenate([np.array([*tokenizer.encode(t), *end], np.int32) for t in texts])


def _embedded(train: bool) -> Sequence[documents.Document]:
    everything = list(documents.read([EMBEDDED]))
    start = documents.held_out_start(documents.count_characters(everything), HELD_OUT)
    return list(
        documents.take(everything, 0, start) if train else documents.take(everything, start)
    )


def _whole(pieces: Sequence[documents.Document]) -> list[str]:
    texts, parts = [], []
    for piece in pieces:
        parts.append(piece.text)
        if piece.last:
            texts.append("".join(parts))
            parts = []
    return texts
