"""Evaluation counts every target once; scores of texts equal the logits'."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from llm_jax import tokenizers
from llm_jax.eval.likelihood import evaluate, text_log_probs
from llm_jax.models import decoder
from llm_jax.nn import params as P
from llm_jax.types import Batch, Mean


def mean(total, weight):
    return Mean(jnp.float32(total), jnp.float32(weight))


def test_token_weighted_not_batch_weighted():
    batches = [
        {"nll": mean(30, 10), "accuracy": mean(5, 10), "nats_per_byte": mean(30, 40)},
        {"nll": mean(1, 1), "accuracy": mean(1, 1), "nats_per_byte": mean(1, 2)},
    ]
    out = evaluate(lambda params, batch: batch, None, batches)
    assert out["eval_loss"] == pytest.approx(31 / 11)  # a mean of batch means would be 2
    assert out["perplexity"] == pytest.approx(math.exp(31 / 11), rel=1e-6)
    assert out["bits_per_byte"] == pytest.approx(31 / 42 / math.log(2))
    assert out["eval_accuracy"] == pytest.approx(6 / 11) and out["eval_tokens"] == 11
    with pytest.raises(ValueError, match="--eval_input"):
        evaluate(lambda params, batch: batch, None, [])


def test_text_log_probs():
    tokenizer = tokenizers.train("byte", [])
    cfg = tiny_model(vocab_size=tokenizer.vocab_size, init_std=0.2)
    params = P.init(decoder.specs(cfg), jax.random.key(0))
    texts = ["hello", "", "a longer text, so that lengths differ", "x"]
    out = text_log_probs(params, cfg, tokenizer, texts, batch_size=2)
    from llm_jax.decode.generate import start_ids

    for text, got in zip(texts, out, strict=True):
        ids = tokenizer.encode(text)
        assert got.shape == (len(ids),)
        if not ids:
            continue
        row = np.array([start_ids(tokenizer) + ids], np.int32)
        z = jax.jit(
            lambda row: decoder.logits(
                params, decoder.hidden(params, Batch(tokens=row), cfg).x, cfg
            )
        )(row)
        want = jax.nn.log_softmax(z)[0, np.arange(len(ids)), ids]
        np.testing.assert_allclose(got, want, atol=2e-5)
