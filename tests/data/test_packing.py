"""Packing: each token once, nothing mixed; the examples of the docstrings hold to the letter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data import packing
from llm_jax.data.tokens import Tokens

DOCUMENTS = st.lists(st.integers(min_value=1, max_value=12), min_size=1, max_size=12)
LENGTH = st.integers(min_value=1, max_value=6)


def corpus(sizes):
    """Documents whose ids are all different: 1, 2, 3, ..."""
    ids = iter(range(1, sum(sizes) + 1))
    return Tokens.from_lists([[next(ids) for _ in range(n)] for n in sizes], 1000)


def matrix(text):
    return [[0 if x == "." else int(x) for x in row.split()] for row in text.split("|")]


def check(leaves, **expected):
    assert set(leaves) == set(expected)
    for name, text in expected.items():
        assert leaves[name].tolist() == matrix(text), name
        assert leaves[name].dtype == (np.float32 if name == "weights" else np.int32)
        assert leaves[name].flags.c_contiguous


def test_split_rows_isolated():
    tokens = Tokens.from_lists([[1, 2, 3], [4, 5, 6, 7]], 10)
    check(
        packing.split_rows(tokens, np.array([0, 4]), 4, isolate=True),
        tokens="1 2 3 4 | 5 6 7 .",
        targets="2 3 4 5 | 6 7 . .",
        weights="1 1 0 1 | 1 1 0 0",
        segments="1 1 1 2 | 1 1 1 0",
        positions="0 1 2 0 | 0 1 2 0",
    )


def test_split_rows_joined():
    tokens = Tokens.from_lists([[1, 2, 3], [4, 5, 6, 7]], 10)
    check(
        packing.split_rows(tokens, np.array([0, 4]), 4, isolate=False),
        tokens="1 2 3 4 | 5 6 7 .",
        targets="2 3 4 5 | 6 7 . .",
        weights="1 1 1 1 | 1 1 0 0",
    )


def test_a_row_that_begins_with_a_document_or_ends_with_one():
    tokens = Tokens.from_lists([[1, 2, 3], [4], [5, 6]], 10)
    check(
        packing.split_rows(tokens, np.array([0, 3]), 3, isolate=True),
        tokens="1 2 3 | 4 5 6",
        targets="2 3 4 | 5 6 .",
        weights="1 1 0 | 0 1 0",
        segments="1 1 1 | 1 2 2",
        positions="0 1 2 | 0 0 1",
    )


def test_rows_past_the_end_are_padding():
    tokens = Tokens.from_lists([[1, 2, 3]], 10)
    leaves = packing.split_rows(tokens, np.array([3, 9]), 3, isolate=True)
    assert all(not leaf.any() for leaf in leaves.values())


def layout(plan, sizes):
    """Rows as words, a letter for each token of a document: "aab."."""
    names = np.repeat(list("abcdefghijkl")[: len(sizes)], sizes)
    rows = []
    for r in range(len(plan)):
        part = slice(plan.rows[r], plan.rows[r + 1])
        pieces = zip(plan.starts[part], plan.sizes[part])
        rows.append("".join("".join(names[s : s + n]) for s, n in pieces).ljust(plan.length, "."))
    return rows


def test_plans():
    sizes = [7, 3, 2, 4, 1]
    tokens = corpus(sizes)
    pad = packing.make_plan(tokens, "pad", 4)
    assert layout(pad, sizes) == ["aaaa", "aaa.", "bbb.", "cc..", "dddd", "e..."]
    assert pad.utilisation == 17 / 24
    fit = packing.make_plan(tokens, "first_fit", 4)
    assert layout(fit, sizes) == ["aaaa", "aaae", "bbb.", "cc..", "dddd"]
    assert fit.utilisation == 17 / 20


def test_packed_rows():
    tokens = Tokens.from_lists([[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11]], 12)
    plan = packing.make_plan(tokens, "first_fit", 5)
    both = {
        "tokens": "1 2 3 4 5 | 6 7 8 9 10 | 11 . . . .",
        "targets": "2 3 . 5 . | 7 8 9 10 11 | . . . . .",
    }
    check(
        packing.packed_rows(tokens, plan, np.arange(3), isolate=True),
        **both,
        weights="1 1 0 1 0 | 1 1 1 1 1 | 0 0 0 0 0",
        segments="1 1 1 2 2 | 1 1 1 1 1 | 1 0 0 0 0",
        positions="0 1 2 0 1 | 0 1 2 3 4 | 0 0 0 0 0",
    )
    check(
        packing.packed_rows(tokens, plan, np.arange(3), isolate=False),
        **(both | {"targets": "2 3 4 5 . | 7 8 9 10 11 | . . . . ."}),
        weights="1 1 1 1 0 | 1 1 1 1 1 | 0 0 0 0 0",
        segments="1 1 1 1 1 | 1 1 1 1 1 | 1 0 0 0 0",
        positions="0 1 2 3 4 | 0 1 2 3 4 | 0 0 0 0 0",
    )


def plain_first_fit(sizes, length):
    """The algorithm as it is told: longest first, into the first row that has room."""
    rows, row_of = [], [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fits = [r for r, used in enumerate(rows) if used + sizes[i] <= length]
        if not fits:
            rows.append(0)
            fits = [len(rows) - 1]
        rows[fits[0]] += sizes[i]
        row_of[i] = fits[0]
    return row_of


def test_first_fit_example():
    assert packing.first_fit(np.array([1, 3, 2, 2]), 4).tolist() == [0, 0, 1, 1]


@given(st.integers(min_value=1, max_value=12), st.data())
def test_first_fit_is_first_fit_decreasing(length, data):
    sizes = data.draw(st.lists(st.integers(min_value=1, max_value=length), min_size=1, max_size=40))
    assert packing.first_fit(np.array(sizes), length).tolist() == plain_first_fit(sizes, length)


@given(DOCUMENTS, LENGTH, st.booleans(), st.sampled_from(["pad", "first_fit"]), st.integers(1, 8))
def test_whole_document_packings_keep_every_token(sizes, length, isolate, kind, window):
    tokens = corpus(sizes)
    plan = packing.make_plan(tokens, kind, length, window)
    leaves = packing.packed_rows(tokens, plan, np.arange(len(plan)), isolate=isolate)
    check_rows(tokens, leaves, isolate)
    real = leaves["tokens"] > 0
    assert sorted(leaves["tokens"][real]) == list(range(1, tokens.total + 1))
    # Padding is at the end of rows, and nowhere else.
    assert (np.diff(real.astype(int), axis=1) <= 0).all()
    np.testing.assert_array_equal(leaves["segments"] > 0, real)
    assert plan.utilisation == real.mean()
    if isolate:
        # A document of n tokens has n - 1 targets, in whatever pieces it comes.
        assert leaves["weights"].sum() == tokens.total - tokens.documents


@given(DOCUMENTS, LENGTH, st.booleans())
def test_split_keeps_every_token_and_target(sizes, length, isolate):
    tokens = corpus(sizes)
    starts = np.arange(0, tokens.total + length, length)  # the last one is past the end
    leaves = packing.split_rows(tokens, starts, length, isolate=isolate)
    check_rows(tokens, leaves, isolate)
    assert leaves["tokens"].ravel()[: tokens.total].tolist() == list(range(1, tokens.total + 1))
    lost = tokens.documents if isolate else 1
    assert leaves["weights"].sum() == tokens.total - lost


def check_rows(tokens, leaves, isolate):
    """What holds of every packing of a corpus whose ids are 1, 2, 3, ..."""
    document_of = np.concatenate(
        [[0], np.searchsorted(tokens.offsets, np.arange(tokens.total), "right")]
    )
    counted = leaves["weights"] > 0
    ids, targets = leaves["tokens"], leaves["targets"]
    if isolate:
        # A target is the token after the input, of the same document.
        np.testing.assert_array_equal(targets[counted], ids[counted] + 1)
        np.testing.assert_array_equal(document_of[targets[counted]], document_of[ids[counted]])
    if "segments" not in leaves:
        return
    for row, segments, positions in zip(ids, leaves["segments"], leaves["positions"]):
        used = segments[segments > 0]
        # Numbered from 1 in order, contiguous.
        assert (np.diff(used) >= 0).all() and set(used) == set(range(1, len(set(used)) + 1))
        for s in set(used):
            here = segments == s
            assert positions[here].tolist() == list(range(here.sum()))
            if isolate:
                assert len(set(document_of[row[here]])) == 1
                assert (np.diff(row[here]) == 1).all()
        if isolate:
            documents = [document_of[row[segments == s]][0] for s in sorted(set(used))]
            assert len(set(documents)) == len(documents)


def test_packing_millions_of_documents_is_quick_enough():
    # 200,000 documents here; in pure Python, searching every row for every document never ends.
    sizes = np.random.default_rng(0).geometric(1 / 300, 200_000)
    tokens = Tokens(
        [np.zeros(sizes.sum(), np.uint16)], np.append(0, np.cumsum(sizes)), vocab_size=9
    )
    plan = packing.make_plan(tokens, "first_fit", 1024)
    assert plan.utilisation > 0.99
    assert np.diff(plan.rows).min() > 0


def test_an_unknown_packing_is_an_error():
    with pytest.raises(ValueError, match=r"data\.packing='best'"):
        packing.make_plan(corpus([3]), "best", 4)
