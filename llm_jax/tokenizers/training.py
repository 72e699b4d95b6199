"""`train`: one call for all kinds of tokenizer, and the sample of text that they learn from."""

import functools
import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from llm_jax.tokenizers import simple, subword_training
from llm_jax.tokenizers.base import Tokenizer, check_unicode

# Each kind and the options that mean something to it.
KINDS: dict[str, tuple[Callable, frozenset[str]]] = {
    "sentencepiece_bpe": (
        functools.partial(subword_training.train_sentencepiece, model_type="bpe"),
        frozenset({"split_digits", "keep_indentation", "byte_fallback"}),
    ),
    "sentencepiece_unigram": (
        functools.partial(subword_training.train_sentencepiece, model_type="unigram"),
        frozenset({"split_digits", "keep_indentation", "byte_fallback"}),
    ),
    "hf_bpe": (subword_training.train_hf_bpe, frozenset({"split_digits", "keep_indentation"})),
    "hf_wordpiece": (subword_training.train_hf_wordpiece, frozenset({"split_digits"})),
    "byte": (simple.train_bytes, frozenset()),
    "char": (simple.train_characters, frozenset({"unk"})),
    "word": (simple.train_words, frozenset({"split_digits", "unk"})),
}
DEFAULTS = {"split_digits": False, "keep_indentation": True, "byte_fallback": True, "unk": True}
_DIGITS_ARE_SPLIT_ANYWAY = ("byte", "char")
_PART = 8192  # characters; documents are cut into parts of at most this size


def train(
    kind: str,
    texts: Iterable[str],
    *,
    vocab_size: int | None = None,
    special_tokens: Sequence[str] = (),
    split_digits: bool = False,
    keep_indentation: bool = True,
    byte_fallback: bool = True,
    unk: bool = True,
    max_bytes: int | None = 20_000_000,
    seed: int = 0,
) -> Tokenizer:
    """Trains a tokenizer. The same arguments and library versions give the same `fingerprint()`.

    Args:
      kind: a key of `KINDS`.
      texts: documents.
      vocab_size: number of ids, special tokens included. Subword kinds have exactly as many, and
        need the argument; "char" and "word" at most as many (None or 0: all); "byte" ignores it.
      special_tokens: user-defined ones, in addition to those of the kind (<pad>, <unk>, <s>, </s>,
        or BERT's for "hf_wordpiece"; "char" has only <unk>).
      split_digits: every digit is a token.
      keep_indentation: False (sentencepiece and "hf_bpe") collapses runs of spaces, for good.
      byte_fallback: (sentencepiece) False makes unseen characters unknown instead of bytes.
      unk: ("char", "word") False leaves out <unk>; encoding something unknown is then an error.
      max_bytes: learn from a random sample of at most so many bytes of UTF-8, drawn in parts of a
        few thousand characters; None is no limit. "char" counts the characters of all the text.
      seed: of that sample.

    Raises:
      ValueError: an unknown kind, an option the kind does not have, too little text for
        `vocab_size`, no text.
      ImportError: the extra `tokenizers` is needed and absent.
    """
    if kind not in KINDS:
        raise ValueError(f"--kind={kind} is not a tokenizer; kinds are {', '.join(KINDS)}")
    function, understood = KINDS[kind]
    vocab_size = vocab_size or None
    given = {
        "split_digits": split_digits,
        "keep_indentation": keep_indentation,
        "byte_fallback": byte_fallback,
        "unk": unk,
    }
    for name, value in given.items():
        trivially = name == "split_digits" and kind in _DIGITS_ARE_SPLIT_ANYWAY
        if name not in understood and value != DEFAULTS[name] and not trivially:
            raise ValueError(f"a {kind} tokenizer has no option {name}; leave it at its default")
    options = {name: given[name] for name in sorted(understood)}
    if kind == "byte":
        return function(special_tokens=special_tokens)
    if kind == "char":
        return function(
            _checked(texts), vocab_size=vocab_size, special_tokens=special_tokens, **options
        )
    if kind != "word":
        if vocab_size is None or vocab_size < 1:
            raise ValueError(f"a {kind} tokenizer needs --vocab_size, for example 4096")
        options["options"] = dict(options)  # what the tokenizer remembers of them
    parts = sample(_checked(texts), max_bytes, seed)
    return function(parts, vocab_size=vocab_size, special_tokens=special_tokens, **options)


def train_each(
    kinds: Sequence[str], texts: Sequence[str], *, vocab_size: int, **arguments: object
) -> dict[str, Tokenizer]:
    """One tokenizer of each kind for a comparison: each takes the options that it understands."""
    options = {name: value for name, value in arguments.items() if name in DEFAULTS}
    others = {name: value for name, value in arguments.items() if name not in DEFAULTS}
    trained = {}
    for kind in kinds:
        own = {name: value for name, value in options.items() if name in KINDS[kind][1]}
        trained[kind] = train(kind, texts, vocab_size=vocab_size, **own, **others)
    return trained


def hold_out(
    texts: Iterable[str], max_bytes: int | None, seed: int, share: int = 10
) -> tuple[list[str], str]:
    """Parts to learn from, and a text of every `share`-th part (at most 1 MB) to measure on."""
    parts = list(sample(texts, max_bytes, seed))
    if len(parts) < share:
        whole = "".join(parts)
        parts = list(cut(whole, max(1, len(whole) // (2 * share))))
    held = parts[share - 1 :: share]
    if not held:
        raise ValueError(
            "the text is too short to hold a part of it out; name another with --eval_input"
        )
    held = sample(held, 1_000_000, seed)
    return [part for i, part in enumerate(parts) if (i + 1) % share], "".join(held)


def sample(texts: Iterable[str], max_bytes: int | None, seed: int) -> Iterable[str]:
    """Parts of the texts, at most `max_bytes` of UTF-8 in all, in the order of the text.

    Every part draws a random number and those with the smallest numbers stay, so each part has the
    same chance wherever it stands, and no more than `max_bytes` is ever held.
    """
    parts = itertools.chain.from_iterable(map(cut, texts))
    if max_bytes is None:
        return parts
    if max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes} leaves no text; give a positive number or None")
    draw = random.Random(seed).random
    kept: list[tuple[float, int, str]] = []  # heap: the largest number on top
    total = 0
    for position, part in enumerate(parts):
        number = draw()
        if total >= max_bytes and kept and -number < kept[0][0]:
            continue
        heapq.heappush(kept, (-number, position, part))
        total += len(part.encode())
        while total > max_bytes and len(kept) > 1:
            total -= len(heapq.heappop(kept)[2].encode())
    return [part for _, _, part in sorted(kept, key=lambda entry: entry[1])]


def cut(text: str, size: int = _PART) -> Iterator[str]:
    """Parts of at most `size` characters, cut before white space, at the end of a line if possible.

    No tokenizer here has pieces that reach from a word into the white space after it, so the parts
    hold the same words, and the same runs of white space, as the text.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        for separator in ("\n", " "):
            found = text.rfind(separator, start + 1, start + size)
            while found > start and text[found - 1].isspace():
                found -= 1
            if found > start:
                end = found
                break
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _checked(texts: Iterable[str]) -> Iterator[str]:
    if isinstance(texts, str):
        raise ValueError("train takes the texts of documents; put a single text into a list")
    for number, text in enumerate(texts):
        check_unicode(text, number)
        yield text
