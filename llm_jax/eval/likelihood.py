"""Likelihood of text under a model: loss, perplexity, bits per byte, and scores of given texts."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import models
from llm_jax.config import ModelConfig
from llm_jax.decode.generate import start_ids
from llm_jax.eval.scoring import Progress, rolling, score_continuations, score_rows
from llm_jax.types import Batch, Mean, PyTree


def evaluate(
    step: Callable[[PyTree, Batch], dict[str, Mean]], params: PyTree, batches: Iterable[Batch]
) -> dict[str, float]:
    """Sums a jitted `step`'s metrics over batches, each target counted once.

    Returns eval_loss (nats a token), perplexity, accuracy, eval_tokens, and bits_per_byte where
    the batches know their bytes.
    """
    totals = None
    for batch in batches:
        means = step(params, batch)
        totals = means if totals is None else jax.tree.map(jnp.add, totals, means)
    if totals is None:
        raise ValueError("the evaluation data is empty; see --eval_input and data.eval_fraction")
    totals = jax.device_get(totals)
    nll = totals["nll"]
    if nll.weight == 0:
        raise ValueError("the evaluation data has no target that counts; see --eval_input")
    loss = float(nll.total) / float(nll.weight)
    out = {
        "eval_loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "eval_accuracy": float(totals["accuracy"].total) / float(nll.weight),
        "eval_tokens": int(nll.weight),
    }
    if "nats_per_byte" in totals and totals["nats_per_byte"].weight > 0:
        per_byte = totals["nats_per_byte"]
        out["bits_per_byte"] = float(per_byte.total) / float(per_byte.weight) / math.log(2)
    return out


def text_log_probs(
    params: PyTree, cfg: ModelConfig, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 8
) -> list[np.ndarray]:
    """log p of each token of each text given what stands before it: float32 [n tokens], in nats.

    The first token is conditioned on the token that starts a text (`generate.start_ids`).
    """
    rows = [tokenizer.encode(text) for text in texts]
    return score_rows(params, cfg, rows, batch_size=batch_size, start=start_ids(tokenizer))


def perplexity(
    params: PyTree,
    cfg: ModelConfig,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of whole texts, each token scored once (`scoring.rolling`).

    A text starts from the token that starts a text (`generate.start_ids`), and what looks like a
    special token in it is plain text. `window` (default: what the model has room for) and
    `stride` (default: the window) are in the result, since they change the number. Standard errors
    are those of a ratio of sums over windows, whose tokens are not independent of one another.

    Returns:
      n (texts), tokens, words (between white space), bytes; nats_per_token, perplexity (a token's),
      word_perplexity, byte_perplexity and bits_per_byte, with their NAME_stderr; window, stride.

    Raises:
      ValueError: no token to score, or stride outside 1 .. window.
    """
    window = window or models.family(cfg.family).room(params, cfg)
    stride = stride or window
    (prefix,) = start_ids(tokenizer)
    n = words = n_bytes = 0
    pairs = []
    for text in texts:
        n, words, n_bytes = n + 1, words + len(text.split()), n_bytes + len(text.encode())
        pairs += rolling(tokenizer.encode(text), window=window, stride=stride, prefix=prefix)
    if not pairs:
        raise ValueError("the texts have no token to score; see --input")
    scores = score_continuations(
        params, cfg, pairs, batch_size=batch_size, window=window, progress=progress
    )
    nats = -np.array([score.log_prob for score in scores])
    counts = np.array([score.n_tokens for score in scores])
    tokens, loss = int(counts.sum()), float(nats.sum() / counts.sum())
    k = len(scores)
    # Of the total: a window is off by what it has more or less than the mean of its tokens.
    error = math.sqrt(k / (k - 1) * np.sum((nats - loss * counts) ** 2)) if k > 1 else math.nan
    total, result = float(nats.sum()), {"n": n, "tokens": tokens, "words": words, "bytes": n_bytes}
    result |= {"nats_per_token": total / tokens, "nats_per_token_stderr": error / tokens}
    for name, units in [("", tokens), ("word_", words), ("byte_", n_bytes)]:
        value = math.exp(min(total / units, 700.0)) if units else math.nan
        result[f"{name}perplexity"] = value
        result[f"{name}perplexity_stderr"] = value * error / units if units else math.nan
    result["bits_per_byte"] = total / n_bytes / math.log(2)
    result["bits_per_byte_stderr"] = error / n_bytes / math.log(2)
    return result | {"window": window, "stride": stride}
