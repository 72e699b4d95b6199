"""Weighted sources: which rows of which source make up each step.

Everything is a function of the step number, so that any step can be asked for at any time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llm_jax.data.tokens import Tokens

Weights = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Component:
    """One source of a mixture: its tokens and (fraction of training, weight) points."""

    name: str
    tokens: Tokens
    weights: Weights = ((0.0, 1.0),)


def check_weights(name: str, weights: Weights) -> None:
    """Raises ValueError unless points ascend within [0, 1] and weights are not negative."""
    where = f"data.sources: the weights of {name!r}"
    pairs = all(isinstance(point, tuple | list) and len(point) == 2 for point in weights)
    if not weights or not pairs:
        raise ValueError(f"{where} have to be (fraction, weight) points, not {weights!r}")
    fractions = [f for f, _ in weights]
    if sorted(set(fractions)) != fractions or fractions[0] < 0 or fractions[-1] > 1:
        raise ValueError(f"{where}: fractions {fractions} have to ascend within [0, 1]")
    if min(w for _, w in weights) < 0:
        raise ValueError(f"{where}: a weight is negative")


def rates(
    examples: Mapping[str, int], *, cap: float = 0.0, temperature: float = 1.0
) -> dict[str, float]:
    """Share of each task by the number of its examples; they sum to 1.

        r_m = min(e_m, K)^(1/T) / sum over tasks

    Examples-proportional mixing with an artificial limit K on a data set's size (`cap`; 0: none)
    and a temperature T (Raffel et al. 2020, section 3.5.2): T = 1 is proportional, a large T gives
    every task the same. A share is the weight of a source (`SourceConfig.weights`).

        examples           8    1    27    cap 8           8    1    8
        T = 1           0.22 0.03  0.75    T = 1        0.47 0.06 0.47
        T = 3           0.33 0.17  0.50    T = 3        0.40 0.20 0.40

    Raises:
      ValueError: a task without examples, a negative cap, or a temperature that is not above 0.
    """
    if not examples or min(examples.values()) < 1:
        empty = next((name for name, n in examples.items() if n < 1), "")
        raise ValueError(f"a mixture needs an example of each task; there is none of {empty!r}")
    if not cap >= 0:
        raise ValueError(f"cap={cap} has to be at least 1, or 0 for none")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} has to be above 0")
    logs = {name: math.log(min(n, cap or n)) / temperature for name, n in examples.items()}
    top = max(logs.values())  # a low temperature would overflow
    weights = {name: math.exp(value - top) for name, value in logs.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def shares(weights: Sequence[Weights], steps: int) -> np.ndarray:
    """Share of each source in each step, float64 [steps, sources]; rows sum to 1.

    The weight at step t is the piecewise-linear curve at t / (steps - 1), constant outside its
    points, so the first point is step 0 and fraction 1 the last step.
    """
    at = np.arange(steps) / max(steps - 1, 1)
    weight = np.stack([np.interp(at, *np.transpose(points)) for points in weights], axis=1)
    total = weight.sum(axis=1, keepdims=True)
    if (total == 0).any():
        step = int(np.argmax(total == 0))
        raise ValueError(f"data.sources: all weights are 0 at step {step} of {steps}")
    return weight / total


def rows_per_step(share: np.ndarray, batch_size: int) -> np.ndarray:
    """Whole rows of each source in each step, int64 [steps, sources]; each step has `batch_size`.

    Shares 2/3 and 1/3 at batch 2, five steps: the error is carried on, not rounded away.

        wanted in all   1.33  2.67  4.00  5.33  6.67
        rows, source 1  2     1     1     2     1      in all  2 3 4 6 7
        rows, source 2  0     1     1     0     1      in all  0 1 2 2 3

    After every step each source has had, within less than one row, what its shares add up to. To
    keep that promise the next row of a source has to come before its wanted total grows by one;
    the rows that may still wait are taken in the order of these deadlines (earliest deadline first,
    which meets all of them whenever that is possible: Baruah et al., Proportionate progress, 1996).
    """
    steps, sources = share.shape
    if sources == 1:
        return np.full((steps, 1), batch_size)
    wanted = np.round(np.cumsum(share * batch_size, axis=0), 9)
    due = np.floor(wanted).astype(np.int64)
    deadline = np.stack(
        [np.searchsorted(wanted[:, i], due[:, i] + 1) for i in range(sources)], axis=1
    )
    deadline[wanted == due] = steps + 1  # nothing is wanted beyond what is due
    had, totals = [0] * sources, np.empty((steps, sources), np.int64)
    for step, (due_now, deadline_now) in enumerate(
        zip(due.tolist(), deadline.tolist(), strict=True)
    ):
        spare = batch_size * (step + 1)
        waiting = []
        for i in range(sources):
            if had[i] <= due_now[i]:
                had[i] = due_now[i]
                waiting.append((deadline_now[i], i))
            spare -= had[i]
        for _, i in sorted(waiting)[:spare]:
            had[i] += 1
        totals[step] = had
    return np.diff(totals, axis=0, prepend=0)


class Mixture:
    """Which source, and which of its rows, stands at each place of a step's batch."""

    def __init__(self, weights: Sequence[Weights], steps: int, batch_size: int):
        self._batch_size = batch_size
        self._rows = None  # a single source needs no table
        if len(weights) > 1:
            self._rows = rows_per_step(shares(weights, steps), batch_size)  # [steps, sources]
            self._before = np.cumsum(self._rows, axis=0) - self._rows

    def step(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, row number), both int64 [B]; a source's rows are numbered over all steps.

        The sources are spread evenly over the batch, so that every host and every micro-batch
        sees about the same mixture.
        """
        if self._rows is None:
            within = np.arange(self._batch_size)
            return np.zeros_like(within), step * self._batch_size + within
        count = self._rows[step]
        source = np.repeat(np.arange(len(count)), count)
        within = np.concatenate([np.arange(n) for n in count])
        order = np.argsort((within + 0.5) / count[source], kind="stable")
        return source[order], (self._before[step][source] + within)[order]
