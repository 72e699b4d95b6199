"""Evaluation counts every target once; scores of texts equal the logits'."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from llm_jax import tokenizers
from llm_jax.eval import likelihood
from llm_jax.eval.likelihood import evaluate, perplexity, text_log_probs
from llm_jax.eval.scoring import Score
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


def test_worked_perplexity(monkeypatch):
    """Probabilities 0.9, 0.5, 0.25: exp of nats is 2.0715; 2 to the nats, 1.6566, is wrong."""
    nats = -np.log([0.9, 0.5, 0.25])
    scores = lambda *a, **k: [Score(-x, False, 1) for x in nats]  # noqa: E731
    monkeypatch.setattr(likelihood, "score_continuations", scores)
    tokenizer = tokenizers.train("byte", [])
    out = perplexity(None, tiny_model(), tokenizer, ["a c"], window=1)
    assert out["perplexity"] == pytest.approx(2.0715, abs=1e-4)
    assert out["byte_perplexity"] == pytest.approx(out["perplexity"])  # three bytes, three tokens
    assert out["word_perplexity"] == pytest.approx(math.exp(nats.sum() / 2))
    assert 2 ** out["bits_per_byte"] == pytest.approx(2.0715, abs=1e-4)
    error = np.std(nats, ddof=1) / np.sqrt(3)
    assert out["nats_per_token_stderr"] == pytest.approx(error)
    assert out["perplexity_stderr"] == pytest.approx(2.0715 * error, abs=1e-4)


def test_perplexity_counts_every_token_once():
    """With one window for all of it, it is text_log_probs; a stride says what it did."""
    tokenizer = tokenizers.train("byte", [])
    cfg = tiny_model(vocab_size=tokenizer.vocab_size, init_std=0.2)
    params = P.init(decoder.specs(cfg), jax.random.key(0))
    texts = ["to be or not to be", "zürich 42"]
    log_probs = np.concatenate(text_log_probs(params, cfg, tokenizer, texts))
    out = perplexity(params, cfg, tokenizer, texts, window=32)
    assert out["nats_per_token"] == pytest.approx(-log_probs.mean(), rel=1e-5)
    assert (out["n"], out["tokens"], out["words"], out["bytes"]) == (2, 28, 8, 28)
    assert (out["window"], out["stride"]) == (32, 32)
    short = perplexity(params, cfg, tokenizer, texts, window=8, stride=3)
    assert short["tokens"] == 28 and (short["window"], short["stride"]) == (8, 3)
    assert short["nats_per_token"] != pytest.approx(out["nats_per_token"], rel=1e-5)
    with pytest.raises(ValueError, match="--stride=9"):
        perplexity(params, cfg, tokenizer, texts, window=8, stride=9)
    with pytest.raises(ValueError, match="no token to score"):
        perplexity(params, cfg, tokenizer, [""])
