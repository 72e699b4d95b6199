"""Chinchilla's approach 2: the minimum of each IsoFLOP curve, then power laws through the minima.

Hoffmann et al. 2022 (arXiv:2203.15556), section 3.2.
"""

import time

import numpy as np

from llm_jax.scaling.laws import bootstrap, optima
from llm_jax.scaling.laws.optima import Optima
from llm_jax.scaling.laws.result import LawFit, Options
from llm_jax.scaling.runs import Runs

# A run counts by exp(-x^2 / 2), x = log(N / N*) / log(WIDTH), as IsoFLOP curves are no parabolas far
# from their minimum; and less by OUTLIER / r where it lies a share r > OUTLIER of the loss off the
# parabola, so that a run that went wrong moves it little.
WIDTH = 3.0
OUTLIER = 0.01
FEWEST_BUDGETS = 2


def fit(runs: Runs, options: Options) -> LawFit:
    """A parabola of loss in log N for each budget, then N* = k_N C^a, D* = k_D C^b, and
    L* = E + k_L C^-gamma.

    Runs are weighted by a Gaussian of log(N / N*) and by Huber's weights, found with N* by iteration;
    D* is read off a line of log D in log N. A budget whose parabola opens downwards, or whose minimum lies outside its
    sizes, is left out with a warning. Intervals: runs are drawn with replacement in each budget.

    Raises:
      ValueError: the table is not made of budgets, or fewer than two of them have a minimum.
    """
    start = time.perf_counter()
    if runs.budget is None:
        raise ValueError(
            "chinchilla2 needs IsoFLOP budgets: groups of runs of equal FLOPs and three or more "
            "sizes (--columns=...,budget:COLUMN names them)"
        )
    point = minima(runs, np.ones((len(runs), 1)))
    found = point.weight_KxR[:, 0] > 0
    warnings = [
        f"no minimum: the budget of {np.exp(log_c):.3g} FLOPs is left out ({_why(runs, i)})"
        for i, log_c in enumerate(point.log_c_K)
        if not found[i]
    ]
    if found.sum() < FEWEST_BUDGETS:
        raise ValueError(
            f"chinchilla2 needs at least {FEWEST_BUDGETS} budgets with a minimum inside their sizes; "
            f"{found.sum()} of {len(found)} have one"
            + (f" ({_why(runs, int(np.argmin(found)))})" if not found.all() else "")
        )
    if found.sum() < optima.FEWEST_FOR_OFFSET:
        warnings.append(f"few budgets: with {found.sum()} minima E of the loss is not fitted but 0")
    params_1, sse_1 = optima.power_laws(point)
    params = {name: float(v[0]) for name, v in params_1.items()}
    curvature = point_curvature(runs)
    details = {
        "minima": [
            {"budget": int(i), "C": float(np.exp(c)), "N": float(np.exp(n)), "D": float(np.exp(d)), "loss": float(y),
             "curvature": float(k)}
            for i, c, n, d, y, k, ok in zip(np.unique(runs.budget), point.log_c_K, point.log_n_KxR[:, 0],
                                         point.log_d_KxR[:, 0], point.loss_KxR[:, 0], curvature,
                                         found, strict=True) if ok
        ]
    }  # fmt: skip
    seconds = time.perf_counter() - start
    result = LawFit(
        law="chinchilla2", params=params, objective=float(sse_1[0]), converged=True,
        n_rows=len(runs), seconds=seconds, level=options.level, warnings=warnings,
        at=options.at or 10 * float(runs.c.max()), details=details,
    )  # fmt: skip
    if options.bootstrap:
        start = time.perf_counter()
        times_nxR = bootstrap.resample(runs, options.bootstrap, options.seed).T
        optima.summarise(result, optima.power_laws(minima(runs, times_nxR))[0])
        result.bootstrap_seconds = time.perf_counter() - start
    return result


def predict(params: dict[str, float], runs: Runs) -> np.ndarray:
    """Loss [R] that the best model of each run's FLOPs would have; the run's own N plays no part."""
    return optima.loss_at(params, runs.c)


def minima(runs: Runs, times_nxR: np.ndarray) -> Optima:
    """The minimum of every budget when row i of the table counts times_nxR[i] times."""
    parts = []
    for budget in np.unique(runs.budget):
        rows = np.flatnonzero(runs.budget == budget)
        x_n, times = np.log(runs.n[rows]), times_nxR[rows]
        center_R, loss_R, _, ok_R = vertex(x_n, runs.loss[rows], times)
        log_d_R = _line_at(x_n, np.log(runs.d[rows]), times, center_R)
        parts.append((np.log(np.median(runs.c[rows])), center_R, log_d_R, loss_R, ok_R))
    log_c, log_n, log_d, loss, ok = (np.array(part) for part in zip(*parts, strict=True))
    return Optima(log_c, log_n, log_d, loss, ok.astype(float))


