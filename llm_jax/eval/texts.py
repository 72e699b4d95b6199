"""The texts that language models are measured on: whole documents of a file or a folder, or the part
of the embedded corpus that pretraining holds out."""

from collections.abc import Iterator
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


def read(path: str, *, train: bool = False) -> Iterator[str]:
    """The whole documents of a file, folder or hf:NAME; of the embedded corpus (no path) what is held
    out, or with `train` the rest: the document at the cut has a part in either.

    Raises:
      ValueError, FileNotFoundError: as `documents.read`.
    """
    if path:
        pieces = documents.read([path])
    else:
        everything = list(documents.read([EMBEDDED]))
        start = documents.held_out_start(documents.count_characters(everything), HELD_OUT)
        pieces = documents.take(everything, *((0, start) if train else (start,)))
    parts = []
    for piece in pieces:
        parts.append(piece.text)
        if piece.last:
            yield "".join(parts)
            parts = []
    if parts:  # the embedded corpus is cut inside a document
        yield "".join(parts)


def where(path: str) -> str:
    """In words, what `read` reads."""
    return path or f"{EMBEDDED}, the last {HELD_OUT:.0%} of its characters"


def held_out(path: str, tokenizer: Any, limit_tokens: int = 0) -> Texts:
    """What `read` reads; with a limit the last text is cut where it is reached."""
    out, tokens, source = [], 0, where(path)
    for text in read(path):
        ids = tokenizer.encode(text)
        left = limit_tokens - tokens
        if limit_tokens and len(ids) > left:
            text = tokenizer.decode(ids[:left]).rstrip("\ufffd")
            ids = ids[:left]
        if text:
            out.append(text)
            tokens += len(ids)
        if limit_tokens and tokens >= limit_tokens:
            source += f", the first {tokens:,} tokens"
            break
    return Texts(out, source, tokens)


def training_ids(path: str, tokenizer: Any) -> np.ndarray:
    """int32 ids of all texts one after the other, with the end token in between; of the embedded
    corpus those of what is not held out."""
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    texts = read(path, train=True)
    return np.concatenate([np.array([*tokenizer.encode(t), *end], np.int32) for t in texts])
