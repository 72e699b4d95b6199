"""Every law finds the law that made its rows, and refuses rows that cannot identify it."""

import dataclasses

import numpy as np
import pytest

from llm_jax.scaling.laws import LAWS, Options, data_constrained, frontier, kaplan, power
from llm_jax.scaling.runs import Runs

POINT = Options(bootstrap=0)
CHINCHILLA = {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28}
KAPLAN = {"alpha_N": 0.076, "alpha_D": 0.103, "N_c": 6.4e13, "D_c": 1.8e13}
REPEATED = CHINCHILLA | {"R_D_star": 15.0, "R_N_star": 5.0}


def grid(sizes: int = 8, tokens: int = 6) -> Runs:
    n = np.repeat(np.geomspace(1e7, 3e9, sizes), tokens)
    d = np.tile(np.geomspace(2e8, 5e10, tokens), sizes)
    return Runs(n=n, d=d, c=6 * n * d, loss=np.ones(len(n)))


def made_by(predict, params, runs: Runs, noise: float = 0.0) -> Runs:
    z = np.random.default_rng(0).standard_normal(len(runs))
    return dataclasses.replace(runs, loss=predict(params, runs) * np.exp(noise * z))


def repeated_grid() -> Runs:
    """Parameters and tokens on a grid, with four sizes of the set of distinct tokens."""
    runs = grid(8, 8)
    unique = np.minimum(runs.d, np.tile([2e8, 1e9, 5e9, 5e10], len(runs) // 4))
    return dataclasses.replace(runs, unique=unique)


RECOVERED = {
    "chinchilla3": (CHINCHILLA, grid()),
    "kaplan": (KAPLAN, grid()),
    "data_constrained": (REPEATED, repeated_grid()),
}


@pytest.mark.parametrize("name", RECOVERED)
def test_a_law_is_recovered(name):
    truth, runs = RECOVERED[name]
    law = LAWS[name]
    exact = law.fit(made_by(law.predict, truth, runs), POINT)
    assert exact.converged and exact.law == name and exact.n_rows == len(runs)
    for key, value in truth.items():
        assert exact.params[key] == pytest.approx(value, rel=1e-4), key
    noisy = law.fit(made_by(law.predict, truth, runs, 0.002), POINT)
    assert noisy.converged
    for key in truth.keys() & {"alpha", "beta", "alpha_N", "alpha_D"}:
        assert noisy.params[key] == pytest.approx(truth[key], rel=0.1), key
    again = law.predict(exact.params, runs)
    np.testing.assert_allclose(again, law.predict(truth, runs), rtol=1e-6)


def test_names():
    assert {"chinchilla1", "chinchilla2", "chinchilla3", "kaplan", "data_constrained"} == set(LAWS)
    fit = LAWS["chinchilla3"].fit(made_by(frontier_loss, CHINCHILLA, grid(), 0.003), POINT)
    assert list(fit.params) == ["E", "A", "B", "alpha", "beta", "a", "b"]
    assert fit.intervals == {} and fit.at == 10 * grid().c.max()


def frontier_loss(params, runs):
    return frontier.loss_at(params, runs.n, runs.d)


def test_the_frontier_is_the_best_split_of_the_flops():
    c = np.geomspace(1e18, 1e26, 5)
    for factor in (6.0, 4.8):
        n, d = frontier.optimal(CHINCHILLA, c, factor)
        np.testing.assert_allclose(factor * n * d, c, rtol=1e-12)
        best = frontier.loss_at(CHINCHILLA, n, d)
        for other in (0.97, 1.03):
            assert (frontier.loss_at(CHINCHILLA, n * other, d / other) > best).all()
    a, b = frontier.exponents(CHINCHILLA)
    assert (a, b) == (pytest.approx(0.28 / 0.62), pytest.approx(0.34 / 0.62))


def test_kaplans_optimum_is_the_best_split_of_the_flops():
    law = kaplan.frontier_of({k: np.array(v) for k, v in KAPLAN.items()})
    n, d = frontier.optimal(law, 1e21)
    around = np.array([0.97, 1.0, 1.03])
    losses = kaplan.predict(KAPLAN, Runs(n=n * around, d=d / around, c=6 * n * d, loss=around))
    assert losses.argmin() == 1


def test_kaplans_laws_of_one_variable_use_the_rows_where_they_hold():
    # Tokens beyond need: L(N) alone is left, and no row shows what tokens are worth by themselves.
    runs = grid(8, 12)
    fit = LAWS["kaplan"].fit(made_by(kaplan.predict, KAPLAN, runs), POINT)
    law = fit.details["L(N)"]
    assert 8 <= law["n_rows"] < len(runs)
    assert law["alpha_N"] == pytest.approx(KAPLAN["alpha_N"], abs=0.006)
    every_row = power.fit(runs.n, kaplan.predict(KAPLAN, runs), offset=False)
    assert abs(every_row.alpha - 0.076) > abs(law["alpha_N"] - 0.076)
    few = runs.take(runs.d > 1e10)
    starved = LAWS["kaplan"].fit(made_by(kaplan.predict, KAPLAN, few), POINT)
    assert "L(D)" not in starved.details and any("L(D)" in w for w in starved.warnings)


def test_data_that_is_seen_once_is_chinchillas():
    runs = grid()
    fresh = dataclasses.replace(runs, unique=runs.d)
    once = data_constrained.predict(REPEATED | {"R_N_star": 1e9}, fresh)
    np.testing.assert_allclose(once, frontier_loss(CHINCHILLA, runs), rtol=1e-7)
    none = dataclasses.replace(fresh, loss=once)
    with pytest.raises(ValueError, match="0 of 48 runs repeat their data"):
        LAWS["data_constrained"].fit(none, POINT)
    with pytest.raises(ValueError, match="distinct tokens"):
        LAWS["data_constrained"].fit(runs, POINT)


def test_repetitions_lose_value():
    one = Runs(n=np.full(4, 1e7), d=1e9 * np.array([1, 2, 40, 4000]), c=np.ones(4), loss=np.ones(4))
    one = dataclasses.replace(one, unique=np.full(4, 1e9))
    loss = data_constrained.predict(REPEATED, one)
    fresh = frontier_loss(CHINCHILLA, one)
    assert loss[0] == pytest.approx(fresh[0]) and (np.diff(loss) < 0).all()
    assert (loss[1:] > fresh[1:]).all() and loss[2] - loss[3] < 0.1 * (loss[0] - loss[1])


def test_power_law():
    x = np.geomspace(1, 1e6, 12)
    law = power.fit(x, 1.5 + 3 * x**-0.3)
    assert law.converged and (law.E, law.A, law.alpha) == pytest.approx((1.5, 3.0, 0.3), rel=1e-8)
    plain = power.fit(x, 4 * x**-0.05, offset=False)
    assert plain.E == 0 and (plain.A, plain.alpha) == pytest.approx((4.0, 0.05), rel=1e-8)
    noisy = 1.5 + 3 * x**-0.3
    noisy = noisy * np.exp(0.01 * np.random.default_rng(0).standard_normal(12))
    weights = np.random.default_rng(1).multinomial(12, np.full(12, 1 / 12), 300)
    law = power.fit(x, noisy, weights=weights)
    assert law.intervals["alpha"][0] < law.alpha < law.intervals["alpha"][1]
    np.testing.assert_allclose(power.predict(law, x), noisy, rtol=0.05)
    for bad in (np.full(12, np.nan), -x, np.ones(12)):
        with pytest.raises(ValueError):
            power.fit(bad, noisy)


def change(runs: Runs, **columns) -> Runs:
    """The runs with one value of a column replaced."""
    for name, value in columns.items():
        x = getattr(runs, name).copy()
        x[3] = value
        runs = dataclasses.replace(runs, **{name: x})
    return runs


@pytest.mark.parametrize("name", ["chinchilla3", "kaplan"])
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda r: r.take(np.arange(3)), "3 rows"),
        (lambda r: r.take(r.n == r.n[0]), "rows|different values of N"),
        (lambda r: r.take(r.d == r.d[0]), "different values of D|rows"),
        (lambda r: dataclasses.replace(r, d=1e18 / r.n), "straight line"),
        (lambda r: dataclasses.replace(r, d=20 * r.n), "straight line"),
        (lambda r: dataclasses.replace(r, budget=np.zeros(len(r), int)), "one budget"),
        (lambda r: change(r, loss=np.nan), "loss is not positive and finite in 1 of 48"),
        (lambda r: change(r, loss=-1.0), "loss is not positive"),
        (lambda r: change(r, n=np.inf), "N is not positive and finite"),
        (lambda r: change(r, d=0.0), "D is not positive"),
    ],
)
def test_rows_that_cannot_identify_a_law_are_refused(name, make, message):
    runs = made_by(frontier_loss, CHINCHILLA, grid(), 0.002)
    with pytest.raises(ValueError, match=message) as error:
        LAWS[name].fit(make(runs), POINT)
    assert "\n" not in str(error.value)


