"""Effective parameters and tokens when data repeat, and the log loss that follows from them.

What `data_constrained` fits, with first and second derivatives by hand. Letters as in `huber`;
theta = (log E, a, b, alpha, beta, kappa_D, kappa_N), where a, b are the logarithms of the two terms
at the mean log N and log D, and kappa = -log R*.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llm_jax.scaling.laws import frontier, huber
from llm_jax.scaling.runs import Runs

_E, _A, _B, _ALPHA, _BETA, _KD, _KN = range(7)


def effective(
    params: Mapping[str, float], n: np.ndarray, d: np.ndarray, unique: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(N', D') of n parameters trained on d tokens of which `unique` are distinct."""
    unique = np.minimum(unique, d)
    best = _best_size(params, unique)
    base = np.minimum(n, best)
    return (
        base * _worth(n / base - 1, params["R_N_star"]),
        unique * _worth(d / unique - 1, params["R_D_star"]),
    )


def _worth(repeats: np.ndarray, star: float) -> np.ndarray:
    return 1 - star * np.expm1(-repeats / star)


def _best_size(params, unique):
    """N at which parameters and `unique` tokens are worth the same: alpha A / N^alpha =
    beta B / D^beta, which is the optimum of the FLOPs whose D* is `unique`."""
    alpha, beta = params["alpha"], params["beta"]
    ratio = np.log(alpha * params["A"]) - np.log(beta * params["B"])
    return np.exp((ratio + beta * np.log(unique)) / alpha)


