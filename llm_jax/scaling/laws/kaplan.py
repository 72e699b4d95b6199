"""The laws of Kaplan et al. 2020 (arXiv:2001.08361): L(N, D), equation 1.5, and L(N), L(D), L(C),
equations 1.1 to 1.3. None has an irreducible loss.

    L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D

is the main law. With rho = alpha_N / alpha_D its logarithm is alpha_D times the log-sum-exp of
t - rho log N and log D_c - log D, which is linear in (t, rho, log D_c).
"""

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llm_jax.scaling.laws import bootstrap, checks, huber, power, powers, search
from llm_jax.scaling.laws.result import LawFit, Options
from llm_jax.scaling.runs import Runs

_ALPHA_D = np.geomspace(0.02, 1.0, 12)
_RATIO = np.geomspace(0.1, 5.0, 12)
# The other variable "does not limit" a run if more of it would lower the loss by less than this.
_LIMIT = 0.05


def predict(params: Mapping[str, float], runs: Runs) -> np.ndarray:
    """Loss of every run by L(N, D), [R]."""
    return _joint(params, runs.n, runs.d)


def _joint(params, n, d):
    ratio = params["alpha_N"] / params["alpha_D"]
    return ((params["N_c"] / n) ** ratio + params["D_c"] / d) ** params["alpha_D"]


def fit(runs: Runs, options: Options) -> LawFit:
    """Fits alpha_N, alpha_D, N_c, D_c of L(N, D) by the sum of Huber terms of log loss, and the
    exponents a, b of its optimum N* ~ C^a, D* ~ C^b; `details` has the laws of one variable.

    L(N) is fitted to the runs that more data would improve by less than 5 % (by the joint law), L(D)
    to those that more parameters would, L(C) to the runs that no cheaper run beats.

    Raises:
      ValueError: the runs cannot identify the law.
    """
    begin = time.perf_counter()
    warnings = checks.require(runs, "kaplan", 4, {"N": 2, "D": 2})
    checks.require_plane(runs, "kaplan")
    rows = _Rows.of(runs)
    point = search.point_fit(rows.problem, rows.starts(options.huber_delta), options.huber_delta)
    params = {k: float(v[0]) for k, v in rows.named(point.theta[None]).items()}
    doubts, sound = _doubts(params)
    result = search.law_fit(
        "kaplan",
        runs,
        options,
        point,
        params,
        predict(params, runs),
        sound=sound,
        warnings=warnings + doubts,
        begin=begin,
    )
    if result.converged:
        _one_variable(result, runs, options)

    bootstrap.add_intervals(
        result, runs, options, rows.problem, point.theta, rows.named, frontier_of
    )
    return result


