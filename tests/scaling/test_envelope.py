"""Chinchilla's approach 1 on curves of a known law, and on published runs."""

import os
from pathlib import Path

import numpy as np
import pytest

from llm_jax.scaling import runs as tables
from llm_jax.scaling.laws import Options, envelope
from llm_jax.scaling.runs import Runs

E, A, B, ALPHA, BETA = 1.82, 482.0, 2085.4, 0.348, 0.366
EXPONENT = BETA / (ALPHA + BETA)
POINT = Options(bootstrap=0)


def curves(models=25, points=30, noise=0.0, seed=0, named=False) -> Runs:
    """Models from 20M to 20B parameters, each measured from 2 to 200 tokens a parameter."""
    rng = np.random.default_rng(seed)
    n = np.repeat(np.geomspace(2e7, 2e10, models), points)
    d = n * np.tile(np.geomspace(2, 200, points), models)
    loss = (E + A * n**-ALPHA + B * d**-BETA) * np.exp(noise * rng.normal(size=len(n)))
    curve = np.repeat(np.arange(models), points) if named else None
    return Runs(n, d, 6 * n * d, loss, curve=curve)


def test_exponents_of_a_known_law():
    fit = envelope.fit(curves(), POINT)
    assert fit.params["a"] == pytest.approx(EXPONENT, abs=4e-3)
    assert fit.params["a"] + fit.params["b"] == pytest.approx(1, abs=1e-9)
    assert fit.params["E"] == pytest.approx(E, abs=0.01)
    assert fit.details["curves"] == 25 and fit.details["sizes_on_envelope"] == 23


def test_curves_by_run_or_by_size():
    """Two runs of one size, the second worse by 0.1: as one curve their mean would win nowhere."""
    table = curves(models=9, named=True)
    worse = Runs(table.n, table.d, table.c, table.loss + 0.1, curve=table.curve + 9)
    both = Runs(*(np.concatenate([getattr(table, k), getattr(worse, k)])
                  for k in ("n", "d", "c", "loss")),
                curve=np.concatenate([table.curve, worse.curve]))  # fmt: skip
    assert envelope.fit(both, POINT).params == envelope.fit(table, POINT).params
    by_size = envelope.fit(Runs(both.n, both.d, both.c, both.loss), POINT)
    assert by_size.details["curves"] == 9 and by_size.params["E"] > E + 0.03


def test_nothing_is_extrapolated_and_edges_are_no_optima():
    """Where only the smallest models have got, or the largest wins, nothing is known of N*."""
    table = curves(models=12)
    c = envelope.interpolate(table)
    point = envelope.envelope(c, np.ones((12, 1), bool))
    used = point.weight_KxR[:, 0] > 0
    chosen = np.exp(point.log_n_KxR[used, 0])
    assert c.n_M.min() < chosen.min() and chosen.max() < c.n_M.max()
    for m, n in enumerate(c.n_M):
        measured = np.log(table.c[table.n == n])
        inside = (c.log_c_K >= measured.min()) & (c.log_c_K <= measured.max())
        np.testing.assert_array_equal(np.isfinite(c.loss_MxK[m]), inside)


def test_a_resample_without_a_curve_is_the_envelope_of_the_others():
    table = curves(models=8, noise=0.003)
    c = envelope.interpolate(table)
    present = np.ones((8, 2), bool)
    present[3, 1] = False
    both = envelope.envelope(c, present)
    alone = envelope.envelope(
        envelope.Curves(c.log_c_K, *(np.delete(x, 3, 0) for x in (c.n_M, c.loss_MxK, c.log_d_MxK))),
        np.ones((7, 1), bool),
    )
    for x, y in zip(vars(both).values(), vars(alone).values(), strict=True):
        np.testing.assert_array_equal(x[:, 1] if x.ndim == 2 else x, y[:, 0] if y.ndim == 2 else y)
    assert (both.log_n_KxR[:, 0] != both.log_n_KxR[:, 1]).any()


def test_a_resample_with_one_best_size_has_no_law():
    """Its N* would not grow at all: a = 0 was never measured."""
    c = envelope.interpolate(curves(models=8))
    present = np.zeros((8, 1), bool)
    present[[2, 3, 4]] = True  # only the middle one lies between others
    assert envelope.envelope(c, present).weight_KxR.sum() == 0


def test_intervals_hold_the_truth_and_repeat():
    first, again = (envelope.fit(curves(noise=2e-4), Options(bootstrap=200)) for _ in range(2))
    assert first.intervals == again.intervals
    low, high = first.intervals["a"]
    assert low < EXPONENT < high and high - low < 0.06
    assert set(first.intervals) == {*first.params, "N*", "D*", "D*/N*"}


@pytest.mark.parametrize("models, points, words", [
    (3, 30, "at least 4 training curves"),
    (9, 1, "there are 0"),
])  # fmt: skip
def test_tables_that_it_cannot_use(models, points, words):
    with pytest.raises(ValueError, match=words):
        envelope.fit(curves(models, points), POINT)


def test_curves_that_never_cross():
    table = curves(models=9)
    table = Runs(table.n, table.d, table.c, 5 - 0.1 * np.log(table.n / 1e7))
    with pytest.raises(ValueError, match="0 of 9 sizes are the best somewhere"):
        envelope.fit(table, POINT)


@pytest.mark.skipif("LLM_JAX_DATA" not in os.environ, reason="LLM_JAX_DATA is not set")
def test_published_runs():
    """Porian's tuned runs give 0.497 by their own method; the curves of Gemstones give an interval."""
    folder = Path(os.environ["LLM_JAX_DATA"]) / "scaling"
    where = ["dataset=rw,hparams=tuned,decay=const,param_count=standard"]
    table, _ = tables.read(folder / "porian2024_isoflop_points.csv", "N,C,loss", where)
    fit = envelope.fit(table, Options(bootstrap=500))
    assert fit.params["a"] == pytest.approx(0.497, abs=0.02)
    assert fit.intervals["a"][0] < 0.497 < fit.intervals["a"][1]
    table, _ = tables.read(folder / "gemstones_hot.csv", "N,D,loss,run:run_name")
    fit = envelope.fit(table, Options(bootstrap=500))
    assert fit.details["curves"] == 22
    assert 0.3 < fit.intervals["a"][0] < fit.params["a"] < fit.intervals["a"][1] < 0.9
