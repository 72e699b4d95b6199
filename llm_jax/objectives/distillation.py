"""Distillation objectives: functions of Scores, Batch and numbers."""

from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp

from llm_jax.objectives import likelihood
from llm_jax.types import Array, Batch, Loss, Mean, Scores

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
# Less is what rounding leaves of a sum that is 1, not a probability.
SMALLEST_TAIL = 1e-5


def divergence(kind: str, beta: float = 0.5) -> Callable[[Array, Array], Array]:
    """A function of a teacher's and a student's log-probabilities [..., V] -> [...], in nats.

    forward_kl: KL(teacher || student) (Hinton et al. 2015); reverse_kl: KL(student || teacher);
    jsd: beta KL(teacher || m) + (1 - beta) KL(student || m) with the mixture
    m = beta teacher + (1 - beta) student (GKD, Agarwal et al. 2024, equation 1).

    Raises:
      ValueError: another kind, or a beta outside (0, 1).
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"--divergence={kind} is unknown; there are {', '.join(DIVERGENCES)}")
    if not 0 < beta < 1:
        raise ValueError(f"--beta={beta} has to be in (0, 1)")

    def kl(log_p: Array, log_q: Array) -> Array:
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    def jsd(log_t: Array, log_s: Array) -> Array:
        log_m = jnp.logaddexp(log_t + jnp.log(beta), log_s + jnp.log1p(-beta))
        return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)

    return {"forward_kl": kl, "reverse_kl": lambda t, s: kl(s, t), "jsd": jsd}[kind]


def bucket_divergence(
    scores: Scores,
    batch: Batch,
    between: Callable[[Array, Array], Array],
    *,
    temperature: float = 1.0,
) -> Array:
    """The divergence [B, T] between distributions of which n probabilities are known.

    What is left of each, the probability of all other tokens, is one more bucket: the student is not
    rewarded for how it spreads that mass, only for how much it is, and its n probabilities are
    compared as they are, not renormalised. A temperature acts on the n + 1 buckets,
    softmax(log p / temperature). If the candidates are the whole vocabulary this is the divergence
    of the full distributions: where neither has more than SMALLEST_TAIL left there is no such bucket.
    """
    chex.assert_rank([scores.candidate_log_probs, batch.candidate_log_probs], 3)
    chex.assert_equal_shape([scores.candidate_log_probs, batch.candidate_log_probs])
    known_t, known_s = batch.candidate_log_probs, scores.candidate_log_probs
    rest_t, rest_s = _rest(known_t), _rest(known_s)
    has_tail = jnp.maximum(rest_t, jax.lax.stop_gradient(rest_s)) > SMALLEST_TAIL
    # Where neither has one the bucket is out of both: probability 0, no gradient.
    log_rest = lambda rest: jnp.where(  # noqa: E731
        has_tail, jnp.log(jnp.maximum(rest, SMALLEST_TAIL / 100)), -1e9
    )
    log_t = jnp.concatenate([known_t, log_rest(rest_t)[..., None]], axis=-1)
    log_s = jnp.concatenate([known_s, log_rest(rest_s)[..., None]], axis=-1)
    tempered = lambda log_p: jax.nn.log_softmax(log_p / temperature, axis=-1)  # noqa: E731
    return between(jax.lax.stop_gradient(tempered(log_t)), tempered(log_s))


def _rest(log_probs: Array) -> Array:
    """1 - the sum of the probabilities, without the cancellation of a sum above 1."""
    return jnp.maximum(1.0 - jnp.sum(jnp.exp(log_probs), axis=-1), 0.0)


def distillation(
    scores: Scores,
    batch: Batch,
    *,
    alpha: float,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    penalties: Mapping[str, float] | None = None,
) -> Loss:
    """(1 - alpha) cross-entropy + alpha temperature^2 divergence, each a mean over the targets.

    The factor keeps the size of the divergence's gradient, which falls with the square of the
    temperature (Hinton et al. 2015, section 2). z-loss and the model's own penalties come to it as in
    `likelihood.cross_entropy`. Metrics: those of it, and `divergence` without the factor.
    """
    chex.assert_rank([scores.divergence, batch.weights], 2)
    chex.assert_equal_shape([scores.divergence, batch.weights])
    loss = likelihood.cross_entropy(scores, batch, z_loss=z_loss, penalties=penalties)
    apart = Mean.of(scores.divergence, batch.weights)
    soft = Mean(temperature**2 * apart.total, apart.weight)
    return Loss(
        terms={**loss.terms, "distillation": soft},
        scales={**loss.scales, "cross_entropy": 1.0 - alpha, "distillation": alpha},
        metrics={**loss.metrics, "divergence": apart},
    )
