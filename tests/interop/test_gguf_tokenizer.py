"""The tokenizer of a GGUF file cuts text as the one that the file was made from."""

import json

import pytest
from interop.gguf_files import BYTE_TOKENS, SIZES, WIDTH, random, write

from llm_jax import tokenizers
from llm_jax.interop import gguf as gguf_import
from llm_jax.tokenizers import sentencepiece_model

pytest.importorskip("gguf")


def read_tokenizer(tmp_path, tokenizer):
    tensors = {"token_embd.weight": random(len(tokenizer["tokens"]), WIDTH)}
    path = write(tmp_path / "t.gguf", "qwen2", tensors, SIZES, tokenizer)
    return gguf_import.read(path)[2]


PROSE = (
    "Of all the 1,234 ships that sailed in 1905,  only 17 came   home; the others' captains "
    "(who'd  said they knew) didn't. Zoë \u65e5\u672c \U0001f917\n\tif x == 10:  # 3.14\n"
)


def test_byte_level_bpe(tmp_path):
    special = ["<|user|>", "<|end|>"]
    old = tokenizers.train("hf_bpe", [PROSE * 9], vocab_size=330, special_tokens=special)
    model = json.loads(old.files()["tokenizer.json"])["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    names = set(old.special_tokens)
    new = read_tokenizer(
        tmp_path,
        {
            "model": "gpt2",
            "pre": "gpt-2",
            "tokens": tokens,
            "token_type": [3 if token in names else 1 for token in tokens],
            "merges": [" ".join(merge) for merge in model["merges"]],
            "bos_token_id": old.bos_id,
            "eos_token_id": old.eos_id,
            "add_bos_token": True,
        },
    )
    text = PROSE + "<|user|> hi<|end|>" + PROSE
    assert new.encode(text) == old.encode(text)
    assert new.encode(text, special=True) == old.encode(text, special=True)
    assert new.decode(new.encode(text)) == text
    assert (new.bos_id, new.eos_id, new.pad_id) == (old.bos_id, old.eos_id, None)
    assert new.lossless
    assert new.options == {"imported": True, "add_bos_token": True}


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["a", " ", " 123", " don", "'t", " DON", "'", "T"]),
        # Digits first and one by one: the two spaces before them stay together.
        ("smollm", ["a", "  ", "1", "2", "3", " don", "'t", " DON", "'", "T"]),
        ("qwen2", ["a", " ", " ", "1", "2", "3", " don", "'t", " DON", "'T"]),
        ("llama-bpe", ["a", " ", " ", "123", " don", "'t", " DON", "'T"]),
    ],
)
def test_text_is_cut_as_the_file_says(pre, words, tmp_path):
    byte_of = tokenizers.bpe_reference.byte_characters()
    pieces = dict.fromkeys("".join(byte_of[b] for b in word.encode()) for word in words)
    merges = [  # every word can be built, and so can whatever lies across two of them
        *("Ġ Ġ", "1 2", "12 3", "Ġ 123", "d o", "do n", "Ġ don", "' t", "D O", "DO N", "Ġ DON"),
        *("' T", "ĠĠ 123", "a ĠĠ", "a Ġ"),
    ]
    tokens = [*BYTE_TOKENS, *dict.fromkeys([m.replace(" ", "") for m in merges] + list(pieces))]
    tokens = list(dict.fromkeys(tokens))
    tokenizer = read_tokenizer(
        tmp_path,
        {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": [1] * len(tokens)}
        | {"merges": merges},
    )
    ids = tokenizer.encode("a  123 don't DON'T")
    assert [tokenizer.decode([i]) for i in ids] == words


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix, tmp_path):
    old = tokenizers.train("sentencepiece_bpe", [PROSE * 9], vocab_size=330)
    pieces = sentencepiece_model.pieces(old.files()["tokenizer.model"])
    new = read_tokenizer(
        tmp_path,
        {
            "model": "llama",
            "tokens": [piece.text for piece in pieces],
            "scores": [piece.score for piece in pieces],
            "token_type": [piece.type for piece in pieces],
            "bos_token_id": old.bos_id,
            "eos_token_id": old.eos_id,
            "padding_token_id": old.unk_id,
            "add_space_prefix": prefix,
        },
    )
    assert new.encode(PROSE) == old.encode(" " * prefix + PROSE)
    # No space is put between a special token and the word after it.
    ids = [old.bos_id, *old.encode("Of all")]
    assert new.encode("<s>Of all", special=True) == ids
    assert new.decode(new.encode(PROSE)) == PROSE
    assert (new.bos_id, new.eos_id, new.pad_id, new.unk_id) == (2, 3, 1, 1)
