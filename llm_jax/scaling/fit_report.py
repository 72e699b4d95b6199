"""report.md of fitted laws: tables of parameters, held-out predictions and sensitivity, and plots."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.report import Block, Code, Plot, Table, Text, write_report
from llm_jax.scaling import fit_plots
from llm_jax.scaling.fit import Fits
from llm_jax.scaling.laws import LAWS


def write(result: Fits, directory: str | os.PathLike, command: Sequence[str]) -> Path:
    """Writes report.md and its plots into a folder; returns the path of the former.

    Args:
      command: the words of the command that made it, shown as they are.
    """
    blocks = [
        Text(_about(result)),
        *_warnings(result),
        Text("## The laws side by side"),
        Table(_overview(result)),
        *(Text(f"`{name}` is not fitted: {why}.") for name, why in result.skipped.items()),
        *_plots(fit_plots.optima(result)),
        Text("## The runs"),
        *_plots(fit_plots.runs(result)),
        *_held_out(result),
        Text("## Parameters"),
        *(block for name in result.fits for block in _parameters(result, name)),
        *_plots(fit_plots.clouds(result)),
        *_plots(fit_plots.residuals(result)),
        *_sensitivity(result),
        Text("## How to make this again"),
        Code(" ".join(map(shlex.quote, command)), language="sh"),
        Text(
            f"The table has SHA-256 `{result.source.sha256}`. `fit.json` beside this report has every "
            "number; `python -m experiments.plan --budget=FLOPS --law=fit.json` turns a law into a model."
        ),
    ]
    path = result.source.path
    name = path.resolve().parent.name if path.name == "runs.csv" else path.stem
    return write_report(directory, f"Scaling laws: {name}", blocks)


def _plots(plots: Sequence[Plot]) -> list[Block]:
    return list(plots)


def _about(result: Fits) -> str:
    runs, source = result.runs, result.source
    budgets = "" if runs.budget is None else f" in {runs.budget.max() + 1} budgets"
    where = f" where {', '.join(source.where)}" if source.where else ""
    named = ", ".join(f"{role} = `{name}`" for role, name in source.columns.items())
    given = source.columns.keys() & {"N", "D", "C"}
    counted = f"; C = {source.flops_factor:g} N D" if len(given) == 2 or "C" not in given else ""
    held = result.held_out
    return (
        f"{len(runs)} of {source.n_read} rows of `{source.path.name}`{where}: "
        f"{len(np.unique(runs.n))} model sizes from {runs.n.min():.3g} to {runs.n.max():.3g} "
        f"parameters{budgets}, {runs.d.min():.3g} to {runs.d.max():.3g} tokens, {runs.c.min():.3g} to "
        f"{runs.c.max():.3g} FLOPs. Columns: {named}{counted}. Loss is in nats per token. "
        + (
            f"{result.options.level:.0%} intervals come from {result.options.bootstrap:,} bootstrap "
            "fits. "
            if result.options.bootstrap
            else "Without a bootstrap there are no intervals. "
        )
        + (f"Held out for the test: {held.what}." if held else "Nothing is held out.")
    )


def _warnings(result: Fits) -> list[Block]:
    found = [f"- {w}" for w in result.warnings]
    for name, fit in result.fits.items():
        if not fit.converged:
            found.append(f"- **`{name}` did not converge: it has no answer here**")
        found += [f"- `{name}`: {w}" for w in fit.warnings]
    return [Text("## Warnings\n\n" + "\n".join(found))] if found else []


def _overview(result: Fits) -> list[dict[str, Any]]:
    rows = []
    for name, fit in result.fits.items():
        row: dict[str, Any] = {"law": LAWS[name].title, "converged": fit.converged}
        if fit.converged:
            values = fit.params | (fit.details.get("optimum") or {})
            for key in ("a", "b", "E", "N*", "D*", "D*/N*"):
                row[_heading(key, fit.at)] = _with_interval(fit, key, values)
            held = fit.details.get("held_out", {}).get("best_run")
            row["best held-out run"] = f"{held['error_percent']:+.2f} %" if held else None
        rows.append(row)
    return rows


def _heading(key: str, at: float | None) -> str:
    return f"{key} at {at:.3g} FLOPs" if "*" in key and at else key


def _with_interval(fit: Any, key: str, values: dict[str, float]) -> str | None:
    if key not in values:
        return None
    low, high = fit.intervals.get(key, (None, None))
    band = "" if low is None else f" [{low:.3g}, {high:.3g}]"
    return f"{values[key]:.3g}{band}"


def _parameters(result: Fits, name: str) -> list[Block]:
    fit = result.fits[name]
    title = f"### {LAWS[name].title}\n\n$${LAWS[name].formula}$$"
    if not fit.converged:
        return [Text(f"{title}\n\n**Not converged: no answer.**")]
    values = fit.params | {k: v for k, v in (fit.details.get("optimum") or {}).items() if k != "C"}
    percent = f"{fit.level:.0%}"
    rows = [
        {
            "parameter": _heading(key, fit.at),
            "value": f"{value:.6g}",
            f"{percent} from": _short(fit.intervals.get(key, (None, None))[0]),
            f"{percent} to": _short(fit.intervals.get(key, (None, None))[1]),
            "standard error": _short(fit.standard_errors.get(key)),
        }
        for key, value in values.items()
    ]
    about = (
        f"Objective {fit.objective:.8g} over {fit.n_rows} rows; {fit.starts_at_optimum:.0%} of the "
        f"starts reached it; {fit.seconds:.2f} s, and {fit.bootstrap_seconds:.2f} s for the bootstrap."
    )
    return [Text(f"{title}\n\n{about}"), Table(rows)]


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.5g}"


def _held_out(result: Fits) -> list[Block]:
    tested = [name for name in result.fits if name in result.predictions]
    if not tested:
        return []
    held = result.held_out
    rows = [
        {
            "law": name,
            "runs": result.fits[name].details["held_out"]["n_rows"],
            "mean error, %": result.fits[name].details["held_out"]["mean_error_percent"],
            "largest error, %": result.fits[name].details["held_out"]["largest_error_percent"],
            "best run, measured": result.fits[name].details["held_out"]["best_run"]["measured"],
            "predicted": result.fits[name].details["held_out"]["best_run"]["predicted"],
            "error": f"{result.fits[name].details['held_out']['best_run']['error_percent']:+.2f} %",
        }
        for name in tested
    ]
    text = (
        f"## Held out\n\nThe laws were fitted again without {held.what}, and predicted these "
        f"{held.rows.sum()} runs. Laws of the frontier alone (approaches 1 and 2) say only how good the "
        "best run of a budget can be."
    )
    main = next(
        (n for n in ("chinchilla3", "data_constrained", "kaplan") if n in tested), tested[0]
    )
    every = [
        {"C": f"{p['C']:.3g}", "N": f"{p['N']:.4g}", "D": f"{p['D']:.4g}", "measured": p["measured"],
         "predicted": p["predicted"], "from": p["low"] if np.isfinite(p["low"]) else None,
         "to": p["high"] if np.isfinite(p["high"]) else None,
         "error": f"{p['error_percent']:+.2f} %"}
        for p in result.predictions[main]
    ]  # fmt: skip
    shown = every[:20]
    caption = f"{main}, run by run" + (f" (20 of {len(every)})" if len(every) > 20 else "")
    return [
        Text(text),
        Table(rows),
        *_plots(fit_plots.held_out(result)),
        Table(shown, caption=caption),
    ]


def _sensitivity(result: Fits) -> list[Block]:
    blocks: list[Block] = []
    for name, fit in result.fits.items():
        if not fit.details.get("sensitivity"):
            continue
        keys = [k for k in fit.params if k not in ("k_N", "k_D", "k_L")]
        rows = [{"change": "none", "rows": fit.n_rows} | {k: f"{fit.params[k]:.4g}" for k in keys}]
        for row in fit.details["sensitivity"]:
            values = row["params"]
            found = {k: f"{values[k]:.4g}" for k in keys if k in values} if values else {}
            rows.append({"change": row["change"], "rows": row["n_rows"]} | found)
            if row["why"]:
                rows[-1][keys[0]] = row["why"]
        blocks.append(Table(rows, caption=name, columns=["change", "rows", *keys]))
    head = Text("## Sensitivity\n\nThe same law fitted again after each change.")
    return [head, *blocks] if blocks else []
