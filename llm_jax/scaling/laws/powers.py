"""Sums of power laws, E + sum_k A_k x_k^-alpha_k, fitted to log loss by variable projection.

With the exponents given, the law is linear in E and A: so the starts come from a grid of exponents,
each with its best E, A >= 0 (reweighted, non-negative least squares). The best start of every cell
of the grid then goes to exact Newton in all parameters (see `search`).

Letters: K variables (Chinchilla: N and D; a power law: one), R rows, B fits, P = 1 + 2 K parameters
in the order log E, log A_k, alpha_k, where A_k is the term at the mean log x_k.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from llm_jax.scaling.laws import huber, search

GRID = np.geomspace(0.03, 2.0, 16)
# A term this far below the smallest loss (e^-30) is zero.
_ZERO = 30.0


@dataclass(frozen=True)
class Powers:
    """The rows that E + sum_k A_k x_k^-alpha_k is fitted to; x are positive.

    Attributes:
      centred: log x_k less their mean, [K, R].
      centre: the means, [K].
      log_loss: [R].
      offset: whether E is fitted; else it is 0.
    """

    centred: np.ndarray
    centre: np.ndarray
    log_loss: np.ndarray
    offset: bool = True

    @classmethod
    def of(cls, x_KxR: np.ndarray, loss: np.ndarray, offset: bool = True) -> "Powers":
        log_x = np.log(np.asarray(x_KxR, float))
        centre = log_x.mean(1)
        return cls(log_x - centre[:, None], centre, np.log(np.asarray(loss, float)), offset)

    @property
    def problem(self) -> huber.Problem:
        """The law with its rows, for `search`; a term below its bound counts as zero."""
        n = len(self.centre)
        floor = np.full(1 + n, self.log_loss.min() - _ZERO)
        lower = np.concatenate([floor, np.full(n, -np.inf)])
        return huber.Problem(self.log_law, self.log_loss, lower, np.full(1 + 2 * n, np.inf))

    def log_law(self, theta_BxP: np.ndarray):
        """Log loss, its Jacobian and Hessian (`huber.LogLoss`)."""
        n_vars, n_rows = self.centred.shape
        terms = 1 + n_vars
        jac = np.empty((len(theta_BxP), terms + n_vars, n_rows))
        jac[:, 0] = np.exp(theta_BxP[:, :1]) if self.offset else 0.0
        total = jac[:, 0].copy()
        for k, x in enumerate(self.centred):
            log_term = theta_BxP[:, terms + k, None] * -x
            log_term += theta_BxP[:, 1 + k, None]
            np.exp(log_term, out=jac[:, 1 + k])
            total += jac[:, 1 + k]
        jac[:, :terms] /= total[:, None]
        for k, x in enumerate(self.centred):
            np.multiply(jac[:, 1 + k], -x, out=jac[:, terms + k])

        def hessian(inside_BxR: np.ndarray, psi_BxR: np.ndarray) -> np.ndarray:
            # log L is a log-sum-exp of linear functions: its own Hessian is a part, term by term,
            # less J J' (Boyd & Vandenberghe, Convex Optimization, 3.1.5).
            out = huber.gram(jac, inside_BxR - psi_BxR)
            first = np.matmul(jac, psi_BxR[..., None])[..., 0]
            out[:, 0, 0] += first[:, 0]
            for k, x in enumerate(self.centred):
                i, j = 1 + k, terms + k
                out[:, i, i] += first[:, i]
                out[:, i, j] += first[:, j]
                out[:, j, i] += first[:, j]
                out[:, j, j] += (psi_BxR * jac[:, j]) @ -x
            return out

        return np.log(total), jac, hessian

    def natural(self, theta_BxP: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """E [B], A [B, K], alpha [B, K]; a term at its bound is 0."""
        terms = 1 + len(self.centre)
        alpha = theta_BxP[:, terms:]
        size = np.exp(theta_BxP[:, :terms])
        size[theta_BxP[:, :terms] <= self.problem.lower[:terms]] = 0.0
        if not self.offset:
            size[:, 0] = 0.0
        return size[:, 0], size[:, 1:] * np.exp(alpha * self.centre), alpha

    def starts(self, delta: float, rounds: int = 5) -> np.ndarray:
        """Variable projection on the grid of exponents: the best theta of each cell, [S, P]."""
        n_vars = len(self.centre)
        alpha_GxK = np.array(list(itertools.product(GRID, repeat=n_vars)))
        terms_GxTxR = np.exp(-alpha_GxK[:, :, None] * self.centred)
        if self.offset:
            terms_GxTxR = np.concatenate([np.ones_like(terms_GxTxR[:, :1]), terms_GxTxR], 1)
        relative = terms_GxTxR * np.exp(-self.log_loss)
        size_GxT, residual_GxR = project(relative, delta, rounds)
        best = search.best_of_cells(huber.huber(residual_GxR, delta).sum(1), len(GRID), n_vars)
        size = size_GxT[best]
        if not self.offset:
            size = np.concatenate([np.ones_like(size[:, :1]), size], 1)
        # A term that a start has at zero would stay there: start it at a ten-thousandth.
        size = np.maximum(size, 1e-4 * np.exp(self.log_loss.min()))
        return np.concatenate([np.log(size), alpha_GxK[best]], 1)


def project(columns_GxTxR: np.ndarray, delta: float, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """The s >= 0 for which log sum_t s_t column_t is nearest to 0 in Huber's sense: non-negative
    least squares of the sum against 1, reweighted `rounds` times.

    Returns:
      (s [G, T], log of the sums [G, R]).
    """
    weight_GxR = np.ones(columns_GxTxR[:, 0].shape)
    for _ in range(rounds):
        size_GxT = _non_negative(columns_GxTxR, weight_GxR)
        residual_GxR = np.log(np.maximum(np.einsum("gt,gtr->gr", size_GxT, columns_GxTxR), 1e-300))
        weight_GxR = delta / np.maximum(np.abs(residual_GxR), delta)
    return size_GxT, residual_GxR


def _non_negative(columns_GxTxR: np.ndarray, weight_GxR: np.ndarray) -> np.ndarray:
    """argmin over s >= 0 of sum_r weight (sum_t s_t column_t - 1)^2, [G, T]: the best of all
    supports, of which there are few."""
    weighted = columns_GxTxR * weight_GxR[:, None]
    gram = np.matmul(weighted, columns_GxTxR.transpose(0, 2, 1))
    target = weighted.sum(2)
    n_grid, n_terms = target.shape
    best, best_value = np.zeros((n_grid, n_terms)), np.full(n_grid, np.inf)
    for size in range(1, n_terms + 1):
        for support in map(list, itertools.combinations(range(n_terms), size)):
            part = gram[:, support][:, :, support]
            part = part + np.eye(size) * 1e-13 * np.einsum("gtt->g", part)[:, None, None]
            solved = np.linalg.solve(part, target[:, support][..., None])[..., 0]
            value = -np.einsum("gt,gt->g", solved, target[:, support])
            better = (solved >= 0).all(1) & (value < best_value)
            best_value[better] = value[better]
            best[better] = 0.0
            best[np.ix_(better, support)] = solved[better]
    return best
