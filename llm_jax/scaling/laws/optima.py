"""From the optimum of each of several FLOPs to power laws: N* = k_N C^a, D* = k_D C^b and
L* = E + k_L C^-gamma, for approaches 1 and 2 of Hoffmann et al. 2022 (arXiv:2203.15556).

Everything is batched over R bootstrap resamples; K optima, of which a resample may lack some.
"""

from dataclasses import dataclass

import numpy as np

from llm_jax.scaling.laws import bootstrap
from llm_jax.scaling.laws.result import LawFit

FEWEST_FOR_OFFSET = 4
GAMMAS = np.geomspace(0.003, 1.0, 241)


@dataclass(frozen=True)
class Optima:
    """The best size, its tokens and its loss at each of K FLOPs, for each of R resamples.

    Attributes:
      log_c_K: logarithm of the FLOPs.
      log_n_KxR, log_d_KxR: logarithms of the parameters and the tokens that are best.
      loss_KxR: loss there.
      weight_KxR: 1 where there is an optimum, 0 where there is none (other values are unused there).
    """

    log_c_K: np.ndarray
    log_n_KxR: np.ndarray
    log_d_KxR: np.ndarray
    loss_KxR: np.ndarray
    weight_KxR: np.ndarray


def power_laws(optima: Optima) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Least squares of log N*, log D* and L* on log C.

    Returns:
      {a, k_N, b, k_D, E, k_L, gamma: [R]}, NaN where a resample has fewer than two optima; and [R],
      the sum of squared residuals of log N*. With fewer than four optima E is 0: three points do
      not tell an offset from an exponent.
    """
    w_KxR = optima.weight_KxR
    a_R, log_k_n_R, sse_R = _line(optima.log_c_K, optima.log_n_KxR, w_KxR)
    b_R, log_k_d_R, _ = _line(optima.log_c_K, optima.log_d_KxR, w_KxR)
    offset_R = (w_KxR > 0).sum(0) >= FEWEST_FOR_OFFSET
    e_R, log_k_l_R, gamma_R = _loss_law(optima.log_c_K, optima.loss_KxR, w_KxR, offset_R)
    params = {
        "a": a_R,
        "b": b_R,
        "k_N": np.exp(log_k_n_R),
        "k_D": np.exp(log_k_d_R),
        "E": e_R,
        "k_L": np.exp(log_k_l_R),
        "gamma": gamma_R,
    }
    enough_R = (w_KxR > 0).sum(0) >= 2
    return {k: np.where(enough_R, v, np.nan) for k, v in params.items()}, sse_R


def sizes_at(params: dict, flops: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """N* and D* at these FLOPs; params and FLOPs broadcast."""
    return params["k_N"] * flops ** params["a"], params["k_D"] * flops ** params["b"]


def loss_at(params: dict, flops: np.ndarray | float) -> np.ndarray:
    """L* at these FLOPs, nats per token; params and FLOPs broadcast."""
    return params["E"] + params["k_L"] * flops ** -params["gamma"]


def summarise(result: LawFit, samples: dict[str, np.ndarray]) -> None:
    """Adds what bootstrap resamples say to a fit: percentile intervals, standard errors, samples.

    Resamples without two optima have no law and are left out; a warning counts them.
    """
    n, d = sizes_at(samples, result.at)
    everything = samples | {"N*": n, "D*": d, "D*/N*": d / n}
    good_R = np.isfinite(np.stack(list(everything.values()))).all(0)
    if not good_R.all():
        result.warnings.append(
            f"lost resamples: {np.sum(~good_R)} of {len(good_R)} have no law and are left out"
        )
    if good_R.sum() > 1:
        everything = {name: values[good_R] for name, values in everything.items()}
        result.samples = {name: everything[name] for name in samples}
        result.intervals = bootstrap.percentiles(everything, result.level)
        result.standard_errors = bootstrap.standard_errors(everything)


def _line(x_K: np.ndarray, y_KxR: np.ndarray, w_KxR: np.ndarray) -> tuple[np.ndarray, ...]:
    """Slope, intercept and sum of squared residuals of weighted straight lines, [R] each."""
    total_R = np.maximum(w_KxR.sum(0), 1e-300)
    y_KxR = np.where(w_KxR > 0, y_KxR, 0.0)
    x_mean_R, y_mean_R = (w_KxR * x_K[:, None]).sum(0) / total_R, (w_KxR * y_KxR).sum(0) / total_R
    dx_KxR, dy_KxR = x_K[:, None] - x_mean_R, y_KxR - y_mean_R
    sxx_R = (w_KxR * dx_KxR**2).sum(0)
    slope_R = (w_KxR * dx_KxR * dy_KxR).sum(0) / np.where(sxx_R > 0, sxx_R, np.nan)
    sse_R = (w_KxR * (dy_KxR - slope_R * dx_KxR) ** 2).sum(0)
    return slope_R, y_mean_R - slope_R * x_mean_R, sse_R


def _loss_law(
    log_c_K: np.ndarray, loss_KxR: np.ndarray, w_KxR: np.ndarray, offset_R: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E, log k_L, gamma, [R] each: E and k_L in closed form for each gamma, gamma by search."""
    middle = log_c_K.mean()  # C^-gamma about it is of the order of 1
    x_K, y_KxR = log_c_K - middle, np.where(w_KxR > 0, loss_KxR, 0.0)
    total_R = np.maximum(w_KxR.sum(0), 1e-300)
    y_mean_R, y2_R = (w_KxR * y_KxR).sum(0) / total_R, (w_KxR * y_KxR**2).sum(0)

    def solve(p_R, p2_R, py_R):
        """Squared error, E >= 0 and k_L > 0 that are best, from sums of C^-gamma, its square and
        its product with the loss."""
        sxx_R, sxy_R = p2_R - p_R**2 / total_R, py_R - p_R * y_mean_R
        k_R = sxy_R / np.where(sxx_R > 0, sxx_R, np.inf)
        e_R = y_mean_R - k_R * p_R / total_R
        free_R = offset_R & (e_R > 0) & (k_R > 0)
        e_R = np.where(free_R, e_R, 0.0)
        k_R = np.where(free_R, k_R, py_R / np.maximum(p2_R, 1e-300))
        sse_R = y2_R + e_R**2 * total_R + k_R**2 * p2_R
        sse_R += 2 * (e_R * k_R * p_R - e_R * y_mean_R * total_R - k_R * py_R)
        return sse_R, e_R, k_R

    def at_gamma(gamma_R):
        p_KxR = np.exp(-gamma_R * x_K[:, None])
        w_p_KxR = w_KxR * p_KxR
        return solve(w_p_KxR.sum(0), (w_p_KxR * p_KxR).sum(0), (w_p_KxR * y_KxR).sum(0))

    p_GxK = np.exp(-GAMMAS[:, None] * x_K)  # one gamma for all resamples: matrix products
    wy_KxR = w_KxR * y_KxR
    best_R = solve(p_GxK @ w_KxR, p_GxK**2 @ w_KxR, p_GxK @ wy_KxR)[0].argmin(0)
    best_R = np.clip(best_R, 1, len(GAMMAS) - 2)
    low_R, high_R = np.log(GAMMAS)[best_R - 1], np.log(GAMMAS)[best_R + 1]
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(20):  # golden section: gamma to 3e-6 of itself
        left_R, right_R = high_R - ratio * (high_R - low_R), low_R + ratio * (high_R - low_R)
        lower_R = at_gamma(np.exp(left_R))[0] < at_gamma(np.exp(right_R))[0]
        low_R, high_R = np.where(lower_R, low_R, left_R), np.where(lower_R, right_R, high_R)
    gamma_R = np.exp((low_R + high_R) / 2)
    _, e_R, k_R = at_gamma(gamma_R)
    with np.errstate(divide="ignore"):  # of resamples without optima
        return e_R, np.log(k_R) + gamma_R * middle, gamma_R
