"""A power law with an offset, y = E + A x^-alpha, of any positive x; and its bootstrap."""

from dataclasses import dataclass, field

import numpy as np

from llm_jax.scaling.laws import bootstrap, checks, powers, search


@dataclass(frozen=True)
class PowerLaw:
    """A fitted power law.

    Attributes:
      E, A, alpha: y = E + A x^-alpha.
      objective: sum of Huber terms of the residuals of log y.
      converged: False is never an answer.
      starts_at_optimum: share of the starts that ended there.
      intervals: percentile intervals of E, A, alpha; {} without a bootstrap.
      samples: the resamples behind them, {name: [n]}.
      warnings: named doubts, one line each.
    """

    E: float
    A: float
    alpha: float
    objective: float
    converged: bool
    starts_at_optimum: float
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    samples: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    warnings: list[str] = field(default_factory=list)


def fit(
    x: np.ndarray,
    y: np.ndarray,
    offset: bool = True,
    huber_delta: float = 1e-3,
    weights: np.ndarray | None = None,
    level: float = 0.9,
) -> PowerLaw:
    """Fits y = E + A x^-alpha by the sum of Huber terms of the residuals of log y.

    Args:
      x, y: [R], positive.
      offset: False: E is 0.
      weights: resamples as multiplicities of rows, int [n, R], for intervals; see
        `bootstrap.resample`.
      level: nominal coverage of the intervals.

    Raises:
      ValueError: numbers that are not positive and finite, fewer than four points, or too few
        different x.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    for name, value in (("x", x), ("y", y)):
        if not (np.isfinite(value) & (value > 0)).all():
            raise ValueError(f"a power law needs positive finite numbers; {name} has others")
    distinct = len(np.unique(x))
    if len(x) < 4 or distinct < 2 + offset:
        raise ValueError(
            f"a power law needs 4 points of {2 + offset} different x; "
            f"there are {len(x)} points of {distinct}"
        )
    rows = powers.Powers.of(x[None], y, offset)
    point = search.point_fit(rows.problem, rows.starts(huber_delta), huber_delta)
    params = {k: float(v[0]) for k, v in _named(rows, point.theta[None]).items()}
    found = params if offset else {k: v for k, v in params.items() if k != "E"}
    warnings, sound = checks.doubts(found, {"A": "alpha"})
    samples = {}
    if weights is not None:
        samples = _named(rows, search.refit(rows.problem, weights, point.theta, huber_delta).theta)
    return PowerLaw(
        **params,
        objective=point.objective,
        converged=point.converged and sound,
        starts_at_optimum=point.starts_at_optimum,
        intervals=bootstrap.percentiles(samples, level),
        samples=samples,
        warnings=warnings,
    )


def predict(law: PowerLaw, x: np.ndarray) -> np.ndarray:
    """y at x."""
    return law.E + law.A * np.asarray(x, float) ** -law.alpha


def _named(rows: powers.Powers, theta_BxP: np.ndarray) -> dict[str, np.ndarray]:
    e, size, alpha = rows.natural(theta_BxP)
    return {"E": e, "A": size[:, 0], "alpha": alpha[:, 0]}
