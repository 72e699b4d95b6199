"""Fits laws to a table of runs: every law that its columns support, with held-out error and
sensitivity, and writes fit.json."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.scaling.laws import LAWS, LawFit, Options, frontier, kaplan, optima
from llm_jax.scaling.runs import FEWEST_ROWS, Runs, Source

# These give the loss of the best model of a budget, not of any model.
FRONTIER_ONLY = ("chinchilla1", "chinchilla2")
HELD_OUT_ROWS = 0.1  # of a table that is not made of budgets
PREDICTION_SAMPLES = 200  # resamples behind the interval of a held-out prediction
DOUBTFUL_PERCENT = 2.0  # mean error on held-out rows from which a law is called doubtful


@dataclass(frozen=True)
class HeldOut:
    """Rows that a law is tested on, having been fitted to all others.

    Attributes:
      what: which rows, in words.
      rows: bool [R], the rows held out.
    """

    what: str
    rows: np.ndarray


@dataclass
class Fits:
    """Everything that was fitted to one table.

    Attributes:
      fits: law -> fit; `converged` may be False, and then `params` are no answer.
      skipped: law -> why the table does not support it.
      predictions: law -> one row for each held-out run: C, N, D, measured, predicted, low, high,
        error_percent.
    """

    runs: Runs
    source: Source
    options: Options
    held_out: HeldOut | None
    fits: dict[str, LawFit] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    predictions: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def fit(runs: Runs, source: Source, law: str, options: Options, holdout: str = "largest") -> Fits:
    """Fits one law, or with law="all" each that the table supports.

    Raises:
      ValueError: an unknown law or holdout; or the only law asked for, or every law, cannot be
        fitted to this table.
    """
    if law != "all" and law not in LAWS:
        raise ValueError(f"--law={law}: none of {', '.join(LAWS)}, all")
    result = Fits(runs, source, options, hold_out(runs, holdout), warnings=list(source.warnings))
    for name in LAWS if law == "all" else [law]:
        try:
            found = LAWS[name].fit(runs, options)
        except ValueError as e:
            if law != "all":
                raise
            result.skipped[name] = " ".join(str(e).split())
            continue
        result.fits[name] = found
        found.warnings = _repeated_tokens(runs, name) + _new(found.warnings, result.warnings)
        if found.converged:
            _test(result, name)
            found.details["sensitivity"] = sensitivity(runs, name, found, options)
            found.details["optimum"] = optimum(found, options.flops_factor)
    if not result.fits:
        raise ValueError(
            "no law can be fitted: " + "; ".join(map(": ".join, result.skipped.items()))
        )
    return result


def _repeated_tokens(runs: Runs, name: str) -> list[str]:
    if runs.unique is None or name == "data_constrained":
        return []
    again = runs.d > 1.01 * runs.unique
    return [
        f"repeated tokens: {again.sum()} of {len(runs)} rows saw tokens more than once; this law "
        "counts them as new (data_constrained does not, --where leaves them out)"
    ] * bool(again.any())


def _new(warnings: list[str], known: list[str]) -> list[str]:
    """Warnings of a law whose name the table's own do not have already."""
    names = {w.partition(":")[0] for w in known}
    return [w for w in warnings if w.partition(":")[0] not in names]


def hold_out(runs: Runs, how: str) -> HeldOut | None:
    """The rows to test on: `largest` (budget; without budgets the tenth of the rows with most
    FLOPs), `none`, a share of the rows below 1, or FLOPs from which on rows are held out.

    Raises:
      ValueError: another word, or a choice that leaves nothing on one side.
    """
    if how == "none":
        return None
    try:
        value = HELD_OUT_ROWS if how == "largest" else float(how)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise ValueError(f"--holdout={how}: largest, none, a share below 1, or FLOPs")
    if how == "largest" and runs.budget is not None:
        last = runs.budget.max()
        if last == 0:
            return None
        rows = runs.budget == last
        what = f"the largest budget, {np.median(runs.c[rows]):.3g} FLOPs"
    elif value < 1:
        count = max(1, round(value * len(runs)))
        rows = runs.c >= np.sort(runs.c)[-count]
        what = f"the {rows.sum()} runs of most FLOPs, from {runs.c[rows].min():.3g} on"
    else:
        rows = runs.c >= value
        what = f"runs of {value:.3g} FLOPs and more"
        if not rows.any():
            raise ValueError(f"--holdout={how}: no run has so many FLOPs ({runs.c.max():.3g})")
    if (~rows).sum() < FEWEST_ROWS:
        if how == "largest":
            return None
        raise ValueError(f"--holdout={how} leaves {(~rows).sum()} runs to fit")
    return HeldOut(what, rows)


