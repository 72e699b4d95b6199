"""Compute-optimal sizes of a law L = E + A / N^alpha + B / D^beta under C = k N D.

Hoffmann et al. 2022, equation 4: N* = G (C / k)^a, D* = (C / k)^b / G with a = beta / (alpha + beta),
b = alpha / (alpha + beta) and G = (alpha A / (beta B))^(1 / (alpha + beta)). Parameters may be arrays
(bootstrap samples); everything broadcasts.
"""

from collections.abc import Mapping

import numpy as np


def exponents(params: Mapping[str, float | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) of N* ~ C^a and D* ~ C^b."""
    alpha, beta = np.asarray(params["alpha"]), np.asarray(params["beta"])
    with np.errstate(all="ignore"):
        return beta / (alpha + beta), alpha / (alpha + beta)


def optimal(
    params: Mapping[str, float | np.ndarray], c: float | np.ndarray, flops_factor: float = 6.0
) -> tuple[np.ndarray, np.ndarray]:
    """(N*, D*) for `c` training FLOPs, where C = flops_factor * N * D."""
    a, b = exponents(params)
    alpha, beta = np.asarray(params["alpha"]), np.asarray(params["beta"])
    product = np.asarray(c, float) / flops_factor
    with np.errstate(all="ignore"):
        ratio = alpha * np.asarray(params["A"]) / (beta * np.asarray(params["B"]))
        g = ratio ** (1 / (alpha + beta))
        return g * product**a, product**b / g


def loss_at(
    params: Mapping[str, float | np.ndarray], n: float | np.ndarray, d: float | np.ndarray
) -> np.ndarray:
    """Loss in nats per token of n parameters trained on d tokens."""
    n, d = np.asarray(n, float), np.asarray(d, float)
    return params["E"] + params["A"] * n ** -params["alpha"] + params["B"] * d ** -params["beta"]
