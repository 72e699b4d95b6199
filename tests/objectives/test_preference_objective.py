"""Preference losses by hand, by enumeration and by where they lead; TRL's numbers: test_preference_peers."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.objectives import preference
from llm_jax.objectives.preference import OTHERS, direct, kto, pairs_of, reference_free, reward
from llm_jax.train.step import micro_batches
from llm_jax.types import Batch, Scores

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def softplus(x):
    """-log sigmoid(-x)."""
    return np.logaddexp(0.0, x)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def batch_of(groups, labels, tokens=None) -> Batch:
    """Rows of answers [R, A], one after the other, of so many targets each (1); no reference."""
    groups = np.array(groups)
    tokens = np.broadcast_to(1 if tokens is None else tokens, groups.shape)
    answers = np.zeros((len(groups), tokens.sum(axis=1).max()), int)
    for row, n in zip(answers, tokens, strict=True):
        row[: n.sum()] = np.repeat(np.arange(1, len(n) + 1), n)
    weights = jnp.array(answers > 0, jnp.float32)
    return Batch(
        tokens=jnp.zeros(answers.shape, jnp.int32),
        weights=weights,
        answers=jnp.array(answers),
        groups=jnp.array(groups),
        labels=jnp.array(labels, jnp.float32),
        ref_log_probs=0.0 * weights,
    )


def said(batch: Batch, x) -> Scores:
    """Scores whose log-probabilities, and values, add up to x [R, A] for the answers."""
    answers = np.asarray(batch.answers)
    targets = (answers[:, :, None] == answers[:, None, :]).sum(axis=2)  # of each one's answer
    x = np.pad(np.asarray(x, float), ((0, 0), (1, 0)))
    out = jnp.array(np.take_along_axis(x, answers, axis=1) / targets, jnp.float32)
    return Scores(log_probs=out, values=out)


@functools.cache
def compiled(objective, **keys):
    return jax.jit(lambda scores, batch: objective(scores, batch, **keys))


def run(objective, batch, x, **keys):
    """The Loss of answers' numbers x [R, A]."""
    return compiled(objective, **keys)(said(batch, x), batch)


value = lambda *args, **keys: float(run(*args, **keys).value())  # noqa: E731


@functools.cache
def graded(objective):
    """x [B, T], as log-probabilities and as values, and a batch -> (Loss, gradient [B, T])."""

    def loss(x, batch):
        out = objective(Scores(log_probs=x, values=x), batch)
        return out.value(), out

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    return lambda x, batch: gradient(x, batch)[::-1]


compared_pairs = jax.jit(pairs_of, static_argnames=("ties", "per_prompt"))
ORPO = functools.partial(reference_free, loss="orpo")
ONE = batch_of([[1, 1]], [[1, 0]])  # the first of two answers is preferred

# ------------------------------------------------------------------------------------ pairs by hand


@pytest.mark.parametrize(
    ("keys", "cost"),
    [
        ({}, lambda h: softplus(-0.1 * h)),
        ({"beta": 0.5}, lambda h: softplus(-0.5 * h)),
        ({"loss": "hinge", "beta": 4.0}, lambda h: max(0, 1 - 4 * h)),  # 0 of h = 0.4
        ({"loss": "ipo", "beta": 0.5}, lambda h: (h - 1) ** 2),
        (
            {"label_smoothing": 0.2},  # the wrong way round: 0.2 and 0.8
            lambda h: 0.8 * softplus(-0.1 * h) + 0.2 * softplus(0.1 * h),
        ),
        (
            {"label_smoothing": 0.2, "robust": True},
            lambda h: (0.8 * softplus(-0.1 * h) - 0.2 * softplus(0.1 * h)) / 0.6,
        ),
        (
            {"loss": "ipo", "beta": 0.5, "label_smoothing": 0.2},
            lambda h: 0.8 * (h - 1) ** 2 + 0.2 * (-h - 1) ** 2,
        ),
    ],
)
def test_direct_by_hand(keys, cost):
    for h in (-1.5, 0.4):
        close(value(direct, ONE, [[h - 2, -2]], **keys), cost(h))