def frontier_of(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """E, A, B, alpha, beta of a sum of powers whose optimum of N against D is that of L(N, D)."""
    ratio = params["alpha_N"] / params["alpha_D"]
    size = np.exp(np.clip(ratio * np.log(params["N_c"]), -700, 700))
    return {
        "E": 0.0 * ratio,
        "A": size,
        "B": params["D_c"],
        "alpha": ratio,
        "beta": 1.0 + 0.0 * ratio,
    }


def _doubts(params: Mapping[str, float]) -> tuple[list[str], bool]:
    bad = [k for k in ("alpha_N", "alpha_D") if not 0 < params[k] < 3.0]
    bad += [k for k in ("N_c", "D_c") if not (np.isfinite(params[k]) and params[k] > 0)]
    return [f"boundary: {k} = {params[k]:.3g}" for k in bad], not bad


def _one_variable(result: LawFit, runs: Runs, options: Options) -> None:
    """Adds L(N), L(D), L(C) to the details, or a warning that the rows do not show one."""
    params, loss = result.params, predict(result.params, runs)
    without_d = (params["N_c"] / runs.n) ** params["alpha_N"]
    without_n = (params["D_c"] / runs.d) ** params["alpha_D"]
    choices = {
        "N": (runs.n, loss < without_d * (1 + _LIMIT)),
        "D": (runs.d, loss < without_n * (1 + _LIMIT)),
        "C": (runs.c, _undominated(runs)),
    }
    for name, (x, rows) in choices.items():
        try:
            law = power.fit(x[rows], runs.loss[rows], offset=False, huber_delta=options.huber_delta)
        except ValueError as e:
            result.warnings.append(f"L({name}): not fitted to its {rows.sum()} rows; {e}")
            continue
        if not law.converged:
            result.warnings.append(f"L({name}): did not converge on its {rows.sum()} rows")
            continue
        result.details[f"L({name})"] = {
            f"alpha_{name}": law.alpha,
            f"{name}_c": float(np.exp(np.log(law.A) / law.alpha)),
            "objective": law.objective,
            "n_rows": int(rows.sum()),
        }


def _undominated(runs: Runs) -> np.ndarray:
    """Which runs no run of at most their FLOPs (within one part in a hundred) beats, bool [R]."""
    cheaper_RxR = runs.c[None] <= 1.01 * runs.c[:, None]
    return runs.loss <= np.where(cheaper_RxR, runs.loss[None], np.inf).min(1)


@dataclass(frozen=True)
class _Rows:
    """The rows, with theta = (alpha_D, t, rho, log D_c) about the means of log N and log D."""

    x_n: np.ndarray
    x_d: np.ndarray
    centre: tuple[float, float]
    log_loss: np.ndarray

    @classmethod
    def of(cls, runs: Runs) -> "_Rows":
        n, d = np.log(runs.n), np.log(runs.d)
        return cls(
            n - n.mean(), d - d.mean(), (float(n.mean()), float(d.mean())), np.log(runs.loss)
        )

    @property
    def problem(self) -> huber.Problem:
        lower, upper = np.full(4, -np.inf), np.full(4, np.inf)
        lower[0], upper[0] = 1e-3, 10.0
        return huber.Problem(self.log_law, self.log_loss, lower, upper)

    def log_law(self, theta_BxP: np.ndarray):
        """Log loss, its Jacobian and Hessian (`huber.LogLoss`)."""
        alpha, t, ratio, k = (column[:, None] for column in theta_BxP.T)
        term_n, term_d = t - ratio * self.x_n, k - self.x_d
        soft = np.logaddexp(term_n, term_d)
        share_n, share_d = np.exp(term_n - soft), np.exp(term_d - soft)
        jac = np.stack([soft, alpha * share_n, -alpha * share_n * self.x_n, alpha * share_d], 1)

        def hessian(inside_BxR: np.ndarray, psi_BxR: np.ndarray) -> np.ndarray:
            # d2 = alpha share_n share_d v v' for the log-sum-exp, v = (1, -x_n, -1) of (t, rho, k);
            # alpha multiplies it, so its own row is the Jacobian over alpha.
            out = huber.gram(jac, inside_BxR)
            v = np.stack([np.ones_like(self.x_n), -self.x_n, -np.ones_like(self.x_n)])
            weight = psi_BxR * alpha * share_n * share_d
            out[:, 1:, 1:] += np.matmul(v * weight[:, None], v.T)
            cross = np.matmul(jac[:, 1:], psi_BxR[..., None])[..., 0] / alpha
            out[:, 0, 1:] += cross
            out[:, 1:, 0] += cross
            return out

        return alpha * soft, jac, hessian

    def starts(self, delta: float) -> np.ndarray:
        """With alpha_D and rho given, L^(1 / alpha_D) is linear: the best of each cell of a grid."""
        grid = np.array(list(itertools.product(_ALPHA_D, _RATIO)))
        alpha, ratio = grid[:, :1], grid[:, 1:]
        target = self.log_loss / alpha
        columns = np.stack([np.exp(-ratio * self.x_n - target), np.exp(-self.x_d - target)], 1)
        scale = columns.max((1, 2))  # exponents of fifty leave float64 otherwise
        # A log residual of L^(1 / alpha) is 1 / alpha times that of L.
        size, residual = powers.project(columns / scale[:, None, None], 10 * delta, 5)
        objective = huber.huber(residual * alpha, delta).sum(1)
        best = search.best_of_cells(objective, len(_RATIO), 2)
        size = np.log(np.maximum(size[best], 1e-6)) - np.log(scale[best])[:, None]
        return np.stack([alpha[best, 0], size[:, 0], ratio[best, 0], size[:, 1]], 1)

    def named(self, theta_BxP: np.ndarray) -> dict[str, np.ndarray]:
        """Parameters of theta by name, [B] each."""
        alpha_d, t, ratio, k = theta_BxP.T
        with np.errstate(all="ignore"):
            return {
                "alpha_N": ratio * alpha_d,
                "alpha_D": alpha_d,
                "N_c": np.exp(t / ratio + self.centre[0]),
                "D_c": np.exp(k + self.centre[1]),
                "a": 1 / (1 + ratio),
                "b": ratio / (1 + ratio),
            }
