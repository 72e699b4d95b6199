"""Many small robust fits at once: exact Newton on a sum of Huber terms.

A law predicts log loss; the objective of Hoffmann et al. 2022, equation 3, is

    F(theta) = sum_r w_r huber(log L(theta; r) - log loss_r)

with Huber's function (x^2 / 2 up to delta, then delta (|x| - delta / 2)). Letters: B fits (starts or
resamples), R rows, P parameters. w are multiplicities of rows, so that a bootstrap resample is a
row of integers and all resamples are one batch. Everything is float64.
"""

from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass

import numpy as np

# (theta_BxP) -> (log_loss_BxR, jacobian_BxPxR, hessian), where hessian(inside_BxR, psi_BxR) is
# sum_r inside_r J_r J_r' + psi_r d2 log_loss_r / dtheta2, [B, P, P].
Hessian = Callable[[np.ndarray, np.ndarray], np.ndarray]
LogLoss = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, Hessian]]

# Fits worked on at once: so many that their Jacobians stay in the second-level cache.
_CACHE_BYTES = 2**20
_THREADS = 2
# A step may change no parameter (all are exponents, or logarithms of sizes) by more.
_LONGEST_STEP = 4.0
# Of a log loss.
_ROUNDING = 1e-14


@dataclass(frozen=True)
class Problem:
    """A law and the rows that it is fitted to.

    Attributes:
      law: (theta_BxP) -> log loss, its Jacobian and Hessian; see `LogLoss`.
      log_loss: of the rows, [R]; or each fit's own, [B, R].
      lower, upper: bounds of the parameters, [P].
    """

    law: LogLoss
    log_loss: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


@dataclass(frozen=True)
class Solution:
    """B optima.

    Attributes:
      theta: parameters, [B, P].
      objective: F at them, [B].
      stationary: whether the gradient is zero to working precision (parameters at a bound excepted,
        if F falls beyond it), [B].
      iterations: evaluations of the law, [B].
    """

    theta: np.ndarray
    objective: np.ndarray
    stationary: np.ndarray
    iterations: np.ndarray


def huber(x: np.ndarray, delta: float) -> np.ndarray:
    """Huber's function: x^2 / 2 within delta, linear beyond."""
    clipped = np.clip(x, -delta, delta)
    return clipped * (x - 0.5 * clipped)


