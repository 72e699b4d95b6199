"""Cutting long documents for the tokenizer must not show in the tokens."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax import tokenizers
from llm_jax.data import encoding
from llm_jax.data.documents import Document

WORDS = st.lists(st.sampled_from(["the ", "cat\n", "\n\n", "  sat", "mat.\nOn", "é"]), max_size=40)


def stream(text, cuts):
    """One document that comes in pieces, cut at the given places."""
    bounds = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    parts = itertools.pairwise(bounds)
    return [Document(text[a:b], "x", a == 0, b == len(text)) for a, b in parts]


@given(WORDS, st.lists(st.integers(min_value=1, max_value=100), max_size=3), st.integers(2, 12))
def test_pieces_depend_on_the_text_alone(words, cuts, limit):
    text = "".join(words)
    found = list(encoding.pieces(stream(text, cuts), limit))
    assert found == list(encoding.pieces(stream(text, []), limit))
    assert "".join(p.text for p in found) == text
    assert all(0 < len(p.text) <= limit for p in found)
    assert [p.first for p in found] == [i == 0 for i in range(len(found))]
    assert [p.last for p in found] == [i == len(found) - 1 for i in range(len(found))]
    joined = "".join(p.text for p in found)
    at = np.cumsum([0] + [len(p.text) for p in found])
    assert [p.before for p in found] == [joined[i - 1 : i] for i in at[:-1]]


def test_cuts_are_where_lines_end():
    found = encoding.pieces([Document("one, two\nsix\n\nfour five six", "x")], 15)
    assert [p.text for p in found] == ["one, two\n", "six\n\nfour five", " six"]
    found = encoding.pieces([Document("aaaa bbbb cccc", "x")], 7)
    assert [p.text for p in found] == ["aaaa", " bbbb", " cccc"]


def test_documents_that_were_cut_elsewhere_begin_without_being_first():
    docs = [Document("ab", "x", False, True), Document("cd", "y"), Document("e", "z", True, False)]
    found = list(encoding.pieces(docs))
    assert [(p.text, p.first, p.last, p.begins) for p in found] == [
        ("ab", False, True, True),
        ("cd", True, True, True),
        ("e", True, False, True),
    ]


def test_batches_hold_everything_in_order():
    items = list(encoding.pieces([Document("x" * n, "x") for n in (3, 4, 9, 1)]))
    groups = list(encoding.batches(items, 5))
    assert [len(g) for g in groups] == [2, 1, 1]
    assert [p for g in groups for p in g] == items


TEXT = "A line of text,\nand another one: naïve.\n\n    indented()\n" * 60


@pytest.mark.parametrize("kind", ["sentencepiece_bpe", "hf_bpe", "char", "word", "byte"])
def test_pieces_give_the_tokens_of_the_whole(kind):
    if kind == "hf_bpe":
        pytest.importorskip("tokenizers")
    tokenizer = tokenizers.train(kind, [TEXT], vocab_size=290)
    group = list(encoding.pieces([Document(TEXT, "x")], 100))
    assert len(group) > 20
    ids = np.concatenate(encoding.Encoder(tokenizer)(group))
    np.testing.assert_array_equal(ids, tokenizer.encode(TEXT))


def test_a_tokenizer_that_puts_a_space_before_a_text_does_so_once(data_dir):
    # Joining the pieces' own ids would put a space before every piece.
    tokenizer = tokenizers.load(f"{data_dir}/tokenizers/llama2")
    group = list(encoding.pieces([Document(TEXT, "x")], 100))
    encoder = encoding.Encoder(tokenizer)
    assert encoder.minds_start
    np.testing.assert_array_equal(np.concatenate(encoder(group)), tokenizer.encode(TEXT))
    naive = np.concatenate(tokenizer.encode_batch([p.text for p in group]))
    assert tokenizer.decode(naive) != TEXT
