"""Best-of-n from samples agrees with what can be counted, and its divergence with its theorem."""

import itertools
import math

import numpy as np
import pytest

from llm_jax import report
from llm_jax.align import best_of_n
from llm_jax.align.win_rate import mean_win_rate, win_rate

RNG = np.random.default_rng(0)


def all_subsets(scores, values, n):
    """Mean over all choices of n of the samples of a best one's value; the tied share."""
    out = []
    for chosen in itertools.combinations(range(len(scores)), n):
        best = max(scores[i] for i in chosen)
        out.append(np.mean([values[i] for i in chosen if scores[i] == best]))
    return np.mean(out)


@pytest.mark.parametrize("scores", [RNG.normal(size=7), np.array([2.0, 0, 1, 1, 2, 0, 2])])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_weights_are_those_of_all_choices(scores, n):
    """Of tied answers the lengths are shared; a stable sort would take the last one's."""
    lengths = RNG.normal(size=7)
    weights = best_of_n.best_weights(scores[None], n)[0]
    assert weights.sum() == pytest.approx(1)
    assert weights @ lengths == pytest.approx(all_subsets(scores, lengths, n))
    assert best_of_n.expected_best(scores[None], n)[0] == pytest.approx(
        all_subsets(scores, scores, n)
    )


def test_expected_best_is_unbiased():
    """Of n of N uniform numbers the best is n / (n + 1); the best of a prompt's first n scatters more,
    and the best of all N is too high."""
    scores = RNG.random((4000, 12))
    for n in (1, 3, 8):
        found = best_of_n.expected_best(scores, n)
        error = found.std() / math.sqrt(len(found))
        assert abs(found.mean() - n / (n + 1)) < 4 * error
        assert found.std() < scores[:, :n].max(axis=1).std()


