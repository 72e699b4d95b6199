"""Likelihood objectives: functions of Scores, Batch and numbers."""

from collections.abc import Mapping

import chex
import jax.numpy as jnp

from llm_jax.types import Batch, Loss, Mean, Scores


def cross_entropy(
    scores: Scores,
    batch: Batch,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    penalties: Mapping[str, float] | None = None,
) -> Loss:
    """Token cross-entropy, in nats: -(1 - e) log p(target) - e mean_v log p(v) + z_loss * log_z^2.

    e is `label_smoothing` (Szegedy et al. 2016), the last term PaLM's z-loss (Chowdhery et al.
    2022), which keeps the softmax denominator near 1. Each target counts by its weight. To this
    come the model's own `scores.penalties`, means over the tokens of the batch, times their scale
    in `penalties`. Metrics: `nll` without smoothing and z-loss, `accuracy`, `nats_per_byte`, and
    the model's own `scores.stats`.

    Raises:
      ValueError: the model has a penalty without a scale.
    """
    chex.assert_rank([scores.log_probs, batch.weights], 2)
    chex.assert_equal_shape([scores.log_probs, batch.weights])
    w = batch.weights
    nll = Mean.of(-scores.log_probs, w)
    target = -scores.log_probs
    if label_smoothing:
        target = (1 - label_smoothing) * target - label_smoothing * scores.mean_log_probs
    terms, scales = {"cross_entropy": Mean.of(target, w)}, {"cross_entropy": 1.0}
    if z_loss:
        terms["z_loss"] = Mean.of(jnp.square(scores.log_z), w)
        scales["z_loss"] = z_loss
    metrics = {"nll": nll, "accuracy": Mean.of(scores.correct, w)}
    if batch.bytes is not None:
        counted = jnp.where(w > 0, batch.bytes, 0).astype(jnp.float32)
        metrics["nats_per_byte"] = Mean(nll.total, jnp.sum(counted))
    return with_penalties(Loss(terms, scales, metrics), scores, batch, penalties or {})


def with_penalties(loss: Loss, scores: Scores, batch: Batch, factors: Mapping[str, float]) -> Loss:
    """A loss with the model's own penalties, times their `factors`, and its stats: means over the
    tokens of the batch.

    Raises:
      ValueError: the model has a penalty without a factor.
    """
    terms, scales, metrics = dict(loss.terms), dict(loss.scales), dict(loss.metrics)
    tokens = _tokens(batch)
    for name, sum_B in scores.penalties.items():
        if name not in factors:
            raise ValueError(f"the penalty {name!r} of the model has no scale")
        terms[name], scales[name] = Mean(jnp.sum(sum_B), tokens), factors[name]
    for name, sum_Bx in scores.stats.items():
        metrics[name] = Mean(jnp.sum(sum_Bx, axis=0), tokens)
    return Loss(terms=terms, scales=scales, metrics=metrics)


def _tokens(batch: Batch) -> jnp.ndarray:
    """Tokens of the batch that are not padding, float32 scalar."""
    if batch.segments is None:
        return jnp.float32(batch.tokens.size)
    return jnp.sum(batch.segments > 0, dtype=jnp.float32)


def wanted(label_smoothing: float) -> tuple[str, ...]:
    """The scores that `cross_entropy` reads."""
    return ("log_probs", "log_z", "correct") + (("mean_log_probs",) if label_smoothing else ())
