"""Tokenizers without learned pieces: bytes, characters, words."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llm_jax.tokenizers.base import (
    BOS,
    EOS,
    PAD,
    UNK,
    Tokenizer,
    cut_inside,
    name_special_tokens,
    roles_by_name,
)

VOCABULARY_FILE = "vocabulary.json"

# A word or a sign with the one space before it, or white space by the character (runs of spaces
# together, but for the last, which belongs to the word that follows).
_WORDS = re.compile(r" +(?= )| ?\w+| ?[^\w\s]|\s")
_WORDS_AND_DIGITS = re.compile(r" +(?= )| ?\d| ?(?:(?!\d)\w)+| ?[^\w\s]|\s")


class Bytes(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8, special tokens follow. Lossless."""

    def __init__(self, names: Sequence[str], options: Mapping[str, object] | None = None):
        special_tokens = {name: 256 + i for i, name in enumerate(names)}
        super().__init__(
            kind="byte",
            token_bytes=[bytes([i]) for i in range(256)] + [b""] * len(names),
            special_tokens=special_tokens,
            roles=roles_by_name(special_tokens),
            lossless=True,
            options=options or {},
        )

    def _encode_plain(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def _model_files(self) -> dict[str, bytes]:
        return {}


class Characters(Tokenizer):
    """One id for each character, in order of code point; special tokens follow.

    A character outside the vocabulary is `<unk>`, or a ValueError where there is no such token.
    """

    def __init__(
        self,
        characters: Sequence[str],
        names: Sequence[str],
        options: Mapping[str, object] | None = None,
    ):
        special_tokens = {name: len(characters) + i for i, name in enumerate(names)}
        super().__init__(
            kind="char",
            token_bytes=[char.encode() for char in characters] + [b""] * len(names),
            special_tokens=special_tokens,
            roles=roles_by_name(special_tokens),
            lossless=False,
            options=options or {},
        )
        self._characters = list(characters)
        codes = np.array([ord(char) for char in characters], np.int64)
        # Code point -> id; the last entry stands for all code points above.
        self._ids = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)
        self._ids[codes] = np.arange(len(codes))
        if self.unk_id is not None:
            self._ids[self._ids < 0] = self.unk_id

    def _encode_plain(self, texts: list[str]) -> list[np.ndarray]:
        encoded = []
        for text in texts:
            codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
            if self.unk_id is None and ids.size and ids.min() < 0:
                raise ValueError(
                    f"character {text[int(np.argmin(ids))]!r} is not in the vocabulary of this "
                    "char tokenizer, which has no unknown token; train it with unk=True"
                )
            encoded.append(ids)
        return encoded

    def _model_files(self) -> dict[str, bytes]:
        return {VOCABULARY_FILE: _to_json(self._characters)}


class Words(Tokenizer):
    """Words, signs and white space; special tokens first, then the most frequent.

    A word carries the space before it (" the"), so that ids joined are the text wherever no word is
    unknown. An unknown one is `<unk>`, or a ValueError where there is no such token.
    """

    def __init__(
        self,
        words: Sequence[str],
        names: Sequence[str],
        options: Mapping[str, object] | None = None,
    ):
        special_tokens = {name: i for i, name in enumerate(names)}
        super().__init__(
            kind="word",
            token_bytes=[b""] * len(names) + [word.encode() for word in words],
            special_tokens=special_tokens,
            roles=roles_by_name(special_tokens),
            lossless=False,
            options=options or {},
        )
        self._words = list(words)
        self._ids = {word: len(names) + i for i, word in enumerate(words)}
        self._find = _words_pattern(bool(self.options.get("split_digits"))).findall

    def _encode_plain(self, texts: list[str]) -> list[np.ndarray]:
        get, unknown = self._ids.get, -1 if self.unk_id is None else self.unk_id
        encoded = []
        for text in texts:
            found = self._find(text)
            ids = np.fromiter((get(word, unknown) for word in found), np.int32, len(found))
            if self.unk_id is None and ids.size and ids.min() < 0:
                raise ValueError(
                    f"word {found[int(np.argmin(ids))]!r} is not in the vocabulary of this word "
                    "tokenizer, which has no unknown token; train it with unk=True"
                )
            encoded.append(ids)
        return encoded

    def _model_files(self) -> dict[str, bytes]:
        return {VOCABULARY_FILE: _to_json(self._words)}


