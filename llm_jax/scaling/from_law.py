"""What a law says of a budget: N* parameters and D* tokens, by a fit.json or as published."""

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.scaling import published
from llm_jax.scaling.assumptions import Assumptions
from llm_jax.scaling.fit import frontier_at
from llm_jax.scaling.laws import LAWS, frontier
from llm_jax.scaling.runs import Runs

DEFAULT_LAW = "chinchilla3"
FAR = 100.0  # times the largest run's FLOPs from which an extrapolation is called far
DEFAULT_MFU = 0.4  # of budgets in hours
# Columns of a sweep's runs.csv that N may have been; any other is taken for all parameters.
COUNTED = {"N_non_embedding": "non_embedding"}


@dataclass(frozen=True)
class Law:
    """A law that a plan can follow.

    Attributes:
      name: chinchilla3, hoffmann3, ...
      source: the file, or the paper.
      params: of E + A / N^alpha + B / D^beta, or of N* = k_N C^a, D* = k_D C^b.
      counted: what N is, a key of `parameters.CONVENTIONS`.
      flops_factor: C = flops_factor * N * D.
      intervals: of N*, D* and D*/N* at `at` FLOPs, {name: (low, high)}.
      at, level: FLOPs and coverage of the intervals.
      largest: FLOPs of the largest run that it was fitted to; None: not known.
      held_out: mean error in % of the runs that it was tested on; None: it was not.
      warnings: of the fit.
    """

    name: str
    source: str
    params: Mapping[str, float]
    counted: str = "all"
    flops_factor: float = 6.0
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    at: float | None = None
    level: float | None = None
    largest: float | None = None
    held_out: float | None = None
    warnings: tuple[str, ...] = ()


def load(text: str, counted: str | None = None) -> tuple[Law, list[Law]]:
    """--law=FILE[:NAME] or --law=PUBLISHED -> that law, and others to show beside it.

    Of a file with several laws `chinchilla3` is taken if NAME is not given, or its only one. Laws of
    the file that did not converge or have no optimum of N against D are left out of the others.
    `counted` says what their N is (published laws say it themselves).

    Raises:
      FileNotFoundError: no such file and no such published law.
      ValueError: no fit.json, no such law in it, or one that is no answer.
    """
    if text in published.LAWS:
        laws = {name: _published(name) for name in published.LAWS}
        return laws.pop(text), list(laws.values())
    path, _, name = text.partition(":")
    fits = _read(text, path)
    name = name or (DEFAULT_LAW if DEFAULT_LAW in fits or len(fits) > 1 else next(iter(fits)))
    if name not in fits:
        near = difflib.get_close_matches(name, fits, n=1)
        hint = f"did you mean {path}:{near[0]}? " if near else ""
        raise ValueError(f"--law={text}: no law {name!r}; {hint}it has {', '.join(fits)}")
    usable = {n: f for n, f in fits.items() if not _why_not(f)}
    if why := _why_not(fits[name]):
        others = ", ".join(f"--law={path}:{n}" for n in usable)
        raise ValueError(f"--law={path}:{name} {why}; {f'take {others}' if others else 'refit'}")
    laws = {n: _fitted(n, path, f, counted) for n, f in usable.items()}
    return laws.pop(name), list(laws.values())


def optimum(law: Law, c: float) -> tuple[float, float]:
    """(N*, D*) of `c` FLOPs, by the law's own way of counting all three."""
    n, d = frontier_at(law.params, c, law.flops_factor)
    return float(n), float(d)


def loss(law: Law, n: float, d: float) -> float | None:
    """Nats per token of n parameters after d tokens; None if the law does not say."""
    if _is_published(law):
        return float(frontier.loss_at(law.params, n, d)) if "A" in law.params else None
    n_1, d_1 = np.array([n]), np.array([d])
    runs = Runs(n=n_1, d=d_1, c=law.flops_factor * n_1 * d_1, loss=np.ones(1))
    try:
        return float(LAWS[law.name].predict(law.params, runs)[0])
    except KeyError:  # another program's law, or only its optima
        return None


def budget(text: str, a: Assumptions, n_devices: int) -> tuple[float, str]:
    """--budget=1e21, or 24h of `n_devices` devices at the utilisation "mfu" (0.4 unless given).

    Returns:
      FLOPs, and where they come from, in words.

    Raises:
      ValueError: neither FLOPs nor hours.
    """
    hours = text.endswith("h")
    try:
        value = float(text.removesuffix("h"))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"--budget={text}: FLOPs such as 1e21, or hours such as 24h")
    if not hours:
        return value, "flag"
    peak, mfu = a["peak_flops"] * n_devices / a.chip.devices, a.get("mfu", DEFAULT_MFU)
    words = f"{value:g} h of {n_devices:,} {a.chip.name} at {mfu:.0%} of their peak"
    return value * 3600 * peak * mfu * a["goodput"], words


