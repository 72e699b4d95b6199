"""Fitting laws to a table: held-out error, sensitivity, what fit.json and the report say."""

import json
import re

import numpy as np
import pytest

from llm_jax import report
from llm_jax.scaling import fit, fit_report, runs
from llm_jax.scaling.laws import LAWS, Law, LawFit, Options

E, A, B, ALPHA, BETA = 1.82, 482.0, 2085.4, 0.348, 0.366
EXPONENT = BETA / (ALPHA + BETA)
FAST = Options(bootstrap=20)


def losses(n, d):
    return E + A * n**-ALPHA + B * d**-BETA


def write_table(path, noise=0.002, unique=False):
    """Six budgets of eight sizes from a known law, as a CSV file."""
    rng = np.random.default_rng(0)
    lines = ["N,D,loss" + ",U_D" * unique]
    for c in np.geomspace(1e18, 1e20, 6):
        best = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (c / 6) ** EXPONENT
        for n in best * np.geomspace(1 / 6, 6, 8):
            d = c / 6 / n
            loss = losses(n, d) * np.exp(noise * rng.normal())
            lines.append(f"{n},{d},{loss}" + f",{min(d, 1e9)}" * unique)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Every law of a table, with a small bootstrap."""
    table, source = runs.read(write_table(tmp_path_factory.mktemp("fit") / "runs.csv"))
    return fit.fit(table, source, "all", FAST)


def test_all_laws_see_the_same_exponent(everything):
    assert {"chinchilla1", "chinchilla2", "chinchilla3", "kaplan"} >= set(everything.fits)
    for name in ("chinchilla2", "chinchilla3"):
        assert everything.fits[name].params["a"] == pytest.approx(EXPONENT, abs=0.03)
        best = everything.fits[name].details["optimum"]
        assert best["C"] == pytest.approx(1e21) and 6 * best["N*"] * best["D*"] == pytest.approx(
            1e21
        )
        assert best["D*/N*"] == pytest.approx(best["D*"] / best["N*"])
    assert "distinct tokens" in everything.skipped["data_constrained"]
    assert set(everything.fits) | set(everything.skipped) == set(LAWS)


def test_the_optimum_is_where_the_law_is_lowest(everything):
    """N* and D* of every law of N and D against a search along C = 6 N D."""
    n = np.geomspace(1e7, 1e12, 200_001)
    for name in ("chinchilla3", "kaplan"):
        params = everything.fits[name].params
        for c in (1e19, 1e22):
            line = runs.Runs(n=n, d=c / 6 / n, c=np.full(n.shape, c), loss=np.ones(n.shape))
            lowest = n[LAWS[name].predict(params, line).argmin()]
            best_n, best_d = fit.frontier_at(params, c, 6.0)
            assert best_n == pytest.approx(
                lowest, rel=1e-3
            ) and 6 * best_n * best_d == pytest.approx(c)


def test_held_out_rows_are_not_seen(tmp_path):
    """Losses of the largest budget made 10 % worse: the predictions stay, the errors show it. A fit
    that had seen them would be off by a few per cent."""
    table, source = runs.read(write_table(tmp_path / "runs.csv"))
    worse = table.loss * np.where(table.budget == 5, 1.1, 1.0)
    spoilt = runs.Runs(table.n, table.d, table.c, worse, budget=table.budget)
    before, after = (
        fit.fit(t, source, "chinchilla3", Options(bootstrap=0)) for t in (table, spoilt)
    )
    a, b = before.predictions["chinchilla3"], after.predictions["chinchilla3"]
    assert len(a) == 8 and [p["predicted"] for p in a] == [p["predicted"] for p in b]
    found = before.fits["chinchilla3"].details["held_out"]
    assert found["mean_error_percent"] < 0.7 and "largest budget, 1e+20 FLOPs" in found["rows"]
    found = after.fits["chinchilla3"].details["held_out"]
    assert found["mean_error_percent"] == pytest.approx(100 - 100 / 1.1, abs=0.7)
    assert found["best_run"]["error_percent"] == pytest.approx(-9, abs=0.7)
    assert not before.fits["chinchilla3"].warnings
    assert "% on average; this law does not extrapolate" in after.fits["chinchilla3"].warnings[0]
    assert before.fits["chinchilla3"].n_rows == 48, "the answer is fitted to all rows"


@pytest.mark.parametrize(
    ("how", "rows"),
    [("largest", 8), ("0.25", 12), ("3e19", 16), ("none", None)],
)
def test_what_is_held_out(tmp_path, how, rows):
    table, _ = runs.read(write_table(tmp_path / "runs.csv"))
    held = fit.hold_out(table, how)
    if rows is None:
        assert held is None
        return
    assert held.rows.sum() >= rows and table.c[held.rows].min() > table.c[~held.rows].max()
    no_budgets = runs.Runs(table.n, table.d, table.c, table.loss)
    assert fit.hold_out(no_budgets, "largest").rows.sum() in range(5, 9)  # a tenth, and its equals


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("most", "--holdout=most: largest, none, a share below 1, or FLOPs"),
        ("-1", "--holdout=-1: largest"),
        ("nan", "--holdout=nan: largest"),
        ("1e25", "no run has so many FLOPs"),
        ("1e10", "leaves 0 runs to fit"),
    ],
)
def test_what_cannot_be_held_out(tmp_path, how, words):
    table, _ = runs.read(write_table(tmp_path / "runs.csv"))
    with pytest.raises(ValueError, match=re.escape(words)):
        fit.hold_out(table, how)


def test_sensitivity_is_the_fit_of_the_changed_table(everything):
    table, found = everything.runs, everything.fits["chinchilla3"]
    rows = {row["change"]: row for row in found.details["sensitivity"]}
    residual = np.abs(np.log(LAWS["chinchilla3"].predict(found.params, table) / table.loss))
    kept = np.delete(np.arange(len(table)), residual.argmax())
    alone = LAWS["chinchilla3"].fit(table.take(kept), Options(bootstrap=0)).params
    assert rows["without the worst run"]["params"] == pytest.approx(alone, rel=1e-6)
    assert rows["without the worst run"]["n_rows"] == 47
    least = LAWS["chinchilla3"].fit(table, Options(bootstrap=0, huber_delta=1e3)).params
    assert rows["delta 1e+03 (least squares)"]["params"] == pytest.approx(least, rel=1e-6)
    assert rows["without the smallest budget"]["n_rows"] == 40
    changes = {row["change"] for row in everything.fits["chinchilla2"].details["sensitivity"]}
    assert changes == {"without the smallest budget", "without the largest budget"}


def test_a_law_that_the_table_does_not_support(tmp_path):
    table, source = runs.read(write_table(tmp_path / "runs.csv"))
    with pytest.raises(ValueError, match="data_constrained needs the distinct tokens"):
        fit.fit(table, source, "data_constrained", FAST)
    with pytest.raises(ValueError, match="--law=chinchila: none of chinchilla1"):
        fit.fit(table, source, "chinchila", FAST)
    one = table.take(table.budget == 0)
    with pytest.raises(ValueError, match="no law can be fitted: chinchilla1: "):
        fit.fit(one, source, "all", FAST)


def test_repeated_tokens_are_named(tmp_path):
    table, source = runs.read(write_table(tmp_path / "runs.csv", unique=True))
    result = fit.fit(table, source, "chinchilla3", Options(bootstrap=0))
    again = int((table.d > 1.01e9).sum())
    assert f"repeated tokens: {again} of 48 rows" in result.fits["chinchilla3"].warnings[0]


@pytest.fixture
def undrawn(monkeypatch):
    """Plots are checked and named, but not drawn, which takes a second each."""
    monkeypatch.setattr(report, "save_plot", lambda plot, path: None)


def read_strictly(path):
    def refuse(word):
        raise AssertionError(f"{word} in JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_fit_json(everything, tmp_path):
    found = read_strictly(fit.write_json(everything, tmp_path))
    assert set(found) == set(everything.fits)
    law = found["chinchilla3"]
    assert set(law["params"]) == {"E", "A", "B", "alpha", "beta", "a", "b"}
    assert law["params"] == pytest.approx(everything.fits["chinchilla3"].params)
    for key in ("objective", "converged", "starts_at_optimum", "n_rows", "seconds",
                "bootstrap_seconds", "level", "at", "warnings", "details"):  # fmt: skip
        assert key in law
    assert law["converged"] is True and law["level"] == 0.9 and law["n_rows"] == 48
    for name in [*law["params"], "N*", "D*", "D*/N*"]:
        low, high = law["intervals"][name]
        assert low <= high and law["standard_errors"][name] > 0
    assert law["data"]["sha256"] == everything.source.sha256
    assert law["data"]["columns"] == {"N": "N", "D": "D", "loss": "loss"}
    assert law["data"]["options"]["bootstrap"] == 20 and law["data"]["budgets"] == 6
    assert law["data"]["largest_flops"] == pytest.approx(1e20)
    assert [p.name for p in tmp_path.iterdir()] == ["fit.json"]


def test_a_fit_that_stopped_early_is_no_answer(tmp_path, monkeypatch, undrawn):
    """Neither fit.json nor the terminal nor the report gives its numbers as the law's."""
    table, source = runs.read(write_table(tmp_path / "runs.csv"))

    def stopped(table, options):
        params = {"E": 1.2345, "A": 1.0, "B": 1.0, "alpha": 0.3, "beta": 0.3, "a": 0.5, "b": 0.5}
        return LawFit("chinchilla3", params, 0.1, False, len(table), intervals={"E": (1.0, 2.0)},
                      samples={k: np.full(9, v) for k, v in params.items()})  # fmt: skip

    law = LAWS["chinchilla3"]
    monkeypatch.setitem(LAWS, "chinchilla3", Law(stopped, law.predict, law.title, law.formula))
    result = fit.fit(table, source, "chinchilla3", FAST)
    found = read_strictly(fit.write_json(result, tmp_path / "out"))["chinchilla3"]
    assert found["converged"] is False and found["params"] is None
    assert found["intervals"] == {} and found["unconverged_params"]["E"] == 1.2345
    shown = "\n".join(fit.lines(result))
    assert "NOT CONVERGED, no answer" in shown and "1.2345" not in shown
    text = fit_report.write(result, tmp_path / "out", ["command"]).read_text()
    assert "did not converge" in text and "1.2345" not in text and "1.23 [" not in text