def train_bytes(*, special_tokens: Sequence[str] = ()) -> Bytes:
    """Nothing to train: 256 bytes, <pad>, <s>, </s> and the requested special tokens."""
    return Bytes(name_special_tokens([PAD, BOS, EOS], special_tokens))


def train_characters(
    texts: Iterable[str],
    *,
    vocab_size: int | None = None,
    special_tokens: Sequence[str] = (),
    unk: bool = True,
) -> Characters:
    """All characters of the texts, or, with `vocab_size`, the most frequent that fit.

    There are no special tokens but `<unk>` and the requested ones ("<pad>", "<s>" and "</s>" take
    their roles), so that `unk=False` alone gives nanoGPT's vocabulary.
    """
    names = name_special_tokens([UNK] if unk else [], special_tokens)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    if not counts:
        raise ValueError("there is no text to train a tokenizer on; change --input")
    kept = _most_frequent(counts, vocab_size, len(names), UNK in names)
    return Characters(sorted(kept), names, {"unk": unk})


def train_words(
    texts: Iterable[str],
    *,
    vocab_size: int | None = None,
    special_tokens: Sequence[str] = (),
    split_digits: bool = False,
    unk: bool = True,
) -> Words:
    """The most frequent words that fit into `vocab_size`, all of them without it."""
    standard = [PAD, *([UNK] if unk else []), BOS, EOS]
    names = name_special_tokens(standard, special_tokens)
    find = _words_pattern(split_digits).findall
    counts: Counter[str] = Counter()
    for text in texts:
        for part in cut_inside(text, names):
            counts.update(find(part))
    if not counts:
        raise ValueError("there is no text to train a tokenizer on; change --input")
    kept = _most_frequent(counts, vocab_size, len(names), UNK in names)
    options = {"split_digits": split_digits, "unk": unk, "unknown_in_training": 0}
    options["unknown_in_training"] = counts.total() - sum(counts[word] for word in kept)
    return Words(kept, names, options)


def from_model_files(kind: str, files: Mapping[str, bytes], config: Mapping) -> Tokenizer:
    """The tokenizer that `files()` came from; `config` is its parsed `tokenizer_config.json`."""
    names = sorted(config["special_tokens"], key=config["special_tokens"].__getitem__)
    if kind == "byte":
        return Bytes(names, config["options"])
    entries = json.loads(files[VOCABULARY_FILE])
    cls = {"char": Characters, "word": Words}[kind]
    return cls(entries, names, config["options"])


def _most_frequent(
    counts: Mapping[str, int], vocab_size: int | None, n_special: int, has_unk: bool
) -> list[str]:
    room = len(counts) if vocab_size is None else vocab_size - n_special
    if room < 1:
        raise ValueError(
            f"--vocab_size={vocab_size} has no room beside {n_special} special tokens; raise it"
        )
    if room < len(counts) and not has_unk:
        raise ValueError(
            f"the text has {len(counts)} different entries, --vocab_size={vocab_size} has room for "
            f"{room}, and without an unknown token nothing may be left out; raise --vocab_size"
        )
    return sorted(counts, key=lambda entry: (-counts[entry], entry))[:room]


def _words_pattern(split_digits: bool) -> re.Pattern:
    return _WORDS_AND_DIGITS if split_digits else _WORDS


def _to_json(entries: Sequence[str]) -> bytes:
    return (json.dumps(entries, ensure_ascii=True, indent=0) + "\n").encode()