def test_the_reference_and_the_length_by_hand():
    """Three tokens of log-probability -1 against one: the reference had -1.5 and -2 a token."""
    batch = batch_of([[1, 1]], [[1, 0]], tokens=[[3, 1]])
    batch = batch.replace(ref_log_probs=jnp.array([[-1.5, -1.5, -1.5, -2.0]]))
    policy = [[-3.0, -1.0]]
    h = (-3 + 4.5) - (-1 + 2)
    close(value(direct, batch, policy), softplus(-0.1 * h))
    a_token = 0.5 - 1  # the longer answer is behind
    close(value(direct, batch, policy, per_token=True), softplus(-0.1 * a_token))
    # R-DPO: 0.02 (3 - 1) is on the logit, not on h, which would give 0.1 (h + 0.04)
    close(value(direct, batch, policy, length_penalty=0.02), softplus(-(0.1 * h + 0.04)))
    close(value(direct, batch, policy, sft=2.0), softplus(-0.1 * h) + 2 * 1.0)  # a token, not 3
    metrics = run(direct, batch, policy).metrics
    expected = {"margin": 0.1 * h, "chosen": 0.15, "rejected": 0.1, "pair_accuracy": 1}
    expected |= {"chosen_tokens": 3, "rejected_tokens": 1, "chosen_nll": 1}
    assert set(metrics) == set(expected)
    for name, number in expected.items():
        close(metrics[name].value(), number)


def test_simpo_and_orpo_by_hand():
    batch = batch_of([[1, 1]], [[1, 0]], tokens=[[4, 2]])
    policy = [[-2.0, -4.0]]  # -0.5 and -2 a token; the sums are 2 apart
    close(value(reference_free, batch, policy), softplus(-2 * 1.5))
    # gamma is off the logit: 3 - 0.8, where 2 (1.5 - 0.8) would be another
    close(value(reference_free, batch, policy, gamma=0.8), softplus(-(3 - 0.8)))
    p, q = math.exp(-0.5), math.exp(-2)
    log_odds = math.log(p / (1 - p)) - math.log(q / (1 - q))
    wanted = 0.5 + 0.25 * softplus(-log_odds)
    close(value(reference_free, batch, policy, loss="orpo", beta=0.25), wanted)


@pytest.mark.parametrize("top", [0.0, -1e-8, -1e-6, -200.0])
def test_orpo_is_finite_at_certain_and_impossible_answers(top):
    """log(1 - p) of p = 1 is -inf, and its derivative at the clamp 0 * inf."""
    for x in ([[top, -1.0]], [[-1.0, top]], [[top, top]]):
        loss, gradient = graded(ORPO)(jnp.array(x), ONE)
        assert np.isfinite(loss.value()) and np.isfinite(gradient).all()


def test_robust_is_unbiased():
    """Of labels that are flipped with probability e the expected loss is the clean one."""
    e, keys = 0.2, {"label_smoothing": 0.2, "robust": True}
    flipped = ONE.replace(labels=jnp.array([[0.0, 1.0]]))
    for h in (-3.0, 0.7, 8.0):
        right, wrong = (value(direct, b, [[h, 0.0]], beta=0.5, **keys) for b in (ONE, flipped))
        close((1 - e) * right + e * wrong, softplus(-0.5 * h))


def test_exchanged_labels_exchange_everything():
    labels = np.array([[1, 0, 3, 2], [0, 1, 0, 1]])
    batch = batch_of([[1, 1, 2, 2], [1, 1, 2, 2]], labels)
    other = batch.replace(labels=jnp.array(labels.max() - labels, jnp.float32))
    x = [[1.0, -1.0, 0.5, 0.75], [2.0, 2.0, -1.0, 1.5]]
    ahead = np.array([2.0, -0.25, 0.0, 2.5])
    for objective, scale in ((direct, 0.1), (reward, 1.0)):
        loss, swapped = run(objective, batch, x), run(objective, other, x)
        close(loss.value(), softplus(-scale * ahead).mean())
        close(swapped.value(), softplus(scale * ahead).mean())
        a, b = loss.metrics, swapped.metrics
        close(a["pair_accuracy"].value(), 2.5 / 4)  # the tie counts half
        close(b["pair_accuracy"].value(), 1.5 / 4)
        close(a["margin"].value(), scale * ahead.mean())
        close(b["margin"].value(), -scale * ahead.mean())
        close(a["chosen"].value(), b["rejected"].value())


