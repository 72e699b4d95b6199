"""Best-of-n: of n answers of a base policy the one that a judge scores highest.

It needs no training, and how far it goes from the base is known: it is the yardstick for policies
that were tuned. All estimates are made of N answers to each of P prompts, for every n up to N.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from scipy.special import gammaln

from llm_jax import plots, report
from llm_jax.align.win_rate import WinRate, mean_win_rate, win_rate
from llm_jax.eval.uncertainty import paired_bootstrap

T = TypeVar("T")
BASE = "base"


# ------------------------------------------------------------------------------------------ theory


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n: what KL(best-of-n || base) is at most, in nats.

    It is exact where no two answers have the same score and each has probability 0, a limit that
    long texts come near to. Every finite set of answers stays below it for n > 1 (the weight that
    best-of-n gives an answer of probability p is the mean of n u^(n-1) over an interval of length p,
    and by Jensen's inequality x log x of a mean is below the mean of x log x), and equal scores take
    it further down: of a judge that says yes or no, far. The bound holds for each prompt, so for
    their mean as well. Sources: the formula, as an equality, Stiennon et al. 2020; that it is a
    bound, Beirami et al. 2024, "Theoretical Guarantees on the Best-of-n Alignment Policy", section 3.
    """
    _check_n(n)
    return math.log(n) - (n - 1) / n


def win_rate_bound(n: int) -> float:
    """n / (n + 1): how often best-of-n wins over one more answer of the base at most, a tie counted
    as half; exact where no answer has the score of another. Source: Beirami et al. 2024, section 5."""
    _check_n(n)
    return n / (n + 1)


def kl_exact(probabilities: Sequence[float], rewards: Sequence[float], n: int) -> float:
    """KL(best-of-n || base) in nats, over finitely many answers with their base probabilities.

    With F(r) the probability of a score up to r and F-(r) that of a lower one, best-of-n has a score
    r with probability F(r)^n - F-(r)^n, which answers of that score share as they do under the base
    (the first of the tied is taken). Source: Beirami et al. 2024, section 2.

    Raises:
      ValueError: probabilities that do not add up to 1, or other numbers of rewards.
    """
    _check_n(n)
    p, r = np.asarray(probabilities, np.float64), np.asarray(rewards, np.float64)
    if p.ndim != 1 or p.shape != r.shape:
        raise ValueError(f"{p.shape} probabilities need as many rewards, not {r.shape}")
    if (p < 0).any() or abs(p.sum() - 1) > 1e-6:
        raise ValueError(
            f"probabilities have to add up to 1, not {p.sum():g}, none of them below 0"
        )
    _, which = np.unique(r, return_inverse=True)
    mass = np.bincount(which, weights=p / p.sum())
    mass = mass[mass > 0]
    best = np.diff(np.minimum(np.cumsum(mass), 1.0) ** n, prepend=0.0)
    kept = best > 0
    return float(np.sum(best[kept] * np.log(best[kept] / mass[kept])))


# --------------------------------------------------------------------------------------- estimates


def best_weights(scores_PxN: Any, n: int) -> np.ndarray:
    """The probability [P, N] of each answer to be the best of n that are drawn from the N without
    replacement; equal scores share theirs.

    The sum of weights times scores is the unbiased estimate of the expected score of best-of-n that
    has the least variance: with s_(1) <= ... <= s_(N),

        sum_k C(k - 1, n - 1) / C(N, n) s_(k)

    and weights times lengths are its expected length. Binomials are taken in logarithms.

    Raises:
      ValueError: n outside 1 .. N.
    """
    scores = _scores(scores_PxN)
    N = scores.shape[1]
    if not 1 <= n <= N:
        raise ValueError(f"best of {n} cannot be estimated from {N} answers a prompt")
    below, upto = _counts(scores)
    return (_share(upto, N, n) - _share(below, N, n)) / (upto - below)


def expected_best(scores_PxN: Any, n: int) -> np.ndarray:
    """Unbiased estimates [P] of the expected score of best-of-n, as `best_weights` has them."""
    return np.sum(best_weights(scores_PxN, n) * _scores(scores_PxN), axis=1)


