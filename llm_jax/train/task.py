"""What a run learns where it is not to model language alone: a hook for distillation and its like."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax

from llm_jax.config import TrainConfig
from llm_jax.data.prepare import Corpus
from llm_jax.report import Block
from llm_jax.train.step import LossFn
from llm_jax.types import Batch, PyTree


@dataclass(frozen=True)
class Task:
    """What differs from language modelling.

    Attributes:
      loss_fn: what is trained on; None: cross-entropy.
      evaluates: the loss whose metrics evaluation measures; None: the same.
      evaluate: (whole parameter tree, held-out batches) -> numbers, "eval_loss" among them, in
        place of what `eval.likelihood` finds; names with a "/" come into the summary.
      specs, params: of other models that `loss_fn` finds in the parameter tree, by name. They are
        not trained and not saved.
      prepare: what is computed before the first step, by all processes; not in a dry run.
      add: (batch of this process, step from 0) -> the batch with what else `loss_fn` needs of it.
      finish: (whole parameter tree after the last step) -> rows for the summary, blocks for the
        report; after the last evaluation, by all processes.
      notes: rows for the summary.
    """

    loss_fn: LossFn | None = None
    evaluates: LossFn | None = None
    evaluate: Callable[[PyTree, Iterable[Batch]], dict[str, float]] | None = None
    specs: dict[str, PyTree] = field(default_factory=dict)
    params: dict[str, PyTree] = field(default_factory=dict)
    prepare: Callable[[], None] = lambda: None
    add: Callable[[Batch, int], Batch] = lambda batch, step: batch
    finish: Callable[[PyTree], tuple[dict[str, Any], list[Block]]] = lambda params: ({}, [])
    notes: dict[str, Any] = field(default_factory=dict)


# (frozen config, mesh, data, its loader) -> the task, once all of these are there
MakeTask = Callable[[TrainConfig, jax.sharding.Mesh, Corpus, Any], Task]
