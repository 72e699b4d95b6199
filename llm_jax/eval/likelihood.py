"""Likelihood of text under a model: loss, perplexity, bits per byte, and scores of given texts."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import models
from llm_jax.config import ModelConfig
from llm_jax.decode.generate import start_ids
from llm_jax.types import Array, Batch, Mean, PyTree


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


@partial(jax.jit, static_argnames="cfg")
def _target_log_probs(params: PyTree, batch: Batch, cfg: ModelConfig) -> Array:
    return models.family(cfg.family).scores(params, batch, cfg, want=("log_probs",)).log_probs


def text_log_probs(
    params: PyTree, cfg: ModelConfig, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 8
) -> list[np.ndarray]:
    """log p of each token of each text given what stands before it: float32 [n tokens], in nats.

    The first token is conditioned on the token that starts a text (`generate.start_ids`).
    """
    start = start_ids(tokenizer)
    rows = [np.array(start + tokenizer.encode(text), np.int32) for text in texts]
    out: list[np.ndarray | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    for at in range(0, len(order), batch_size):
        group = order[at : at + batch_size]
        longest = max(len(rows[n]) for n in group) - 1
        L = max(-(-longest // 64) * 64, 64)
        tokens, targets = np.zeros((2, batch_size, L), np.int32)
        segments = np.zeros((batch_size, L), np.int32)
        for row, n in enumerate(group):
            m = len(rows[n]) - 1
            tokens[row, :m], targets[row, :m], segments[row, :m] = rows[n][:-1], rows[n][1:], 1
        positions = np.broadcast_to(np.arange(L, dtype=np.int32), (batch_size, L))
        if cfg.positions == "learned" and longest > cfg.max_length:
            raise ValueError(
                f"a text of {longest} tokens does not fit the model's {cfg.max_length} positions"
            )
        batch = Batch(tokens=tokens, targets=targets, segments=segments, positions=positions)
        log_probs = np.asarray(_target_log_probs(params, batch, cfg))
        for row, n in enumerate(group):
            out[n] = log_probs[row, : len(rows[n]) - 1]
    return out