def best_wins(scores_PxN: Any, n: int) -> np.ndarray:
    """Unbiased estimates [P] of how often the best of n answers beats one more, a tie counted as half:
    the mean over all choices of n of the N answers and of another one.

    Without ties it is n / (n + 1) whatever the scores are.

    Raises:
      ValueError: n outside 1 .. N - 1.
    """
    scores = _scores(scores_PxN)
    N = scores.shape[1]
    if not 1 <= n < N:
        raise ValueError(
            f"that best of {n} wins over one more cannot be estimated from {N} answers a prompt"
        )
    below, upto = _counts(scores)
    worse = _share(below, N - 1, n)  # all of the n below the other one
    not_better = _share(upto - 1, N - 1, n)  # none of them above it
    return np.mean(1 - (worse + not_better) / 2, axis=1)


def pick(answers: Sequence[Sequence[T]], scores: Any, n: int) -> list[T]:
    """The best of the first n answers to each prompt; of equal ones the first.

    Raises:
      ValueError: n outside 1 .. N.
    """
    scores = _scores(scores)
    if len(answers) != len(scores) or any(len(group) != scores.shape[1] for group in answers):
        raise ValueError(f"scores {scores.shape} are not of these answers")
    if not 1 <= n <= scores.shape[1]:
        raise ValueError(f"there are {scores.shape[1]} answers to pick from, not {n}")
    best = np.argmax(scores[:, :n], axis=1)
    return [group[i] for group, i in zip(answers, best, strict=True)]


def ties(scores_PxN: Any) -> float:
    """The share of pairs of answers to one prompt that have the same score; 0 without a pair."""
    scores = _scores(scores_PxN)
    N = scores.shape[1]
    below, upto = _counts(scores)
    return float(np.mean((upto - below - 1) / (N - 1))) if N > 1 else 0.0


# -------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Policy:
    """Another policy's answers to the same prompts.

    Attributes:
      scores, lengths: [P, N'].
      kl: of the policy from the base, nats; None: not known.
      kl_error: its standard error.
    """

    name: str
    scores: Any
    lengths: Any
    kl: float | None = None
    kl_error: float | None = None


@dataclass(frozen=True)
class Point:
    """A policy on the frontier; intervals are of 95 %, over prompts."""

    name: str
    kl: float | None  # nats; of best-of-n its bound
    kl_error: float | None  # None: the number is no estimate
    score: float
    score_low: float
    score_high: float
    length: float
    wins: WinRate | None = None  # over one answer of the base
    n: int | None = None  # of best-of-n


def compare(
    scores_PxN: Any,
    lengths_PxN: Any,
    *,
    ns: Sequence[int] | None = None,
    others: Sequence[Policy] = (),
    seed: int = 0,
) -> list[Point]:
    """The base, best-of-n of it for each n, and other policies.

    Args:
      scores_PxN: of N answers of the base to each prompt.
      lengths_PxN: of the same answers, in any unit.
      ns: default: the powers of two up to N. Best of all N has no win rate, as no answer is left
        to compare it with.

    Raises:
      ValueError: fewer than two prompts, or policies with other prompts.
    """
    scores = _scores(scores_PxN)
    P, N = scores.shape
    lengths = _same_shape(lengths_PxN, scores, BASE)
    if P < 2:
        raise ValueError("intervals over prompts need two of them at least (--prompts, --input)")
    ns = [2**i for i in range(N.bit_length()) if 2**i <= N] if ns is None else ns
    points = []
    for n in sorted({1, *ns}):
        weights = best_weights(scores, n)
        values = np.sum(weights * scores, axis=1)
        points.append(
            Point(
                name=f"best of {n}" if n > 1 else BASE,
                kl=kl_bound(n),
                kl_error=None,
                **_interval(values, seed),
                length=float(np.mean(np.sum(weights * lengths, axis=1))),
                wins=mean_win_rate(best_wins(scores, n), seed=seed) if 1 < n < N else None,
                n=n,
            )
        )
    for policy in others:
        theirs = _scores(policy.scores)
        if len(theirs) != P:
            raise ValueError(f"{policy.name} answered {len(theirs)} prompts, the base {P}")
        points.append(
            Point(
                name=policy.name,
                kl=policy.kl,
                kl_error=policy.kl_error,
                **_interval(theirs.mean(axis=1), seed),
                length=float(np.mean(_same_shape(policy.lengths, theirs, policy.name))),
                wins=win_rate(theirs, scores, seed=seed),
            )
        )
    return points