def minimise(
    problem: Problem,
    weights: np.ndarray,
    theta: np.ndarray,
    delta: float,
    tolerance: float = 1e-20,
    max_iterations: int = 200,
) -> Solution:
    """Damped Newton from each start, to stationarity.

    The step solves (H + damping M) s = -g with H the exact Hessian and M the matrix of iteratively
    reweighted least squares, which bounds the Huber terms from above: so a step is Newton's where
    that works, and turns into a descent step where residuals cross delta or H is not positive.
    A step is taken only if F falls.

    Args:
      weights: [B, R] or [R], any real or integer type.
      theta: starts, [B, P].
      tolerance: g' M^-1 g, which is the fall of F within reach, must sink below this share of F.
    """
    n_fits, n_params = theta.shape
    n_rows = problem.log_loss.shape[-1]
    log_loss = np.broadcast_to(problem.log_loss, (n_fits, n_rows))
    weights = np.broadcast_to(weights, (n_fits, n_rows))
    chunk = max(8, _CACHE_BYTES // (8 * n_params * n_rows))

    def part(fits: slice) -> Solution:
        pool = _Pool(problem, log_loss[fits], weights[fits], theta[fits], delta)
        return pool.run(chunk, tolerance, max_iterations)

    if n_fits < 4 * chunk:
        return part(slice(None))
    shares = [slice(i * n_fits // _THREADS, (i + 1) * n_fits // _THREADS) for i in range(_THREADS)]
    with futures.ThreadPoolExecutor(_THREADS) as threads:
        parts = list(threads.map(part, shares))
    columns = zip(*(vars(p).values() for p in parts), strict=True)
    return Solution(*(np.concatenate(x) for x in columns))


class _Pool:
    """The state of B fits; each turn moves the first unfinished ones by one evaluation."""

    def __init__(self, problem, log_loss, weights, theta, delta):
        n_fits, n_params = theta.shape
        self.problem, self.log_loss, self.weights = problem, log_loss, weights
        self.delta = delta
        self.theta = np.clip(theta, problem.lower, problem.upper)
        self.step = np.zeros((n_fits, n_params))
        self.objective = np.full(n_fits, np.inf)
        self.expected = np.zeros(n_fits)  # fall of F that the step promises
        self.gradient = np.zeros((n_fits, n_params))
        self.hessian = np.zeros((n_fits, n_params, n_params))
        self.metric = np.zeros((n_fits, n_params, n_params))
        self.damping = np.full(n_fits, 1e-3)
        self.size = weights.sum(1)

    def run(self, chunk: int, tolerance: float, max_iterations: int) -> Solution:
        iterations = np.zeros(len(self.theta), int)
        stationary = np.zeros(len(self.theta), bool)
        unfinished = np.arange(len(self.theta))
        while len(unfinished):
            now = unfinished[:chunk]
            with np.errstate(all="ignore"):  # a wild trial overflows, and is not taken
                self._move(now)
                self._aim(now)
            iterations[now] += 1
            done = self._stationary(now, tolerance)
            stationary[now] = done
            stop = done | (iterations[now] >= max_iterations) | (self.damping[now] > 1e12)
            unfinished = np.concatenate([now[~stop], unfinished[chunk:]])
        return Solution(self.theta, self.objective, stationary, iterations)

    def _move(self, now: np.ndarray) -> None:
        """Evaluates the trial points, and takes those at which F is lower."""
        bounds = self.problem.lower, self.problem.upper
        trial = np.clip(self.theta[now] + self.step[now], *bounds)
        objective, gradient, hessian, metric = self._evaluate(trial, now)
        old = self.objective[now]
        # At the optimum differences of F are rounding; there a step is Newton's last.
        rounding = 1e-15 * np.sqrt(2 * old * self.size[now])
        taken = objective < old + np.where(self.expected[now] < rounding, rounding, 0.0)
        damping = np.where(taken, self.damping[now] * 0.1, np.maximum(self.damping[now] * 10, 1e-6))
        self.damping[now] = np.where(damping < 1e-12, 0.0, damping)
        fits = now[taken]
        self.theta[fits], self.objective[fits] = trial[taken], objective[taken]
        self.gradient[fits], self.hessian[fits] = gradient[taken], hessian[taken]
        self.metric[fits] = metric[taken]

    def _evaluate(self, theta, now):
        """F, its gradient and Hessian, and the matrix of reweighted least squares."""
        delta, weights = self.delta, self.weights[now]
        value_BxR, jac_BxPxR, hessian_of = self.problem.law(theta)
        x_BxR = value_BxR - self.log_loss[now]
        size_BxR = np.abs(x_BxR)
        clipped_BxR = np.clip(x_BxR, -delta, delta)
        psi_BxR = weights * clipped_BxR
        x_BxR -= 0.5 * clipped_BxR
        objective = np.einsum("br,br->b", psi_BxR, x_BxR)
        gradient = np.matmul(jac_BxPxR, psi_BxR[..., None])[..., 0]
        hessian = hessian_of(weights * (size_BxR <= delta), psi_BxR)
        np.maximum(size_BxR, delta, out=size_BxR)
        metric = gram(jac_BxPxR, weights / size_BxR)
        metric *= delta
        return objective, gradient, hessian, metric

    def _free(self, now):
        """Which parameters may move: not one at a bound that F pushes against it; and F's slope."""
        theta, gradient = self.theta[now], self.gradient[now]
        held = (theta <= self.problem.lower) & (gradient > 0)
        held |= (theta >= self.problem.upper) & (gradient < 0)
        return ~held, np.where(held, 0.0, gradient)

    def _aim(self, now):
        """The next step of each fit."""
        free, gradient = self._free(now)
        metric = self.metric[now]
        damping = self.damping[now][:, None, None]
        step = -_solve(self.hessian[now] + damping * metric, gradient, free)
        slope = np.einsum("bp,bp->b", gradient, step)
        uphill = ~(slope <= 0)
        if uphill.any():
            scaled = (1 + damping[uphill]) * metric[uphill]
            step[uphill] = -_solve(scaled, gradient[uphill], free[uphill])
            slope[uphill] = np.einsum("bp,bp->b", gradient[uphill], step[uphill])
        longest = np.abs(step).max(1, keepdims=True)
        self.step[now] = step * (_LONGEST_STEP / np.maximum(longest, _LONGEST_STEP))
        self.expected[now] = -slope

    def _stationary(self, now, tolerance):
        """Whether g' M^-1 g is below `tolerance`; as H is at most M but for the curvature of the law,
        only fits whose damped step promises little need to be looked at."""
        done = np.zeros(len(now), bool)
        bound = tolerance * self.objective[now] + _ROUNDING**2 * self.size[now]
        promise = self.expected[now] / (1 + self.damping[now])
        near = np.flatnonzero(promise <= np.maximum(1e-10 * self.objective[now], 10 * bound))
        if len(near):
            free, gradient = self._free(now[near])
            reach = _solve(self.metric[now[near]], gradient, free)
            done[near] = np.einsum("bp,bp->b", gradient, reach) <= bound[near]
        return done


def gram(jac_BxPxR: np.ndarray, weights_BxR: np.ndarray) -> np.ndarray:
    """sum_r weights_r J_r J_r', [B, P, P]."""
    return np.matmul(jac_BxPxR * weights_BxR[:, None], jac_BxPxR.transpose(0, 2, 1))


def _solve(matrix, vector, free):
    """matrix^-1 vector among the free parameters, with a ridge that only singular ones feel."""
    matrix = matrix * (free[:, :, None] & free[:, None, :])
    size = np.abs(np.einsum("bpp->bp", matrix))
    ridge = 1e-14 * (size + size.max(1, keepdims=True)) + 1e-300
    matrix += np.eye(vector.shape[1]) * np.where(free, ridge, 1.0)[:, None]
    return np.linalg.solve(matrix, vector[..., None])[..., 0]
