"""A tokenised corpus: what is on disk, how it is opened, and how ids are read from it.

A folder holds `tokens-00000.bin`, ... (ids one after another, uint16 or uint32 by vocabulary, all
shards but the last of equal length), `documents.bin` (int64, where each document starts, and the
end) and `manifest.json`, which is written last. Reading is memory-mapped.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from llm_jax.data import branches as branching

FORMAT = 1
PER_TOKEN = ("trained", "read", "ref_log_probs")
MANIFEST, DOCUMENTS = "manifest.json", "documents.bin"


@dataclass(frozen=True)
class Manifest:
    """What is in a folder of shards, and what it was made from."""

    tokenizer: str  # fingerprint
    vocab_size: int
    dtype: str
    shard_tokens: int
    add_bos: bool
    add_eos: bool
    identity: Any  # of the text: what the caller says must not have changed
    tokens: int = 0
    documents: int = 0
    characters: int = 0
    bytes: int = 0  # UTF-8 bytes of the text
    unknown: int = 0  # tokens that stand for what the tokenizer does not know
    shards: list[dict] = field(default_factory=list)  # file, tokens, sha256
    documents_sha256: str = ""
    seconds: float = 0.0  # of work it took
    format: int = FORMAT

    def fingerprint(self) -> str:
        """One hash over all tokens and document bounds, for checkpoints to compare."""
        parts = [self.dtype, self.documents_sha256, *(s["sha256"] for s in self.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Tokens:
    """A tokenised corpus; ids are read from memory-mapped shards when they are asked for.

    Attributes:
      total: number of tokens.
      offsets: int64 [documents + 1], where each document starts, and `total`.
      trained: bool [total], the tokens that count as targets; None: all do.
      read: bool [total], the tokens whose own places count, in place of targets (rewards); or None.
      branches: how documents branch (`data.branches`), which are never cut then; None: they do not.
      ref_log_probs: float32 [total], of each token under a reference model; or None.
    """

    def __init__(
        self,
        shards: list[np.ndarray],
        offsets: np.ndarray,
        *,
        vocab_size: int,
        name: str = "tokens",
        manifest: Manifest | None = None,
        trained: np.ndarray | None = None,
        read: np.ndarray | None = None,
        branches: branching.Branches | None = None,
        ref_log_probs: np.ndarray | None = None,
    ):
        # Plain views: indexing numpy's memmap class costs several times as much.
        self.shards, self.offsets = [np.asarray(s) for s in shards], np.asarray(offsets)
        self.vocab_size, self.name, self.manifest = vocab_size, name, manifest
        self.trained, self.read = trained, read
        self.branches, self.ref_log_probs = branches, ref_log_probs
        self.bounds = np.cumsum([0] + [len(s) for s in shards])  # where each shard starts
        self.total = int(self.bounds[-1])

    @classmethod
    def from_lists(cls, documents: Iterable[Iterable[int]], vocab_size: int) -> "Tokens":
        """A corpus in memory, from the ids of each document."""
        arrays = [np.asarray(list(d), dtype_of(vocab_size)) for d in documents]
        offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int64)
        return cls([np.concatenate(arrays)], offsets, vocab_size=vocab_size)

    @classmethod
    def concatenate(cls, parts: Sequence["Tokens"]) -> "Tokens":
        """Several corpora of one vocabulary, one after another; no ids are copied."""
        if len(parts) == 1:
            return parts[0]
        ends = np.cumsum([0] + [p.total for p in parts])
        offsets = [p.offsets[:-1] + start for p, start in zip(parts, ends)]
        return cls(
            [shard for p in parts for shard in p.shards],
            np.concatenate([*offsets, ends[-1:]]),
            vocab_size=max(p.vocab_size for p in parts),
            name=" + ".join(p.name for p in parts),
            **{name: _joined([getattr(p, name) for p in parts]) for name in PER_TOKEN},
            branches=parts[0].branches and branching.concatenate([p.branches for p in parts]),
        )

    def fingerprint(self) -> str:
        """One hash over all of it, for checkpoints to compare; read from a manifest if possible."""
        if self.manifest is not None:
            return self.manifest.fingerprint()
        digest = hashlib.sha256(self.offsets.tobytes())
        known = [self.trained, self.read, *(self.branches or ())]
        for array in (*self.shards, *(x for x in known if x is not None)):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def windows(self, starts_N: np.ndarray, width: int) -> np.ndarray:
        """Ids [N, width] from each start on; every window has to lie inside the corpus."""
        if len(self.shards) == 1:
            return _windows(self.shards[0], starts_N, width)
        first = np.searchsorted(self.bounds, starts_N, "right") - 1
        whole = starts_N + width <= self.bounds[first + 1]
        found = np.empty((len(starts_N), width), self.shards[0].dtype)
        for i in np.unique(first[whole]):
            rows = whole & (first == i)
            found[rows] = _windows(self.shards[i], starts_N[rows] - self.bounds[i], width)
        if not whole.all():
            positions = starts_N[~whole, None] + np.arange(width)
            found[~whole] = self.take(positions.ravel()).reshape(-1, width)
        return found

    def take(self, positions_N: np.ndarray) -> np.ndarray:
        """Ids [N] at the given positions; ascending ones are found fastest."""
        if len(self.shards) == 1:
            return self.shards[0][positions_N]
        if (positions_N[1:] < positions_N[:-1]).any():
            order = np.argsort(positions_N)
            found = np.empty(len(positions_N), self.shards[0].dtype)
            found[order] = self.take(positions_N[order])
            return found
        edges = np.searchsorted(positions_N, self.bounds)
        parts = [
            self.shards[i][positions_N[edges[i] : edges[i + 1]] - self.bounds[i]]
            for i in np.flatnonzero(np.diff(edges))
        ]
        return np.concatenate(parts) if parts else np.empty(0, self.shards[0].dtype)


def _joined(arrays: list[np.ndarray | None]) -> np.ndarray | None:
    return None if arrays[0] is None else np.concatenate(arrays)


def _windows(shard: np.ndarray, starts_N: np.ndarray, width: int) -> np.ndarray:
    if not len(starts_N):
        return np.empty((0, width), shard.dtype)
    return np.lib.stride_tricks.sliding_window_view(shard, width)[starts_N]


def dtype_of(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# ----------------------------------------------------------------------------------------- reading


def read_manifest(directory: str) -> Manifest:
    """Raises FileNotFoundError if the folder holds no finished shards, ValueError if damaged."""
    path = os.path.join(directory, MANIFEST)
    try:
        with open(path) as f:
            values = json.load(f)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no token shards here; make them with prepare_data"
        ) from None
    except ValueError as e:
        raise ValueError(f"{path}: damaged ({e}); {_rebuild(directory)}") from None
    known = {f.name for f in fields(Manifest)}
    if values.get("format") != FORMAT or set(values) != known:
        raise ValueError(f"{path}: not a manifest of format {FORMAT}; {_rebuild(directory)}")
    return Manifest(**values)


def open_(directory: str, *, tokenizer: str = "", verify: bool = True) -> Tokens:
    """Opens a folder of shards, memory-mapped.

    Args:
      tokenizer: fingerprint that the shards must have been made with; "" for any.
      verify: whether to read everything once (about a second a gigabyte) and compare hashes and
        ids. Sizes are always compared.

    Raises:
      FileNotFoundError: no manifest, or a file of it is gone.
      ValueError: another tokenizer, a damaged file, an id outside the vocabulary.
    """
    manifest = read_manifest(directory)
    if tokenizer and tokenizer != manifest.tokenizer:
        raise ValueError(
            f"{directory}: made with tokenizer {manifest.tokenizer[:12]}, not {tokenizer[:12]}; "
            f"{_rebuild(directory)}"
        )
    dtype = np.dtype(manifest.dtype)
    parts = [(s["file"], s["tokens"] * dtype.itemsize, s["sha256"]) for s in manifest.shards]
    parts.append((DOCUMENTS, (manifest.documents + 1) * 8, manifest.documents_sha256))
    for file, size, _ in parts:
        path = os.path.join(directory, file)
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: this shard is gone; {_rebuild(directory)}")
        if os.path.getsize(path) != size:
            raise ValueError(
                f"{path}: damaged, {os.path.getsize(path):,} bytes instead of {size:,}; "
                f"{_rebuild(directory)}"
            )
    if verify:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            jobs = [pool.submit(_verify, directory, manifest, *part) for part in parts]
            for job in jobs:
                job.result()
    paths = [os.path.join(directory, s["file"]) for s in manifest.shards]
    return Tokens(
        [np.memmap(path, dtype, "r") for path in paths],
        np.memmap(os.path.join(directory, DOCUMENTS), "<i8", "r"),
        vocab_size=manifest.vocab_size,
        name=directory,
        manifest=manifest,
    )


def _verify(directory: str, manifest: Manifest, file: str, size: int, sha256: str) -> None:
    path, digest, position = os.path.join(directory, file), hashlib.sha256(), 0
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
            if file != DOCUMENTS:
                ids = np.frombuffer(chunk, manifest.dtype)
                if ids.max() >= manifest.vocab_size:
                    wrong = int(np.argmax(ids >= manifest.vocab_size))
                    raise ValueError(
                        f"{path}: token id {ids[wrong]} at position {position + wrong:,} is "
                        f"outside the vocabulary of {manifest.vocab_size}; {_rebuild(directory)}"
                    )
                position += len(ids)
    if digest.hexdigest() != sha256:
        raise ValueError(f"{path}: damaged, its hash is not the manifest's; {_rebuild(directory)}")


def _rebuild(directory: str) -> str:
    return f"delete {directory} and run the same command again to rebuild it"
