"""Preference objectives: reward models and direct optimisation, as functions of Scores, Batch and numbers.

All of them see answers, not rows: what a model says of an answer is a sum over the targets of it that
count, of log-probabilities or, where one token counts, of the value there. Answers to one prompt are a
group, and any two of a group with different labels are a pair. So a pair, a ranking of K answers and
several prompts packed into a row are one case, in arrays [R, A] of A answers to a row and
[R, A, A] of their pairs (i preferred to j).
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from llm_jax.types import OTHERS, Array, Batch, Loss, Mean, Scores

PAIR_LOSSES = ("logistic", "hinge", "ipo")


class Answers(NamedTuple):
    """What a batch says of its answers, [R, A] each."""

    groups: Array  # int32, 0 where there is none
    labels: Array  # float32, the higher the better
    tokens: Array  # float32, targets that count

    @property
    def real(self) -> Array:
        """1 where there is an answer."""
        return (self.groups > 0).astype(jnp.float32)


def answers_of(batch: Batch) -> Answers:
    """The answers of a batch.

    Without `answers` every row is one, and rows 2i and 2i + 1 are a pair whose first is preferred
    (unless `labels` [B] say otherwise).
    """
    chex.assert_rank(batch.weights, 2)
    tokens = per_answer(jnp.ones_like(batch.weights), batch)
    if batch.answers is None:
        groups = jnp.ones(tokens.shape, jnp.int32)
        labels = jnp.broadcast_to(jnp.array([[1.0, 0.0]]), tokens.shape)
        if batch.labels is not None:
            labels = batch.labels.astype(jnp.float32).reshape(tokens.shape)
        return Answers(groups, labels, tokens)
    chex.assert_rank([batch.groups, batch.labels], 2)
    return Answers(batch.groups, batch.labels.astype(jnp.float32), tokens)


def per_answer(values_BxT: Array, batch: Batch) -> Array:
    """The sum of `values`, each times its target's weight, over the targets of each answer [R, A]."""
    chex.assert_equal_shape([values_BxT, batch.weights])
    counted = jnp.where(batch.weights == 0, 0.0, values_BxT.astype(jnp.float32) * batch.weights)
    if batch.answers is None:
        return jnp.sum(counted, axis=1).reshape(-1, 2)
    A = batch.groups.shape[1]
    here_BxTxA = batch.answers[:, :, None] == jnp.arange(1, A + 1)[None, None, :]
    return jnp.einsum("bt,bta->ba", counted, here_BxTxA.astype(jnp.float32))


class Pairs(NamedTuple):
    """Which answers are compared: [R, A, A], i (axis 1) with j (axis 2)."""

    weights: Array  # float32
    # The probability that i is preferred, as labelled: 1, or 1/2 of a tie
    preferred: Array


def pairs_of(answers: Answers, *, ties: str = "drop", per_prompt: bool = False) -> Pairs:
    """All ordered pairs of answers to the same prompt.

    Args:
      ties: answers with equal labels are no pair ("drop"), or one that is preferred by half ("half").
      per_prompt: the pairs of a prompt count as one together (Ouyang et al. 2022), not each as one.
    """
    if ties not in ("drop", "half"):
        raise ValueError(f"ties={ties!r} is neither drop nor half")
    groups, labels = answers.groups, answers.labels
    same = (groups[:, :, None] == groups[:, None, :]) & (groups[:, :, None] > 0)
    ahead = labels[:, :, None] - labels[:, None, :]
    first = jnp.triu(jnp.ones(same.shape[1:], bool), k=1)[None]
    tied = same & first & (ahead == 0)
    weights = (same & (ahead > 0)).astype(jnp.float32)
    preferred = jnp.where(tied, 0.5, 1.0)
    if ties == "half":
        weights = weights + tied
    if per_prompt:
        own = jnp.einsum("rij,rik->rk", weights, same.astype(jnp.float32))  # pairs of k's prompt
        weights = weights / jnp.maximum(own, 1.0)[:, :, None]
    return Pairs(weights, preferred)


def differences(x_RxA: Array) -> Array:
    """[R, A, A]: of i minus of j."""
    return x_RxA[:, :, None] - x_RxA[:, None, :]