@dataclass(frozen=True)
class Rows:
    """The runs: logarithms of N and U_D about the means of log N and log D, and repetitions.

    Attributes:
      x_n, x_u: log N, log U_D less `centre`, [R].
      repeats: D / U_D - 1, [R].
      most: largest R*, and the inverse of the smallest.
    """

    x_n: np.ndarray
    x_u: np.ndarray
    repeats: np.ndarray
    centre: np.ndarray
    log_loss: np.ndarray
    most: float = 1e3

    @classmethod
    def of(cls, runs: Runs) -> "Rows":
        unique = np.minimum(runs.unique, runs.d)
        centre = np.array([np.log(runs.n).mean(), np.log(runs.d).mean()])
        x_n, x_u = np.log(runs.n) - centre[0], np.log(unique) - centre[1]
        return cls(x_n, x_u, runs.d / unique - 1, centre, np.log(runs.loss))

    @property
    def problem(self) -> huber.Problem:
        floor, steep = self.log_loss.min() - 30.0, np.log(self.most)
        lower = np.array([floor, floor, floor, 1e-3, 1e-3, -steep, -steep])
        upper = np.array([np.inf, np.inf, np.inf, 20.0, 20.0, steep, steep])
        return huber.Problem(self.log_law, self.log_loss, lower, upper)

    def theta_of(self, log_size: np.ndarray, alpha: np.ndarray, star: np.ndarray) -> np.ndarray:
        """Theta of log (E, A, B), (alpha, beta), (R_D*, R_N*), [7]."""
        size = log_size - np.concatenate([[0.0], alpha * self.centre])
        # A start at a bound would stay there.
        size = np.maximum(size, self.log_loss.min() - 9.0)
        return np.concatenate([size, alpha, -np.log(star)])

    def named(self, theta_BxP: np.ndarray) -> dict[str, np.ndarray]:
        """Parameters by name, and the exponents a, b of the frontier of fresh data; [B] each."""
        alpha, size = theta_BxP[:, 3:5], np.exp(theta_BxP[:, :3])
        size[theta_BxP[:, :3] <= self.problem.lower[:3]] = 0.0
        star = np.exp(-theta_BxP[:, 5:])
        law = {
            "E": size[:, 0],
            "A": size[:, 1] * np.exp(alpha[:, 0] * self.centre[0]),
            "B": size[:, 2] * np.exp(alpha[:, 1] * self.centre[1]),
            "alpha": alpha[:, 0],
            "beta": alpha[:, 1],
            "R_D_star": star[:, 0],
            "R_N_star": star[:, 1],
        }
        a, b = frontier.exponents(law)
        return law | {"a": a, "b": b}

    def excess(self, theta: np.ndarray) -> np.ndarray:
        """Which runs have more parameters than N_opt of their distinct tokens, bool [R]."""
        return self.x_n > self._best(theta[None])[0]

    def _best(self, theta_BxP):
        """log N_opt(U_D), centred; see `_best_size`."""
        _, a, b, alpha, beta, _, _ = (column[:, None] for column in theta_BxP.T)
        return (np.log(alpha) - np.log(beta) + a - b + beta * self.x_u) / alpha

    def log_law(self, theta_BxP: np.ndarray):
        """Log loss, its Jacobian and Hessian (`huber.LogLoss`)."""
        e, a, b, alpha, beta, kappa_d, kappa_n = (column[:, None] for column in theta_BxP.T)
        best = self._best(theta_BxP)
        excess = self.x_n > best
        # log N' = base + log h(repeats): with no excess base is log N itself, and h is 1.
        base = np.where(excess, best, self.x_n)
        n, n_q, n_k, n_qq, n_qk, n_kk = _log_worth(np.expm1(self.x_n - base), kappa_n)
        n += base
        n_q, n_qq, n_qk = (np.where(excess, v, 0.0) for v in (n_q, n_qq, n_qk))
        d, _, d_k, _, _, d_kk = _log_worth(self.repeats, kappa_d)
        d += self.x_u
        # Derivatives of log N_opt by (a, b, alpha, beta).
        q_beta, q_alpha = (self.x_u - 1 / beta) / alpha, (1 / alpha - best) / alpha
        one = np.ones_like(best)
        q = {_A: one / alpha, _B: -one / alpha, _ALPHA: q_alpha, _BETA: q_beta}
        q2 = {
            (_A, _ALPHA): -one / alpha**2,
            (_B, _ALPHA): one / alpha**2,
            (_ALPHA, _ALPHA): -1 / alpha**3 - 2 * q_alpha / alpha,
            (_ALPHA, _BETA): -q_beta / alpha,
            (_BETA, _BETA): one / (alpha * beta**2),
        }
        term_n, term_d = a - alpha * n, b - beta * d
        log_l = np.logaddexp(np.logaddexp(np.broadcast_to(e, n.shape), term_n), term_d)
        share_n, share_d = np.exp(term_n - log_l), np.exp(term_d - log_l)
        grad_n, grad_d = np.zeros((2, len(theta_BxP), 7, n.shape[1]))
        slope = {i: n_q * q_i for i, q_i in q.items()} | {_KN: n_k}  # of log N'
        for i, value in slope.items():
            grad_n[:, i] = -alpha * value
        grad_n[:, _A] += 1
        grad_n[:, _ALPHA] -= n
        grad_d[:, _B], grad_d[:, _BETA], grad_d[:, _KD] = 1.0, -d, -beta * d_k
        jac = share_n[:, None] * grad_n + share_d[:, None] * grad_d
        jac[:, _E] = np.exp(e - log_l)

        def hessian(inside_BxR: np.ndarray, psi_BxR: np.ndarray) -> np.ndarray:
            # Hessian of a log-sum-exp of z: sum_k share_k (z_k' z_k'^T + z_k'') - J J^T.
            psi_n, psi_d = psi_BxR * share_n, psi_BxR * share_d
            out = huber.gram(jac, inside_BxR - psi_BxR)
            out += huber.gram(grad_n, psi_n) + huber.gram(grad_d, psi_d)
            out[:, _E, _E] += (psi_BxR * jac[:, _E]).sum(1)

            def add(i, j, value_BxR):
                total = value_BxR.sum(1)
                out[:, i, j] += total
                if i != j:
                    out[:, j, i] += total

            for i in slope:
                for j in slope:
                    if j < i:
                        continue
                    if j == _KN:
                        second = n_kk if i == _KN else n_qk * q[i]
                    else:
                        second = n_qq * q[i] * q[j] + n_q * q2.get((i, j), 0.0)
                    value = -alpha * second
                    value = value - (i == _ALPHA) * slope[j] - (j == _ALPHA) * slope[i]
                    add(i, j, psi_n * value)
            add(_BETA, _KD, -psi_d * d_k)
            add(_KD, _KD, -psi_d * beta * d_kk)
            return out

        return log_l, jac, hessian


def _log_worth(repeats, kappa):
    """log h = log(1 + (1 - exp(-x s)) / s) of x repetitions, s = exp(kappa) = 1 / R*, and its
    derivatives by (q, kappa): q, q q, q kappa those of q + log h(exp(n - q) - 1) at fixed n."""
    s, y = np.exp(kappa), repeats + 1
    fade = np.exp(-repeats * s)
    gain = -np.expm1(-repeats * s) / s
    h = 1 + gain
    by_k = repeats * fade - gain
    y_fade = y * fade
    first_q, first_k = 1 - y_fade / h, by_k / h
    qq = y_fade * (1 - s * y) / h - (y_fade / h) ** 2
    qk = repeats * s * y_fade / h + by_k * y_fade / h**2
    kk = -(by_k + repeats**2 * s * fade) / h - first_k**2
    return np.log(h), first_q, first_k, qq, qk, kk