def test_the_report(everything, tmp_path):
    path = fit_report.write(everything, tmp_path, ["python", "-m", "x", "--columns=N:Model Size"])
    text = path.read_text()
    for words in (
        "## The laws side by side", "## The runs", "## Held out", "## Parameters", "## Sensitivity",
        "`data_constrained` is not fitted", "python -m x '--columns=N:Model Size'",
        everything.source.sha256, "IsoFLOP",
    ):  # fmt: skip
        assert words in text, words
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", text)
    images = set(re.findall(r"\(plots/(\w+\.png)\)", text))
    assert images == {p.name for p in (tmp_path / "plots").iterdir()}
    assert images >= {
        "curves.png", "isoflops.png", "contours.png", "optimal_size.png", "cloud_E_a.png",
        "tokens_per_parameter.png", "held_out.png", "residuals_chinchilla3_by_compute.png",
    }  # fmt: skip


def test_a_report_without_budgets_bootstrap_or_held_out_rows(tmp_path, undrawn):
    table, source = runs.read(write_table(tmp_path / "runs.csv"))
    plain = runs.Runs(table.n, table.d, table.c, table.loss)
    result = fit.fit(plain, source, "chinchilla3", Options(bootstrap=0), "none")
    text = fit_report.write(result, tmp_path, ["x"]).read_text()
    assert "## Held out" not in text and "cloud" not in text and "isoflops" not in text
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", text)