# ------------------------------------------------------------------------------------------- groups


def test_a_group_gives_all_its_pairs():
    """Labels 2, 0, 1, 1 of one prompt: five pairs and a tie; of the other two answers one."""
    answers = preference.answers_of(batch_of([[1, 1, 1, 1, 7, 7, 0]], [[2, 0, 1, 1, 0, 4, 9]]))
    pairs = compared_pairs(answers)
    expected = np.zeros((7, 7))
    for i, j in [(0, 1), (0, 2), (0, 3), (2, 1), (3, 1), (5, 4)]:
        expected[i, j] = 1
    np.testing.assert_array_equal(pairs.weights[0], expected)
    half = compared_pairs(answers, ties="half")
    tie = np.zeros((7, 7))
    tie[2, 3] = 1  # once, not also as 3 with 2
    np.testing.assert_array_equal(half.weights[0], expected + tie)
    assert (np.asarray(half.preferred[0])[tie == 1] == 0.5).all()
    assert (np.asarray(half.preferred[0])[expected == 1] == 1).all()
    for ties, pairs_of_first in (("drop", 5), ("half", 6)):
        weights = compared_pairs(answers, ties=ties, per_prompt=True).weights[0]
        close(weights.sum(), 2)  # prompts
        close(weights[5, 4], 1)
        close(weights[0, 1], 1 / pairs_of_first)
    four = preference.answers_of(batch_of([[1, 1, 1, 1]], [[3, 1, 0, 2]]))
    w = np.asarray(compared_pairs(four).weights[0])
    assert w.sum() == 6 and (w + w.T == 1 - np.eye(4)).all()  # 4 over 2, each once
    with pytest.raises(ValueError, match="ties='no'"):
        pairs_of(answers, ties="no")


@pytest.mark.parametrize("per_prompt", [False, True])
def test_a_prompt_counts_by_its_pairs_or_once(per_prompt):
    batch = batch_of([[1, 1, 1, 2, 2]], [[2, 1, 0, 1, 0]])
    x = [[3.0, 1.0, 2.0, 0.5, 1.0]]
    three, one = softplus(-np.array([2.0, 1.0, -1.0])), softplus(0.5)
    expected = (three.mean() + one) / 2 if per_prompt else (three.sum() + one) / 4
    close(value(reward, batch, x, per_prompt=per_prompt), expected)


@pytest.mark.parametrize(
    ("objective", "keys"),
    [
        (direct, {}),
        (direct, {"loss": "ipo", "label_smoothing": 0.1}),
        (direct, {"loss": "hinge", "beta": 1.0}),
        (direct, {"length_penalty": 0.1}),
        (reward, {"margin": 2.0}),
        (reference_free, {"gamma": 0.9}),
        (reference_free, {"loss": "orpo"}),
    ],
)
def test_a_tie_has_no_first_answer(objective, keys):
    """A margin that the earlier answer is to keep would pull tied answers apart."""
    half = functools.partial(value, objective, ties="half", **keys)
    batch, other = (batch_of([[1, 1]], [[1, 1]], tokens=[n]) for n in ([3, 2], [2, 3]))
    close(half(batch, [[-3.0, -1.0]]), half(other, [[-1.0, -3.0]]))
    if objective is reference_free and "gamma" in keys:
        close(half(batch, [[-3.0, -2.0]]), math.log(2))  # equal a token
    dropped = run(objective, batch, [[-3.0, -1.0]], **keys)
    assert dropped.value() == 0 and sum(t.weight for t in dropped.terms.values()) == 0


