"""Text from files, folders, globs, data sets and embedded corpora, as one stream of documents.

Memory does not grow with the input: a long plain text file comes as several pieces, of which the
first has `first` and the last has `last` set. Everything else comes whole.
"""

import difflib
import glob
import gzip
import importlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from absl import logging

from llm_jax import corpus

CHUNK_BYTES = 1 << 20

# What is read from a folder. A file that is named, or that a glob matches, is read whatever its
# suffix: `.json` is a list of rows, any other one plain text.
TEXT = set(
    ".txt .text .md .rst .tex .html .csv .tsv .log .py .pyi .js .ts .c .h .cc .cpp .hpp .java .go "
    ".rs .rb .sh .sql .r .jl .scala .kt .swift .php .lua .pl .hs".split()
)
ROWS = {".jsonl", ".ndjson", ".parquet"}
PACKED = {".gz", ".zst"}


@dataclass(frozen=True)
class Document:
    """A document, or a piece of one.

    Attributes:
      text: never empty.
      source: the file or data set it comes from.
      first: the text is the beginning of the document.
      last: the text is the end of the document; if not, the next piece goes on with it, or the
        stream was cut here.
    """

    text: str
    source: str
    first: bool = True
    last: bool = True


def read(inputs: Sequence[str], *, text_key: str = "text") -> Iterator[Document]:
    """Streams the documents of all inputs, in order.

    An input is a file (plain text is one document; .jsonl, .json and .parquet have one a row; each
    but .parquet also as .gz or .zst), a folder (its readable files, recursively, sorted by path), a
    glob, `hf:NAME[:config][:split]` (a Hugging Face data set; an empty config may be left between
    two colons) or `embedded:NAME` (see `llm_jax.corpus`). Empty documents are left out. Text is
    taken as it is, line ends included, but for a byte order mark.

    Raises:
      FileNotFoundError: an input that does not exist, or a glob or folder without a readable file.
      ValueError: text that is not UTF-8, a row without `text_key`, a damaged file, no text at all.
      ImportError: a reader whose extra is not installed.
    What can be checked without reading is checked before the first document.
    """
    items = resolve(inputs)
    return _read(items, text_key)


def resolve(inputs: Sequence[str], suffixes: Collection[str] = TEXT | ROWS) -> list[str]:
    """Files, `hf:` and `embedded:` names, in the order in which `read` takes them.

    Of a folder the files with one of `suffixes` are taken.
    """
    inputs = (inputs,) if isinstance(inputs, str) else inputs
    if not inputs:
        raise ValueError("there is no input; name files in --input (data.inputs)")
    items = []
    for given in inputs:
        path = os.path.expanduser(given)
        if given.startswith(("hf:", "embedded:")):
            kind, _, name = given.partition(":")
            if kind == "embedded" and name not in corpus.NAMES:
                raise ValueError(f"{given}: there are embedded:{{{','.join(corpus.NAMES)}}} only")
            items.append(given)
        elif os.path.isdir(path):
            items += _folder(path, suffixes)
        elif os.path.exists(path):
            items.append(path)
        elif glob.has_magic(path):
            found = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
            if not found:
                raise FileNotFoundError(f"{given}: no file matches (--input, data.inputs)")
            items += found
        else:
            raise FileNotFoundError(f"{given}: no such file{_nearest(path)} (--input, data.inputs)")
    return items


def identity(inputs: Sequence[str], suffixes: Collection[str] = TEXT | ROWS) -> list[list]:
    """What tells whether inputs have changed: [path, bytes, time of change in ns], or [name]."""
    found = []
    for item in resolve(inputs, suffixes):
        if item.startswith("embedded:"):
            found.append([item, corpus.version()])
        elif item.startswith("hf:"):
            found.append([item])
        else:
            stat = os.stat(item)
            found.append([os.path.abspath(item), stat.st_size, stat.st_mtime_ns])
    return found


def count_characters(documents: Iterable[Document]) -> int:
    """The number of characters (Unicode code points)."""
    return sum(len(d.text) for d in documents)


def held_out_start(characters: int, eval_fraction: float) -> int:
    """Where the held-out text begins: `int(n * 0.9)` for a tenth, as nanoGPT splits a file."""
    return int(characters * (1.0 - eval_fraction))


