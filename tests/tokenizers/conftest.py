"""Tokenizers of every kind, trained once on the prose of Python's own help."""

import pathlib
import pydoc_data.topics

import pytest

from llm_jax import tokenizers

SPECIAL = ("<|user|>", "<|end|>")


@pytest.fixture(scope="session")
def prose():
    """Half a megabyte of English with code examples."""
    return "\n\n".join(pydoc_data.topics.topics.values())


@pytest.fixture(scope="session")
def trained(prose):
    """Kind -> tokenizer of 1,000 tokens (where the kind has a choice), with two special tokens."""
    return {
        kind: tokenizers.train(kind, [prose], vocab_size=1000, special_tokens=SPECIAL)
        for kind in tokenizers.KINDS
    }


@pytest.fixture(scope="session")
def lossless(trained):
    return {kind: tokenizer for kind, tokenizer in trained.items() if tokenizer.lossless}


@pytest.fixture(scope="session")
def real_data(data_dir):
    return pathlib.Path(data_dir)


@pytest.fixture(scope="session")
def wikitext(real_data):
    return (real_data / "text/wikitext2-test.txt").read_bytes().decode()
