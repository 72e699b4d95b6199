"""Byte-pair encoding as it reads in the paper, on bytes, as GPT-2 uses it.

This is the algorithm to read and to test against (Sennrich et al. 2016, arXiv:1508.07909; bytes:
Radford et al. 2019). The library behind "hf_bpe" computes the same, merge by merge and id by id,
some hundred times faster.
"""

import functools
import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

Pair = tuple[bytes, bytes]


def train(texts: Iterable[str], *, n_merges: int, min_count: int = 2) -> list[Pair]:
    """Learns up to `n_merges` merges, most frequent pair first.

    1. Cut the texts into words and count them; spell each word as single bytes.
    2. Count every pair of neighbouring symbols, as often as its word occurs.
    3. Merge the most frequent pair wherever it stands, and go to 2.

    Ties go to the pair whose symbols are older, the left one first. A symbol's age is its place in
    the vocabulary: single bytes in the order of `first_symbols`, then merges as they were learned.
    Only words that hold the merged pair change, so only those are counted again.
    """
    word_counts = Counter(word for text in texts for word in split_words(text))
    words = [[bytes([byte]) for byte in word.encode()] for word in word_counts]
    counts = list(word_counts.values())
    rank = {symbol: i for i, symbol in enumerate(first_symbols())}

    pair_counts: Counter[Pair] = Counter()
    holders: defaultdict[Pair, set[int]] = defaultdict(set)

    def count(number: int, sign: int) -> None:
        word = words[number]
        for pair in itertools.pairwise(word):
            pair_counts[pair] += sign * counts[number]
            if sign > 0:
                holders[pair].add(number)
            elif not pair_counts[pair]:
                del pair_counts[pair]

    for number in range(len(words)):
        count(number, 1)

    merges: list[Pair] = []
    while len(merges) < n_merges and pair_counts:
        best = max(pair_counts, key=lambda p: (pair_counts[p], -rank[p[0]], -rank[p[1]]))
        if pair_counts[best] < min_count:
            break
        merges.append(best)
        rank.setdefault(best[0] + best[1], len(rank))
        for number in holders.pop(best):
            count(number, -1)
            words[number] = merge(words[number], best)
            count(number, 1)
    return merges


def merge(symbols: Sequence[bytes], pair: Pair) -> list[bytes]:
    """Joins each occurrence of `pair`, from left to right: a a a with (a, a) is aa a."""
    merged: list[bytes] = []
    at = 0
    while at < len(symbols):
        if tuple(symbols[at : at + 2]) == pair:
            merged.append(pair[0] + pair[1])
            at += 2
        else:
            merged.append(symbols[at])
            at += 1
    return merged


def vocabulary(merges: Sequence[Pair]) -> dict[bytes, int]:
    """Symbol -> id: the 256 bytes, then what the merges spell (two may spell the same)."""
    symbols = dict.fromkeys([*first_symbols(), *(left + right for left, right in merges)])
    return {symbol: i for i, symbol in enumerate(symbols)}


def encode(text: str, merges: Sequence[Pair], ids: Mapping[bytes, int]) -> list[int]:
    """Ids of `text`: in each word, the oldest merge that applies is applied, until none does."""
    age = {pair: i for i, pair in enumerate(merges)}

    @functools.cache
    def encode_word(word: str) -> list[int]:
        symbols = [bytes([byte]) for byte in word.encode()]
        while True:
            pairs = {pair for pair in itertools.pairwise(symbols) if pair in age}
            if not pairs:
                return [ids[symbol] for symbol in symbols]
            symbols = merge(symbols, min(pairs, key=age.__getitem__))

    return [i for word in split_words(text) for i in encode_word(word)]


def split_words(text: str) -> list[str]:
    """GPT-2's pre-tokenisation; the parts joined are the text.

    English contractions; runs of letters, of numbers, or of other signs, each with the one space
    before it; white space, which leaves its last character to the word that follows.

    Python's `re` has no classes for letters and numbers of all scripts, so the classes are spelled
    out of the characters that the text holds.
    """
    # Python counts four separators as white space that Unicode (and so the library) does not.
    spaces = {char for char in set(text) if char.isspace() and char not in "\x1c\x1d\x1e\x1f"}
    letters = {char for char in set(text) if unicodedata.category(char)[0] == "L"}
    numbers = {char for char in set(text) if unicodedata.category(char)[0] == "N"}

    def one_of(characters: set[str]) -> str:
        return f"[{re.escape(''.join(sorted(characters)))}]" if characters else r"(?!)"

    def none_of(characters: set[str]) -> str:
        return f"[^{re.escape(''.join(sorted(characters)))}]" if characters else r"(?s:.)"

    pattern = "|".join(
        [
            "'(?:s|t|re|ve|m|ll|d)",
            f" ?{one_of(letters)}+",
            f" ?{one_of(numbers)}+",
            f" ?{none_of(letters | numbers | spaces)}+",
            f"{one_of(spaces)}+(?!{none_of(spaces)})",
            f"{one_of(spaces)}+",
        ]
    )
    return re.findall(pattern, text)


@functools.cache
def byte_characters() -> dict[int, str]:
    """GPT-2's spelling of bytes: the Latin-1 character if it prints, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable}
    return spelled | {byte: chr(256 + i) for i, byte in enumerate(others)}


def first_symbols() -> list[bytes]:
    """The 256 single bytes in order of their printable spelling, which is their order of id."""
    spelled = byte_characters()
    return [bytes([byte]) for byte in sorted(spelled, key=spelled.__getitem__)]


def read_merges(content: str) -> list[Pair]:
    """Merges of a `vocab.bpe` or `merges.txt`: a line each, in the printable spelling of bytes."""
    byte_of = {char: byte for byte, char in byte_characters().items()}
    lines = [line for line in content.splitlines() if line and not line.startswith("#version")]
    pairs = [line.split(" ") for line in lines]
    return [tuple(bytes(byte_of[char] for char in part) for part in pair) for pair in pairs]
