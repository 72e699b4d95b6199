"""Token shards: documents are tokenised once, into a folder that later runs reuse."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from absl import logging

from llm_jax.data import encoding, progress
from llm_jax.data.documents import Document
from llm_jax.data.tokens import (
    DOCUMENTS,
    MANIFEST,
    Manifest,
    Tokens,
    dtype_of,
    open_,
    read_manifest,
)

__all__ = ["Manifest", "Tokens", "open_", "prepare"]

SHARD_BYTES = 1 << 27
PROGRESS = "progress.json"


def prepare(
    documents: Iterable[Document],
    tokenizer: Any,
    directory: str,
    *,
    add_bos: bool = False,
    add_eos: bool = True,
    identity: Any = None,
    characters: Callable[[], int] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Tokenises documents into a folder of shards, unless it holds the very same already.

    The folder appears in one move when it is complete. `documents` is not touched if the shards
    there have the same `identity` (not None), tokenizer and options; shards that differ are
    rebuilt, with a warning that says why. A run that was interrupted goes on where it was.

    Args:
      identity: JSON value that changes whenever the text does (`documents.identity`); None:
        unknown, so that nothing is reused.
      characters: tells how much text there is, for the progress bar; only asked if it is needed.
      shard_bytes: size of a shard.

    Raises ValueError if no token comes out, the tokenizer lacks the id that `add_bos` or `add_eos`
    asks for, or makes ids outside its vocabulary.
    """
    for flag, token in (("add_bos", tokenizer.bos_id), ("add_eos", tokenizer.eos_id)):
        if {"add_bos": add_bos, "add_eos": add_eos}[flag] and token is None:
            raise ValueError(
                f"this {tokenizer.kind} tokenizer has no {flag[4:]} token; set data.{flag}=False "
                f"(--{flag}=false)"
            )
    dtype = dtype_of(tokenizer.vocab_size)
    wanted = Manifest(
        tokenizer=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        dtype=dtype.str,
        shard_tokens=max(shard_bytes // dtype.itemsize, 1),
        add_bos=add_bos,
        add_eos=add_eos,
        identity=json.loads(json.dumps(identity)),
    )
    directory = os.path.normpath(directory)
    with lock(directory):
        if found := _reusable(directory, wanted):
            return found
        partial = directory + ".partial"
        bar = progress.bar(
            f"tokenise {os.path.basename(directory)}", characters() if characters else None, "char"
        )
        writer = _Writer(partial, wanted)
        try:
            with bar:
                bar.update(writer.state["characters"])
                _encode_all(documents, tokenizer, writer, bar)
            if not writer.state["tokens"]:
                raise ValueError(
                    f"{directory}: no token in this part of the text; add some (--input)"
                )
            manifest = writer.finish()
        finally:
            writer.close()
        if os.path.exists(directory):
            shutil.rmtree(directory + ".old", ignore_errors=True)
            os.replace(directory, directory + ".old")
        os.replace(partial, directory)
        shutil.rmtree(directory + ".old", ignore_errors=True)
        return manifest


def _encode_all(documents: Iterable[Document], tokenizer: Any, writer: "_Writer", bar: Any) -> None:
    state, encoder = writer.state, encoding.Encoder(tokenizer)
    bos = np.array([tokenizer.bos_id] if writer.manifest.add_bos else [], np.int32)
    eos = np.array([tokenizer.eos_id] if writer.manifest.add_eos else [], np.int32)
    todo = itertools.islice(encoding.pieces(documents), state["pieces"], None)
    start = time.monotonic() - state["seconds"]
    for group in encoding.batches(todo):
        arrays, begins = [], []
        state["bytes"] += sum(map(_bytes, group))
        for piece, ids in zip(group, encoder(group), strict=True):
            if piece.begins:
                begins.append(len(arrays))
            arrays += [bos] * piece.first + [ids] + [eos] * piece.last
            if tokenizer.unk_id is not None:
                state["unknown"] += int(np.count_nonzero(ids == tokenizer.unk_id))
        ends = np.cumsum([0] + [len(a) for a in arrays])
        ids = np.concatenate(arrays)
        if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
            raise ValueError(
                f"this {tokenizer.kind} tokenizer makes ids from {ids.min()} to {ids.max()}, "
                f"outside its vocabulary of {tokenizer.vocab_size}"
            )
        size = sum(len(p.text) for p in group)
        state["pieces"] += len(group)
        state["characters"] += size
        state["seconds"] = round(time.monotonic() - start, 3)
        writer.write(ids, ends[begins])
        bar.update(size)


def _bytes(piece: encoding.Piece) -> int:
    if piece.text.isascii():
        return len(piece.text)
    try:
        return len(piece.text.encode("utf-8"))
    except UnicodeEncodeError as e:
        raise ValueError(
            f"{piece.source}: the text has a lone surrogate U+{ord(piece.text[e.start]):04X} (half "
            "of a JSON escape), which UTF-8 cannot hold; mend the row"
        ) from None


def _reusable(directory: str, wanted: Manifest) -> Manifest | None:
    """The manifest there, if it is of what is wanted; says so if it is not."""
    try:
        found = read_manifest(directory)
    except FileNotFoundError:
        return None
    except ValueError as e:
        logging.warning("%s", e)
        return None
    inputs = ("tokenizer", "vocab_size", "dtype", "shard_tokens", "add_bos", "add_eos", "identity")
    changed = [n for n in inputs if getattr(found, n) != getattr(wanted, n)]
    if wanted.identity is None:
        changed.append("identity")
    if changed:
        names = ", ".join({"identity": "the text"}.get(n, n) for n in dict.fromkeys(changed))
        logging.warning("%s: rebuilding the token shards; changed: %s", directory, names)
        return None
    logging.info("%s: reusing %d tokens", directory, found.tokens)
    return found


class _Writer:
    """Writes shards into a folder of its own; every finished shard is a point to go on from."""

    def __init__(self, directory: str, manifest: Manifest):
        self.directory, self.manifest = directory, manifest
        self.dtype = np.dtype(manifest.dtype)
        self.state = {"pieces": 0, "tokens": 0, "documents": 0, "characters": 0, "bytes": 0}
        self.state |= {"unknown": 0, "seconds": 0.0, "shards": []}
        self._file, self._documents = None, None
        if not self._resume():
            shutil.rmtree(directory, ignore_errors=True)
            os.makedirs(directory)
        self._documents = open(self._path(DOCUMENTS), "ab")
        self._documents.truncate(8 * self.state["documents"])
        self._open_shard()

    def _path(self, file: str) -> str:
        return os.path.join(self.directory, file)

    def _resume(self) -> bool:
        try:
            with open(self._path(PROGRESS)) as f:
                saved = json.load(f)
        except (FileNotFoundError, ValueError):
            return False
        if self.manifest.identity is None or saved["manifest"] != asdict(self.manifest):
            return False
        self.state = saved["state"]
        logging.warning("%s: going on after %d tokens", self.directory, self.state["tokens"])
        return True

    def _open_shard(self) -> None:
        """Opens the shard that the next token belongs to, cut to what the state counts."""
        size = self.manifest.shard_tokens
        done, inside = divmod(self.state["tokens"], size)
        self._file = open(self._path(f"tokens-{done:05d}.bin"), "ab")
        self._file.truncate(inside * self.dtype.itemsize)

    def write(self, ids: np.ndarray, begins: np.ndarray) -> None:
        """Appends ids; `begins` are the places among them where documents begin."""
        (begins + self.state["tokens"]).astype("<i8").tofile(self._documents)
        self.state["documents"] += len(begins)
        finished, rest = len(self.state["shards"]), ids.astype(self.dtype)
        while len(rest):
            room = self.manifest.shard_tokens - self.state["tokens"] % self.manifest.shard_tokens
            part, rest = rest[:room], rest[room:]
            part.tofile(self._file)
            self.state["tokens"] += len(part)
            if len(part) == room:
                self._close_shard(self.manifest.shard_tokens)
                self._open_shard()
        if len(self.state["shards"]) > finished:
            for file in (self._file, self._documents):
                _sync(file)
            _write_json(
                self._path(PROGRESS), {"manifest": asdict(self.manifest), "state": self.state}
            )

    def _close_shard(self, tokens: int) -> None:
        _sync(self._file)
        self._file.close()
        file = f"tokens-{len(self.state['shards']):05d}.bin"
        shard = {"file": file, "tokens": tokens, "sha256": _sha256(self._path(file))}
        self.state["shards"].append(shard)

    def finish(self) -> Manifest:
        """Closes everything and writes the manifest."""
        inside = self.state["tokens"] % self.manifest.shard_tokens
        if inside:
            self._close_shard(inside)
        else:
            self._file.close()
            os.remove(self._file.name)
        np.array([self.state["tokens"]], "<i8").tofile(self._documents)
        self.close()
        state = {k: v for k, v in self.state.items() if k != "pieces"}
        hashes = {"documents_sha256": _sha256(self._path(DOCUMENTS))}
        manifest = Manifest(**(asdict(self.manifest) | state | hashes))
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._path(PROGRESS))
        _write_json(self._path(MANIFEST), asdict(manifest))
        return manifest

    def close(self) -> None:
        for file in (self._file, self._documents):
            if file is not None and not file.closed:
                _sync(file)
                file.close()


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _write_json(path: str, value: Any) -> None:
    with open(path + ".tmp", "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")
        _sync(f)
    os.replace(path + ".tmp", path)


@contextlib.contextmanager
def lock(directory: str) -> Iterator[None]:
    """Held while a folder is made, so that two runs with one cache do not write it together."""
    import fcntl

    parent, name = os.path.split(os.path.normpath(directory))
    os.makedirs(parent or ".", exist_ok=True)
    with open(os.path.join(parent, f".{name}.lock"), "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.warning("%s: waiting for another process that prepares it", directory)
            fcntl.flock(f, fcntl.LOCK_EX)
        except OSError as e:
            logging.warning("%s: no locks on this file system (%s); going on", directory, e)
        yield