# -------------------------------------------------------------------------------------- reward models


def ranking_cost(order, r):
    """-log Plackett-Luce probability of the order, best first."""
    return sum(np.log(np.sum(np.exp(r[list(order[k:])]))) - r[order[k]] for k in range(len(order)))


def test_plackett_luce_by_enumeration():
    r = np.array([0.3, -1.2, 0.9])
    total = 0.0
    for order in itertools.permutations(range(3)):
        labels = np.zeros(3)
        labels[list(order)] = [2, 1, 0]  # the first of the order is the best
        cost = value(reward, batch_of([[1, 1, 1]], [labels]), [r], loss="listwise")
        close(cost, ranking_cost(order, r))
        total += math.exp(-cost)
    close(total, 1.0)


def test_plackett_luce_of_two_ties_and_several_prompts():
    listwise = functools.partial(value, reward, loss="listwise")
    close(listwise(ONE, [[0.4, 1.0]]), softplus(0.6))  # logistic
    # Of equal labels the earlier counts as better; an answer alone and an empty slot are no prompt.
    batch = batch_of([[1, 4, 1, 1, 2, 2, 0]], [[0, 9, 1, 1, 0, 1, 5]])
    x = np.array([0.3, 7.0, -1.0, 0.9, 2.0, 1.0, 3.0])
    expected = (ranking_cost((2, 3, 0), x) + ranking_cost((5, 4), x)) / 2
    close(listwise(batch, [x]), expected)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, softplus(-0.5)),
        ({"margin": 0.1}, softplus(-(0.5 - 0.1 * 3))),
        ({"loss": "hinge"}, 0.5),
        ({"label_smoothing": 0.1}, 0.9 * softplus(-0.5) + 0.1 * softplus(0.5)),
        ({"centring": 0.01}, softplus(-0.5) + 0.01 * 2.5**2),
        # Of both answers, each an error: (1.5 - 3)^2 and (1 - 0)^2
        ({"loss": "regression"}, (1.5**2 + 1) / 2),
    ],
)
def test_reward_by_hand(keys, expected):
    """Rewards 1.5 and 1, labels 3 and 0."""
    batch = batch_of([[1, 1, 0]], [[3, 0, 8]])
    close(value(reward, batch, [[1.5, 1.0, 40.0]], **keys), expected)


def test_a_length_slope_takes_what_length_explains():
    """d/ds of -log sigmoid(r_i - r_j + s (log 6 - log 2))."""
    batch = batch_of([[1, 1]], [[1, 0]], tokens=[[6, 2]])
    last = jnp.array([[0, 0, 0, 0, 0, 1, 0, 1]], jnp.float32)  # a reward's only place
    batch = batch.replace(weights=last)
    scores = Scores(values=jnp.array([[9, 9, 9, 9, 9, 0.7, 9, 0.4]]))

    def loss_of(slope):
        loss = reward(scores, batch, beside=slope * preference.log_length(batch))
        return loss.value(), loss.metrics["margin"].value()

    (loss, margin), slope = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(0.5)
    h = 0.3 + 0.5 * math.log(3)
    close(loss, softplus(-h))
    close(slope, -sigmoid(-h) * math.log(3))
    close(margin, 0.3)  # of the rewards themselves
    assert preference.log_length(batch).tolist() == np.log(np.float32([[6, 2]])).tolist()


# ----------------------------------------------------------------------------------------------- KTO


