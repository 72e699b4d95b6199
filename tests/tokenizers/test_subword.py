"""Subword kinds: nothing is lost, and the options do what they say."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax import tokenizers

LOSSLESS = ("sentencepiece_bpe", "sentencepiece_unigram", "hf_bpe", "byte")
SENTENCEPIECE = ("sentencepiece_bpe", "sentencepiece_unigram")
SUBWORD = (*SENTENCEPIECE, "hf_bpe", "hf_wordpiece")
# What sentencepiece treats in a special way, or once did; what is easily lost; what looks special.
TRICKY = [
    *("▁", "▁▁ ▁a", " ", "   ", "\t", "\t\t", "\n", "\r\n", "\n\n\n", "\0", "\x1c", "\u2585"),
    *("\ufdd0", "\ufeff", "\ufffd", "\U0010ffff", "\u2028", "\u00a0", "\u3000", "ﬁ", "Å", "①"),
    *("<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<|user|>", "[CLS]", "##", "Ġ", "Ċ"),
    *("e\u0301", "\u0301", "🎉", "👨‍👩‍👧", "日本語"),
]
UNICODE = st.lists(
    st.one_of(
        st.sampled_from(TRICKY), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    ),
    max_size=10,
).map("".join)


def check_lossless(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    pieces = tokenizer.token_bytes()
    assert b"".join(pieces[i] for i in ids) == tokenizer.decode_bytes(ids) == text.encode()


def test_the_kinds_that_are_lossless(lossless):
    assert set(lossless) == set(LOSSLESS)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_bytes_in_are_bytes_out_on_tricky_strings(trained, kind):
    for text in ["", *TRICKY, "".join(TRICKY), " ".join(TRICKY), "x".join(TRICKY)]:
        check_lossless(trained[kind], text)


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=150)
@given(text=UNICODE)
def test_bytes_in_are_bytes_out_on_any_unicode(trained, kind, text):
    tokenizer = trained[kind]
    check_lossless(tokenizer, text)
    ids = tokenizer.encode(text, special=True)
    assert tokenizer.decode(ids, skip_special=False) == text


@pytest.mark.parametrize("kind", LOSSLESS)
def test_bytes_in_are_bytes_out_on_wikitext(trained, wikitext, kind):
    check_lossless(trained[kind], wikitext)


@pytest.mark.parametrize("kind", SUBWORD)
def test_training_is_deterministic(trained, prose, kind):
    again = tokenizers.train(kind, [prose], vocab_size=1000, special_tokens=["<|user|>", "<|end|>"])
    assert again.fingerprint() == trained[kind].fingerprint()


@pytest.mark.parametrize("kind", SUBWORD)
def test_the_vocabulary_has_the_requested_size(trained, kind):
    assert trained[kind].vocab_size == 1000


@pytest.mark.parametrize("kind", [*SUBWORD, "word"])
def test_split_digits_makes_every_digit_a_token(prose, kind):
    text = prose[:100_000] + "in 1984, 1985 and 1986 " * 100
    whole = tokenizers.train(kind, [text], vocab_size=800)
    split = tokenizers.train(kind, [text], vocab_size=800, split_digits=True)

    def most_digits(tokenizer):
        pieces = [tokenizer.decode([i]) for i in tokenizer.encode("in 1984, 1985 and 1986")]
        return max(sum(char.isdigit() for char in piece) for piece in pieces)

    assert most_digits(whole) > 1
    assert most_digits(split) == 1
    assert not any(sum(chr(byte).isdigit() for byte in piece) > 1 for piece in split.token_bytes())


@pytest.mark.parametrize("kind", [*SENTENCEPIECE, "hf_bpe"])
def test_indentation_is_kept_in_long_pieces_or_dropped_on_request(prose, kind):
    code = "def f(x):\n    if x:\n        return x\n    return 0\n\n\n"
    text = prose[:50_000] + code * 50
    kept = tokenizers.train(kind, [text], vocab_size=600)
    assert kept.decode(kept.encode(code)) == code
    assert max(piece.count(b" ") for piece in kept.token_bytes()) >= 4
    dropped = tokenizers.train(kind, [text], vocab_size=600, keep_indentation=False)
    assert not dropped.lossless
    assert "if x:\n return x\n return 0" in dropped.decode(dropped.encode(code))
    assert max(piece.count(b" ") for piece in dropped.token_bytes()) == 1


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_without_byte_fallback_the_unseen_is_unknown(prose, kind):
    text = prose[:30_000].replace("   ", "\t")
    assert "\t" in text
    tokenizer = tokenizers.train(kind, [text], vocab_size=300, byte_fallback=False)
    assert not tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode(text)) == text  # tabs and newlines, too
    assert tokenizer.encode("🎉").count(tokenizer.unk_id) == 1


@pytest.mark.parametrize("kind", [*SENTENCEPIECE, "hf_bpe"])
def test_pieces_with_line_ends_and_tabs_hold_nothing_but_white_space(prose, kind):
    text = prose[:100_000].replace("   ", "\t").replace("\n\n", "\r\n")
    pieces = tokenizers.train(kind, [text], vocab_size=700).token_bytes()
    found = [piece for piece in pieces if set(piece) & set(b"\r\n\t")]
    assert {b"\n", b"\t", b"\r\n"} < set(found)
    assert not any(piece.strip() for piece in found)


@pytest.mark.parametrize("kind", [*SUBWORD, "word"])
def test_no_piece_learns_to_spell_a_special_token(prose, kind):
    # One token to a pre-tokenizer, so nothing but our own care keeps it from becoming a piece.
    names = ["###", "SEP", "##"]
    text = prose[:50_000] + "\n### SEP ## a ##### b SEPARATE\n" * 500
    tokenizer = tokenizers.train(kind, [text], vocab_size=600, special_tokens=names)
    special_ids = {tokenizer.special_tokens[name] for name in names}
    for plain in ("###", "SEP", " SEP ", "#####", "SEPARATE ### SEP ##\n"):
        assert not special_ids & set(tokenizer.encode(plain)), plain


@pytest.mark.parametrize("kind", SUBWORD)
def test_too_little_text_names_a_vocabulary_size_that_works(prose, kind):
    text = prose[:5000]
    with pytest.raises(ValueError, match="--vocab_size") as error:
        tokenizers.train(kind, [text], vocab_size=9000)
    assert "\n" not in str(error.value)
    size = int(str(error.value).split("--vocab_size=")[1].split()[0])
    assert tokenizers.train(kind, [text], vocab_size=size).vocab_size == size


@pytest.mark.parametrize("kind", SUBWORD)
def test_too_small_a_vocabulary_is_an_error(prose, kind):
    with pytest.raises(ValueError, match=r"--vocab_size=20 is too small"):
        tokenizers.train(kind, [prose[:5000]], vocab_size=20)


@pytest.mark.parametrize("kind", [*SENTENCEPIECE, "char", "word"])
@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_no_text_is_an_error(kind, texts):
    with pytest.raises(ValueError, match="no text to train a tokenizer on; change --input"):
        tokenizers.train(kind, texts, vocab_size=500)


def test_a_missing_library_names_the_extra(monkeypatch, trained):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'llm_jax\[tokenizers\]'"):
        tokenizers.train("hf_bpe", ["text"], vocab_size=300)
    with pytest.raises(ImportError, match=r"pip install 'llm_jax\[tokenizers\]'"):
        tokenizers.from_files(trained["hf_bpe"].files())


def test_wordpiece_counts_what_it_does_not_know(trained):
    tokenizer = trained["hf_wordpiece"]
    ids = tokenizer.encode("the 🎉 function")
    assert ids.count(tokenizer.unk_id) == 1
    assert tokenizer.decode(ids) == "the function"
    assert tokenizer.decode(ids, skip_special=False) == "the[UNK] function"
