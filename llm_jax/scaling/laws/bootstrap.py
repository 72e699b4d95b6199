"""The bootstrap over runs: resamples as multiplicities of rows, and intervals from them."""

import time
from collections.abc import Callable, Mapping

import numpy as np

from llm_jax.scaling.laws import frontier, huber, search
from llm_jax.scaling.laws.result import LawFit, Options
from llm_jax.scaling.runs import Runs

# A fit whose resamples reach a stationary point more rarely says so.
_ENOUGH = 0.995
_FEWEST = 3  # rows of a budget that is drawn from by itself
_LAD = 2.6


def resample(runs: Runs, n: int, seed: int) -> np.ndarray:
    """n resamples with replacement, as multiplicities of rows, int64 [n, R].

    What is drawn are runs: the points of one training curve are drawn together, as their errors
    are not independent. Without curves each budget keeps its number of rows; budgets of one or two
    rows count as one together, as do all rows without budgets.
    """
    unit_R, stratum_U = _units(runs)
    rng = np.random.default_rng(seed)
    drawn = np.zeros((n, len(stratum_U)), np.int64)
    for value in np.unique(stratum_U):
        members = np.flatnonzero(stratum_U == value)
        even = np.full(len(members), 1 / len(members))
        drawn[:, members] = rng.multinomial(len(members), even, size=n)
    return drawn[:, unit_R]


def _units(runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """The unit that each row belongs to [R], and the stratum of each unit [U]."""
    if runs.curve is not None and len(np.unique(runs.curve)) < len(runs):
        unit = np.unique(runs.curve, return_inverse=True)[1].reshape(-1)
        return unit, np.zeros(unit.max() + 1, int)
    unit = np.arange(len(runs))
    if runs.budget is None:
        return unit, np.zeros(len(runs), int)
    _, stratum, count = np.unique(runs.budget, return_inverse=True, return_counts=True)
    stratum = stratum.reshape(-1)
    return unit, np.where(count[stratum] < _FEWEST, -1, stratum)


def spread_scale(runs: Runs, residual_R: np.ndarray, n_params: int, delta: float) -> float:
    """What the deviations of resamples must be multiplied with in a small table.

    With P parameters and R rows, in squares: least squares leaves residuals too small by
    (R - P) / R, and drawing U units from S strata has (U - S) / U of the variance. Least absolute
    deviations, which Huber's loss is to residuals beyond delta, spreads too far instead, as each
    resample fits P of its own rows exactly: by exp(2.6 P / R), a constant from simulations of 20 to
    240 rows (`benchmarks/coverage.py`). The share of rows within delta, less the P exact ones, mixes
    the two. All tend to 1 in large tables.
    """
    _, stratum_U = _units(runs)
    n_rows, n_units, n_strata = len(runs), len(stratum_U), len(np.unique(stratum_U))
    inside = (np.abs(residual_R) <= delta).sum() - n_params
    share = np.clip(inside / (n_rows - n_params), 0.0, 1.0)
    squares = n_rows / (n_rows - n_params) * n_units / max(n_units - n_strata, 1)
    absolute = np.exp(-_LAD * n_params / n_rows)
    return float(np.sqrt(share * squares + (1 - share) * absolute))


def add_intervals(
    result: LawFit,
    runs: Runs,
    options: Options,
    problem: huber.Problem,
    theta: np.ndarray,
    named: Callable[[np.ndarray], dict[str, np.ndarray]],
    law_of: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] = dict,
) -> None:
    """Fills in samples, intervals and standard errors of a fit, in place.

    Percentile intervals; the deviations of the resamples from the fit are first multiplied with
    `spread_scale`, which `result.details["spread_scale"]` shows.

    Args:
      theta: the optimum, [P].
      named: theta [B, P] -> {parameter: [B]}.
      law_of: from that to E, A, B, alpha, beta of `frontier`, for N*, D* and D*/N* at `result.at`.
    """
    if not options.bootstrap:
        return
    begin = time.perf_counter()
    weights = resample(runs, options.bootstrap, options.seed)
    found = search.refit(problem, weights, theta, options.huber_delta)
    if found.stationary.mean() < _ENOUGH:
        result.warnings.append(
            f"bootstrap: {(~found.stationary).sum()} of {len(weights)} resamples did not converge"
        )
    residual_R = problem.law(theta[None])[0][0] - problem.log_loss
    scale = spread_scale(runs, residual_R, len(theta), options.huber_delta)
    samples = named(scaled(theta, found.theta, scale, problem))
    n, d = frontier.optimal(law_of(samples), result.at, options.flops_factor)
    everything = samples | {"N*": n, "D*": d, "D*/N*": d / n}
    result.samples = samples
    result.intervals = percentiles(everything, options.level)
    result.standard_errors = standard_errors(everything)
    result.details["spread_scale"] = scale
    result.details["bootstrap_converged"] = float(found.stationary.mean())
    result.bootstrap_seconds = time.perf_counter() - begin


def scaled(
    theta: np.ndarray, resampled_BxP: np.ndarray, scale: float, problem: huber.Problem
) -> np.ndarray:
    """Resamples with their deviations from theta multiplied; one at a bound (E = 0) stays there."""
    at_bound = (resampled_BxP <= problem.lower) | (resampled_BxP >= problem.upper)
    moved = np.clip(theta + scale * (resampled_BxP - theta), problem.lower, problem.upper)
    return np.where(at_bound, resampled_BxP, moved)


def percentiles(samples: Mapping[str, np.ndarray], level: float) -> dict[str, tuple[float, float]]:
    """The central interval of `level` of each sample."""
    tails = [50 * (1 - level), 50 * (1 + level)]
    return {k: tuple(map(float, np.percentile(v, tails))) for k, v in samples.items()}


def standard_errors(samples: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The standard deviation of each sample."""
    return {k: float(np.std(v, ddof=1)) for k, v in samples.items()}