def table(points: Sequence[Point]) -> report.Table:
    """One row for each point."""

    def interval(value: float, low: float, high: float) -> str:
        return " ".join([number(value), f"[{number(low)}, {number(high)}]"])

    number = report.format_number
    rows = []
    for p in points:
        kl = None if p.kl is None else number(p.kl)
        if p.kl is not None and p.n is not None and p.n > 1:
            kl = f"≤ {kl}"
        elif p.kl_error is not None:
            kl = f"{kl} ± {number(p.kl_error)}"
        rows.append(
            {
                "policy": p.name,
                "KL from the base, nats": kl,
                "score": interval(p.score, p.score_low, p.score_high),
                "length": p.length,
                "win rate": interval(*p.wins[:3]) if p.wins else None,
                "p": p.wins.p_value if p.wins else None,
            }
        )
    return report.Table(
        rows,
        caption="In brackets 95 % over prompts; ± one standard error; p: of a win rate of 1/2",
    )


def plot(points: Sequence[Point], *, ylabel: str = "score") -> report.Plot:
    """Score against the square root of the KL divergence: best-of-n as a line, the others as points.

    The root, as a gain of score goes with it for small steps (Bai et al. 2022). Policies
    without a divergence are lines across.
    """

    def root(kl: float) -> float:
        return math.sqrt(max(kl, 0.0))  # an estimate may fall below 0

    line = [p for p in points if p.n is not None]
    series = [
        report.Series(
            "best of n",
            [root(p.kl) for p in line],
            [p.score for p in line],
            low=[p.score_low for p in line],
            high=[p.score_high for p in line],
            texts=[BASE if p.n == 1 else f"n = {p.n}" for p in line],
        )
    ]
    placed = [p for p in points if p.n is None and p.kl is not None]
    for i, p in enumerate(placed, start=1):
        color = plots.PALETTE[i % len(plots.PALETTE)]
        error = np.nan_to_num(p.kl_error or 0.0)
        series += [
            report.Series(
                "", [root(p.kl)], [p.score], "points", low=[p.score_low], high=[p.score_high],
                color=color, texts=[p.name],
            ),
            report.Series(
                "", [root(p.kl - error), root(p.kl + error)], [p.score] * 2, "thin", color=color
            ),
        ]  # fmt: skip
    return report.Plot(
        name="best_of_n",
        title="Score against distance from the base",
        xlabel="square root of the KL divergence from the base (nats)",
        ylabel=ylabel,
        series=series,
        hlines=[report.Mark(p.score, p.name) for p in points if p.n is None and p.kl is None],
        caption=(
            "Up and left is better. Of best-of-n the divergence is its bound, so that its line may "
            "lie further left than drawn; bars and band: 95 % over prompts, across one standard error."
        ),
    )


def _interval(values_P: np.ndarray, seed: int) -> dict[str, float]:
    found = paired_bootstrap(values_P, np.zeros(len(values_P)), seed=seed)
    return {"score": found.difference, "score_low": found.low, "score_high": found.high}


def _share(of: np.ndarray, N: int, n: int) -> np.ndarray:
    """C(of, n) / C(N, n): the probability that n of N all fall among `of` of them."""
    x = np.maximum(of, n).astype(np.float64)
    log_share = gammaln(x + 1) - gammaln(x - n + 1) - gammaln(N + 1.0) + gammaln(N - n + 1.0)
    return np.where(of < n, 0.0, np.exp(log_share))


def _counts(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each score how many of its prompt's are below it, and how many not above, [P, N] each."""
    ranked = np.sort(scores, axis=1)
    below, upto = (
        np.array([np.searchsorted(r, s, side) for r, s in zip(ranked, scores, strict=True)])
        for side in ("left", "right")
    )
    return below, upto


def _check_n(n: int) -> None:
    if n < 1:
        raise ValueError(f"best of {n}: n has to be at least 1")


def _scores(scores: Any) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"scores have to be [prompts, answers], not {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite")
    return scores


def _same_shape(lengths: Any, scores: np.ndarray, name: str) -> np.ndarray:
    lengths = np.asarray(lengths, np.float64)
    if lengths.shape != scores.shape:
        raise ValueError(f"{name}: lengths {lengths.shape} of answers with scores {scores.shape}")
    return lengths
