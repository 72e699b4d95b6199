"""A table of finished training runs, which is all that a scaling law is fitted to."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Runs:
    """R runs, or points of training curves; float64 columns of length R.

    Attributes:
      n: parameters, by whichever convention the table counts.
      d: training tokens.
      c: training FLOPs; 6 n d unless the table has its own.
      loss: nats per token.
      budget: number of the IsoFLOP group that a run belongs to, int64 from 0 by rising compute;
        rows of one group share a budget up to rounding. None: the table is not made of budgets.
      curve: number of the training run that a row is a point of, int64; None: each row is a run.
      unique: distinct tokens, for laws of repeated data; None: every token was seen once.
      other: further numeric columns by name (learning rate, seed, width, ...).
    """

    n: np.ndarray
    d: np.ndarray
    c: np.ndarray
    loss: np.ndarray
    budget: np.ndarray | None = None
    curve: np.ndarray | None = None
    unique: np.ndarray | None = None
    other: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, rows: np.ndarray) -> "Runs":
        """The runs at these indices (or under this mask)."""

        def of(x):
            return None if x is None else x[rows]

        return Runs(
            n=self.n[rows],
            d=self.d[rows],
            c=self.c[rows],
            loss=self.loss[rows],
            budget=of(self.budget),
            curve=of(self.curve),
            unique=of(self.unique),
            other={k: v[rows] for k, v in self.other.items()},
        )
