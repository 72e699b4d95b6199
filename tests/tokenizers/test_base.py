"""What holds for every tokenizer, whatever its kind."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax import tokenizers
from llm_jax.tokenizers import base

KINDS = tuple(tokenizers.KINDS)
FAMILY = "👨‍👩‍👧"  # three emoji and two joiners, 18 bytes


def stream(tokenizer, ids, **options):
    decoder = tokenizers.StreamDecoder(tokenizer, **options)
    return [*map(decoder.push, ids), decoder.flush()]


@pytest.mark.parametrize("kind", KINDS)
def test_from_files_and_load_give_the_same_tokenizer(trained, tmp_path, kind):
    tokenizer = trained[kind]
    tokenizer.save(tmp_path / "deep" / "folder")
    text = "The quick <|user|> brown fox,\n    100 times"
    for again in (
        tokenizers.from_files(tokenizer.files()),
        tokenizers.load(tmp_path / "deep" / "folder"),
        tokenizers.load(tmp_path / "deep" / "folder" / "tokenizer_config.json"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert again.fingerprint() == tokenizer.fingerprint()
        assert again.encode(text) == tokenizer.encode(text)
        assert again.encode(text, special=True) == tokenizer.encode(text, special=True)
        assert again.token_bytes() == tokenizer.token_bytes()
        for name in ("kind", "vocab_size", "pad_id", "unk_id", "bos_id", "eos_id", "lossless"):
            assert getattr(again, name) == getattr(tokenizer, name)


def test_fingerprints_differ_where_the_tokenizers_do(trained):
    fingerprints = {tokenizer.fingerprint() for tokenizer in trained.values()}
    fingerprints |= {tokenizers.train("byte", [], special_tokens=["<|a|>"]).fingerprint()}
    assert len(fingerprints) == len(KINDS) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_come_from_special_parsing_alone(trained, kind):
    tokenizer = trained[kind]
    special_ids = set(tokenizer.special_tokens.values()) - {tokenizer.unk_id}
    text = "".join(f"{name} a{name}b " for name in tokenizer.special_tokens)
    assert not special_ids & set(tokenizer.encode(text))
    found = [i for i in tokenizer.encode(text, special=True) if i in special_ids]
    expected = [i for i in tokenizer.special_tokens.values() if i in special_ids]
    assert found == [i for i in expected for _ in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_visible_only_on_request(trained, kind):
    tokenizer = trained[kind]
    ids = tokenizer.encode("a<|user|>b", special=True)
    assert tokenizer.special_tokens["<|user|>"] in ids
    assert "<|user|>" not in tokenizer.decode(ids)
    assert "<|user|>" in tokenizer.decode(ids, skip_special=False)


def test_the_longest_special_token_wins():
    tokenizer = tokenizers.train("byte", [], special_tokens=["<a>", "<a><b>"])
    ids = tokenizer.encode("<a><a><b>", special=True)
    assert ids == [tokenizer.special_tokens["<a>"], tokenizer.special_tokens["<a><b>"]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_texts_one_by_one(trained, kind):
    texts = ["", "one", "two <|end|> three", "▁ four", ""]
    for special in (False, True):
        batch = trained[kind].encode_batch(texts, special=special)
        assert all(ids.dtype == np.int32 for ids in batch)
        singly = [trained[kind].encode(text, special=special) for text in texts]
        assert [ids.tolist() for ids in batch] == singly
    assert trained[kind].encode_batch([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_stand_for_no_bytes(trained, kind):
    tokenizer = trained[kind]
    pieces = tokenizer.token_bytes()
    assert len(pieces) == tokenizer.vocab_size
    assert all(pieces[i] == b"" for i in tokenizer.special_tokens.values())
    np.testing.assert_array_equal(tokenizer.token_lengths(), [len(piece) for piece in pieces])
    assert tokenizer.token_lengths().dtype == np.int32


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(data=st.data())
def test_a_stream_joined_is_the_decoded_whole(trained, kind, data):
    tokenizer = trained[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    for skip_special in (True, False):
        parts = stream(tokenizer, ids, skip_special=skip_special)
        assert "".join(parts) == tokenizer.decode(ids, skip_special=skip_special)


@pytest.mark.parametrize("kind", ["sentencepiece_bpe", "sentencepiece_unigram", "hf_bpe", "byte"])
def test_a_stream_never_emits_half_a_character(trained, kind):
    tokenizer = trained[kind]
    text = f"é🎉 {FAMILY} 日本"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # several tokens to a character, or the test shows nothing
    parts = stream(tokenizer, ids)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert parts[-1] == ""


def test_an_emoji_is_held_back_until_whole(trained):
    assert stream(trained["byte"], "a🎉".encode()) == ["a", "", "", "", "🎉", ""]
    assert stream(trained["byte"], "a🎉".encode()[:-1]) == ["a", "", "", "", "\ufffd"]


def test_a_streamed_continuation_keeps_its_first_space(trained):
    tokenizer = trained["hf_wordpiece"]
    ids = tokenizer.encode("one two three")
    assert "".join(stream(tokenizer, ids[1:], prompt_ids=ids[:1])) == " two three"
    assert "".join(stream(tokenizer, ids[1:])) == "two three"


def test_only_invalid_bytes_are_replaced(trained):
    ids = [0xFF, *"é".encode(), 0xC3, ord("a")]
    assert trained["byte"].decode(ids) == "\ufffdé\ufffda"
    assert trained["byte"].decode_bytes(ids) == b"\xff\xc3\xa9\xc3a"


@pytest.mark.parametrize("wrong", [-1, 1000])
def test_an_id_outside_the_vocabulary_is_an_error(trained, wrong):
    tokenizer = trained["sentencepiece_bpe"]
    with pytest.raises(ValueError, match=f"token id {wrong} is outside the vocabulary of 1000"):
        tokenizer.decode([5, wrong])
    with pytest.raises(ValueError, match=f"token id {wrong} is outside"):
        tokenizers.StreamDecoder(tokenizer).push(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_not_unicode_is_an_error(trained, kind):
    with pytest.raises(ValueError, match=r"text 1 has a lone surrogate U\+D800 at character 2"):
        trained[kind].encode_batch(["fine", "ab\ud800"])


def test_a_text_in_place_of_a_batch_is_an_error(trained):
    with pytest.raises(ValueError, match="list of texts"):
        trained["byte"].encode_batch("text")


def test_decode_takes_arrays_and_nothing(trained):
    tokenizer = trained["byte"]
    assert tokenizer.decode(np.array([104, 105], np.int32)) == "hi"
    assert tokenizer.decode([]) == tokenizer.decode(np.zeros(0, np.float32)) == ""
    with pytest.raises(ValueError, match="list of integers"):
        tokenizer.decode([[104, 105]])


@pytest.mark.parametrize("name", ["a", "<a b>", "<\n>", "▁x", ""])
def test_special_tokens_that_could_be_text_are_refused(name):
    with pytest.raises(ValueError, match="--special_tokens"):
        base.name_special_tokens([], [name])


def test_cut_inside_leaves_no_special_token_whole():
    assert base.cut_inside("abc x abab", ["ab", "bc"]) == ["a", "b", "c x a", "ba", "b"]
    assert base.cut_inside("", ["ab"]) == [""]
