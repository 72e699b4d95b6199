"""Win rates: how often the answers of one policy score above those of another to the same prompts."""

from typing import Any, NamedTuple

import numpy as np

from llm_jax.eval.uncertainty import mcnemar, paired_bootstrap, wilson


class WinRate(NamedTuple):
    """The share of comparisons that the first policy wins, ties counted as half."""

    rate: float
    low: float  # 95 % interval
    high: float
    p_value: float  # two-sided, of a rate of 1/2


def win_rate(scores_a: Any, scores_b: Any, *, seed: int = 0) -> WinRate:
    """The win rate of policy a over policy b: scores [P] or [P, A] and [P] or [P, B].

    All A answers to a prompt are compared with all B, and each prompt counts the same. Prompts, not
    comparisons, are what the interval and the test draw: with one answer each they are Wilson's
    interval (which is too wide where there are ties) and the exact sign test without the ties, as
    McNemar's; otherwise a bootstrap of prompts.

    Raises:
      ValueError: scores of other numbers of prompts or that are not finite; a single prompt with
        several answers.
    """
    a, b = _groups(scores_a), _groups(scores_b)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} prompts: a win rate compares answers to the same")
    ahead = a[:, :, None] - b[:, None, :]
    if ahead[0].size == 1:
        first, second = ahead[:, 0, 0] > 0, ahead[:, 0, 0] < 0
        won = float(np.mean(first) + np.mean(~first & ~second) / 2)
        return WinRate(won, *wilson(won * len(a), len(a)), mcnemar(first, second)[0])
    return mean_win_rate(((ahead > 0) + (ahead == 0) / 2).mean(axis=(1, 2)), seed=seed)


def mean_win_rate(won_P: Any, *, seed: int = 0) -> WinRate:
    """The win rate of policies that win the share `won_P` [P] of the comparisons of each prompt, with
    a bootstrap of prompts.

    Raises:
      ValueError: fewer than two prompts.
    """
    won = np.asarray(won_P, np.float64)
    if len(won) < 2:
        raise ValueError("the interval of a win rate needs two prompts at least")
    found = paired_bootstrap(won, np.full(len(won), 0.5), seed=seed)
    rate = float(won.mean())
    if rate in (0.0, 1.0):  # prompts that all went one way show a bootstrap no spread
        return WinRate(
            rate, *wilson(round(rate * len(won)), len(won)), mcnemar(won == 1, won == 0)[0]
        )
    return WinRate(rate, found.low + 0.5, found.high + 0.5, found.p_value)


def _groups(scores: Any) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    scores = scores[:, None] if scores.ndim == 1 else scores
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"scores have to be [prompts] or [prompts, answers], not {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite")
    return scores
