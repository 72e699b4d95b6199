"""N-grams of an evaluation set are found in a corpus, however it is cut, and nothing else is."""

import numpy as np
import pytest

from llm_jax.data.documents import Document
from llm_jax.eval import overlap as O
from llm_jax.eval.overlap import overlap

ITEM = "The quick brown fox jumps over the lazy dog"


def documents(*texts):
    return [Document(text, f"file{i}") for i, text in enumerate(texts)]


def test_the_worked_example():
    found = overlap([ITEM], documents("A quick brown fox jumps. Over there"), n=4, coverage_n=4)
    (item,) = found.items
    assert item.words == 9 and item.matched == [1, 2]
    assert item.covered == 5 / 9 == item.longest  # words, not n-grams (2 of 6)
    assert item.source == "file0" and found.contaminated == [0]
    assert (found.documents, found.words) == (1, 7)


def test_neither_case_nor_signs_nor_lines_hide_a_copy():
    copy = "... THE quick, brown\nfox — jumps “over” the\t\tlazy dog!"
    assert overlap([ITEM], documents(copy), n=9).items[0].covered == 1.0
    assert overlap([ITEM], documents(copy.replace("fox", "cat")), n=9).contaminated == []


def test_nothing_reaches_over_the_end_of_a_document():
    halves = documents("the quick brown fox", "jumps over the lazy dog")
    assert overlap([ITEM], halves, n=5).items[0].matched == [4]
    assert overlap([ITEM], halves, n=6).contaminated == []


@pytest.mark.parametrize("size", [1, 2, 7, 20])
def test_pieces_of_a_long_document_are_one_text(size):
    text = "Something before, " + ITEM + ", and after."
    cuts = range(0, len(text), size)  # inside words, too
    pieces = [
        Document(text[at : at + size], "long", at == 0, at + size >= len(text)) for at in cuts
    ]
    for n in (1, 3, 9):
        found = overlap([ITEM], pieces, n=n, coverage_n=n)
        assert found.items[0].covered == 1.0 and len(found.items[0].matched) == 10 - n
        assert (found.documents, found.words) == (1, 13)
    other = Document(ITEM[20:], "other")  # what a piece held back is not carried into it
    found = overlap([ITEM], [pieces[0], other], n=6, coverage_n=6)
    assert found.contaminated == []


def test_coverage_and_the_longest_run():
    words = [f"w{i}" for i in range(20)]
    corpus = documents(" ".join(words[:5]), " ".join(words[3:9]), " ".join(words[15:]))
    found = overlap([" ".join(words)], corpus, n=13, coverage_n=4)
    (item,) = found.items
    assert item.covered == (9 + 5) / 20  # words 3 and 4 count once
    # The n-grams that begin at words 0, 1, 3, 4, 5 and 15, 16: the one at 2 is missing.
    assert item.longest == 6 / 20 and item.matched == [] and item.source is None


def test_items_that_share_an_ngram_are_all_found():
    items = ["a b c d", "x a b c", "a b", "b a c d"]
    found = overlap(items, documents("z a b c z", "a b c d"), n=3, coverage_n=2)
    assert found.contaminated == [0, 1] and found.too_short == [2]
    assert [item.source for item in found.items] == ["file0", "file0", None, None]
    assert [item.covered for item in found.items] == [1.0, 0.75, 1.0, 0.5]


def test_equals_a_plain_search():
    rng = np.random.default_rng(0)
    draw = lambda n: " ".join(f"w{i}" for i in rng.integers(0, 4, n))  # noqa: E731
    items, texts = [draw(12) for _ in range(20)], [draw(30) for _ in range(20)]
    for n in (1, 3, 5, 8):
        found = overlap(items, documents(*texts), n=n, coverage_n=n)
        for text, item in zip(items, found.items, strict=True):
            words = text.split()
            have = lambda i: any(f" {' '.join(words[i : i + n])} " in f" {t} " for t in texts)  # noqa: B023, E731
            assert item.matched == [i for i in range(13 - n) if have(i)]


def test_summary_and_rendering():
    texts = [ITEM, "nothing of this is anywhere"]
    result = O.summary(overlap(texts, documents(ITEM), n=9, coverage_n=3), texts)
    assert result["contaminated"] == 1 and result["too_short"] == 1
    assert result["mean_covered"] == 0.5 and [f["item"] for f in result["found"]] == [0]
    text = O.render(result)
    assert "1 items share a run of 9 words" in text and "item 0: 100% covered" in text


def test_user_errors():
    with pytest.raises(ValueError, match="--input"):
        overlap([], documents("a"))
    with pytest.raises(ValueError, match="--ngram"):
        overlap(["a"], documents("a"), n=0)
