"""The reference for `chinchilla`: L-BFGS from each start of Hoffmann et al. 2022's grid (appendix D.3).

Slow and plain. The sum of Huber terms is scaled by 1 / delta^2, so that the optimiser's tolerances
mean something: on an average of terms of the order of delta^2 its defaults stop at once, and report
success (`tests/scaling/test_laws_failure.py`).
"""

import itertools

import numpy as np
from scipy import optimize

from llm_jax.scaling.laws import huber
from llm_jax.scaling.runs import Runs

GRID = {
    "alpha": (0.0, 0.5, 1.0, 1.5, 2.0),
    "beta": (0.0, 0.5, 1.0, 1.5, 2.0),
    "e": (-1.0, -0.5, 0.0, 0.5, 1.0),
    "a": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
    "b": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
}


def starts() -> np.ndarray:
    """All 4,500 of (log E, log A, log B, alpha, beta), [S, 5]."""
    alpha, beta, e, a, b = np.array(list(itertools.product(*GRID.values()))).T
    return np.stack([e, a, b, alpha, beta], 1)


def objective(
    theta: np.ndarray, runs: Runs, delta: float, weights: np.ndarray | float = 1.0
) -> tuple[float, np.ndarray]:
    """F, the sum of Huber terms at theta [5], and its gradient (equation 3 of the paper)."""
    e, a, b, alpha, beta = theta
    log_n, log_d = np.log(runs.n), np.log(runs.d)
    terms_3xR = np.stack([np.full(len(runs), e), a - alpha * log_n, b - beta * log_d])
    log_loss = np.logaddexp.reduce(terms_3xR)
    residual = log_loss - np.log(runs.loss)
    share_e, share_n, share_d = np.exp(terms_3xR - log_loss)
    psi = weights * np.clip(residual, -delta, delta)
    gradient = np.stack([share_e, share_n, share_d, -share_n * log_n, -share_d * log_d]) @ psi
    return float((weights * huber.huber(residual, delta)).sum()), gradient


def minimise(
    runs: Runs,
    delta: float,
    from_: np.ndarray,
    weights: np.ndarray | float = 1.0,
    rounds: int = 5,
) -> tuple[np.ndarray, np.ndarray]:
    """L-BFGS from each start [S, 5], restarted where it stopped until that gains nothing.

    Returns:
      (theta [S, 5], F [S]).
    """

    def scaled(theta):
        with np.errstate(all="ignore"):
            value, gradient = objective(theta, runs, delta, weights)
        return value / delta**2, gradient / delta**2

    ends = []
    for theta in from_:
        value = np.inf
        for _ in range(rounds):
            found = optimize.minimize(
                scaled,
                theta,
                jac=True,
                method="L-BFGS-B",
                options={
                    "maxiter": 5000,
                    "maxfun": 20000,
                    "ftol": 1e-15,
                    "gtol": 1e-10,
                    "maxcor": 20,
                },
            )
            theta, last, value = found.x, value, found.fun
            if not value < last - 1e-12:
                break
        ends.append((theta, value * delta**2))
    return np.array([t for t, _ in ends]), np.array([f for _, f in ends])
