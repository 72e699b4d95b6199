"""The readable algorithm does what the library does."""

import inspect
import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax import tokenizers
from llm_jax.tokenizers import bpe_reference


def library_merges(tokenizer):
    """Merges of an "hf_bpe" tokenizer, as bytes."""
    byte_of = {char: byte for byte, char in bpe_reference.byte_characters().items()}
    merges = json.loads(tokenizer.files()["tokenizer.json"])["model"]["merges"]
    return [tuple(bytes(byte_of[c] for c in part) for part in pair) for pair in merges]


def check_equal_to_the_library(text, other_text, n_merges):
    merges = bpe_reference.train([text], n_merges=n_merges)
    ids = bpe_reference.vocabulary(merges)
    library = tokenizers.train("hf_bpe", [text], vocab_size=len(ids) + 3)
    assert len(merges) == n_merges
    assert merges == library_merges(library)
    expected = library.encode(other_text)
    # The library's ids start with <pad>, <s> and </s>.
    assert [i + 3 for i in bpe_reference.encode(other_text, merges, ids)] == expected


def test_merges_by_hand():
    # ab occurs 5 times, bc twice, then abc twice: words "ab" * 3 and "abc" * 2.
    merges = bpe_reference.train(["ab ab ab", " abc abc"], n_merges=10)
    assert merges == [(b"a", b"b"), (b" ", b"ab"), (b" ab", b"c")]


def test_ties_go_to_the_older_symbols():
    # All pairs occur twice; bytes are ordered by their printable spelling, so "!" before "a".
    merges = bpe_reference.train(["ca", "ca", "ba", "ba", "!!", "!!"], n_merges=2)
    assert merges == [(b"!", b"!"), (b"b", b"a")]


def test_a_run_is_merged_from_the_left():
    assert bpe_reference.merge([b"a"] * 5, (b"a", b"a")) == [b"aa", b"aa", b"a"]


def test_merges_equal_the_librarys_on_prose(prose):
    check_equal_to_the_library(prose[:150_000], prose[150_000:250_000], n_merges=500)


def test_merges_equal_the_librarys_on_code():
    # Indentation: runs of one symbol, where overlapping pairs are easily counted wrongly.
    folder = pathlib.Path(inspect.getfile(json)).parent
    code = "".join(path.read_text("utf-8") for path in sorted(folder.glob("*.py")))
    check_equal_to_the_library(code, code, n_merges=500)


def test_merges_equal_the_librarys_on_wikitext(wikitext):
    check_equal_to_the_library(wikitext[:150_000], wikitext[150_000:400_000], n_merges=500)


def test_encoding_with_gpt2s_files_equals_the_library(real_data, wikitext):
    folder = real_data / "tokenizers/gpt2"
    merges = bpe_reference.read_merges((folder / "vocab.bpe").read_text("utf-8"))
    byte_of = {char: byte for byte, char in bpe_reference.byte_characters().items()}
    pieces = json.loads((folder / "encoder.json").read_text("utf-8"))
    del pieces["<|endoftext|>"]
    ids = {bytes(byte_of[char] for char in piece): i for piece, i in pieces.items()}
    text = wikitext + "I'm 12½ y'all'd   \n\n  \t x\r\n 日本語 🎉 e\u0301 \x1c ▁"
    assert bpe_reference.encode("Hello world", merges, ids) == [15496, 995]
    assert bpe_reference.encode(text, merges, ids) == tokenizers.load(folder).encode(text)


@given(text=st.text())
def test_words_joined_are_the_text(text):
    assert "".join(bpe_reference.split_words(text)) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello world", ["Hello", " world"]),
        ("it's we'll 'tis", ["it", "'s", " we", "'ll", " '", "tis"]),
        ("x1 23²", ["x", "1", " 23²"]),
        ("a  b\n\n c", ["a", " ", " b", "\n\n", " c"]),
        ("end.  ", ["end", ".", "  "]),
    ],
)
def test_words_of_gpt2(text, words):
    assert bpe_reference.split_words(text) == words


def test_byte_characters_are_gpt2s():
    spelled = bpe_reference.byte_characters()
    assert len(set(spelled.values())) == 256
    assert (spelled[0x20], spelled[0x0A], spelled[0x41], spelled[0xAD]) == ("Ġ", "Ċ", "A", "Ń")
