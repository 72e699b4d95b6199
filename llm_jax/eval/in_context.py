"""In-context learning: how accuracy grows with the examples in the prompt.

Synthetic: each sequence draws a function that no other sequence has and shows examples of it,

    x_1 y_1 x_2 y_2 ... x_K y_K x_{K+1} y_{K+1}

so that y can be told from the examples alone; weights cannot hold it (Garg et al. 2022, "What Can
Transformers Learn In-Context?"; Chan et al. 2022 for labels without a meaning of their own).
Real: a model's accuracy on an evaluation task against the number of worked examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import models
from llm_jax.config import ModelConfig
from llm_jax.eval.run import Options, evaluate_tasks
from llm_jax.report import Mark, Plot, Series
from llm_jax.types import Array, Batch, PyTree

FUNCTIONS = ("lookup", "linear")


@dataclass(frozen=True)
class Functions:
    """A family of functions from inputs to labels.

    Attributes:
      kind: lookup: each of `active` words, drawn from `words` anew for each sequence, has a random
        label. linear: y = [w · x > 0] of x in {-1, 1}^dimensions, each dimension one token, with
        a Gaussian w for each sequence.
      shots: examples before the last question.
    """

    kind: str = "lookup"
    shots: int = 16
    labels: int = 4
    words: int = 16
    active: int = 4
    dimensions: int = 5

    def __post_init__(self):
        if self.kind not in FUNCTIONS:
            raise ValueError(f"--function={self.kind!r}; there are {', '.join(FUNCTIONS)}")
        if not 1 <= self.active <= self.words:
            raise ValueError(f"--active={self.active} has to be between 1 and --words={self.words}")

    @property
    def n_labels(self) -> int:
        return 2 if self.kind == "linear" else self.labels

    @property
    def x_tokens(self) -> int:
        """Tokens of one input."""
        return self.dimensions if self.kind == "linear" else 1

    @property
    def vocab_size(self) -> int:
        """Labels come first, then what inputs are made of."""
        return self.n_labels + (2 * self.dimensions if self.kind == "linear" else self.words)

    @property
    def length(self) -> int:
        """Tokens of a sequence; the last label is only a target."""
        return (self.x_tokens + 1) * (self.shots + 1) - 1

    def sample(self, n: int, rng: np.random.Generator) -> Batch:
        """n sequences, each with a new function; only labels have a weight: [n, length]."""
        x, y = (self._linear if self.kind == "linear" else self._lookup)(n, rng)
        rows = np.concatenate([x, y[..., None]], axis=-1).reshape(n, -1).astype(np.int32)
        weights = np.zeros((n, self.length), np.float32)
        weights[:, self.x_tokens - 1 :: self.x_tokens + 1] = 1
        return Batch(tokens=rows[:, :-1], targets=rows[:, 1:], weights=weights)

    def best(self) -> list[float] | None:
        """Accuracy after 0 .. shots examples of who remembers every example and else guesses.

        Of a lookup: word k+1 is among the first k with probability s = 1 - (1 - 1/active)^k, and
        s + (1 - s) / labels are right. Of linear functions there is no closed form.
        """
        if self.kind == "linear":
            return None
        seen = 1 - (1 - 1 / self.active) ** np.arange(self.shots + 1)
        return (seen + (1 - seen) / self.labels).tolist()

    def _lookup(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        words = rng.permuted(np.tile(np.arange(self.words), (n, 1)), axis=1)[:, : self.active]
        labels = rng.integers(0, self.labels, (n, self.active))
        which = rng.integers(0, self.active, (n, self.shots + 1))
        x = self.labels + np.take_along_axis(words, which, axis=1)
        return x[..., None], np.take_along_axis(labels, which, axis=1)

    def _linear(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        w = rng.standard_normal((n, 1, self.dimensions))
        bits = rng.integers(0, 2, (n, self.shots + 1, self.dimensions))
        y = ((2 * bits - 1) * w).sum(-1) > 0
        return 2 + 2 * np.arange(self.dimensions) + bits, y.astype(np.int64)


def accuracy_by_shots(
    params: PyTree, cfg: ModelConfig, functions: Functions, batch: Batch, *, rows: int = 256
) -> np.ndarray:
    """Share of `batch`'s sequences whose label after 0 .. shots examples has the highest logit of
    all labels: float64 [shots + 1]."""
    step = functions.x_tokens + 1
    targets = batch.targets[:, functions.x_tokens - 1 :: step]
    chosen = [
        _choose(params, batch.tokens[at : at + rows], cfg, step, functions.n_labels)
        for at in range(0, len(targets), rows)
    ]
    return np.mean(np.concatenate(chosen) == targets, axis=0, dtype=np.float64)


@partial(jax.jit, static_argnames=("cfg", "step", "n_labels"))
def _choose(params: PyTree, tokens_BxL: Array, cfg: ModelConfig, step: int, n_labels: int) -> Array:
    model = models.family(cfg.family)
    x_BxLxD = model.hidden(params, Batch(tokens=tokens_BxL), cfg).x
    logits = model.logits(params, x_BxLxD[:, step - 2 :: step], cfg)
    return jnp.argmax(logits[..., :n_labels], axis=-1)


def task_by_shots(
    params: PyTree,
    cfg: ModelConfig,
    tokenizer: Any,
    task: str,
    shots: Sequence[int],
    options: Options,
    *,
    metric: str = "acc",
) -> tuple[list[float], list[float]]:
    """(values, standard errors) of an evaluation task's metric with each number of worked examples.

    The questions are the same each time.

    Raises:
      ValueError: a metric that the task does not have, or what `evaluate_tasks` refuses.
    """
    found = []
    for k in shots:
        result = evaluate_tasks(params, cfg, tokenizer, [task], replace(options, num_fewshot=k))
        metrics = next(iter(result.values()))["metrics"]
        if len(result) > 1 or metric not in metrics:
            known = ", ".join(metrics)
            raise ValueError(f"--metric={metric}: --task={task} has {known} (name a single task)")
        found.append(metrics[metric])
    return [m["value"] for m in found], [m["stderr"] for m in found]


def plots(result: dict) -> list[Plot]:
    """Accuracy against shots with a line for each model, and against size with one for each number
    of shots. `result` has shots, chance, best (or None) and models with name, parameters, accuracy
    and stderr."""
    shots, found = result["shots"], sorted(result["models"], key=lambda m: m["parameters"])
    lines = [
        Series(
            f"{m['name']}, {m['parameters']:,} parameters",
            shots,
            m["accuracy"],
            low=[a - 1.96 * e for a, e in zip(m["accuracy"], m["stderr"], strict=True)],
            high=[a + 1.96 * e for a, e in zip(m["accuracy"], m["stderr"], strict=True)],
        )
        for m in found
    ]
    if result.get("best"):
        lines.append(Series("best possible", shots, result["best"], style="dashed"))
    chance = [Mark(result["chance"], "chance")] if result.get("chance") else []
    by_shots = Plot(
        "shots",
        lines,
        title=result["title"],
        xlabel="examples in the prompt",
        ylabel=result.get("metric", "accuracy"),
        hlines=chance,
        annotation="bands: 95 % of the sampling error",
    )
    if len(found) < 2:
        return [by_shots]
    sizes = [m["parameters"] for m in found]
    some = sorted({0, len(shots) // 8, len(shots) // 4, len(shots) // 2, len(shots) - 1})
    by_size = Plot(
        "size",
        [Series(f"{shots[i]} shots", sizes, [m["accuracy"][i] for m in found]) for i in some],
        title=result["title"],
        xlabel="parameters",
        ylabel=result.get("metric", "accuracy"),
        xscale="log",
        hlines=chance,
    )
    return [by_shots, by_size]
