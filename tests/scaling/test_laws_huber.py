"""The solver: exact derivatives, stationary optima, and never an answer that is not one."""

import numpy as np
import pytest

from llm_jax.scaling.laws import huber, kaplan, powers, repeated, search
from llm_jax.scaling.runs import Runs

DELTA = 1e-3


def grid_runs(noise: float = 0.005, seed: int = 0, unique: bool = False) -> Runs:
    rng = np.random.default_rng(seed)
    n = np.repeat(np.geomspace(1e7, 1e9, 6), 7)
    d = np.tile(np.geomspace(3e8, 3e10, 7), 6)
    loss = (1.7 + 400 / n**0.34 + 410 / d**0.28) * np.exp(noise * rng.standard_normal(len(n)))
    repeats = d / np.tile([1.0, 4.0, 16.0], len(d) // 3) if unique else None
    return Runs(n=n, d=d, c=6 * n * d, loss=loss, unique=repeats)


def chinchilla_rows(runs: Runs) -> powers.Powers:
    return powers.Powers.of(np.stack([runs.n, runs.d]), runs.loss)


LAWS = {
    "powers": (
        lambda runs: chinchilla_rows(runs).problem,
        np.array([0.5, -1.0, -0.9, 0.3, 0.4]),
    ),
    "kaplan": (lambda runs: kaplan._Rows.of(runs).problem, np.array([0.1, 8.0, 0.8, 8.5])),
    "repeated": (
        lambda runs: repeated.Rows.of(runs).problem,
        np.array([0.5, -1.0, -0.9, 0.3, 0.4, -2.0, -1.5]),
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_derivatives_are_those_of_the_law(name):
    problem_of, theta = LAWS[name]
    problem = problem_of(grid_runs(unique=True))
    theta = theta + 0.03 * np.random.default_rng(0).standard_normal((3, len(theta)))
    psi = np.random.default_rng(1).standard_normal((3, len(problem.log_loss)))
    _, jac, hessian = problem.law(theta)
    step = 1e-6 * np.eye(theta.shape[1])
    ends = [(problem.law(theta + h), problem.law(theta - h)) for h in step]
    jac_by_difference = np.stack([(up[0] - down[0]) / 2e-6 for up, down in ends], 1)
    np.testing.assert_allclose(jac, jac_by_difference, atol=1e-8 * np.abs(jac).max())
    second = np.stack(
        [np.einsum("bpr,br->bp", up[1] - down[1], psi) / 2e-6 for up, down in ends], 1
    )
    exact = hessian(np.zeros_like(psi), psi)
    np.testing.assert_allclose(exact, second, atol=1e-7 * np.abs(exact).max())
    gauss_newton = hessian(np.ones_like(psi), np.zeros_like(psi))
    np.testing.assert_allclose(gauss_newton, np.einsum("bpr,bqr->bpq", jac, jac), rtol=1e-9)


@pytest.mark.parametrize("delta", [1e-1, 1e-3, 1e-4])
def test_an_optimum_is_stationary_and_lower_than_its_surroundings(delta):
    rows = chinchilla_rows(grid_runs())
    point = search.point_fit(rows.problem, rows.starts(delta), delta)
    assert point.converged

    def objective(theta):
        value, jac, _ = rows.problem.law(theta)
        x = value - rows.log_loss
        psi = np.clip(x, -delta, delta)
        return huber.huber(x, delta).sum(1), np.einsum("bpr,br->bp", jac, psi)

    at, gradient = objective(point.theta[None])
    assert at[0] == pytest.approx(point.objective, rel=1e-12)
    assert np.abs(gradient).max() < 1e-10 * delta * len(rows.log_loss)
    around = point.theta + 1e-3 * np.random.default_rng(0).standard_normal((200, 5))
    assert (objective(around)[0] > at[0]).all()


def test_multiplicities_are_copies_of_rows():
    runs = grid_runs()
    weights = np.random.default_rng(0).integers(0, 3, len(runs))
    rows, copied = (
        chinchilla_rows(runs),
        chinchilla_rows(runs.take(np.repeat(np.arange(42), weights))),
    )
    start = np.array([[0.5, -1.0, -0.9, 0.3, 0.3]])
    ours = huber.minimise(rows.problem, weights[None], start, DELTA)
    shift = np.array([copied.centre - rows.centre])
    start = start - np.concatenate([[[0.0]], start[:, 3:] * shift, [[0.0, 0.0]]], 1)
    theirs = huber.minimise(copied.problem, np.ones(1), start, DELTA)
    np.testing.assert_allclose(ours.objective, theirs.objective, rtol=1e-12)
    for a, b in zip(rows.natural(ours.theta), copied.natural(theirs.theta), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8)


def test_a_batch_is_its_fits_one_by_one():
    rows = chinchilla_rows(grid_runs())
    weights = np.random.default_rng(0).multinomial(42, np.full(42, 1 / 42), size=40)
    start = np.tile([0.5, -1.0, -0.9, 0.3, 0.3], (40, 1))
    batch = huber.minimise(rows.problem, weights, start, DELTA)
    for i in range(0, 40, 8):
        alone = huber.minimise(rows.problem, weights[i : i + 1], start[:1], DELTA)
        np.testing.assert_allclose(alone.theta[0], batch.theta[i], rtol=1e-9)


def test_a_fit_that_is_cut_short_is_not_stationary():
    rows = chinchilla_rows(grid_runs())
    start = np.array([[0.0, -1.0, -0.5, 0.8, 0.2]])
    cut = huber.minimise(rows.problem, np.ones(1), start, DELTA, max_iterations=3)
    whole = huber.minimise(rows.problem, np.ones(1), start, DELTA)
    assert not cut.stationary[0] and cut.objective[0] > whole.objective[0]
    assert whole.stationary[0]


def test_rows_without_noise_are_fitted_exactly():
    rows = chinchilla_rows(grid_runs(noise=0.0))
    point = search.point_fit(rows.problem, rows.starts(DELTA), DELTA)
    assert point.converged and point.objective < 1e-25
    e, size, alpha = rows.natural(point.theta[None])
    np.testing.assert_allclose([e[0], *size[0], *alpha[0]], [1.7, 400, 410, 0.34, 0.28], rtol=1e-9)


def test_best_start_of_each_cell():
    objective = np.arange(64.0)[::-1].reshape(8, 8)
    best = search.best_of_cells(objective.reshape(-1), 8, 2)
    # Cells are 2 by 2 points, and the lowest of each is its last.
    assert sorted(best) == sorted(8 * i + j for i in (1, 3, 5, 7) for j in (1, 3, 5, 7))
