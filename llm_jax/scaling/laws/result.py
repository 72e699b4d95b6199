"""What every law is fitted with, and what the fit returns."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Options:
    """How a law is fitted.

    Attributes:
      huber_delta: residual of log loss where Huber's loss turns from square to linear.
      bootstrap: resamples for intervals; 0: none.
      seed: of the resamples.
      level: nominal coverage of the intervals.
      at: FLOPs at which N*, D* and D*/N* are given; None: ten times the largest of the table.
      flops_factor: C = flops_factor * N * D.
    """

    huber_delta: float = 1e-3
    bootstrap: int = 4000
    seed: int = 0
    level: float = 0.9
    at: float | None = None
    flops_factor: float = 6.0


@dataclass
class LawFit:
    """One fitted law.

    Attributes:
      law: its name, a key of `llm_jax.scaling.laws.LAWS`.
      params: fitted parameters and what follows from them (exponents a, b of N* ~ C^a, D* ~ C^b).
      objective: what the fit minimised (for the parametric laws the sum of Huber terms of the
        residuals of log loss), at its optimum.
      converged: whether the optimum is stationary to working precision; False is never an answer.
      starts_at_optimum: share of the starts that ended at it (1.0 for fits in closed form).
      intervals: percentile bootstrap intervals {name: (low, high)} at `level`, for `params` and for
        N*, D*, D*/N* at `at` FLOPs.
      standard_errors: standard deviations over the same resamples.
      n_rows: rows fitted.
      seconds: wall time of the point fit.
      bootstrap_seconds: wall time of all resamples.
      samples: {name: [bootstrap resamples]} of `params`, for plots; not written to fit.json.
      at: the FLOPs at which N* and D* are given.
      level: nominal coverage of `intervals`.
      warnings: named doubts, such as "only one seed", one line each.
      details: anything more that is worth a line in fit.json (R^2, error on held-out rows, ...).
    """

    law: str
    params: dict[str, float]
    objective: float
    converged: bool
    n_rows: int
    starts_at_optimum: float = 1.0
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    standard_errors: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    bootstrap_seconds: float = 0.0
    samples: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    at: float | None = None
    level: float = 0.9
    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
