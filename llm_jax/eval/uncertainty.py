"""How sure an evaluation's number is: standard errors, intervals, and comparing two models.

Two models that answered the same questions are compared by their differences on each question: what
makes a question hard for both is then no noise. Source of the whole: Miller 2024, "Adding Error Bars
to Evals: A Statistical Approach to Language Model Evaluations".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

_CHUNK = 1 << 22  # numbers that a bootstrap draws at a time


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of n independent values: sqrt(Σ (x - mean)² / (n - 1) / n).

    nan for a single value, which says nothing about the spread. Raises ValueError for none.
    """
    values = _values(values)
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan


def clustered_standard_error(values: Sequence[float], clusters: Sequence[Any]) -> float:
    """Standard error of the mean where values of one cluster go together.

    Questions about one passage, or translations of one question, are not independent: their number
    overstates what was learnt. With G clusters of n values in all,

        SE² = G / (G - 1) · Σ_c (Σ_{i in c} (x_i - mean))² / n²

    Where each value is its own cluster this is `standard_error`. `clusters` names the cluster of
    each value. nan with a single cluster. Source: Miller 2024, equation 4, with the usual
    correction for few clusters.
    """
    values = _values(values)
    sums, _ = _per_cluster(values - values.mean(), clusters)
    G = len(sums)
    return float(math.sqrt(G / (G - 1) * np.sum(sums**2)) / values.size) if G > 1 else math.nan


def proportion_standard_error(successes: int, n: int) -> float:
    """sqrt(p (1 - p) / n). It is 0 at 0 % and 100 %, where `wilson` still gives an interval."""
    _check_count(successes, n)
    p = successes / n
    return math.sqrt(p * (1 - p) / n)


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; inside [0, 1], right also near its ends.

    With z the quantile of (1 + confidence) / 2:

        (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n)

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    _check_count(successes, n)
    p, z = successes / n, _quantile(confidence)
    middle = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same items.

    Attributes:
      difference: mean of the first less mean of the second.
      standard_error: of the difference, over bootstrap samples.
      low, high: the confidence interval of the difference.
      p_value: two-sided, of no difference.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    *,
    clusters: Sequence[Any] | None = None,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compares two models by their scores of the same items, in the same order.

    Items (whole `clusters` of them, where given) are drawn with replacement, both models' scores
    together. The interval holds the middle of the samples' differences d*; the p-value asks how
    often they lie as far from the measured d as d lies from 0,

        p = (1 + #{|d* - d| >= |d|}) / (1 + samples)

    The same seed gives the same numbers. Source: Efron & Tibshirani 1993, "An Introduction to the
    Bootstrap", chapters 13 and 16.

    Raises:
      ValueError: different numbers of scores, fewer than two items (clusters), or samples < 1.
    """
    first, second = _values(first), _values(second)
    if first.size != second.size:
        raise ValueError(
            f"{first.size} and {second.size} scores: both models need one for each item"
        )
    if samples < 1:
        raise ValueError(f"samples={samples} has to be 1 or more")
    names = np.arange(first.size) if clusters is None else clusters
    sums, sizes = _per_cluster(first - second, names)
    G = len(sums)
    if G < 2:
        raise ValueError("a bootstrap needs two items (clusters) at least")
    rng = np.random.default_rng(seed)
    drawn = []
    rows = max(_CHUNK // G, 1)
    for at in range(0, samples, rows):
        which = rng.integers(0, G, (min(rows, samples - at), G))
        drawn.append(sums[which].sum(axis=1) / sizes[which].sum(axis=1))
    drawn = np.concatenate(drawn)
    difference = float(sums.sum() / sizes.sum())
    tail = (1 - _confidence(confidence)) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail))
    # Ties are frequent (accuracies are multiples of 1/n) and must not hang on rounding.
    far = np.abs(drawn - difference) >= abs(difference) - 1e-12
    return Comparison(
        difference=difference,
        standard_error=float(drawn.std()),
        low=float(low),
        high=float(high),
        p_value=float((1 + far.sum()) / (1 + samples)),
    )


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, int, int]:
    """(p, b, c): McNemar's exact test of two models, each right or wrong on the same items.

    Only items on which they differ say anything: b that the first alone has right, c the second
    alone. With no difference b is Binomial(b + c, 1/2), and p = min(1, 2 P(X <= min(b, c))); 1.0
    where they never differ. Source: McNemar 1947; exact by Fagerland et al. 2013.
    """
    first, second = _values(first), _values(second)
    if first.size != second.size or not np.isin(np.concatenate([first, second]), (0, 1)).all():
        raise ValueError("McNemar's test takes 0 or 1 of both models for each item")
    b, c = int(np.sum(first > second)), int(np.sum(second > first))
    return min(1.0, 2 * float(stats.binom.cdf(min(b, c), b + c, 0.5))), b, c


def _per_cluster(values: np.ndarray, clusters: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """(sums [G], sizes [G]) of the values of each cluster."""
    if len(clusters) != values.size:
        raise ValueError(f"{values.size} values need as many clusters, not {len(clusters)}")
    numbers: dict[Any, int] = {}
    index = np.array([numbers.setdefault(name, len(numbers)) for name in clusters])
    return np.bincount(index, weights=values), np.bincount(index)


def _values(values: Sequence[float]) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"a list of scores is needed, not {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("a score is not finite")
    return values


def _check_count(successes: int, n: int) -> None:
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} of {n} is no proportion")


def _confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} has to lie between 0 and 1, such as 0.95")
    return confidence


def _quantile(confidence: float) -> float:
    return float(stats.norm.ppf((1 + _confidence(confidence)) / 2))