def test_kto_by_hand():
    """z = max(0, mean of the OTHERS), of which there are 0.6 and 0.2: no gradient goes there."""
    batch = batch_of([[1, 2, 3, 4, 5]], [[1, OTHERS, 0, OTHERS, 1]])
    x, z = np.array([1.0, 0.6, -0.5, 0.2, -2.0]), 0.4
    logit = 0.5 * np.array([1 - z, -(-0.5 - z), -2 - z])
    weights = np.array([2.0, 3.0, 2.0])
    weighted = functools.partial(kto, beta=0.5, desirable=2.0, undesirable=3.0)
    loss, gradient = graded(weighted)(said(batch, [x]).log_probs, batch)
    close(loss.value(), np.mean(weights * sigmoid(-logit)))  # by 3, not by 5 answers
    slope = weights * sigmoid(logit) * sigmoid(-logit) * 0.5 / 3
    close(gradient[0], [-slope[0], 0, slope[1], 0, -slope[2]])
    assert gradient[0, 1] == 0 and gradient[0, 3] == 0
    close(loss.metrics["kl"].value(), z)
    close(loss.metrics["desirable_reward"].value(), -0.25)
    close(loss.metrics["undesirable_reward"].value(), -0.25)
    x[[1, 3]] = -0.6, 0.2  # a negative estimate is 0
    loss = run(kto, batch, [x], beta=0.5)
    assert loss.metrics["kl"].value() == 0
    close(loss.value(), np.mean(sigmoid(-0.5 * np.array([1.0, 0.5, -2.0]))))


# ------------------------------------------------------- packing, padding, micro-batches, plain rows

EVERY = {
    "dpo": direct,
    "rdpo": functools.partial(direct, length_penalty=0.1, sft=0.5),
    "ipo": functools.partial(direct, loss="ipo", per_token=True, per_prompt=True),
    "cdpo": functools.partial(direct, label_smoothing=0.1, ties="half"),
    "simpo": functools.partial(reference_free, gamma=0.5),
    "orpo": ORPO,
    "kto": kto,
    "reward": functools.partial(reward, centring=0.1, margin=0.5),
    "slope": lambda s, b: reward(s, b, beside=0.3 * log_places(b)),
    "listwise": functools.partial(reward, loss="listwise"),
    "regression": functools.partial(reward, loss="regression"),
}
# Rows of 5, 1, 0 and 1 pairs and a tie, some of KTO's labels
GROUPS = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 2, 0, 0], [1, 1, 0, 0]]
LABELS = [[2, 0, 1, 1], [0, 1, 0, 0], [1, 0, 0, 0], [OTHERS, 0, 0, 0]]
TOKENS = [[2, 1, 3, 1], [4, 1, 0, 0], [1, 2, 0, 0], [2, 2, 0, 0]]
NUMBERS = np.array([[-2.0, -3, -1, -2], [-4, -0.5, 0, 0], [-1, -2.5, 0, 0], [-1.5, -2, 0, 0]])


def log_places(batch: Batch):
    """Of packed rows, and of plain ones, whose places are those of the packed ones."""
    if batch.answers is None:
        return jnp.log(jnp.maximum(jnp.sum(batch.weights, axis=1), 1)).reshape(-1, 2)
    return preference.log_length(batch)


def padded(x_BxT, batch: Batch, hole: float):
    """(x, batch) of 4 rows, 24 targets and 20 slots, where padding has this log-probability."""

    def wider(a, first, size, fill=0):
        more = (0, 4 - len(a)), (first, size - first - a.shape[1])
        return jnp.array(np.pad(a, more, constant_values=fill))

    new = {name: wider(getattr(batch, name), 1, 24) for name in ("tokens", "answers", "weights")}
    new |= {name: wider(getattr(batch, name), 0, 20) for name in ("groups", "labels")}
    new["ref_log_probs"] = wider(batch.ref_log_probs, 1, 24, hole)
    return wider(x_BxT, 1, 24, hole), batch.replace(**new)


def rows(x=NUMBERS):
    """The log-probabilities [4, 7] and the batch of the above, a prompt to a row; z of KTO is not 0."""
    batch = batch_of(GROUPS, LABELS, tokens=TOKENS)
    return said(batch, x).log_probs, batch.replace(ref_log_probs=-0.8 * batch.weights)