def take(documents: Iterable[Document], start: int, stop: int | None = None) -> Iterator[Document]:
    """The characters [start, stop) of all documents; those that straddle a bound are cut there."""
    end = 0
    for document in documents:
        begin, end = end, end + len(document.text)
        if stop is not None and begin >= stop:
            return
        if end > start:
            low = max(start - begin, 0)
            high = len(document.text) if stop is None else min(stop - begin, len(document.text))
            yield replace(
                document,
                text=document.text[low:high],
                first=document.first and low == 0,
                last=document.last and high == len(document.text),
            )


def _read(items: list[str], text_key: str) -> Iterator[Document]:
    empty = True
    for item in items:
        if item.startswith("embedded:"):
            found = (Document(t, item) for _, t in corpus.documents(item.partition(":")[2]))
        elif item.startswith("hf:"):
            rows = _texts_of(hugging_face_rows(item), text_key, item)
            found = (Document(text, item) for text in rows)
        else:
            found = _file(item, text_key)
        for document in found:
            if document.text:
                empty = False
                yield document
    if empty:
        raise ValueError(
            f"the corpus is empty: no text in {', '.join(items[:3])} (--input, data.inputs)"
        )


def _file(path: str, text_key: str) -> Iterator[Document]:
    suffix = suffix_of(path)
    if suffix in (".jsonl", ".ndjson"):
        texts = _json_lines(path, text_key)
    elif suffix == ".json":
        texts = _json_list(path, text_key)
    elif suffix == ".parquet":
        texts = _texts_of(parquet_rows(path, text_key), text_key, path)
    else:
        return _plain(path)
    return (Document(text, path) for text in texts)


def suffix_of(path: str) -> str:
    """The suffix that tells the format: that of the file inside, if it is packed."""
    stem, suffix = os.path.splitext(path)
    return (os.path.splitext(stem)[1] if suffix in PACKED else suffix).lower()


def _folder(path: str, suffixes: Collection[str]) -> list[str]:
    found, others = [], set()
    for folder, folders, files in os.walk(path):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for file in files:
            if file.startswith("."):
                continue
            if suffix_of(file) in suffixes:
                found.append(os.path.join(folder, file))
            else:
                others.add(suffix_of(file) or file)
    if not found:
        there = f"only {', '.join(sorted(others)[:8])}" if others else "it has no files"
        raise FileNotFoundError(
            f"{path}: no readable text in this folder, {there}; name files or a glob"
        )
    if others:
        logging.warning("%s: files left out: %s", path, ", ".join(sorted(others)[:20]))
    return sorted(found)


def _nearest(path: str) -> str:
    folder, name = os.path.split(os.path.abspath(path))
    while not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    near = difflib.get_close_matches(name, os.listdir(folder), n=1, cutoff=0.5)
    return f"; did you mean {os.path.join(folder, near[0])}?" if near else ""


# -------------------------------------------------------------------------------------- plain text


def chunks(path: str) -> Iterator[bytes]:
    """The unpacked bytes of a file, at most CHUNK_BYTES at a time."""
    if path.endswith(".gz"):
        stream, damage = gzip.open(path, "rb"), (EOFError, gzip.BadGzipFile, zlib.error)
    elif path.endswith(".zst"):
        # zstandard's own reader ends a truncated stream without a word; this one raises.
        arrow = _import("pyarrow", "data", path)
        stream, damage = arrow.CompressedInputStream(arrow.OSFile(path), "zstd"), (OSError,)
    else:
        stream, damage = open(path, "rb"), ()
    with stream:
        while True:
            try:
                chunk = stream.read(CHUNK_BYTES)
            except damage as e:
                raise ValueError(f"{path}: damaged or cut short, fetch it again ({e})") from None
            if not chunk:
                return
            yield chunk


def _plain(path: str) -> Iterator[Document]:
    texts = (text for text in _decoded(path) if text)
    text, first = next(texts, None), True
    while text is not None:
        following = next(texts, None)
        yield Document(text, path, first, following is None)
        text, first = following, False


def _decoded(path: str) -> Iterator[str]:
    """Text of a UTF-8 file, chunk by chunk, never half a character."""
    position, rest = 0, b""  # `rest`: the bytes of a character that the chunk before cut
    for chunk in itertools.chain(chunks(path), (b"",)):
        data = rest + chunk
        if position == 0 and data.startswith(b"\xef\xbb\xbf"):
            position, data = 3, data[3:]
        try:
            text, used = data.decode("utf-8"), len(data)
        except UnicodeDecodeError as e:
            # The last bytes may be a character that the next chunk completes.
            if not chunk or e.end < len(data) or e.reason != "unexpected end of data":
                raise _not_utf8(path, position, e) from None
            text, used = data[: e.start].decode("utf-8"), e.start
        yield text
        position, rest = position + used, data[used:]


