"""Laws of loss against size, data and compute: `LAWS` by name, each with `fit` and `predict`."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llm_jax.scaling.laws import chinchilla, data_constrained, envelope, isoflop, kaplan
from llm_jax.scaling.laws.result import LawFit, Options
from llm_jax.scaling.runs import Runs

__all__ = ["LAWS", "Law", "LawFit", "Options"]


@dataclass(frozen=True)
class Law:
    """A law that runs can be fitted with.

    Attributes:
      fit: (runs, options) -> LawFit; ValueError if the runs cannot identify it.
      predict: (params, runs) -> loss of every run in nats per token, [R].
      title: what reports call it.
      formula: its formula, in LaTeX.
    """

    fit: Callable[[Runs, Options], LawFit]
    predict: Callable[[dict[str, float], Runs], np.ndarray]
    title: str
    formula: str


LAWS: dict[str, Law] = {
    "chinchilla1": Law(
        envelope.fit,
        envelope.predict,
        "Chinchilla 1: envelope of training curves",
        r"N^* = k_N C^a,\; D^* = k_D C^b,\; L^* = E + k_L C^{-\gamma}",
    ),
    "chinchilla2": Law(
        isoflop.fit,
        isoflop.predict,
        "Chinchilla 2: IsoFLOP parabolas",
        r"N^* = k_N C^a,\; D^* = k_D C^b,\; L^* = E + k_L C^{-\gamma}",
    ),
    "chinchilla3": Law(
        chinchilla.fit,
        chinchilla.predict,
        "Chinchilla 3: parametric",
        r"L(N, D) = E + A N^{-\alpha} + B D^{-\beta}",
    ),
    "kaplan": Law(
        kaplan.fit,
        kaplan.predict,
        "Kaplan",
        r"L(N, D) = \left((N_c / N)^{\alpha_N / \alpha_D} + D_c / D\right)^{\alpha_D}",
    ),
    "data_constrained": Law(
        data_constrained.fit,
        data_constrained.predict,
        "Repeated data",
        r"L = E + A N'^{-\alpha} + B D'^{-\beta}",
    ),
}
