"""Chinchilla's approach 1: the envelope of training curves, then power laws along it.

Hoffmann et al. 2022 (arXiv:2203.15556), section 3.1.
"""

import time
from dataclasses import dataclass

import numpy as np

from llm_jax.scaling.laws import optima
from llm_jax.scaling.laws.optima import Optima
from llm_jax.scaling.laws.result import LawFit, Options
from llm_jax.scaling.runs import Runs

POINTS = 128  # FLOPs, evenly spaced in logarithm, at which curves are compared
FEWEST_CURVES = 4
CHUNK = 200


@dataclass(frozen=True)
class Curves:
    """Losses of M training curves, by rising size, at K FLOPs; NaN outside what a curve measured.

    `log_d_MxK` are the tokens that a curve's model has seen by then.
    """

    log_c_K: np.ndarray
    n_M: np.ndarray
    loss_MxK: np.ndarray
    log_d_MxK: np.ndarray


def fit(runs: Runs, options: Options) -> LawFit:
    """Which curve is lowest at each FLOPs, then N* = k_N C^a, D* = k_D C^b, L* = E + k_L C^-gamma.

    A curve is the rows of one run (column `run`), or without such a column the rows of one N; its
    loss is interpolated linearly in log FLOPs between its points and nowhere continued. Where the
    lowest curve is of the smallest or the largest size that reaches those FLOPs, the optimum may lie
    beyond and is not used. Intervals: whole curves are drawn with replacement.

    Raises:
      ValueError: fewer than four curves of two or more points, or no FLOPs where the best size lies
        between others.
    """
    start = time.perf_counter()
    curves = interpolate(runs)
    point = envelope(curves, np.ones((len(curves.n_M), 1), bool))
    used = point.weight_KxR[:, 0] > 0
    best = np.unique(point.log_n_KxR[used, 0])
    if len(best) < 2:
        raise ValueError(
            "chinchilla1 needs FLOPs at which the best of several sizes lies between others, for at "
            f"least 2 sizes; {len(best)} of {len(np.unique(curves.n_M))} sizes are the best somewhere"
        )
    params_1, sse_1 = optima.power_laws(point)
    warnings = []
    if len(best) < 4:
        warnings.append(f"few sizes: only {len(best)} are on the envelope between others")
    at = options.at or 10 * float(runs.c.max())
    result = LawFit(
        law="chinchilla1", params={name: float(v[0]) for name, v in params_1.items()},
        objective=float(sse_1[0]), converged=True, n_rows=len(runs), level=options.level, at=at,
        warnings=warnings, seconds=time.perf_counter() - start,
        details={"curves": len(curves.n_M), "sizes_on_envelope": len(best),
                 "envelope": [float(np.exp(v)) for v in point.log_c_K[used][[0, -1]]]},
    )  # fmt: skip
    if options.bootstrap:
        start = time.perf_counter()
        rng = np.random.default_rng(options.seed)
        m = len(curves.n_M)
        drawn_RxM = rng.integers(0, m, (options.bootstrap, m))
        present_MxR = np.zeros((m, options.bootstrap), bool)
        present_MxR[drawn_RxM.T, np.arange(options.bootstrap)] = True
        chunks = np.array_split(np.arange(options.bootstrap), -(-options.bootstrap // CHUNK))
        found = [optima.power_laws(envelope(curves, present_MxR[:, rows]))[0] for rows in chunks]
        samples = {name: np.concatenate([f[name] for f in found]) for name in result.params}
        optima.summarise(result, samples)
        result.bootstrap_seconds = time.perf_counter() - start
    return result


def predict(params: dict[str, float], runs: Runs) -> np.ndarray:
    """Loss [R] that the best model of each run's FLOPs would have; the run's own N plays no part."""
    return optima.loss_at(params, runs.c)


def curve_of(runs: Runs) -> np.ndarray:
    """Number of the training curve of each row: its run; without runs the rows of one size, and of
    one amount of distinct tokens if the table has it."""
    if runs.curve is not None:
        return runs.curve
    alike = runs.n[:, None] if runs.unique is None else np.stack([runs.n, runs.unique], 1)
    return np.unique(alike, axis=0, return_inverse=True)[1].reshape(-1)


def interpolate(runs: Runs) -> Curves:
    """All curves of two or more points at POINTS FLOPs between the least and the most.

    Several losses of a curve at the same FLOPs are averaged.
    """
    curve = curve_of(runs)
    groups = [np.flatnonzero(curve == i) for i in np.unique(curve)]
    groups = [rows for rows in groups if len(np.unique(runs.c[rows])) >= 2]
    groups.sort(key=lambda rows: runs.n[rows[0]])
    if len(groups) < FEWEST_CURVES:
        raise ValueError(
            f"chinchilla1 needs at least {FEWEST_CURVES} training curves, rows of one model at two "
            f"or more FLOPs; there are {len(groups)} (--columns=...,run:COLUMN names them)"
        )
    every = np.concatenate(groups)
    log_c_K = np.linspace(np.log(runs.c[every].min()), np.log(runs.c[every].max()), POINTS)
    losses, tokens = [], []
    for rows in groups:
        x, where = np.unique(np.log(runs.c[rows]), return_inverse=True)
        times = np.bincount(where)
        for y, out in ((runs.loss[rows], losses), (np.log(runs.d[rows]), tokens)):
            mean = np.bincount(where, y) / times
            out.append(np.interp(log_c_K, x, mean, left=np.nan, right=np.nan))
    n_M = np.array([runs.n[rows[0]] for rows in groups])
    return Curves(log_c_K, n_M, np.array(losses), np.array(tokens))


def envelope(curves: Curves, present_MxR: np.ndarray) -> Optima:
    """The lowest of the curves that a resample has, at each FLOPs, where it lies between others; a
    resample that has only one such size has no optimum at all."""
    loss_MxKx1 = curves.loss_MxK[:, :, None]
    there_MxKxR = np.isfinite(loss_MxKx1) & present_MxR[:, None, :]
    best_KxR = np.where(there_MxKxR, loss_MxKx1, np.inf).argmin(0)
    n_Mx1x1 = curves.n_M[:, None, None]
    n_KxR = curves.n_M[best_KxR]
    smallest_KxR = np.where(there_MxKxR, n_Mx1x1, np.inf).min(0)
    largest_KxR = np.where(there_MxKxR, n_Mx1x1, -np.inf).max(0)
    inside_KxR = (n_KxR > smallest_KxR) & (n_KxR < largest_KxR)
    # Where one size is best everywhere there is no growth to fit.
    highest_R = np.where(inside_KxR, n_KxR, -np.inf).max(0)
    inside_KxR &= highest_R > np.where(inside_KxR, n_KxR, np.inf).min(0)

    def of(values_MxK):
        return np.nan_to_num(np.take_along_axis(values_MxK.T, best_KxR, axis=1))

    return Optima(
        curves.log_c_K, np.log(n_KxR), of(curves.log_d_MxK), of(curves.loss_MxK),
        inside_KxR.astype(float),
    )  # fmt: skip