def vertex(x_n: np.ndarray, y_n: np.ndarray, times_nxR: np.ndarray) -> tuple[np.ndarray, ...]:
    """Where a parabola near the lowest of the points (x, y) has its minimum, for R resamples.

    Returns:
      [R] each: x of the minimum, y there, half the second derivative, and whether it is one: three
      or more sizes, curvature above zero, and points on both sides of it.
    """
    sizes = np.unique(x_n)
    gap = np.median(np.diff(sizes)) if len(sizes) > 1 else 1.0
    width = max(np.log(WIDTH), 1.5 * gap)  # a coarse ladder of sizes must not lose all but one
    there_nxR = times_nxR > 0
    enough_R = sum((there_nxR[x_n == size].any(0)).astype(int) for size in sizes) >= 3
    lowest_R = np.where(there_nxR, x_n[:, None], np.inf).min(0)
    highest_R = np.where(there_nxR, x_n[:, None], -np.inf).max(0)
    center_R = x_n[np.where(there_nxR, y_n[:, None], np.inf).argmin(0)]
    trust_nxR = np.ones_like(times_nxR, float)
    for _ in range(30):
        u_nxR = (x_n[:, None] - center_R) / width
        w_nxR = times_nxR * trust_nxR * np.exp(-0.5 * u_nxR**2)
        sums, moments, w_u_nxR = [], [], w_nxR
        for k in range(5):
            sums.append(w_u_nxR.sum(0))
            if k < 3:
                moments.append(y_n @ w_u_nxR)
            w_u_nxR = w_u_nxR * u_nxR
        matrix_Rx3x3 = np.stack([np.stack(sums[k : k + 3], -1) for k in range(3)], -1)
        right_Rx3 = np.stack(moments, -1)
        matrix_Rx3x3 = np.where(enough_R[:, None, None], matrix_Rx3x3, np.eye(3))
        c0_R, c1_R, c2_R = np.linalg.solve(matrix_Rx3x3, right_Rx3[..., None])[..., 0].T
        upwards_R = enough_R & (c2_R > 0)
        step_R = np.where(upwards_R, -c1_R / (2 * np.where(upwards_R, c2_R, 1.0)), 0.0)
        new_R = np.clip(center_R + width * step_R, lowest_R, highest_R)
        off_nxR = np.abs(c0_R + c1_R * u_nxR + c2_R * u_nxR**2 - y_n[:, None]) / y_n[:, None]
        trust_nxR = OUTLIER / np.maximum(off_nxR, OUTLIER)
        moved, center_R = np.max(np.abs(new_R - center_R)), new_R
        if moved < 1e-8:
            break
    loss_R = c0_R - np.where(upwards_R, c1_R**2 / (4 * np.where(upwards_R, c2_R, 1.0)), 0.0)
    inside_R = (center_R > lowest_R) & (center_R < highest_R)
    return center_R, loss_R, c2_R / width**2, upwards_R & inside_R


def point_curvature(runs: Runs) -> np.ndarray:
    """Half the second derivative of loss in log N at the minimum of each budget, [K]."""
    return np.array([
        vertex(np.log(part.n), part.loss, np.ones((len(part), 1)))[2][0]
        for part in (runs.take(runs.budget == b) for b in np.unique(runs.budget))
    ])  # fmt: skip


def _line_at(
    x_n: np.ndarray, y_n: np.ndarray, times_nxR: np.ndarray, at_R: np.ndarray
) -> np.ndarray:
    total_R = np.maximum(times_nxR.sum(0), 1e-300)
    x_R, y_R = times_nxR.T @ x_n / total_R, times_nxR.T @ y_n / total_R
    dx_nxR = x_n[:, None] - x_R
    sxx_R = (times_nxR * dx_nxR**2).sum(0)
    sxy_R = (times_nxR * dx_nxR * (y_n[:, None] - y_R)).sum(0)
    return y_R + sxy_R / np.where(sxx_R > 0, sxx_R, np.inf) * (at_R - x_R)


def _why(runs: Runs, budget: int) -> str:
    part = runs.take(runs.budget == budget)
    sizes = len(np.unique(part.n))
    if sizes < 3:
        return f"{sizes} sizes; a parabola needs three"
    if point_curvature(runs)[budget] <= 0:
        return "its parabola opens downwards"
    lowest = part.n[part.loss.argmin()]
    return f"the loss is lowest at N = {lowest:.3g}, the edge of its sizes {part.n.min():.3g} to {part.n.max():.3g}"
