"""Evaluation of a preference run: what a model says of each held-out answer."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax import report
from llm_jax.align import judgements
from llm_jax.align.judgements import Judged
from llm_jax.config import TrainConfig
from llm_jax.data.comparisons import Comparisons
from llm_jax.data.packing import answer_ids
from llm_jax.data.prepare import TRAIN
from llm_jax.types import Array, Batch, Loss, PyTree

# (whole parameter tree, batch) -> (the loss, a number for each answer [R, A])
Step = Callable[[PyTree, Batch], tuple[Loss, Array]]


class HeldOut:
    """Held-out answers, and what the last evaluation said of them.

    Attributes:
      judged: after an evaluation, the answers that it saw; else None.
    """

    def __init__(self, cfg: TrainConfig, corpus: Comparisons, mesh: Mesh, step: Step):
        self._said, self._tokens = corpus.held_out, corpus.evaluation
        # Of this process alone: it is asked for its plan, not for batches.
        self._batches = corpus.eval_batches(cfg)
        self._shorter = summary_rows(corpus)["train_shorter_preferred"] >= 0.5
        self._step = jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self.judged: Judged | None = None
        self._seen = np.zeros(0, int)

    def evaluate(self, params: PyTree, batches: Iterable[Batch]) -> dict[str, float]:
        """eval_loss, and what `judgements.measure` finds (of single answers without a judgement, the
        loss's own metrics)."""
        total, scores = None, np.full(len(self._said), math.nan)
        seen_N = np.zeros(len(self._said), bool)
        plan, chosen = self._batches.plan, self._batches.chosen
        size = self._batches.batch_size
        for i, batch in enumerate(batches):
            loss, said_RxA = self._step(params, batch)
            means = (loss.terms, loss.metrics)
            total = means if total is None else jax.tree.map(jnp.add, total, means)
            scales = loss.scales
            if len(scores):
                rows = chosen[i * size : (i + 1) * size]
                ids_BxA = answer_ids(self._tokens, plan, rows)
                real = ids_BxA >= 0
                scores[ids_BxA[real]] = np.asarray(said_RxA)[: len(rows)][real]
                seen_N[ids_BxA[real]] = True
        terms, metrics = jax.device_get(total)
        loss = Loss(terms, scales)
        found = {"eval_loss": float(loss.value())}
        if not len(scores):
            return found | {f"eval/{name}": float(m.value()) for name, m in metrics.items()}
        self._seen = np.flatnonzero(seen_N)
        if not np.isfinite(scores[self._seen]).all():
            self.judged = None
            return found | {"eval/not_finite": float((~np.isfinite(scores[self._seen])).sum())}
        said = [self._said[i] for i in self._seen]
        self.judged = Judged(
            scores[self._seen],
            np.array([s.label for s in said]),
            np.array([s.tokens for s in said]),
            np.array([s.group for s in said]),
        )
        return found | judgements.measure(self.judged, shorter_wins=self._shorter)

    def blocks(self) -> list[report.Block]:
        """Of the last evaluation, for a report."""
        if self.judged is None:
            return []
        return judgements.blocks(self.judged, [self._said[i] for i in self._seen])


def summary_rows(corpus: Comparisons) -> dict[str, Any]:
    """What the data says of length, for a run's summary."""
    parts = [part for part in corpus.parts() if part["part"].startswith(TRAIN)]
    found = {
        f"train_{name}": sum(p[name] for p in parts) for name in ("prompts", "answers", "pairs")
    }
    shorter = sum(p["shorter preferred"] * p["pairs"] for p in parts)
    return found | {"train_shorter_preferred": shorter / max(found["train_pairs"], 1)}