def _test(result: Fits, name: str) -> None:
    """Fits a law without the held-out rows and predicts them."""
    if result.held_out is None:
        return
    rest = result.runs.take(~result.held_out.rows)
    held = result.runs.take(result.held_out.rows)
    options = dataclasses.replace(
        result.options, bootstrap=min(result.options.bootstrap, PREDICTION_SAMPLES)
    )
    found = result.fits[name]
    try:
        trial = LAWS[name].fit(rest, options)
    except ValueError as e:
        found.warnings.append(f"no held-out error: {' '.join(str(e).split())}")
        return
    if not trial.converged:
        found.warnings.append(
            "no held-out error: the fit without the held-out rows did not converge"
        )
        return
    if name in FRONTIER_ONLY:
        if held.budget is None:
            return  # which of the rows lie on the frontier is not known
        held = held.take(np.array([held.loss.argmin()]))
    predicted = LAWS[name].predict(trial.params, held)
    low, high = prediction_interval(name, trial, held)
    error = 100 * (predicted / held.loss - 1)
    result.predictions[name] = [
        dict(zip(("C", "N", "D", "measured", "predicted", "low", "high", "error_percent"),
                 map(float, row), strict=True))
        for row in zip(held.c, held.n, held.d, held.loss, predicted, low, high, error, strict=True)
    ]  # fmt: skip
    if np.mean(np.abs(error)) > DOUBTFUL_PERCENT:
        found.warnings.append(
            f"held-out error: predictions of {result.held_out.what} are off by "
            f"{np.mean(np.abs(error)):.1f} % on average; this law does not extrapolate well here"
        )
    best = int(held.loss.argmin())
    found.details["held_out"] = {
        "rows": result.held_out.what,
        "n_rows": len(held),
        "mean_error_percent": float(np.mean(np.abs(error))),
        "largest_error_percent": float(np.max(np.abs(error))),
        "best_run": {
            "measured": float(held.loss[best]),
            "predicted": float(predicted[best]),
            "error_percent": float(error[best]),
        },
    }


