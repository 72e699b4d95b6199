"""Fits of published tables, against what was published about them."""

import csv
import json
import pathlib

import numpy as np
import pytest

from llm_jax.scaling.laws import LAWS, Options, checks, data_constrained, huber
from llm_jax.scaling.runs import Runs

POINT = Options(bootstrap=0)
FEW = Options(bootstrap=200)


@pytest.fixture(scope="module")
def folder(data_dir):
    return pathlib.Path(data_dir) / "scaling"


def read(path: pathlib.Path, loss: str = "loss", size: str = "N", unique=None, **where) -> Runs:
    with path.open() as f:
        rows = [r for r in csv.DictReader(f) if all(r[k] == v for k, v in where.items())]
    n, d, y = (np.array([float(r[k]) for r in rows]) for k in (size, "D", loss))
    u = None if unique is None else np.array([float(r[unique]) for r in rows])
    return Runs(n=n, d=d, c=6 * n * d, loss=y, unique=u)


def inside(fit, names=("E", "A", "B", "alpha", "beta", "a", "b")):
    return all(fit.intervals[k][0] < fit.params[k] < fit.intervals[k][1] for k in names)


@pytest.mark.parametrize(
    "size, expected",
    [
        ("N", {"E": 1.620, "alpha": 0.2526, "beta": 0.2622}),
        ("N_no_embed", {"alpha": 0.2245, "beta": 0.2570}),
    ],
)
def test_gadre(folder, size, expected):
    path = folder / "gadre2024_overtraining_104.csv"
    runs = read(path, "loss_c4_val", size, train_set="c4_original")
    fit = LAWS["chinchilla3"].fit(runs, POINT)
    assert fit.converged and fit.n_rows == 34
    for name, value in expected.items():
        assert fit.params[name] == pytest.approx(value, abs=0.002 if name != "E" else 0.003)


def test_muennighoff(folder):
    published = json.loads((folder / "published_tables.json").read_text())["muennighoff"]
    runs = read(folder / "muennighoff_datablations_fit182.csv", unique="U_D")
    params = {k.upper(): float(np.exp(published[k])) for k in "abe"}
    params |= {k: published[k] for k in ("alpha", "beta", "R_D_star", "R_N_star")}
    predicted = data_constrained.predict(params, runs)
    theirs = huber.huber(np.log(predicted / runs.loss), 1e-3).sum()
    assert theirs == pytest.approx(published["huber_sum"], rel=1e-6)
    goodness = checks.goodness(runs.loss, predicted)
    assert goodness["r2"] == pytest.approx(published["r2"], abs=1e-6)
    assert goodness["r2_log"] > 0.8  # it is the R^2 of the loss that was published
    ours = LAWS["data_constrained"].fit(runs, POINT)
    assert ours.converged and ours.objective < 0.5 * theirs
    tied = ours.details["tied"]
    assert tied["params"]["alpha"] == tied["params"]["beta"] and tied["converged"]
    assert ours.objective < tied["objective"] < 0.5 * theirs


@pytest.mark.slow
def test_gemstones_and_porian_with_intervals(folder):
    gemstones = read(folder / "gemstones_hot.csv")
    tuned = {"dataset": "rw", "hparams": "tuned", "warmup": "short", "val": "val"}
    porian = read(folder / "porian2024_isoflop_points.csv", **tuned)
    for runs, rows in ((gemstones, 220), (porian, 121)):
        fit = LAWS["chinchilla3"].fit(runs, FEW)
        assert fit.converged and fit.n_rows == rows and inside(fit)
        assert fit.details["bootstrap_converged"] > 0.97