def test_many_samples_overflow_nothing():
    scores = np.arange(5000.0)[None]
    # Of n of the numbers 0 .. N - 1 without replacement the largest is n (N + 1) / (n + 1) - 1.
    for n in (1, 2, 1000, 5000):
        expected = n * 5001 / (n + 1) - 1
        assert best_of_n.expected_best(scores, n)[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_wins_are_those_of_all_choices(n):
    scores = np.array([2.0, 0, 1, 1, 2, 0])
    counted = []
    for one in range(6):
        rest = [i for i in range(6) if i != one]
        for chosen in itertools.combinations(rest, n):
            ahead = max(scores[i] for i in chosen) - scores[one]
            counted.append(1.0 if ahead > 0 else 0.5 if ahead == 0 else 0.0)
    assert best_of_n.best_wins(scores[None], n)[0] == pytest.approx(np.mean(counted))
    assert np.mean(counted) <= best_of_n.win_rate_bound(n)
    without_ties = RNG.normal(size=(3, 6))
    np.testing.assert_allclose(best_of_n.best_wins(without_ties, n), n / (n + 1))


def enumerated_kl(p, r, n):
    """KL of best-of-n by all n-tuples of answers, the first of the best taken."""
    best = np.zeros(len(p))
    for drawn in itertools.product(range(len(p)), repeat=n):
        first = max(range(n), key=lambda i: (r[drawn[i]], -i))
        best[drawn[first]] += np.prod([p[i] for i in drawn])
    return float(np.sum(best * np.log(best / np.array(p))))


@pytest.mark.parametrize(
    "rewards", [[3.0, 1, 2, 0], [1.0, 1, 0, 2], [5.0, 5, 5, 5], [0.0, 1, 1, 1]]
)
def test_kl_exact_is_that_of_all_draws(rewards):
    p = [0.1, 0.2, 0.3, 0.4]
    for n in (1, 2, 4):
        found = best_of_n.kl_exact(p, rewards, n)
        assert found == pytest.approx(enumerated_kl(p, rewards, n), abs=1e-12)
        assert -1e-12 <= found <= best_of_n.kl_bound(n) + 1e-12


def test_the_bound_is_one_and_is_met_by_many_answers():
    for n in (2, 16, 1000):
        gaps = []
        for size in (4, 64, 4096, 10**6):
            p = RNG.dirichlet(np.ones(size))
            gap = best_of_n.kl_bound(n) - best_of_n.kl_exact(p, RNG.random(size), n)
            assert gap > 0
            gaps.append(gap)
        assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-2 * best_of_n.kl_bound(n)


def test_a_judge_of_two_scores_is_far_below_the_bound():
    """The best of many is then the base given a yes: KL -> log 1 / P(yes)."""
    p, r = np.full(1000, 1e-3), np.arange(1000) % 4 == 0
    assert best_of_n.kl_exact(p, r, 10**6) == pytest.approx(math.log(4))
    assert best_of_n.kl_bound(10**6) > 12


def test_pick_takes_the_best_of_the_first():
    answers, scores = [list("abcd"), list("efgh")], [[1, 3, 3, 9], [5, 4, 3, 2]]
    assert best_of_n.pick(answers, scores, 3) == ["b", "e"]
    assert best_of_n.pick(answers, scores, 4) == ["d", "e"]
    with pytest.raises(ValueError, match="4 answers to pick from, not 5"):
        best_of_n.pick(answers, scores, 5)


def test_ties():
    assert best_of_n.ties([[1, 1, 2], [0, 0, 0]]) == pytest.approx((1 / 3 + 1) / 2)
    assert best_of_n.ties([[1]]) == 0


# ---------------------------------------------------------------------------------------- win rates


def test_one_answer_each():
    a, b = [3, 3, 3, 1, 0, 5, 6, 7], [1, 2, 3, 2, 0, 1, 1, 1]
    found = win_rate(a, b)
    assert found.rate == 6 / 8  # 5 won, 2 tied; without the ties it would be 5 / 6
    assert found.p_value == pytest.approx(2 * (1 + 6) / 2**6)  # 5 of 6, two-sided, exact
    assert 0.4 < found.low < found.rate < found.high < 1
    back = win_rate(b, a)
    assert back.rate == pytest.approx(1 - found.rate) and back.p_value == found.p_value


def test_several_answers_are_compared_each_with_each():
    a, b = [[1.0, 4.0], [2.0, 2.0]], [[0.0, 2.0, 4.0], [2.0, 1.0, 1.0]]
    # Prompt 1: 1 beats 0; 4 beats 0 and 2 and ties 4. Prompt 2: each 2 beats two and ties one.
    assert win_rate(a, b).rate == pytest.approx((3.5 / 6 + 5 / 6) / 2)


def test_the_interval_is_over_prompts():
    """Ten answers to each of 40 prompts, all alike: 400 comparisons say no more than 40."""
    won = RNG.random(40) < 0.6
    a, b = np.repeat(won[:, None], 10, axis=1), np.full((40, 10), 0.5)
    many, one = win_rate(a, b), win_rate(a[:, 0], b[:, 0])
    assert many.rate == one.rate
    assert (many.high - many.low) == pytest.approx(one.high - one.low, rel=0.2)


def test_an_interval_covers():
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        skill = rng.normal(0.3, 1, (50, 1))
        found = win_rate(skill + rng.normal(size=(50, 4)), rng.normal(size=(50, 4)), seed=seed)
        # Of a difference of normals with variance 1 + 1 + 1 and mean 0.3.
        covered += found.low <= 0.5687 <= found.high
    assert covered >= 52


def test_all_won_is_not_certain():
    found = win_rate(np.ones((5, 3)), np.zeros((5, 3)))
    assert found.rate == 1 and found.low < 0.7 and found.high == 1
    assert found.p_value == pytest.approx(2 * 0.5**5)
    with pytest.raises(ValueError, match="two prompts"):
        win_rate([[1, 2]], [[0, 1]])
    with pytest.raises(ValueError, match="3 and 2 prompts"):
        win_rate([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="not finite"):
        win_rate([1, np.nan], [1, 2])
    assert mean_win_rate([0.5, 0.5]).p_value == 1


# --------------------------------------------------------------------------------------- comparison


def test_comparison(tmp_path):
    scores = RNG.normal(size=(30, 9))
    tuned = best_of_n.Policy("tuned", scores[:, :2] + 1, np.full((30, 2), 7), kl=0.4, kl_error=0.1)
    warm = best_of_n.Policy("warm", scores[:, :2], np.full((30, 2), 7))
    points = best_of_n.compare(scores, -10 * scores, others=[tuned, warm])
    assert [p.name for p in points] == [
        "base", "best of 2", "best of 4", "best of 8", "tuned", "warm",
    ]  # fmt: skip
    base, *best, theirs, _ = points
    assert base.kl == 0 and base.wins is None and base.score == pytest.approx(scores.mean())
    assert [p.wins.rate for p in best] == pytest.approx([2 / 3, 4 / 5, 8 / 9])
    assert all(a.score < b.score and a.kl < b.kl for a, b in itertools.pairwise(points[:4]))
    for p in points[:4]:
        assert p.score_low < p.score < p.score_high
        assert p.length == pytest.approx(-10 * p.score)  # chosen as the scores are
    assert theirs.score == pytest.approx(scores[:, :2].mean() + 1) and theirs.length == 7
    assert theirs.wins.rate > 0.6 and theirs.wins.p_value < 0.05
    table, plot = best_of_n.table(points), best_of_n.plot(points)
    text = report.write_report(tmp_path, "Best of n", [table, plot]).read_text()
    assert "≤ 1.204" in text and "0.4000 ± 0.1000" in text
    assert (tmp_path / "plots" / "best_of_n.png").stat().st_size > 10_000
    assert plot.series[0].x[3] == pytest.approx(math.sqrt(math.log(8) - 7 / 8))
    assert [mark.label for mark in plot.hlines] == ["warm"]  # no divergence is known of it


def test_what_cannot_be_compared():
    scores = RNG.normal(size=(3, 4))
    with pytest.raises(ValueError, match="best of 8 cannot be estimated from 4 answers"):
        best_of_n.compare(scores, scores, ns=[8])
    with pytest.raises(ValueError, match="two of them at least"):
        best_of_n.compare(scores[:1], scores[:1])
    with pytest.raises(ValueError, match=r"tuned answered 2 prompts, the base 3"):
        best_of_n.compare(
            scores, scores, others=[best_of_n.Policy("tuned", scores[:2], scores[:2])]
        )
    assert best_of_n.compare(scores, scores)[-1].wins is None  # best of all four: none is left
    for call in (best_of_n.kl_bound, best_of_n.win_rate_bound):
        with pytest.raises(ValueError, match="at least 1"):
            call(0)
    with pytest.raises(ValueError, match="add up to 1"):
        best_of_n.kl_exact([0.5, 0.6], [0, 1], 2)