def answer(law: Law, others: list[Law], c: float, words: str = "flag") -> dict[str, Any]:
    """N* and D* of a budget with their intervals where the fit has them, the other laws' beside
    them, and what is doubtful; ready for JSON. `words` say where the budget comes from."""
    n, d = optimum(law, c)
    out = {
        "law": law.name,
        "source": law.source,
        "params": dict(law.params),
        "budget": c,
        "budget_from": words,
        "N*": n,
        "D*": d,
        "D*/N*": d / n,
        "loss": loss(law, n, d),
        "counted": law.counted,
        "intervals": {},
        "level": law.level,
        "held_out_error_percent": law.held_out,
        "others": [],
        "warnings": list(law.warnings),
    }
    if law.at and abs(math.log(c / law.at)) < 0.01:
        out["intervals"] = {k: list(law.intervals[k]) for k in ("N*", "D*") if k in law.intervals}
    elif law.intervals:
        out["warnings"].append(
            f"no intervals: the fit has them for {law.at:.3g} FLOPs; fit again with --at={c:.3g}"
        )
    if any(key.startswith("R_D") for key in law.params):
        out["warnings"].append("repeated data: N* and D* are for text that is read once")
    if law.largest and c > FAR * law.largest:
        out["warnings"].append(
            f"far extrapolation: {c / law.largest:,.0f} times the FLOPs of the largest run "
            f"({law.largest:.3g}); run a larger sweep before spending this"
        )
    if _is_published(law):
        out["warnings"].append(
            "published law: other data, tokenizer and training than yours; a sweep of your own decides"
        )
    elif law.largest is None:
        out["warnings"].append("range unknown: the fit does not say how large its runs were")
    if abs(math.log(law.flops_factor * n * d / c)) > 0.05:
        out["warnings"].append(
            f"other FLOPs: {law.flops_factor:g} N* D* is {law.flops_factor * n * d / c:.2f} times the "
            "budget, because the law counts FLOPs otherwise"
        )
    for other in others:
        their_n, their_d = optimum(other, c)
        out["others"].append(
            {"law": other.name, "N*": their_n, "D*": their_d, "D*/N*": their_d / their_n}
            | {"loss": loss(other, their_n, their_d), "counted": other.counted}
        )
    return out


def _is_published(law: Law) -> bool:
    """Fitted laws have names of published ones too."""
    return published.SOURCES.get(law.name) == law.source


def _published(name: str) -> Law:
    return Law(name, published.SOURCES[name], published.LAWS[name], published.N_COUNTED[name])


def _read(text: str, path: str) -> dict[str, dict]:
    if not Path(path).is_file():
        near = difflib.get_close_matches(text, published.LAWS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise FileNotFoundError(
            f"--law={text}: no such file, and no published law; {hint}there are "
            f"{', '.join(published.LAWS)}"
        )
    try:
        fits = json.loads(Path(path).read_text())
        good = fits and all("params" in f and "converged" in f for f in fits.values())
    except (ValueError, AttributeError, TypeError):
        good = False
    if not good:
        raise ValueError(f"--law={path}: not a fit.json of experiments.fit_scaling")
    return fits


def _why_not(fit: dict) -> str:
    """Why a fit is no answer; empty if it is one."""
    params = fit["params"]
    if not fit["converged"] or not params:
        return "did not converge"
    try:
        best = frontier_at(params, 1e20, 6.0)
    except (KeyError, TypeError):  # a parameter that is not there, or null
        best = None
    if best is None or not all(0 < float(x) < math.inf for x in best):
        return "has no best size for a budget"
    return ""


def _fitted(name: str, path: str, fit: dict, counted: str | None) -> Law:
    data = fit.get("data") or {}
    return Law(
        name,
        path,
        fit["params"],
        counted or COUNTED.get((data.get("columns") or {}).get("N"), "all"),
        data.get("flops_factor") or 6.0,
        {k: tuple(v) for k, v in (fit.get("intervals") or {}).items() if None not in v},
        fit.get("at"),
        fit.get("level"),
        data.get("largest_flops"),
        ((fit.get("details") or {}).get("held_out") or {}).get("mean_error_percent"),
        tuple(fit.get("warnings") or ()),
    )