def prediction_interval(name: str, found: LawFit, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of the predicted losses, [R] each, from the resamples; NaN without
    a bootstrap. Of the law's value: the noise of a single run is not in it."""
    count = min([len(v) for v in found.samples.values()] or [0], default=0)
    if count < 2:
        return np.full(len(runs), np.nan), np.full(len(runs), np.nan)
    predicted = [
        LAWS[name].predict({k: float(v[i]) for k, v in found.samples.items()}, runs)
        for i in range(count)
    ]
    tail = 50 * (1 - found.level)
    low, high = np.percentile(predicted, [tail, 100 - tail], axis=0)
    return low, high


def sensitivity(runs: Runs, name: str, found: LawFit, options: Options) -> list[dict[str, Any]]:
    """The law again under changes that should not matter: other deltas, without the runs that it
    fits worst, without the least and the most compute. One row each: change, n_rows, params (None
    where that fit did not converge)."""
    changes: list[tuple[str, Runs, Options]] = []
    plain = dataclasses.replace(options, bootstrap=0)
    for factor, words in ((0.1, "a tenth"), (10, "ten times"), (1e6, "least squares")):
        delta = options.huber_delta * factor
        changes.append(
            (f"delta {delta:.0e} ({words})", runs, dataclasses.replace(plain, huber_delta=delta))
        )
    if name not in FRONTIER_ONLY:
        residual = np.abs(np.log(LAWS[name].predict(found.params, runs) / runs.loss))
        for count in sorted({1, max(2, round(0.02 * len(runs))), max(3, round(0.05 * len(runs)))}):
            keep = np.argsort(residual, kind="stable")[: len(runs) - count]
            words = "worst run" if count == 1 else f"{count} worst runs"
            changes.append((f"without the {words}", runs.take(np.sort(keep)), plain))
    for words, rows in _ends(runs):
        changes.append((words, runs.take(rows), plain))
    rows = []
    for change, part, how in changes:
        params, why = None, ""
        if len(part) >= FEWEST_ROWS:
            try:
                again = LAWS[name].fit(part, how)
                params = again.params if again.converged else None
                why = "" if again.converged else "not converged"
            except ValueError as e:
                why = " ".join(str(e).split())
        if params == found.params:
            continue  # a law without Huber's delta
        rows.append({"change": change, "n_rows": len(part), "params": params, "why": why})
    return rows


def _ends(runs: Runs) -> list[tuple[str, np.ndarray]]:
    if runs.budget is not None and runs.budget.max() > 1:
        return [
            ("without the smallest budget", runs.budget > 0),
            ("without the largest budget", runs.budget < runs.budget.max()),
        ]
    low, high = np.quantile(runs.c, [HELD_OUT_ROWS, 1 - HELD_OUT_ROWS])
    return [("without the tenth of least FLOPs", runs.c > low),
            ("without the tenth of most FLOPs", runs.c < high)]  # fmt: skip


def frontier_at(
    params: Mapping[str, Any], flops: Any, flops_factor: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """N* and D* of a law for these FLOPs; None if it has no optimum of N against D. Parameters may
    be bootstrap samples; they broadcast with the FLOPs."""
    if "k_N" in params:
        return optima.sizes_at(params, flops)
    if "alpha_N" in params:
        params = kaplan.frontier_of(params)
    if params.keys() >= {"A", "B", "alpha", "beta"}:
        return frontier.optimal(params, flops, flops_factor)
    return None


def optimum(found: LawFit, flops_factor: float) -> dict[str, float] | None:
    """{C, N*, D*, D*/N*} at the FLOPs of the options."""
    best = frontier_at(found.params, found.at, flops_factor)
    if best is None:
        return None
    n, d = map(float, best)
    return {"C": float(found.at), "N*": n, "D*": d, "D*/N*": d / n}


def to_json(result: Fits, name: str) -> dict[str, Any]:
    """What fit.json says of one law; a fit that did not converge has no `params`."""
    found = result.fits[name]
    source = result.source
    answer: dict[str, Any] = {"params": found.params if found.converged else None}
    if not found.converged:
        answer["unconverged_params"] = found.params
    answer |= {
        "objective": found.objective,
        "converged": found.converged,
        "starts_at_optimum": found.starts_at_optimum,
        "intervals": {k: list(v) for k, v in found.intervals.items()} if found.converged else {},
        "standard_errors": found.standard_errors if found.converged else {},
        "n_rows": found.n_rows,
        "seconds": found.seconds,
        "bootstrap_seconds": found.bootstrap_seconds,
        "level": found.level,
        "at": found.at,
        "warnings": result.warnings + found.warnings,
        "details": found.details,
        "data": {
            "input": str(source.path),
            "sha256": source.sha256,
            "columns": source.columns,
            "where": source.where,
            "rows_in_file": source.n_read,
            "largest_flops": float(result.runs.c.max()),
            "flops_factor": source.flops_factor,
            "budgets": None if result.runs.budget is None else int(result.runs.budget.max()) + 1,
            "options": dataclasses.asdict(result.options),
        },
    }
    return _plain(answer)


def write_json(result: Fits, directory: str | os.PathLike) -> Path:
    """Writes `directory`/fit.json, {law: ...}, in one move."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "fit.json"
    text = json.dumps(
        {name: to_json(result, name) for name in result.fits}, indent=2, allow_nan=False
    )
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text + "\n", "utf-8")
    os.replace(temporary, path)
    return path


def _plain(value: Any) -> Any:
    """What JSON can hold: no arrays, no numpy numbers, None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def lines(result: Fits) -> Sequence[str]:
    """What a terminal shows: one block a law, warnings last."""
    out = []
    source, runs = result.source, result.runs
    budgets = "" if runs.budget is None else f", {runs.budget.max() + 1} budgets"
    out.append(
        f"{source.path.name}: {len(runs)} of {source.n_read} rows, "
        f"{len(np.unique(runs.n))} sizes{budgets}, {runs.c.min():.3g} to {runs.c.max():.3g} FLOPs"
    )
    for name, found in result.fits.items():
        out += ["", *_law_lines(name, found)]
    for name, why in result.skipped.items():
        out += ["", f"{name}: skipped: {why}"]
    if result.warnings:
        out += ["", *(f"warning: {w}" for w in result.warnings)]
    return out


def _law_lines(name: str, found: LawFit) -> list[str]:
    head = f"{name} ({LAWS[name].title}): "
    if not found.converged:
        return [
            head
            + f"NOT CONVERGED, no answer (objective {found.objective:.6g}; fit.json has where it "
            "stopped as unconverged_params)",
            *(f"  warning: {w}" for w in found.warnings),
        ]
    out = [
        head + f"converged, objective {found.objective:.6g}, {found.n_rows} rows, "
        f"{found.starts_at_optimum:.0%} of starts at the optimum, "
        f"{found.seconds:.2f} s + {found.bootstrap_seconds:.2f} s bootstrap"
    ]
    best = found.details.get("optimum") or {}
    values = found.params | {k: v for k, v in best.items() if k != "C"}
    for key, value in values.items():
        low, high = found.intervals.get(key, (np.nan, np.nan))
        error = found.standard_errors.get(key, np.nan)
        band = f"  [{low:.5g}, {high:.5g}]  ± {error:.3g}" if np.isfinite(low) else ""
        out.append(
            f"  {key:8s} {value:<12.6g}{band}"
            + (f"  at {found.at:.3g} FLOPs" if key in best else "")
        )
    held = found.details.get("held_out")
    if held:
        best_run = held["best_run"]
        out.append(
            f"  held out ({held['rows']}): best run predicted {best_run['predicted']:.4f}, measured "
            f"{best_run['measured']:.4f} ({best_run['error_percent']:+.2f} %); mean error "
            f"{held['mean_error_percent']:.2f} % over {held['n_rows']} runs"
        )
    return out + [f"  warning: {w}" for w in found.warnings]