@pytest.mark.parametrize("name", EVERY)
def test_packing_and_padding_change_nothing(name):
    """All prompts in one row, in another order, beside holes that are NaN or inf."""
    x, batch = rows()
    loss, gradient = graded(EVERY[name])(*padded(x, batch, 0.0))
    counted = np.asarray(batch.weights) > 0
    gradient = np.asarray(gradient)[:, 1 : 1 + counted.shape[1]]
    assert np.abs(gradient).max() > 1e-3

    order = [3, 0, 2, 1]  # of rows; prompts have other numbers, and before each is an empty slot
    flat = lambda a: [np.concatenate([[0, *np.array(a)[r]] for r in order])]  # noqa: E731
    groups = flat(np.array(GROUPS) * np.arange(2, 6)[:, None])
    one = batch_of(groups, flat(LABELS), tokens=flat(TOKENS))
    one = one.replace(ref_log_probs=-0.8 * one.weights)
    x = said(one, flat(NUMBERS)).log_probs
    for hole in (np.nan, -np.inf, 1e30):
        again, slope = graded(EVERY[name])(*padded(x, one, hole))
        for a, b in ((loss.terms, again.terms), (loss.metrics, again.metrics)):
            for key in a:
                close(b[key].total, a[key].total)
                close(b[key].weight, a[key].weight)
        slope, here = np.array(slope), slice(1, 1 + x.shape[1])
        close(slope[0, here], np.concatenate([gradient[r][counted[r]] for r in order]))
        slope[0, here] = 0
        assert (slope == 0).all()  # not NaN


@pytest.mark.parametrize("name", EVERY)
def test_micro_batches_add_up(name):
    """As `make_train_step` has it: totals and weights are summed, and one division made. KTO's z is
    of a micro-batch, so there it has to be 0 in all."""
    x = NUMBERS.copy()
    x[3, 0] = -1.7
    whole, _ = graded(EVERY[name])(*padded(*rows(x), 0.0))
    parts = micro_batches(rows(x), 2)
    halves = []
    for j in range(2):
        half = jax.tree.map(lambda a, j=j: a[j], parts)
        halves.append(graded(EVERY[name])(*padded(*half, 0.0))[0])
    for key, mean in (whole.terms | whole.metrics).items():
        a, b = ((h.terms | h.metrics)[key] for h in halves)
        close((a + b).total, mean.total)
        close((a + b).weight, mean.weight)
    # A mean of the halves' means is another number: they hold 5 and 2 pairs.
    assert abs(sum(h.value() for h in halves) / 2 - whole.value()) > 1e-4


def test_plain_rows_are_pairs_whose_first_is_preferred():
    """Rows of one answer each, without `answers`; `labels` can turn a pair round."""
    weights = jnp.array([[0, 1, 1], [0, 1, 0], [0, 0, 1], [1, 1, 1]], jnp.float32)
    x = jnp.array([[9, -1, -2], [9, -1, 9], [9, 9, -1.5], [-1, -1, -1]], jnp.float32)
    batch = Batch(tokens=jnp.zeros((4, 3), jnp.int32), weights=weights, ref_log_probs=0 * x)
    for labels, ahead in ((None, [-2, 1.5]), ([1, 0, 0, 1], [-2, -1.5])):
        rows = batch.replace(labels=None if labels is None else jnp.array(labels))
        loss = compiled(direct, beta=1.0)(Scores(log_probs=x), rows)
        close(loss.value(), softplus(-np.array(ahead)).mean())
        close(loss.metrics["margin"].value(), np.mean(ahead))
    assert loss.metrics["pair_accuracy"].value() == 0


# ------------------------------------------------------------------------------- where the losses lead


def test_a_token_costs_its_price_at_the_optimum():
    """R-DPO on answers of three tokens and one: pi_ref exp((r - price * tokens) / beta) / Z."""
    beta, price, p = 0.5, 0.3, 0.8
    labels = jnp.array([[1, 0]] * 8 + [[0, 1]] * 2)
    tokens = [[3, 1]] * 10
    batch = batch_of(np.ones((10, 2), int), labels, tokens=tokens)
    batch = batch.replace(ref_log_probs=jnp.zeros_like(batch.weights))

    def objective(h):  # the log-ratio of the first answer, spread over its tokens; of the other 0
        log_probs = jnp.tile(jnp.array([[h / 3, h / 3, h / 3, 0.0]]), (10, 1))
        return direct(Scores(log_probs=log_probs), batch, beta=beta, length_penalty=price).value()

    grid = np.linspace(-6, 6, 2401)
    best = grid[np.argmin([objective(h) for h in grid[::40]]) * 40]
    near = grid[np.abs(grid - best) < 0.3]
    found = near[np.argmin([objective(h) for h in near])]
    r = math.log(p / (1 - p))
    assert found == pytest.approx((r - price * 2) / beta, abs=0.01)