def pair_loss(kind: str, *, beta: float = 1.0) -> Callable[[Array], Array]:
    """What a pair costs whose preferred answer is ahead by h.

    logistic: -log sigmoid(beta h) (Bradley & Terry 1952); hinge: max(0, 1 - beta h) (of log-ratios Liu
    et al. 2024; SLiC, Zhao et al. 2023, has no reference); ipo: (h - 1 / (2 beta))^2 (Azar et al. 2024,
    equation 17).

    Raises:
      ValueError: another kind.
    """
    if kind == "logistic":
        return lambda h: -jax.nn.log_sigmoid(beta * h)
    if kind == "hinge":
        return lambda h: jax.nn.relu(1.0 - beta * h)
    if kind == "ipo":
        return lambda h: jnp.square(h - 1.0 / (2.0 * beta))
    raise ValueError(f"the loss {kind!r} of a pair is unknown; there are {', '.join(PAIR_LOSSES)}")


def compared(
    ahead_RxAxA: Array,
    pairs: Pairs,
    cost: Callable[[Array], Array],
    *,
    label_smoothing: float = 0.0,
    robust: bool = False,
) -> Mean:
    """The mean cost of the pairs, given how far the first answer of each is ahead.

    A share `label_smoothing` of the labels is taken to be flipped: (1 - e) cost(h) + e cost(-h)
    (conservative, Mitchell 2023). `robust` takes the flips out in expectation:
    ((1 - e) cost(h) - e cost(-h)) / (1 - 2 e) (Chowdhury et al. 2024, equation 12).
    """
    chex.assert_equal_shape([ahead_RxAxA, pairs.weights])
    e = label_smoothing
    right, wrong = cost(ahead_RxAxA), cost(-ahead_RxAxA)
    if robust:
        right, wrong = (
            ((1 - e) * a - e * b) / (1 - 2 * e) for a, b in ((right, wrong), (wrong, right))
        )
    elif e:
        right, wrong = ((1 - e) * a + e * b for a, b in ((right, wrong), (wrong, right)))
    p = pairs.preferred
    return Mean.of(jnp.where(p == 1.0, right, p * right + (1 - p) * wrong), pairs.weights)


# ------------------------------------------------------------------------------------ reward models


def reward(
    scores: Scores,
    batch: Batch,
    *,
    loss: str = "logistic",
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    centring: float = 0.0,
    ties: str = "drop",
    per_prompt: bool = False,
    beside: Array | None = None,
) -> Loss:
    """Of `scores.values`, read at the target of each answer that counts.

    logistic: -log sigmoid(r_i - r_j - margin (label_i - label_j)) (Ouyang et al. 2022, equation 1;
    the margin: Touvron et al. 2023, equation 2). hinge: max(0, 1 - (r_i - r_j)). listwise:
    -log of the Plackett-Luce probability of a prompt's ranking, the sum over its places of
    log sum exp of what is left minus r (Luce 1959; Plackett 1975). regression: (r - label)^2.
    `centring` times the mean of (r_i + r_j)^2 keeps rewards around 0, which pairs leave open
    (Eisenstein et al. 2023). With `beside` [R, A] answers are judged by r + beside, so that r need not
    learn what that explains, such as a trained slope times `log_length`.

    Metrics: accuracy (ties of rewards count half), margin, chosen, rejected.

    Raises:
      ValueError: another loss.
    """
    answers = answers_of(batch)
    r_RxA = per_answer(scores.values, batch)
    pairs = pairs_of(answers, ties=ties, per_prompt=per_prompt)
    judged = r_RxA if beside is None else r_RxA + beside
    ahead = differences(judged)
    if loss == "regression":
        term = Mean.of(jnp.square(r_RxA - answers.labels), answers.real)
    elif loss == "listwise":
        term = plackett_luce(judged, answers)
    elif loss in ("logistic", "hinge"):
        wanted = margin * differences(answers.labels) if margin else 0.0
        term = compared(ahead - wanted, pairs, pair_loss(loss), label_smoothing=label_smoothing)
    else:
        raise ValueError(
            f"reward.loss={loss!r} is unknown; there are logistic, hinge, listwise, regression"
        )
    terms, scales = {"reward": term}, {"reward": 1.0}
    if centring:
        both = r_RxA[:, :, None] + r_RxA[:, None, :]
        terms["centring"], scales["centring"] = Mean.of(jnp.square(both), pairs.weights), centring
    return Loss(terms, scales, pair_metrics(r_RxA, answers))


