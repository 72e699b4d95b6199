"""Tokenizers: text to ids and back, exact wherever a kind can be.

    tokenizer = train("sentencepiece_bpe", texts, vocab_size=4096)
    tokenizer.decode(tokenizer.encode("Hello")) == "Hello"

`base` says what a tokenizer is, `subword` and `simple` are the kinds, `chat` renders conversations,
`export` writes Hugging Face's files, `bpe_reference` is the algorithm to read.
"""

from llm_jax.tokenizers.base import StreamDecoder, Tokenizer
from llm_jax.tokenizers.compare import render, report
from llm_jax.tokenizers.export import huggingface_files
from llm_jax.tokenizers.loading import from_files, from_huggingface, load
from llm_jax.tokenizers.training import KINDS, hold_out, sample, train, train_each

__all__ = [
    "KINDS",
    "StreamDecoder",
    "Tokenizer",
    "from_files",
    "from_huggingface",
    "hold_out",
    "huggingface_files",
    "load",
    "render",
    "report",
    "sample",
    "train",
    "train_each",
]