def _not_utf8(path: str, position: int, e: UnicodeDecodeError) -> ValueError:
    byte = e.object[e.start]
    return ValueError(
        f"{path}: not UTF-8 at byte {position + e.start:,} (0x{byte:02x}, {e.reason}); "
        "convert the file, e.g. with iconv -t utf-8"
    )


# -------------------------------------------------------------------------------------------- rows


def _text_of(row: object, text_key: str, where: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(
            f"{where}: a row has to be an object with {text_key!r}, not {type(row).__name__}"
        )
    if text_key not in row:
        raise ValueError(_missing_key(text_key, where, row))
    if not isinstance(row[text_key], str):
        raise ValueError(f"{where}: {text_key!r} is {type(row[text_key]).__name__}, not text")
    return row[text_key]


def _texts_of(rows: Iterable[object], text_key: str, name: str) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        yield _text_of(row, text_key, f"{name}: row {number}")


def _missing_key(text_key: str, where: str, keys: Iterable[str]) -> str:
    keys = ", ".join(repr(k) for k in keys) or "none"
    return f"{where}: no key {text_key!r}; it has {keys}; set --text_key (data.text_key)"


def _json_lines(path: str, text_key: str) -> Iterator[str]:
    for number, position, line in lines(path):
        try:
            line = line.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise _not_utf8(path, position, e) from None
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise ValueError(f"{path}:{number}: not JSON ({e.msg}, column {e.colno})") from None
        yield _text_of(row, text_key, f"{path}:{number}")


def lines(path: str) -> Iterator[tuple[int, int, bytes]]:
    """Lines of a file: (line number from 1, byte offset, line without its end)."""
    number, position, rest = 1, 0, b""
    for chunk in chunks(path):
        *lines, rest_of_chunk = chunk.split(b"\n")
        for line in lines:
            line, rest = rest + line, b""
            yield number, position, line
            number, position = number + 1, position + len(line) + 1
        rest += rest_of_chunk
    if rest:
        yield number, position, rest


def _json_list(path: str, text_key: str) -> Iterator[str]:
    """A JSON array of rows, parsed element by element as it is read; or a single row."""
    decoder, between = json.JSONDecoder(), re.compile(r"[ \t\r\n,]*")
    buffer, at, number, is_list = "", 0, 0, False
    for text in itertools.chain(_decoded(path), (None,)):
        buffer, at = buffer[at:] + (text or ""), 0
        while True:
            at = between.match(buffer, at).end()
            if number == 0 and not is_list and buffer[at : at + 1] == "[":
                at, is_list = at + 1, True
                continue
            if buffer[at : at + 1] in ("", "]"):
                break
            try:
                row, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as e:
                if text is None:
                    raise ValueError(f"{path}: not JSON after row {number} ({e.msg})") from None
                break  # the rest of this row is still to be read
            number, at = number + 1, end
            yield _text_of(row, text_key, f"{path}: row {number}")
    if is_list and buffer[at : at + 1] != "]":
        raise ValueError(f"{path}: the list does not end after row {number}; the file is cut short")


def parquet_rows(path: str, text_key: str = "") -> Iterator[dict[str, Any]]:
    """Rows of a .parquet file, with `text_key` alone or with all columns."""
    parquet = _import("pyarrow.parquet", "data", path)
    damage = (_import("pyarrow", "data", path).ArrowInvalid, OSError)
    try:
        with parquet.ParquetFile(path) as file:
            if text_key and text_key not in file.schema_arrow.names:
                raise ValueError(_missing_key(text_key, path, file.schema_arrow.names))
            columns = [text_key] if text_key else None
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()
    except damage as e:
        raise ValueError(f"{path}: damaged parquet file ({e})") from None


def hugging_face_rows(name: str) -> Iterator[dict[str, Any]]:
    """Rows of a data set, `hf:NAME[:config][:split]`, as they arrive."""
    datasets = _import("datasets", "hf", name)
    _, path, config, split = (name.split(":", 3) + ["", ""])[:4]
    if not path:
        raise ValueError(f"{name}: expected hf:NAME[:config][:split]")
    yield from datasets.load_dataset(path, config or None, split=split or "train", streaming=True)


def _import(module: str, extra: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(f"{what} needs {module}: pip install 'llm_jax[{extra}]'") from None