def log_length(batch: Batch) -> Array:
    """log of the places of each answer of packed rows [R, A]; 0 where there is none."""
    A = batch.groups.shape[1]
    here_BxTxA = batch.answers[:, :, None] == jnp.arange(1, A + 1)[None, None, :]
    return jnp.log(jnp.maximum(jnp.sum(here_BxTxA, axis=1), 1).astype(jnp.float32))


def plackett_luce(r_RxA: Array, answers: Answers) -> Mean:
    """-log of the probability of each prompt's ranking by label, a mean over prompts; of equal
    labels the earlier answer counts as better."""
    groups, labels = answers.groups, answers.labels
    same = (groups[:, :, None] == groups[:, None, :]) & (groups[:, :, None] > 0)
    behind = differences(labels) > 0
    order = jnp.triu(jnp.ones(same.shape[1:], bool))[None]  # i itself, and what stands after it
    left = same & (behind | ((differences(labels) == 0) & order))  # j is not better than i
    z = jnp.where(left, r_RxA[:, None, :], -1e30)
    log_z = jax.nn.logsumexp(z, axis=2)
    size = jnp.sum(same, axis=2)
    # The last place of a prompt, and a prompt with one answer, cost log 1.
    cost = jnp.where(groups > 0, log_z - r_RxA, 0.0)
    counted = (groups > 0) & (size > 1)
    prompts = jnp.sum(jnp.where(counted, 1.0 / jnp.maximum(size, 1), 0.0))
    return Mean(jnp.sum(jnp.where(counted, cost, 0.0)), prompts)


def pair_metrics(r_RxA: Array, answers: Answers) -> dict[str, Mean]:
    """How often, and by how much, the preferred answer of a pair has the higher reward."""
    w = pairs_of(answers).weights
    ahead = differences(r_RxA)
    right = (ahead > 0) + 0.5 * (ahead == 0)
    wide = lambda x, axis: jnp.broadcast_to(jnp.expand_dims(x, axis), w.shape)  # noqa: E731
    return {
        "pair_accuracy": Mean.of(right, w),
        "margin": Mean.of(ahead, w),
        "chosen": Mean.of(wide(r_RxA, 2), w),
        "rejected": Mean.of(wide(r_RxA, 1), w),
        "chosen_tokens": Mean.of(wide(answers.tokens, 2), w),
        "rejected_tokens": Mean.of(wide(answers.tokens, 1), w),
    }


# ------------------------------------------------------------------------------ direct optimisation


def direct(
    scores: Scores,
    batch: Batch,
    *,
    loss: str = "logistic",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    robust: bool = False,
    per_token: bool = False,
    length_penalty: float = 0.0,
    sft: float = 0.0,
    ties: str = "drop",
    per_prompt: bool = False,
) -> Loss:
    """Direct preference optimisation: `pair_loss` of h = log-ratio of i minus log-ratio of j, where an
    answer's log-ratio is log pi(y|x) - log pi_ref(y|x) (Rafailov et al. 2023, equation 7).

    `loss` is logistic (DPO), hinge or ipo. `per_token` divides each log-ratio by the answer's tokens:
    length-normalised DPO (Lambert et al. 2024), and IPO as TRL has it. `length_penalty` is what a
    token costs in the reward that is maximised (R-DPO, Park et al. 2024): that reward's optimum has
    r = beta * log-ratio + length_penalty * tokens, so that a longer answer that is preferred is ahead
    by so much already and has less to teach. `sft` adds so many times the preferred answers'
    cross-entropy a token (RPO, Pang et al. 2024; a preferred answer counts in each of its pairs).
    `label_smoothing`, `robust`: `compared`.

    Metrics: those of `pair_metrics` of the implicit rewards beta * log-ratio (a token, with
    `per_token`), and `chosen_nll`.
    """
    chex.assert_equal_shape([scores.log_probs, batch.ref_log_probs, batch.weights])
    answers = answers_of(batch)
    pairs = pairs_of(answers, ties=ties, per_prompt=per_prompt)
    ratio = per_answer(scores.log_probs - batch.ref_log_probs, batch)
    if per_token:
        ratio = ratio / jnp.maximum(answers.tokens, 1.0)
    ahead = differences(ratio)
    if length_penalty:
        ahead = ahead + length_penalty / beta * differences(answers.tokens)
    term = compared(
        ahead,
        pairs,
        pair_loss(loss, beta=beta),
        label_smoothing=label_smoothing,
        robust=robust,
    )
    nll = _chosen_nll(scores, batch, answers, pairs)
    terms, scales = {"preference": term}, {"preference": 1.0}
    if sft:
        terms["sft"], scales["sft"] = nll, sft
    return Loss(terms, scales, {**pair_metrics(beta * ratio, answers), "chosen_nll": nll})