def test_duplicate_rows_are_named():
    runs = made_by(frontier_loss, CHINCHILLA, grid(), 0.002)
    fit = LAWS["chinchilla3"].fit(runs.take(np.arange(50) % 48), POINT)
    assert any(w.startswith("duplicate rows: 2 of 50") for w in fit.warnings)
    assert not LAWS["chinchilla3"].fit(runs, POINT).warnings


@pytest.mark.parametrize(
    "params, converged, warning",
    [
        (CHINCHILLA | {"E": 0.0}, True, "E is 0"),
        (CHINCHILLA | {"alpha": -0.05, "A": 1.0}, False, "alpha"),
        (CHINCHILLA | {"A": 0.0}, False, "A is 0|alpha"),
        (CHINCHILLA | {"A": 1e35, "alpha": 5.0}, False, "alpha"),
    ],
)
def test_an_optimum_at_a_boundary_is_named(params, converged, warning):
    fit = LAWS["chinchilla3"].fit(made_by(frontier_loss, params, grid(), 0.004), POINT)
    text = " ".join(fit.warnings)
    if converged:
        assert fit.converged and (fit.params["E"] > 0 or "E is 0" in text)
    else:
        # Never a silent number: either the law is refused, or its terms are hardly there.
        assert not fit.converged or fit.params["A"] * 1e7 ** -fit.params["alpha"] < 0.05
        if not fit.converged:
            assert any(word in text for word in warning.split("|"))
