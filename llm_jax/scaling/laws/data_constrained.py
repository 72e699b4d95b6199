"""The law of repeated data of Muennighoff et al. 2023 (arXiv:2305.16264), equation 5:

    L = E + A / N'^alpha + B / D'^beta
    D' = U_D + U_D R_D* (1 - exp(-R_D / R_D*))    R_D = D / U_D - 1 repetitions
    N' = U_N + U_N R_N* (1 - exp(-R_N / R_N*))    R_N = N / U_N - 1, U_N = min(N, N_opt(U_D))

where U_D are the distinct tokens and N_opt(U_D) the parameters that the law without repetition gives
to them: alpha A N_opt^-alpha = beta B U_D^-beta. With D <= U_D and N <= N_opt it is Chinchilla's law.

The paper ties alpha = beta, takes E, A, B, alpha from a fit of other runs and fits R_D*, R_N* alone.
Here all seven parameters are fitted at once, alpha and beta each on its own; `details["tied"]` has
the fit with alpha = beta.
"""

import itertools
import time
from collections.abc import Mapping

import numpy as np

from llm_jax.scaling.laws import bootstrap, checks, frontier, huber, powers, search
from llm_jax.scaling.laws.repeated import Rows, effective
from llm_jax.scaling.laws.result import LawFit, Options
from llm_jax.scaling.runs import Runs

_NAMES = ("E", "A", "B", "alpha", "beta", "R_D_star", "R_N_star")
_STARTS = (2.0, 10.0, 50.0)  # of R_D* and of R_N*
# alpha and beta are one parameter: theta = _TIE @ (e, a, b, alpha, kappa_D, kappa_N).
_TIE = np.zeros((7, 6))
_TIE[[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 3, 4, 5]] = 1.0


def predict(params: Mapping[str, float], runs: Runs) -> np.ndarray:
    """Loss of every run, [R]; without a column of distinct tokens each token was seen once."""
    unique = runs.d if runs.unique is None else runs.unique
    n, d = effective(params, runs.n, runs.d, unique)
    return frontier.loss_at(params, n, d)


def fit(runs: Runs, options: Options) -> LawFit:
    """Fits the seven parameters by the sum of Huber terms of log loss, with bootstrap intervals; N*
    and D* are those of fresh data.

    Raises:
      ValueError: the runs cannot identify the law.
    """
    begin = time.perf_counter()
    if runs.unique is None:
        raise ValueError("data_constrained needs the distinct tokens of each run (unique:COLUMN)")
    warnings = checks.require(runs, "data_constrained", 7, {"N": 3, "D": 3})
    checks.require_plane(runs, "data_constrained")
    repeats = int((runs.d > 1.01 * runs.unique).sum())
    if repeats < 2:
        raise ValueError(
            f"data_constrained: {repeats} of {len(runs)} runs repeat their data (D > U)"
        )
    rows = Rows.of(runs)
    starts = _starts(rows, runs, options.huber_delta)
    point = search.point_fit(rows.problem, starts, options.huber_delta)
    tied = search.point_fit(_tied(rows), starts @ np.linalg.pinv(_TIE).T, options.huber_delta)
    params = {k: float(v[0]) for k, v in rows.named(point.theta[None]).items()}
    doubts, sound = checks.doubts(params, {"A": "alpha", "B": "beta"})
    result = search.law_fit(
        "data_constrained",
        runs,
        options,
        point,
        params,
        predict(params, runs),
        sound=sound,
        warnings=warnings + doubts + _limits(params, rows, point.theta),
        begin=begin,
    )
    tied_params = rows.named((_TIE @ tied.theta)[None])
    result.details["tied"] = {
        "params": {k: float(v[0]) for k, v in tied_params.items()},
        "objective": tied.objective,
        "converged": tied.converged,
    }

    bootstrap.add_intervals(result, runs, options, rows.problem, point.theta, rows.named)
    return result


def _limits(params: Mapping[str, float], rows: Rows, theta: np.ndarray) -> list[str]:
    """Named warnings where R_D* or R_N* ended at a limit, or nothing shows it."""
    warnings = []
    for name, what in (("R_D_star", "tokens"), ("R_N_star", "parameters")):
        if params[name] >= 0.999 * rows.most:
            warnings.append(f"boundary: {name} >= {rows.most:.3g}; excess {what} do not lose value")
        elif params[name] <= 1.001 / rows.most:
            warnings.append(f"boundary: {name} is 0; excess {what} have no value")
    excess = int(rows.excess(theta).sum())
    if excess < 2:
        warnings.append(
            f"undetermined: R_N_star; {excess} runs have more parameters than their distinct tokens "
            "are worth"
        )
    return warnings


def _starts(rows: Rows, runs: Runs, delta: float) -> np.ndarray:
    """Chinchilla's law of three tables, with each of nine pairs of R_D*, R_N*, [S, 7]: all rows by
    D, all by the geometric mean of D and U_D, and those of a single epoch."""
    single = runs.d <= 1.01 * runs.unique
    tables = [(runs, runs.d), (runs, np.sqrt(runs.d * runs.unique))]
    part = runs.take(single)
    if len(part) > 7 and len(np.unique(part.n)) > 2 and len(np.unique(part.d)) > 2:
        tables.append((part, part.d))
    starts = []
    for table, d in tables:
        law = powers.Powers.of(np.stack([table.n, d]), table.loss)
        theta = search.point_fit(law.problem, law.starts(delta), delta).theta
        e, size, alpha = law.natural(theta[None])
        usable = np.clip(alpha[0], 0.05, 2.0)
        with np.errstate(divide="ignore"):
            logs = np.log(np.concatenate([e, size[0]]))
        for pair in itertools.product(_STARTS, repeat=2):
            starts.append(rows.theta_of(logs, usable, np.array(pair)))
    return np.array(starts)


def _tied(rows: Rows) -> huber.Problem:
    """The problem with alpha = beta, in six parameters."""

    def law(theta_BxP: np.ndarray):
        value, jac, hessian = rows.log_law(theta_BxP @ _TIE.T)

        def tied_hessian(inside_BxR: np.ndarray, psi_BxR: np.ndarray) -> np.ndarray:
            return _TIE.T @ hessian(inside_BxR, psi_BxR) @ _TIE

        return value, np.matmul(_TIE.T, jac), tied_hessian

    full, keep = rows.problem, [0, 1, 2, 3, 5, 6]
    return huber.Problem(law, rows.log_loss, full.lower[keep], full.upper[keep])
