"""Standard errors against closed forms, intervals and p-values against simulations."""

import math

import numpy as np
import pytest
from scipy import stats

from llm_jax.eval import uncertainty as U


def test_standard_error():
    values = [1.0, 2.0, 4.0, 5.0]
    assert U.standard_error(values) == pytest.approx(math.sqrt((4 + 1 + 1 + 4) / 3 / 4))
    right = [1] * 30 + [0] * 10
    assert U.standard_error(right) == pytest.approx(math.sqrt(0.75 * 0.25 / 39))
    assert U.proportion_standard_error(30, 40) == pytest.approx(math.sqrt(0.75 * 0.25 / 40))
    assert math.isnan(U.standard_error([0.5]))
    with pytest.raises(ValueError, match="a list of scores"):
        U.standard_error([])
    with pytest.raises(ValueError, match="not finite"):
        U.standard_error([1.0, math.nan])


def test_clusters():
    rng = np.random.default_rng(0)
    values = rng.random(30)
    alone = [f"question {i}" for i in range(30)]
    assert U.clustered_standard_error(values, alone) == pytest.approx(U.standard_error(values))
    # Four copies of each question tell no more than one.
    copied, passages = np.repeat(values, 4), np.repeat(alone, 4)
    mixed = rng.permutation(120)
    found = U.clustered_standard_error(copied[mixed], passages[mixed])
    assert found == pytest.approx(U.standard_error(values))
    assert U.standard_error(copied) < 0.51 * found  # as if there were 120 questions
    assert math.isnan(U.clustered_standard_error([0, 1], ["a", "a"]))
    with pytest.raises(ValueError, match="2 values need as many clusters, not 3"):
        U.clustered_standard_error([0, 1], "abc")


def test_clustered_error_is_that_of_the_simulated_mean():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 9, 60)
    names = np.repeat(np.arange(60), sizes)
    runs = 2000
    shared = rng.normal(size=(runs, 60))[:, names]
    values = shared + rng.normal(size=shared.shape)
    true = values.mean(axis=1).std()
    clustered = np.mean([U.clustered_standard_error(v, names) for v in values[:300]])
    naive = np.mean([U.standard_error(v) for v in values[:300]])
    assert clustered == pytest.approx(true, rel=0.05) and naive < 0.65 * true


def test_wilson():
    for k, n in ((0, 10), (10, 10), (3, 17), (500, 1000)):
        want = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
        assert U.wilson(k, n) == pytest.approx((want.low, want.high))
    assert U.wilson(10, 10)[0] == pytest.approx(0.7225, abs=1e-4)  # p ± 1.96 SE is [1, 1]
    assert U.wilson(5, 10, 0.99)[0] < U.wilson(5, 10, 0.9)[0]
    # Coverage, exactly: over k ~ Binomial(20, p), for p from end to end.
    intervals = np.array([U.wilson(k, 20) for k in range(21)])
    grid = np.linspace(0.01, 0.99, 99)
    inside = (intervals[:, :1] <= grid) & (grid <= intervals[:, 1:])
    coverage = (inside * stats.binom.pmf(np.arange(21)[:, None], 20, grid)).sum(axis=0)
    assert coverage.mean() == pytest.approx(0.95, abs=0.01) and coverage.min() > 0.83
    for bad in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="is no proportion"):
            U.wilson(*bad)
    with pytest.raises(ValueError, match="confidence=95"):
        U.wilson(1, 2, 95)


def test_bootstrap_of_differences():
    rng = np.random.default_rng(2)
    a = rng.random(200)
    b = a - 0.1 + 0.2 * rng.normal(size=200)
    found = U.paired_bootstrap(a, b)
    assert found.difference == pytest.approx((a - b).mean())
    assert found.standard_error == pytest.approx(U.standard_error(a - b), rel=0.03)
    low, high = stats.norm.interval(0.95, found.difference, found.standard_error)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.004)
    assert found == U.paired_bootstrap(a, b) != U.paired_bootstrap(a, b, seed=1)
    other = U.paired_bootstrap(b, a)
    assert other.difference == -found.difference and other.high == pytest.approx(
        -found.low, abs=0.004
    )
    assert U.paired_bootstrap(a, a).p_value == 1.0
    wide = U.paired_bootstrap(a, b, confidence=0.99)
    assert wide.low < found.low and wide.high > found.high


def test_unpaired_analysis_misses_what_paired_analysis_finds():
    """A model that is a little better on every question: most of the spread is the questions'."""
    rng = np.random.default_rng(3)
    hard = rng.normal(size=100)
    a, b = hard + 0.1 + 0.1 * rng.normal(size=100), hard + 0.1 * rng.normal(size=100)
    assert U.paired_bootstrap(a, b).p_value < 0.001
    assert stats.ttest_ind(a, b).pvalue > 0.3  # takes the same questions for different ones
    shuffled = rng.permutation(b)
    assert U.paired_bootstrap(a, shuffled).p_value > 0.1


def test_bootstrap_covers_and_is_uniform_under_the_null():
    rng = np.random.default_rng(4)
    runs, covered, p_values = 300, 0, []
    for run in range(runs):
        a = rng.normal(size=80)
        b = a + rng.normal(size=80)  # mean difference 0
        found = U.paired_bootstrap(a, b, samples=400, seed=run)
        covered += found.low <= 0 <= found.high
        p_values.append(found.p_value)
    assert 0.91 < covered / runs < 0.98
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    # Half the p-value (one-sided) or twice it would be far from uniform.
    assert stats.kstest(np.array(p_values) / 2, "uniform").pvalue < 1e-6


def test_bootstrap_of_clusters():
    rng = np.random.default_rng(5)
    a, b = rng.random((2, 60))
    names = np.arange(60)
    alone = U.paired_bootstrap(a, b)
    copied = U.paired_bootstrap(np.repeat(a, 5), np.repeat(b, 5), clusters=np.repeat(names, 5))
    assert copied.standard_error == pytest.approx(alone.standard_error, rel=0.05)
    assert copied.difference == pytest.approx(alone.difference)
    naive = U.paired_bootstrap(np.repeat(a, 5), np.repeat(b, 5))
    assert naive.standard_error < 0.5 * alone.standard_error
    with pytest.raises(ValueError, match="two items"):
        U.paired_bootstrap([0, 1], [1, 1], clusters=[0, 0])
    with pytest.raises(ValueError, match="2 and 1 scores"):
        U.paired_bootstrap([0, 1], [1])


def test_mcnemar():
    first, second = np.zeros((2, 100), int)
    first[:1], second[1:10] = 1, 1  # one item against nine, ninety that both have wrong
    p, b, c = U.mcnemar(first, second)
    assert (b, c) == (1, 9) and p == pytest.approx(2 * (1 + 10) / 2**10)
    assert p == pytest.approx(stats.binomtest(1, 10).pvalue)
    assert U.mcnemar(first, first) == (1.0, 0, 0)
    assert U.mcnemar([1, 0], [0, 1])[0] == 1.0  # 2 P(X <= 1) would be 1.5
    with pytest.raises(ValueError, match="0 or 1"):
        U.mcnemar([0.5], [1])
