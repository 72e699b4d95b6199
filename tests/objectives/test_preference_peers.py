"""Our preference losses are TRL's on the same log-probabilities, value and gradient, in two layouts.

The golden numbers (`goldens/make_preference_goldens.py`) need no torch; `pytest -m peers` makes them
anew in the environment of constraints/peers.txt.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives.goldens import make_preference_goldens as trl

from llm_jax.objectives.preference import OTHERS, direct, kto, reference_free, reward
from llm_jax.types import Batch, Scores

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
SMOOTHED = {"label_smoothing": trl.SMOOTHING}

# TRL's name -> ours, as a function of Scores, Batch and beta
LOSSES = {
    "sigmoid": direct,
    "hinge": partial(direct, loss="hinge"),
    "ipo": partial(direct, loss="ipo", per_token=True),
    "sigmoid_norm": partial(direct, per_token=True),
    "robust": partial(direct, robust=True, **SMOOTHED),
    "conservative": partial(direct, **SMOOTHED),
    "rpo": partial(direct, sft=trl.SFT),
    "simpo": partial(reference_free, gamma=trl.GAMMA),
    "simpo_smoothed": partial(reference_free, gamma=trl.GAMMA, **SMOOTHED),
    "orpo": partial(reference_free, loss="orpo"),
}
KTO = partial(kto, desirable=trl.DESIRABLE, undesirable=trl.UNDESIRABLE)
REWARDS = {
    "reward": reward,
    "reward_margin": partial(reward, margin=trl.MARGIN),
    "reward_centred": partial(reward, centring=trl.CENTRING),
}


@pytest.fixture(scope="module")
def golden():
    """All arrays of the file."""
    with np.load(trl.FILE) as arrays:
        return dict(arrays)


# ------------------------------------------------------------------------------------------- layouts


class Layout(NamedTuple):
    """A batch of n answers, and where it has their targets [n, T]."""

    batch: Batch
    mask: np.ndarray  # [n, T], targets that count
    rows: np.ndarray  # [n, T], of targets that count
    columns: np.ndarray

    def put(self, x_nxT: np.ndarray, hole: float) -> jax.Array:
        """Numbers of targets in the batch's places, and `hole` in those that do not count."""
        out = np.full(self.batch.weights.shape, hole, np.float32)
        out[self.rows[self.mask], self.columns[self.mask]] = x_nxT[self.mask]
        return jnp.array(out)

    def take(self, x_BxT: np.ndarray) -> np.ndarray:
        """The inverse of `put`, with 0 where nothing counts."""
        return np.where(self.mask, np.asarray(x_BxT)[self.rows, self.columns], 0.0)


def plain(mask, order, labels=None) -> Layout:
    """Answer order[i] is row i."""
    rows = np.broadcast_to(np.argsort(order)[:, None], mask.shape)
    columns = np.broadcast_to(np.arange(mask.shape[1])[None], mask.shape)
    weights = jnp.array(mask[order], jnp.float32)
    if labels is not None:
        labels = jnp.array(labels[order], jnp.float32)
    batch = Batch(tokens=jnp.zeros(mask.shape, jnp.int32), weights=weights, labels=labels)
    return Layout(batch, mask, rows, columns)


def packed(mask, slots, prompts, labels) -> Layout:
    """Row r holds the answers slots[r] one after the other; None is a slot without one.

    Before each stands a target that is of no answer, after each one that is but does not count.
    """
    R, A = len(slots), len(slots[0])
    rows, columns = np.zeros(mask.shape, int), np.zeros(mask.shape, int)
    groups, values = np.zeros((R, A), np.int32), np.zeros((R, A), np.float32)
    answers, weights = np.zeros((2, R, 80))
    for r, row in enumerate(slots):
        at = 0
        for a, i in enumerate(row):
            if i is None:
                continue
            n = int(mask[i].sum())
            rows[i], columns[i, mask[i]] = r, at + 1 + np.arange(n)
            groups[r, a], values[r, a] = prompts[i], labels[i]
            weights[r, at + 1 : at + 1 + n] = 1
            answers[r, at + 1 : at + 2 + n] = a + 1
            at += n + 2
    batch = Batch(
        tokens=jnp.zeros(weights.shape, jnp.int32),
        weights=jnp.array(weights, jnp.float32),
        answers=jnp.array(answers, jnp.int32),
        groups=jnp.array(groups),
        labels=jnp.array(values),
    )
    return Layout(batch, mask, rows, columns)


# Of pairs i (chosen) with i + 6: other rows, other orders, rejected ones first, pairs in each other.
SLOTS = [[9, 3, None, 0, 1, 7, 6, None], [4, None, 5, 2, 10, 11, None, 8]]
KTO_SLOTS = [
    [20, 0, 12, 5, 3, None, 1, 13, 22],
    [2, 14, 15, 4, 16, 17, 6, 18, 9],
    [7, 8, 19, 21, None, 10, 23, 11, None],
]


def pairs(layout: str, mask, scores) -> Layout:
    """The six pairs: the preferred one first ("plain"), or as the labels, scores, have it."""
    if layout == "plain":
        return plain(mask, np.arange(12).reshape(2, 6).T.ravel())
    if layout == "labelled":
        return plain(mask, [6, 0, 1, 7, 2, 8, 9, 3, 10, 4, 5, 11], scores)
    return packed(mask, SLOTS, np.array([3, 1, 2, 7, 5, 6] * 2), scores)


