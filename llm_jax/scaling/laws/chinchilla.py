"""Chinchilla's third approach: L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, 3.3)."""

import time

import numpy as np

from llm_jax.scaling.laws import bootstrap, checks, frontier, powers, search
from llm_jax.scaling.laws.result import LawFit, Options
from llm_jax.scaling.runs import Runs


def predict(params: dict[str, float], runs: Runs) -> np.ndarray:
    """Loss of every run, [R]."""
    return frontier.loss_at(params, runs.n, runs.d)


def fit(runs: Runs, options: Options) -> LawFit:
    """Fits E, A, B, alpha, beta by the sum of Huber terms of log loss, with bootstrap intervals.

    Raises:
      ValueError: the runs cannot identify the law.
    """
    begin = time.perf_counter()
    warnings = checks.require(runs, "chinchilla3", 5, {"N": 3, "D": 3})
    checks.require_plane(runs, "chinchilla3")
    rows = powers.Powers.of(np.stack([runs.n, runs.d]), runs.loss)
    point = search.point_fit(rows.problem, rows.starts(options.huber_delta), options.huber_delta)
    params = {k: float(v[0]) for k, v in named(rows, point.theta[None]).items()}
    doubts, sound = checks.doubts(params, {"A": "alpha", "B": "beta"})
    result = search.law_fit(
        "chinchilla3",
        runs,
        options,
        point,
        params,
        predict(params, runs),
        sound=sound,
        warnings=warnings + doubts,
        begin=begin,
    )

    bootstrap.add_intervals(
        result, runs, options, rows.problem, point.theta, lambda theta: named(rows, theta)
    )
    return result


def named(rows: powers.Powers, theta_BxP: np.ndarray) -> dict[str, np.ndarray]:
    """The parameters by name, and the exponents a, b of the frontier; [B] each."""
    e, size, alpha = rows.natural(theta_BxP)
    law = {"E": e, "A": size[:, 0], "B": size[:, 1], "alpha": alpha[:, 0], "beta": alpha[:, 1]}
    a, b = frontier.exponents(law)
    return law | {"a": a, "b": b}
