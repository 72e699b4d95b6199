"""From many starts to the optimum of a law, and from that to the optima of its resamples.

Near least absolute deviations (small deltas) F has kinks, and local optima that larger deltas do not
have: so starts go through falling deltas, and resamples have two starts. Letters as in `huber`.
"""

import itertools
import time
from dataclasses import dataclass

import numpy as np

from llm_jax.scaling.laws import checks, huber
from llm_jax.scaling.laws.result import LawFit, Options
from llm_jax.scaling.runs import Runs

SAME = 1e-9  # objectives that differ by no more (or by this share) are of one optimum
CELLS = 4  # of a grid along each of its axes; one start each
_DELTAS = (64, 8, 1)
_SMOOTH = 8


@dataclass(frozen=True)
class PointFit:
    """The best optimum of all starts.

    Attributes:
      theta: [P].
      objective: F there.
      converged: whether it is stationary.
      starts_at_optimum: share of the starts that ended within `SAME` of it.
    """

    theta: np.ndarray
    objective: float
    converged: bool
    starts_at_optimum: float


def law_fit(
    law: str,
    runs: Runs,
    options: Options,
    point: PointFit,
    params: dict[str, float],
    predicted: np.ndarray,
    *,
    sound: bool,
    warnings: list[str],
    begin: float,
) -> LawFit:
    """What is known of a law once its optimum is; `sound`: whether the optimum is a law at all,
    `begin`: `time.perf_counter()` when the fit began."""
    return LawFit(
        law=law,
        params=params,
        objective=point.objective,
        converged=point.converged and sound,
        n_rows=len(runs),
        starts_at_optimum=point.starts_at_optimum,
        seconds=time.perf_counter() - begin,
        at=options.at or 10 * float(runs.c.max()),
        level=options.level,
        warnings=warnings,
        details=checks.goodness(runs.loss, predicted),
    )


def best_of_cells(objective_G: np.ndarray, size: int, axes: int) -> list[int]:
    """The best point of each cell of a grid with `size` points along each of its axes."""
    cell = np.arange(size) * CELLS // size
    cell_G = np.array(list(itertools.product(cell, repeat=axes))) @ CELLS ** np.arange(axes)
    members = (np.flatnonzero(cell_G == c) for c in np.unique(cell_G))
    return [int(rows[np.argmin(objective_G[rows])]) for rows in members]


def point_fit(problem: huber.Problem, starts: np.ndarray, delta: float) -> PointFit:
    """The optimum over all rows from starts [S, P]. Starts that meet at one of the larger deltas go
    on as one."""
    theta, end_S = starts, np.arange(len(starts))
    for factor in _DELTAS:
        found = huber.minimise(problem, np.ones(1), theta, factor * delta)
        rounded = np.round(found.theta, 6)
        _, first, same = np.unique(rounded, axis=0, return_index=True, return_inverse=True)
        theta, end_S = found.theta[first], same.reshape(-1)[end_S]
    objective, stationary = found.objective[first], found.stationary[first]
    best = int(np.argmin(objective))
    at_optimum = objective[end_S] <= objective[best] + SAME * (1 + objective[best])
    return PointFit(
        theta[best], float(objective[best]), bool(stationary[best]), float(at_optimum.mean())
    )


def refit(
    problem: huber.Problem, weights: np.ndarray, theta: np.ndarray, delta: float
) -> huber.Solution:
    """The optimum of each resample [B, R], from theta [P] (that of the whole table) and from the
    resample's own optimum at a larger delta; the better of both."""
    theta_BxP = np.broadcast_to(theta, (len(weights), theta.shape[-1]))
    near = huber.minimise(problem, weights, theta_BxP, delta)
    smooth = huber.minimise(
        problem, weights, theta_BxP, _SMOOTH * delta, tolerance=1e-6, max_iterations=30
    )
    far = huber.minimise(problem, weights, smooth.theta, delta)
    take = far.objective < near.objective
    return huber.Solution(
        theta=np.where(take[:, None], far.theta, near.theta),
        objective=np.where(take, far.objective, near.objective),
        stationary=np.where(take, far.stationary, near.stationary),
        iterations=near.iterations + smooth.iterations + far.iterations,
    )
