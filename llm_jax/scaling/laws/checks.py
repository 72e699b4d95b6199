"""Which tables cannot identify a law, which optima are no answer, and how well a law fits."""

from collections.abc import Mapping

import numpy as np

from llm_jax.scaling.runs import Runs

# Exponents beyond it say that only the smallest of the sizes differ from the others.
_STEEPEST = 3.0
# Share of the variance of log D that a straight line in log N may explain.
_LINE = 0.995


def require(runs: Runs, law: str, n_params: int, distinct: dict[str, int]) -> list[str]:
    """Named warnings about a table that a law can be fitted to.

    Args:
      distinct: {"N", "D", "C" or "unique": how many different values the law needs}.

    Raises:
      ValueError: it cannot be: numbers that are not positive and finite, too few rows, too few
        different values.
    """
    columns = {"N": runs.n, "D": runs.d, "C": runs.c, "loss": runs.loss, "unique": runs.unique}
    for name, x in columns.items():
        if x is not None and not (np.isfinite(x) & (x > 0)).all():
            bad = int((~(np.isfinite(x) & (x > 0))).sum())
            raise ValueError(f"{law}: {name} is not positive and finite in {bad} of {len(x)} rows")
    fewest = max(4, n_params + 1)
    if len(runs) < fewest:
        raise ValueError(f"{law} has {n_params} parameters: {len(runs)} rows, {fewest} are needed")
    for name, needed in distinct.items():
        found = len(np.unique(columns[name]))
        if found < needed:
            raise ValueError(
                f"{law} needs {needed} different values of {name}, the rows have {found}"
            )
    repeated = len(runs) - len(np.unique(np.stack([runs.n, runs.d, runs.loss]), axis=1).T)
    if repeated:
        return [f"duplicate rows: {repeated} of {len(runs)} rows repeat another, and count again"]
    return []


def require_plane(runs: Runs, law: str) -> None:
    """Raises ValueError where N determines D (one budget, or one ratio of tokens to parameters)."""
    x, y = np.log(runs.n), np.log(runs.d)
    explained = np.corrcoef(x, y)[0, 1] ** 2
    if runs.budget is not None and len(np.unique(runs.budget)) == 1:
        raise ValueError(f"{law}: all rows have one budget; N and D must vary independently")
    if explained > _LINE:
        raise ValueError(
            f"{law}: log D is a straight line in log N (R^2 {explained:.4f}: one budget, or one "
            "ratio of tokens to parameters); N and D must vary independently"
        )


def doubts(params: Mapping[str, float], terms: Mapping[str, str]) -> tuple[list[str], bool]:
    """Named warnings about an optimum of E + sum_k A_k x_k^-alpha_k, and whether it is a law at all.

    Args:
      terms: {name of A_k: name of its alpha_k}.
    """
    warnings, sound = [], True
    if params.get("E") == 0:
        warnings.append("boundary: E is 0; these rows show no irreducible loss")
    for size, exponent in terms.items():
        value = params[exponent]
        if params[size] == 0:
            sound = False
            warnings.append(f"boundary: {size} is 0; {exponent} is undetermined")
        elif value <= 0:
            sound = False
            warnings.append(f"boundary: {exponent} = {value:.3g}; the loss does not fall")
        elif value > _STEEPEST:
            sound = False
            warnings.append(f"boundary: {exponent} = {value:.3g}; only the smallest sizes matter")
    return warnings, sound


def goodness(loss: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """R^2 of the loss (the one of Muennighoff et al. 2023) and of its logarithm."""

    def r_squared(y, p):
        return float(1 - ((y - p) ** 2).sum() / ((y - y.mean()) ** 2).sum())

    return {
        "r2": r_squared(loss, predicted),
        "r2_log": r_squared(np.log(loss), np.log(predicted)),
    }
