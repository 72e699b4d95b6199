"""Bytes, characters and words."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax import tokenizers
from llm_jax.tokenizers import simple


def test_bytes_are_their_own_ids():
    tokenizer = tokenizers.train("byte", [], special_tokens=["<|user|>"])
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (256, 257, 258)
    assert tokenizer.special_tokens["<|user|>"] == 259
    assert tokenizer.vocab_size == 260
    assert tokenizer.unk_id is None


def test_characters_of_tinyshakespeare_are_nanogpts_65(real_data):
    text = (real_data / "text/tinyshakespeare.txt").read_text("utf-8")
    tokenizer = tokenizers.train("char", [text], unk=False)
    assert tokenizer.vocab_size == 65
    assert tokenizer.special_tokens == {}
    number = {char: i for i, char in enumerate(sorted(set(text)))}
    np.testing.assert_array_equal(
        tokenizer.encode_batch([text])[0], [number[char] for char in text]
    )
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_unknown_character_is_a_token_or_an_error():
    with_unknown = tokenizers.train("char", ["abc"])
    assert with_unknown.encode("a🎉\U0010ffffc") == [0, 3, 3, 2]
    assert with_unknown.unk_id == 3
    assert with_unknown.decode([0, 3, 2], skip_special=False) == "a<unk>c"
    without = tokenizers.train("char", ["abc"], unk=False)
    with pytest.raises(ValueError, match="character 'z' is not in the vocabulary"):
        without.encode("abzc")
    with pytest.raises(ValueError, match="character '🎉' is not in the vocabulary"):
        without.encode("🎉")


def test_characters_take_requested_roles():
    tokenizer = tokenizers.train("char", ["ab"], special_tokens=["<s>", "</s>", "<pad>"], unk=False)
    assert tokenizer.special_tokens == {"<s>": 2, "</s>": 3, "<pad>": 4}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 3, 4)


def test_characters_beyond_the_vocabulary_size_are_the_rare_ones():
    tokenizer = tokenizers.train("char", ["aaabbc" * 3 + "d"], vocab_size=4)
    assert tokenizer.encode("abcd") == [0, 1, 2, tokenizer.unk_id]
    with pytest.raises(ValueError, match=r"has room for 3, .*raise --vocab_size"):
        tokenizers.train("char", ["abcd"], vocab_size=3, unk=False)


def test_all_text_is_searched_for_characters():
    tokenizer = tokenizers.train("char", ["a" * 100_000, "é"], max_bytes=1000)
    assert tokenizer.encode("é") == [1]


def test_words_carry_the_space_before_them():
    tokenizer = tokenizers.train("word", ["the cat, the  dog\n"])
    words = [piece.decode() for piece in tokenizer.token_bytes() if piece]
    # Frequency first, then spelling.
    assert words == sorted(["the", " cat", ",", " the", " ", " dog", "\n"])
    assert tokenizer.decode(tokenizer.encode("the cat, the  dog\n")) == "the cat, the  dog\n"


def test_words_are_cut_off_by_frequency():
    tokenizer = tokenizers.train("word", ["x x x x y y z"], vocab_size=6)  # room for two
    assert tokenizer.token_bytes()[4:] == [b" x", b" y"]
    assert tokenizer.encode(" x z y") == [4, tokenizer.unk_id, 5]
    assert tokenizer.options["unknown_in_training"] == 2  # the first x has no space; z
    saved = json.loads(tokenizer.files()["tokenizer_config.json"])
    assert saved["options"]["unknown_in_training"] == 2


def test_an_unknown_word_without_an_unknown_token_is_an_error():
    tokenizer = tokenizers.train("word", ["one two"], unk=False)
    with pytest.raises(ValueError, match="word ' three' is not in the vocabulary"):
        tokenizer.encode("one three")


@pytest.mark.parametrize("split_digits", [False, True])
@given(text=st.text(st.one_of(st.characters(), st.sampled_from(" \n\t1_a")), max_size=30))
def test_words_joined_are_the_text(split_digits, text):
    words = simple._words_pattern(split_digits).findall(text)
    assert "".join(words) == text
    assert all(words)


def test_unknown_words_are_counted_on_wikitext(trained, wikitext):
    tokenizer = trained["word"]
    ids = tokenizer.encode_batch([wikitext])[0]
    known = tokenizer.token_lengths()[ids].sum()
    assert 0 < (ids == tokenizer.unk_id).mean() < 0.7
    assert known < len(wikitext.encode())
