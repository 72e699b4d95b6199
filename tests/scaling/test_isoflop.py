"""Chinchilla's approach 2 on sweeps from a known law, and on published points."""

import os
from pathlib import Path

import numpy as np
import pytest

from llm_jax.scaling import runs as tables
from llm_jax.scaling.laws import Options, isoflop
from llm_jax.scaling.runs import Runs

E, A, B, ALPHA, BETA = 1.82, 482.0, 2085.4, 0.348, 0.366
EXPONENT = BETA / (ALPHA + BETA)  # a of N* ~ C^a: 0.5126; alpha / (alpha + beta) would be 0.4874
POINT = Options(bootstrap=0)


def law(n, d):
    return E + A * n**-ALPHA + B * d**-BETA


def optimum(c):
    """N* of the law."""
    return (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (c / 6) ** EXPONENT


def sweep(budgets=7, sizes=12, reach=8.0, noise=0.0, seed=0, shift=1.0) -> Runs:
    """`sizes` sizes within a factor `reach` about the optimum (times `shift`) of each budget."""
    rng = np.random.default_rng(seed)
    c = np.repeat(np.geomspace(1e18, 1e21, budgets), sizes)
    n = optimum(c) * shift * np.tile(np.geomspace(1 / reach, reach, sizes), budgets)
    loss = law(n, c / (6 * n)) * np.exp(noise * rng.normal(size=len(n)))
    return Runs(n, c / (6 * n), c, loss, budget=np.repeat(np.arange(budgets), sizes))


@pytest.mark.parametrize("sizes, reach", [(12, 8.0), (6, 16.0), (20, 30.0), (40, 4.0)])
def test_exponents_of_a_known_law(sizes, reach):
    """Without noise what is left is that IsoFLOP curves are no parabolas: 0.002 at most."""
    fit = isoflop.fit(sweep(sizes=sizes, reach=reach), POINT)
    assert fit.params["a"] == pytest.approx(EXPONENT, abs=2e-3)
    assert fit.params["a"] + fit.params["b"] == pytest.approx(1, abs=1e-9)
    assert fit.converged and fit.starts_at_optimum == 1 and fit.n_rows == 7 * sizes
    for m in fit.details["minima"]:
        assert m["N"] == pytest.approx(optimum(m["C"]), rel=0.06)
        assert m["loss"] == pytest.approx(
            law(optimum(m["C"]), m["C"] / 6 / optimum(m["C"])), rel=2e-3
        )
        assert 6 * m["N"] * m["D"] == pytest.approx(m["C"], rel=1e-9)


def test_loss_of_the_frontier():
    """L* = E + k_L C^-gamma with the gamma of the law, alpha beta / (alpha + beta)."""
    fit = isoflop.fit(sweep(), POINT)
    assert fit.params["E"] == pytest.approx(E, abs=0.01)
    assert fit.params["gamma"] == pytest.approx(ALPHA * EXPONENT, abs=4e-3)
    beyond = Runs(*np.full((4, 1), np.nan)).take([0])
    beyond = Runs(n=beyond.n, d=beyond.d, c=np.array([1e22]), loss=beyond.loss)
    want = law(optimum(1e22), 1e22 / 6 / optimum(1e22))
    assert isoflop.predict(fit.params, beyond)[0] == pytest.approx(want, rel=3e-3)


def test_a_run_far_from_the_minimum_does_not_move_it():
    """A parabola through all runs alike would move N* of that budget by 38 %."""
    table = sweep()
    far = table.loss.copy()
    far[11] = 9.0  # the largest model of the smallest budget diverged
    before = isoflop.fit(table, POINT).details["minima"][0]["N"]
    after = isoflop.fit(Runs(table.n, table.d, table.c, far, budget=table.budget), POINT)
    assert after.details["minima"][0]["N"] == pytest.approx(before, rel=0.05)


def test_intervals_cover():
    """Nominal 90 % intervals of a and of N*, over 40 sweeps."""
    true_n = optimum(1e22)
    hits = np.zeros(2)
    for seed in range(40):
        fit = isoflop.fit(sweep(noise=0.002, seed=seed), Options(bootstrap=200, seed=seed))
        assert fit.at == pytest.approx(1e22) and fit.params["a"] != EXPONENT
        for i, (name, true) in enumerate((("a", EXPONENT), ("N*", true_n))):
            low, high = fit.intervals[name]
            hits[i] += low <= true <= high
    assert (hits / 40 >= 0.8).all() and (hits / 40 <= 0.99).all(), hits / 40


def test_the_bootstrap_is_the_fit_of_resampled_tables():
    """Multiplicities do what repeating rows would."""
    table = sweep(sizes=20, noise=0.01)
    times = np.random.default_rng(0).integers(0, 3, len(table))
    repeated = table.take(np.repeat(np.arange(len(table)), times))
    a = isoflop.minima(table, times[:, None].astype(float))
    b = isoflop.minima(repeated, np.ones((len(repeated), 1)))
    kept = a.weight_KxR[:, 0] > 0
    np.testing.assert_allclose(a.log_n_KxR[kept], b.log_n_KxR[kept], rtol=1e-8)
    np.testing.assert_allclose(a.loss_KxR[kept], b.loss_KxR[kept], rtol=1e-8)


def test_same_seed_same_intervals():
    first, again, other = (
        isoflop.fit(sweep(noise=0.01), Options(bootstrap=50, seed=s)) for s in (1, 1, 2)
    )
    assert first.intervals == again.intervals != other.intervals
    assert (
        set(first.intervals) == {*first.params, "N*", "D*", "D*/N*"} == set(first.standard_errors)
    )
    assert set(first.samples) == set(first.params)


def test_a_budget_without_a_minimum_is_left_out_aloud():
    table = sweep()
    loss = table.loss.copy()
    loss[:12] = 4 - 0.1 * np.log(table.n[:12])  # falls to the largest size
    loss[12:24] = 4 - 0.1 * (np.log(table.n[12:24]) - np.log(optimum(table.c[12]))) ** 2
    changed = Runs(table.n, table.d, table.c, loss, budget=table.budget)
    fit = isoflop.fit(changed, POINT)
    assert len(fit.details["minima"]) == 5
    assert fit.params["a"] == pytest.approx(EXPONENT, abs=3e-3)
    assert "budget of 1e+18 FLOPs is left out" in fit.warnings[0]
    assert "budget of 3.16e+18 FLOPs is left out (its parabola opens downwards" in fit.warnings[1]


def test_a_minimum_at_the_edge_is_none():
    """All sizes are too large: the vertex of the parabola lies beyond them, and is not believed."""
    with pytest.raises(ValueError, match="2 budgets with a minimum inside their sizes; 0 of 7"):
        isoflop.fit(sweep(shift=60.0, reach=4.0), POINT)


def test_tables_that_it_cannot_use():
    table = sweep()
    with pytest.raises(ValueError, match="chinchilla2 needs IsoFLOP budgets"):
        isoflop.fit(Runs(table.n, table.d, table.c, table.loss), POINT)
    with pytest.raises(ValueError, match="at least 2 budgets"):
        isoflop.fit(table.take(table.budget == 0), POINT)
    few = isoflop.fit(table.take(table.budget < 3), POINT)
    assert few.params["E"] == 0 and "few budgets" in few.warnings[0]


@pytest.mark.skipif("LLM_JAX_DATA" not in os.environ, reason="LLM_JAX_DATA is not set")
@pytest.mark.parametrize(
    ("what", "published"),  # Porian et al. 2024, figure 1: exponents of N*, refinedweb
    [
        ("hparams=base,warmup=long,decay=kaplan,param_count=standard", 0.7009),
        ("hparams=base,warmup=short,decay=kaplan,param_count=standard", 0.6035),
        ("hparams=base,warmup=short,decay=chinchilla,param_count=standard", 0.5714),
        ("hparams=tuned,warmup=short,decay=const,param_count=standard", 0.497),
    ],
)
def test_porians_exponents(what, published):
    """Their estimate interpolates and weights in another way: agreement within 0.03."""
    path = Path(os.environ["LLM_JAX_DATA"]) / "scaling/porian2024_isoflop_points.csv"
    table, _ = tables.read(path, "N,C,loss", [f"dataset=rw,{what}"])
    fit = isoflop.fit(table, Options(bootstrap=500))
    assert fit.params["a"] == pytest.approx(published, abs=0.03)
    low, high = fit.intervals["a"]
    assert low < fit.params["a"] < high and high - low < 0.1
