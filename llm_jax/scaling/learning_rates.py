"""The best learning rate of those that were tried."""

import math
from collections.abc import Sequence

import numpy as np


def best_index(losses: Sequence[float]) -> tuple[int, bool]:
    """(place of the lowest loss, whether it has a neighbour on both sides), rates being sorted."""
    i = int(np.argmin(losses))
    return i, 0 < i < len(losses) - 1


def parabola_minimum(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The minimum of the parabola in log rate through the lowest loss and its two neighbours; the
    lowest itself if one step further diverges (an infinite loss: there is no parabola).

    Raises:
      ValueError: the lowest loss is at the edge of what was tried.
    """
    order = np.argsort(rates)
    x, y = np.log(np.asarray(rates, float)[order]), np.asarray(losses, float)[order]
    i, inside = best_index(y)
    if not inside:
        raise ValueError(
            f"the best learning rate {math.exp(x[i]):.2e} is at the edge of what was tried"
        )
    near = slice(i - 1, i + 2)
    if not np.isfinite(y[near]).all():
        return math.exp(x[i])
    a, b, _ = np.polyfit(x[near] - x[i], y[near], 2)
    return math.exp(x[i] - b / (2 * a))