def singles(layout: str, mask, labels) -> Layout:
    """KTO's answers, each to a prompt of its own."""
    if layout == "plain":
        return plain(mask, np.random.default_rng(1).permutation(24), labels)
    return packed(mask, KTO_SLOTS, np.arange(1, 25), labels)


def compare(name, golden, got, at: Layout, beta=None):
    """Value and gradient [B, T] with TRL's."""
    name = name if beta is None else f"{name}-{beta}"
    value, gradient = got
    np.testing.assert_allclose(value, golden[f"value/{name}"], **TOLERANCE)
    gradient, theirs = np.asarray(gradient), golden[f"gradient/{name}"]
    assert (gradient[np.asarray(at.batch.weights) == 0] == 0).all()  # not NaN
    ours = at.take(gradient)
    if theirs.ndim == 1:
        ours = ours.sum(axis=1)
    np.testing.assert_allclose(ours[: len(theirs)], theirs, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(ours[len(theirs) :], 0)  # KTO's answers to other prompts


# --------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("layout", ["plain", "packed"])
@pytest.mark.parametrize("name", LOSSES)
def test_pairs_cost_what_they_cost_in_trl(name, layout, golden):
    at = pairs(layout, golden["mask"], golden["scores"])
    batch = at.batch.replace(ref_log_probs=at.put(golden["ref_log_probs"], -np.inf))

    @jax.jit
    @jax.value_and_grad
    def run(log_probs, beta):
        return LOSSES[name](Scores(log_probs=log_probs), batch, beta=beta).value()

    for beta in trl.BETAS:
        compare(name, golden, run(at.put(golden["log_probs"], np.nan), beta), at, beta)


@pytest.mark.parametrize("layout", ["plain", "packed"])
@pytest.mark.parametrize("name", ["kto", "kto_clamped"])
def test_single_answers_cost_what_they_cost_in_trl(name, layout, golden):
    """Clamped: with policy and reference exchanged in z, whose estimate is negative then."""
    kl = ["kl_log_probs", "kl_ref_log_probs"]
    if name == "kto_clamped":
        kl.reverse()
    mask = np.concatenate([golden["mask"], golden["kl_mask"]])
    labels = np.concatenate([golden["desired"], np.full(12, OTHERS)])
    at = singles(layout, mask, labels)
    policy = np.concatenate([golden["log_probs"], golden[kl[0]]])
    ref = np.concatenate([golden["ref_log_probs"], golden[kl[1]]])
    batch = at.batch.replace(ref_log_probs=at.put(ref, np.inf))

    @jax.jit
    @jax.value_and_grad
    def run(log_probs, beta):
        return KTO(Scores(log_probs=log_probs), batch, beta=beta).value()

    for beta in trl.BETAS:
        compare(name, golden, run(at.put(policy, np.nan), beta), at, beta)


@pytest.mark.parametrize("layout", ["labelled", "packed"])
@pytest.mark.parametrize("name", REWARDS)
def test_rewards_cost_what_they_cost_in_trl(name, layout, golden):
    """A reward is the value at an answer's last target, which alone counts."""
    mask = golden["mask"]
    last = mask & (np.cumsum(mask, axis=1) == mask.sum(axis=1, keepdims=True))
    at = pairs(layout, last, golden["scores"])

    @jax.jit
    @jax.value_and_grad
    def run(values):
        return REWARDS[name](Scores(values=values), at.batch).value()

    compare(name, golden, run(at.put(golden["rewards"][:, None] * last, np.nan)), at)


def test_ipo_of_the_paper_is_not_that_of_trl(golden):
    """Equation 17 has sums, TRL means a token, which weigh long answers less."""
    at = pairs("packed", golden["mask"], golden["scores"])
    batch = at.batch.replace(ref_log_probs=at.put(golden["ref_log_probs"], 0.0))
    ratio = ((golden["log_probs"] - golden["ref_log_probs"]) * golden["mask"]).sum(axis=1)
    scores = Scores(log_probs=at.put(golden["log_probs"], 0.0))
    for beta in trl.BETAS:
        paper = np.mean((ratio[:6] - ratio[6:] - 1 / (2 * beta)) ** 2)
        ours = direct(scores, batch, loss="ipo", beta=beta).value()
        np.testing.assert_allclose(ours, paper, **TOLERANCE)
        assert abs(paper - golden[f"value/ipo-{beta}"]) > 0.5


def test_every_golden_is_compared(golden):
    """And each differs from all others: no loss is another one by mistake."""
    values = {key.removeprefix("value/"): v for key, v in golden.items() if key[:6] == "value/"}
    named = [f"{name}-{b}" for name in [*LOSSES, "kto", "kto_clamped"] for b in trl.BETAS]
    assert set(values) == {*named, *REWARDS}
    gaps = np.abs(np.subtract.outer(list(values.values()), list(values.values())))
    assert np.min(gaps + np.eye(len(values))) > 1e-4
    # Both sides of hinge's corner are there, and neither of TRL's rounding near it.
    h = ((golden["log_probs"] - golden["ref_log_probs"]) * golden["mask"]).sum(axis=1)
    ahead = 1 - 0.5 * (h[:6] - h[6:])
    assert (ahead > 0.01).any() and (ahead < -0.01).any() and (np.abs(ahead) > 0.01).all()


@pytest.mark.peers
def test_goldens_are_what_this_version_computes(golden):
    again = trl.compute()
    assert set(again) == set(golden)
    for key, x in golden.items():
        # TRL's ORPO is float32.
        np.testing.assert_allclose(
            again[key], x, atol=1e-6 if "orpo" in key else 1e-12, err_msg=key
        )
