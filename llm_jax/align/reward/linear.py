"""A reward that is linear in given features.

The losses of pairs are convex in it: L-BFGS finds the optimum, and the only choice, how strongly
weights are held to 0, is made by cross-validation over prompts.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from llm_jax.align.judgements import Judged
from llm_jax.align.reward.features import Answers
from llm_jax.align.reward.training import objective
from llm_jax.config import TrainConfig
from llm_jax.types import Array, Batch, Scores

STRENGTHS = (
    1.0,
    0.3,
    0.1,
    0.03,
    0.01,
    0.003,
)  # of l2 that are tried, each from the last one's head
FOLDS = 5


class Head(NamedTuple):
    """reward = features . w + bias; `length` is what log(tokens) was worth beside it."""

    w_D: np.ndarray
    bias: float
    length: float

    def __call__(self, answers: Answers) -> np.ndarray:
        """Rewards, float64 [N]."""
        return answers.features_NxD.astype(np.float64) @ self.w_D + self.bias


def fit(answers: Answers, cfg: TrainConfig, l2: float, start: Head | None = None) -> Head:
    """The head that minimises `cfg.reward`'s loss + l2 / 2 |w|^2 of standardised features; the search
    starts at `start`, or at 0."""
    mean, scale = answers.features_NxD.mean(axis=0), answers.features_NxD.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    x_NxD = ((answers.features_NxD - mean) / scale).astype(np.float32)
    batch, row_N, column_N = _batch(answers)
    log_tokens = np.zeros(batch.weights.shape, np.float32)
    log_tokens[row_N, column_N] = np.log1p(answers.tokens_N)
    D, fixed = x_NxD.shape[1], (x_NxD, batch, (row_N, column_N), log_tokens, np.float32(l2))

    def both(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _cost(jnp.asarray(theta, jnp.float32), *fixed, cfg=cfg)
        return float(value), np.asarray(gradient, np.float64)

    first = np.zeros(D + 2)
    if start is not None:
        first = np.array([*(start.w_D * scale), start.bias + start.w_D @ mean, start.length])
    options = {"maxiter": 300, "ftol": 1e-7}  # of float32 there is no more
    found = optimize.minimize(both, first, jac=True, method="L-BFGS-B", options=options).x
    w = found[:D] / scale
    return Head(w, float(found[D] - w @ mean), float(found[D + 1]))


@partial(jax.jit, static_argnames="cfg")
def _cost(
    theta: Array,
    x_NxD: Array,
    batch: Batch,
    places: tuple[Array, Array],
    log_tokens: Array,
    l2: Array,
    *,
    cfg: TrainConfig,
) -> tuple[Array, Array]:
    """The penalised loss and its gradient at theta [D + 2]: weights, bias, what length is worth."""

    def value(theta: Array) -> Array:
        w_D, bias, slope = theta[:-2], theta[-2], theta[-1]
        r_N = x_NxD @ w_D + bias[None]
        scores = Scores(values=jnp.zeros(batch.weights.shape).at[places].set(r_N))
        loss = objective(scores, batch, cfg, slope * log_tokens)
        return loss.value() + 0.5 * l2 * jnp.sum(jnp.square(w_D))

    return jax.value_and_grad(value)(theta)


def _batch(answers: Answers) -> tuple[Batch, np.ndarray, np.ndarray]:
    """A group a row, an answer a token; and the place of each answer."""
    _, row_N = np.unique(answers.groups_N, return_inverse=True)
    first_R = np.searchsorted(row_N, np.arange(row_N[-1] + 1))
    column_N = np.arange(len(row_N)) - first_R[row_N]
    shape = (len(first_R), int(column_N.max()) + 1)
    weights, labels = np.zeros((2, *shape), np.float32)
    weights[row_N, column_N], labels[row_N, column_N] = 1.0, answers.labels_N
    numbers = np.broadcast_to(np.arange(1, shape[1] + 1, dtype=np.int32), shape)
    batch = Batch(
        tokens=np.zeros(shape, np.int32),
        weights=weights,
        answers=numbers,
        groups=weights.astype(np.int32),
        labels=labels,
    )
    return batch, row_N, column_N


def choose(answers: Answers, cfg: TrainConfig) -> tuple[float, list[dict[str, float]]]:
    """The l2 of STRENGTHS with the lowest held-out loss, in FOLDS folds of prompts (fewer if there
    are fewer prompts); and what was seen of each.

    Raises:
      ValueError: a single prompt.
    """
    known, prompt_N = np.unique(answers.prompts_N, return_inverse=True)
    folds = min(FOLDS, len(known))
    if folds < 2:
        raise ValueError(
            "reward.l2=0 is chosen by cross-validation, which needs two prompts to train on; set it"
        )
    fold_N = np.random.default_rng(cfg.seed).permutation(len(known))[prompt_N] % folds
    losses = {l2: [] for l2 in STRENGTHS}
    for f in range(folds):
        train, test, head = answers.pick(fold_N != f), answers.pick(fold_N == f), None
        for l2 in STRENGTHS:
            head = fit(train, cfg, l2, head)
            losses[l2].append(held_out_loss(head, test, cfg))
    seen = [{"l2": l2, "loss": float(np.mean(own))} for l2, own in losses.items()]
    return min(seen, key=lambda row: row["loss"])["l2"], seen


def held_out_loss(head: Head, answers: Answers, cfg: TrainConfig) -> float:
    """`cfg.reward`'s loss of a fitted head."""
    batch, row_N, column_N = _batch(answers)
    values, log_tokens = np.zeros((2, *batch.weights.shape), np.float32)
    values[row_N, column_N] = head(answers)
    log_tokens[row_N, column_N] = np.log1p(answers.tokens_N)
    return float(objective(Scores(values=values), batch, cfg, head.length * log_tokens).value())


def judged(head: Head, answers: Answers) -> Judged:
    """Answers with the rewards of a head."""
    return Judged(head(answers), answers.labels_N, answers.tokens_N, answers.groups_N)