def _chosen_nll(scores: Scores, batch: Batch, answers: Answers, pairs: Pairs) -> Mean:
    """Cross-entropy a token of the preferred answers, nats."""
    log_p = per_answer(scores.log_probs, batch)
    times_RxA = jnp.sum(pairs.weights * (pairs.preferred == 1.0), axis=2)
    return Mean(-jnp.sum(log_p * times_RxA), jnp.sum(answers.tokens * times_RxA))


def reference_free(
    scores: Scores,
    batch: Batch,
    *,
    loss: str = "simpo",
    beta: float = 2.0,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    ties: str = "drop",
    per_prompt: bool = False,
) -> Loss:
    """Objectives of mean log-probabilities a token, without a reference.

    simpo: -log sigmoid(beta (mean_i - mean_j) - gamma) (Meng et al. 2024, equation 6). orpo: the
    preferred answers' cross-entropy a token - beta log sigmoid(log odds_i - log odds_j), where odds =
    p / (1 - p) of p = exp(mean) (Hong et al. 2024, equations 6 and 7). Metrics as in `direct`, of the
    implicit rewards beta * mean.
    """
    answers = answers_of(batch)
    pairs = pairs_of(answers, ties=ties, per_prompt=per_prompt)
    mean = per_answer(scores.log_probs, batch) / jnp.maximum(answers.tokens, 1.0)
    nll = _chosen_nll(scores, batch, answers, pairs)
    metrics = {**pair_metrics(beta * mean, answers), "chosen_nll": nll}
    smoothing = {"label_smoothing": label_smoothing}
    if loss == "simpo":
        # Of a tie neither is to be ahead.
        ahead = differences(mean) - gamma / beta * (pairs.preferred == 1.0)
        term = compared(ahead, pairs, pair_loss("logistic", beta=beta), **smoothing)
        return Loss({"preference": term}, {}, metrics)
    if loss != "orpo":
        raise ValueError(f"dpo.loss={loss!r} is unknown; without a reference: simpo, orpo")
    # log(1 - p) of p = exp(mean); places without an answer have p = 1.
    safe = jnp.where(answers.tokens > 0, mean, -1.0)
    log_odds = safe - jnp.log(-jnp.expm1(jnp.minimum(safe, -1e-7)))
    term = compared(differences(log_odds), pairs, pair_loss("logistic"), **smoothing)
    return Loss({"sft": nll, "preference": term}, {"sft": 1.0, "preference": beta}, metrics)


def kto(
    scores: Scores,
    batch: Batch,
    *,
    beta: float = 0.1,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> Loss:
    """Kahneman-Tversky optimisation of single answers (Ethayarajh et al. 2024, equation 8).

    A desirable answer (label 1) costs desirable * (1 - sigmoid(beta (ratio - z))), another (label 0)
    undesirable * (1 - sigmoid(beta (z - ratio))). z, which is not differentiated, is the larger of 0
    and the mean log-ratio of answers to other prompts, which the batch holds with the label OTHERS.
    z is of the rows that are computed together: of a micro-batch, where there are several.

    Metrics: `kl`, z itself; `desirable_reward`, `undesirable_reward`, beta * ratio.
    """
    chex.assert_equal_shape([scores.log_probs, batch.ref_log_probs, batch.weights])
    answers = answers_of(batch)
    ratio = per_answer(scores.log_probs - batch.ref_log_probs, batch)
    other = answers.real * (answers.labels == OTHERS)
    z = jax.lax.stop_gradient(jnp.maximum(Mean.of(ratio, other).value(), 0.0))
    good = answers.real * (answers.labels == 1.0)
    bad = answers.real * (answers.labels == 0.0)
    cost = good * desirable * jax.nn.sigmoid(-beta * (ratio - z))
    cost = cost + bad * undesirable * jax.nn.sigmoid(-beta * (z - ratio))
    count = jnp.sum(good + bad)
    metrics = {
        "kl": Mean(z * count, count),
        "desirable_reward": Mean.of(beta * ratio, good),
        "undesirable_reward": Mean.of(beta * ratio, bad),
    }
    return Loss({"preference": Mean(jnp.sum(cost), count)}, {}, metrics)
