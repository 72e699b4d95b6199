"""The texts that models are measured on, and those that they may be trained on."""

from llm_jax.data import documents
from llm_jax.eval import texts
from llm_jax.tokenizers.simple import Bytes


def test_texts_are_cut_at_a_limit_and_training_text_is_not_measured(tmp_path):
    text = "The quick brown fox. " * 8
    tokenizer = Bytes(["<|endoftext|>"])
    path = tmp_path / "a.txt"
    path.write_text(text)
    found = texts.held_out(str(path), tokenizer, 10)
    assert found.texts == ["The quick "] and found.tokens == 10
    assert "first 10 tokens" in found.source
    assert texts.held_out(str(path), tokenizer).tokens == len(text)
    assert len(texts.training_ids(str(path), tokenizer)) >= len(text)


def test_what_is_held_out_of_the_embedded_corpus_is_not_in_its_training_text():
    held_out, train = "".join(texts.read("")), "".join(texts.read("", train=True))
    assert 0.09 < len(held_out) / (len(held_out) + len(train)) < 0.11
    assert held_out[1000:3000] not in train
    every = "".join(piece.text for piece in documents.read(["embedded:docs"]))
    assert train + held_out == every
