"""The famous failure: a mean of Huber terms under default tolerances stops early and says success."""

import numpy as np
import pytest
from scipy import optimize

from llm_jax.scaling.laws import LAWS, Options, multistart
from llm_jax.scaling.runs import Runs

DELTA = 1e-3


@pytest.fixture(scope="module")
def runs():
    """240 runs scattered over sizes and budgets as in the figures of Hoffmann et al. 2022."""
    rng = np.random.default_rng(0)
    n = np.exp(rng.uniform(np.log(5e7), np.log(1e10), 240))
    d = np.clip(20 * n * np.exp(1.2 * rng.standard_normal(240)), 3e8, 1e12)
    loss = (1.82 + 480 / n**0.35 + 2100 / d**0.37) * np.exp(0.005 * rng.standard_normal(240))
    return Runs(n=n, d=d, c=6 * n * d, loss=loss)


@pytest.fixture(scope="module")
def ours(runs):
    return LAWS["chinchilla3"].fit(runs, Options(bootstrap=0))


def test_the_mean_with_default_tolerances_stops_early_and_reports_success(runs, ours):
    def mean(theta):
        value, gradient = multistart.objective(theta, runs, DELTA)
        return value / len(runs), gradient / len(runs)

    start = np.array([0.5, 5.0, 5.0, 0.5, 0.5])  # a point of Hoffmann's grid
    found = optimize.minimize(mean, start, jac=True, method="L-BFGS-B")
    at_stop = found.fun * len(runs)
    assert found.success
    assert at_stop > 1.01 * ours.objective
    assert ours.converged and ours.starts_at_optimum > 0.8
    assert ours.params["A"] == pytest.approx(480, rel=0.5)
    assert abs(np.log(np.exp(found.x[1]) / ours.params["A"])) > 0.1


def test_our_optimum_is_that_of_many_tight_starts(runs, ours):
    starts = multistart.starts()
    some = starts[np.random.default_rng(1).permutation(len(starts))[:8]]
    theta, objective = multistart.minimise(runs, DELTA, some)
    best = theta[np.argmin(objective)]
    assert ours.objective <= objective.min() + 1e-12
    found = [ours.params[k] for k in ("E", "A", "B", "alpha", "beta")]
    np.testing.assert_allclose([*np.exp(best[:3]), *best[3:]], found, rtol=1e-4)


def test_the_objective_is_a_sum(runs, ours):
    p = ours.params
    residual = np.log(p["E"] + p["A"] / runs.n ** p["alpha"] + p["B"] / runs.d ** p["beta"])
    residual = np.abs(residual - np.log(runs.loss))
    terms = np.where(residual <= DELTA, residual**2 / 2, DELTA * (residual - DELTA / 2))
    assert ours.objective == pytest.approx(terms.sum(), rel=1e-10)


def test_the_gradient_of_the_reference_is_exact(runs):
    theta = np.array([0.55, 6.0, 7.5, 0.34, 0.36])
    _, gradient = multistart.objective(theta, runs, DELTA)
    numeric = optimize.approx_fprime(theta, lambda t: multistart.objective(t, runs, DELTA)[0], 1e-7)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3)
    assert len(multistart.starts()) == 4500
