"""`train`: its options, and the sample that it learns from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax import tokenizers
from llm_jax.tokenizers import bpe_reference, training


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="--kind=bpe is not a tokenizer; kinds are"):
        tokenizers.train("bpe", ["text"], vocab_size=300)


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("hf_bpe", {"byte_fallback": False}),
        ("char", {"keep_indentation": False}),
        ("sentencepiece_bpe", {"unk": False}),
        ("hf_wordpiece", {"keep_indentation": False}),
    ],
)
def test_an_option_that_a_kind_does_not_have_is_an_error(kind, option):
    with pytest.raises(ValueError, match=f"a {kind} tokenizer has no option {next(iter(option))}"):
        tokenizers.train(kind, ["text"], vocab_size=300, **option)


@pytest.mark.parametrize("kind", ["sentencepiece_bpe", "hf_bpe", "hf_wordpiece"])
def test_subword_kinds_need_a_size(kind):
    with pytest.raises(ValueError, match="needs --vocab_size"):
        tokenizers.train(kind, ["text"])


def test_one_text_in_place_of_many_is_an_error():
    with pytest.raises(ValueError, match="put a single text into a list"):
        tokenizers.train("word", "text")


@given(text=st.text(st.sampled_from("ab \n\t."), max_size=200), size=st.integers(1, 40))
def test_parts_joined_are_the_text(text, size):
    parts = list(training.cut(text, size))
    assert "".join(parts) == text
    assert all(0 < len(part) <= size for part in parts)


def test_cutting_changes_no_word(prose):
    words = bpe_reference.split_words(prose)
    for size in (300, 8192):
        parts = list(training.cut(prose, size))
        assert len(parts) > len(prose) / size
        assert [word for part in parts for word in bpe_reference.split_words(part)] == words


def test_a_sample_is_bounded_and_in_order():
    texts = [f"{i:05d}" * 100 for i in range(1000)]
    kept = training.sample(texts, 50_000, seed=1)
    assert 49_000 < sum(map(len, kept)) <= 50_000
    assert list(kept) == sorted(kept)
    assert kept == training.sample(iter(texts), 50_000, seed=1)
    assert kept != training.sample(texts, 50_000, seed=2)
    # From everywhere: the mean position of 100 of 1,000, standard deviation 27.
    assert 400 < sum(int(part[:5]) for part in kept) / len(kept) < 600


def test_a_sample_of_little_text_is_all_of_it():
    assert training.sample(["b", "a"], 1000, seed=0) == ["b", "a"]
    assert list(training.sample(["b", "a"], None, seed=0)) == ["b", "a"]
    with pytest.raises(ValueError, match="max_bytes=0"):
        training.sample(["b"], 0, seed=0)


def test_max_bytes_limits_what_is_learned(prose):
    small = tokenizers.train("word", [prose], max_bytes=50_000)
    large = tokenizers.train("word", [prose], max_bytes=None)
    assert small.vocab_size < large.vocab_size / 2


def test_held_out_text_is_not_learned_from():
    texts = [f"{i:05d} " * 100 for i in range(300)]
    learned, held = tokenizers.hold_out(texts, None, seed=0)
    assert len(learned) == 270
    assert not set(held.split()) & set("".join(learned).split())
    learned, held = tokenizers.hold_out(["a short text of a few words"], None, seed=0)
    assert learned and held
    with pytest.raises(ValueError, match="--eval_input"):
        tokenizers.hold_out(["a"], None, seed=0)


@pytest.mark.parametrize("kind", [kind for kind in tokenizers.KINDS if kind != "byte"])
@pytest.mark.parametrize("max_bytes", [None, 1000])
def test_an_error_of_the_reader_comes_through(kind, max_bytes):
    def texts():
        yield "some text"
        raise FileNotFoundError("corpus.txt: no such file")

    with pytest.raises(FileNotFoundError, match=r"^corpus\.txt: no such file$"):
        tokenizers.train(kind, texts(), vocab_size=300, max_bytes=max_bytes)