@pytest.mark.parametrize("loss", ["logistic", "ipo"])
def test_the_optimum_of_a_bandit_is_the_closed_form(loss):
    """Prompts with two answers, which 12 readers compare: of DPO's labels, drawn from
    sigmoid(r_1 - r_2), the optimum is pi_ref exp(r / beta) / Z (Rafailov et al. 2023, equation 4);
    of IPO the log-ratios are (p - 1/2) / beta apart (Azar et al. 2024, equation 17's population)."""
    beta, readers = 0.6, 12
    for_first = np.array([9, 4, 11, 6])
    p = for_first / readers
    r = np.stack([np.log(p / (1 - p)), np.zeros(4)], axis=1)
    ref = jax.nn.log_softmax(jax.random.normal(jax.random.key(3), (4, 2)))

    labels = np.arange(readers)[None] < for_first[:, None]  # [4, 12], the first is preferred
    labels = np.stack([labels, ~labels], axis=-1).reshape(-1, 2)
    batch = batch_of(np.ones_like(labels, int), labels)
    batch = batch.replace(ref_log_probs=jnp.repeat(ref, readers, axis=0))

    def objective(logits):
        log_probs = jnp.repeat(jax.nn.log_softmax(logits), readers, axis=0)
        return direct(Scores(log_probs=log_probs), batch, loss=loss, beta=beta).value()

    # The curvature in the log-ratios' difference is beta^2 p (1 - p) or 2, over 4 prompts.
    rate = 4 / beta**2 if loss == "logistic" else 1.0
    descend = lambda _, z: z - rate * jax.grad(objective)(z)  # noqa: E731
    found = jax.nn.softmax(jax.jit(lambda z: jax.lax.fori_loop(0, 500, descend, z))(ref))

    policy = lambda bonus, ref=ref: jax.nn.softmax(ref + bonus)  # noqa: E731
    apart = lambda target: float(np.abs(found - target).max())  # noqa: E731
    if loss == "ipo":
        half = jnp.array((p - 0.5) / beta)[:, None] * jnp.array([[0.5, -0.5]])
        assert apart(policy(half)) < 1e-3
        assert apart(policy(half * beta)) > 0.05  # without beta
        return
    assert apart(policy(r / beta)) < 1e-3
    assert apart(policy(r)) > 0.05  # without beta
    assert apart(policy(r * beta)) > 0.05
    assert apart(policy(r / beta, ref=0.0 * ref)) > 0.05  # without the reference


# --------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (direct, "the loss 'no' of a pair is unknown; there are logistic, hinge, ipo"),
        (reference_free, "dpo.loss='no' is unknown; without a reference: simpo, orpo"),
        (reward, "reward.loss='no' is unknown; there are logistic, hinge, listwise, regression"),
    ],
)
def test_unknown_losses_are_named(objective, message):
    with pytest.raises(ValueError, match=message):
        value(objective, ONE, [[0.0, 0.0]], loss="no")


def test_a_batch_without_a_pair_costs_nothing():
    """0, not 0 / 0."""
    alone = np.array(GROUPS) * np.arange(1, 17).reshape(4, 4)  # every answer has its own prompt
    x, batch = rows()
    both = padded(x, batch.replace(groups=jnp.array(alone)), 0.0)
    for name in ("dpo", "rdpo", "ipo", "cdpo", "simpo", "orpo", "reward", "listwise"):
        loss, gradient = graded(EVERY[name])(*both)
        assert loss.value() == 0 and not gradient.any()
