"""Training a reward model: a task of `train.loop`, with all of the backbone, or a LoRA of it."""

from pathlib import Path
from typing import Any

import jax

from llm_jax import models
from llm_jax.align.held_out import HeldOut, summary_rows
from llm_jax.config import TrainConfig
from llm_jax.models import heads
from llm_jax.objectives import likelihood, preference
from llm_jax.train import loop, program
from llm_jax.train.step import LossFn
from llm_jax.train.task import Task
from llm_jax.types import Array, Batch, Loss, PyTree, Scores


def objective(scores: Scores, batch: Batch, cfg: TrainConfig, lengths_RxA: Array) -> Loss:
    """What `cfg.reward` asks for, of rewards; `lengths` is what each answer's length is worth, where
    it is controlled for."""
    r = cfg.reward
    return preference.reward(
        scores,
        batch,
        loss=r.loss,
        margin=r.margin,
        label_smoothing=r.label_smoothing,
        centring=r.centring,
        ties=cfg.data.preference.ties,
        per_prompt=cfg.data.preference.per_prompt,
        beside=lengths_RxA if r.control_length else None,
    )


def length_worth(params: PyTree, batch: Batch) -> Array:
    """[R, A]: the head's "length" times the log of an answer's tokens."""
    return params[heads.REWARD]["length"] * preference.log_length(batch)


def make_loss_fn(cfg: TrainConfig) -> LossFn:
    """The loss of a frozen config, with the model's own penalties."""
    model, factors = models.family(cfg.model.family), program.penalty_scales(cfg.model)

    def loss_fn(params: PyTree, batch: Batch, carry: PyTree, keys: Array | None):
        scores = heads.reward_scores(model, params, batch, cfg.model, rng=keys)
        loss = objective(scores, batch, cfg, length_worth(params, batch))
        return likelihood.with_penalties(loss, scores, batch, factors), carry

    return loss_fn


def make_task(cfg: TrainConfig, mesh: jax.sharding.Mesh, corpus: Any, loader: Any) -> Task:
    """What a run of the frozen config learns from `data.comparisons`."""
    model, loss_fn = models.family(cfg.model.family), make_loss_fn(cfg)
    if corpus.evaluation is None:
        return Task(loss_fn, notes=summary_rows(corpus))

    def step(params: PyTree, batch: Batch) -> tuple[Loss, Array]:
        scores = heads.reward_scores(model, params, batch, cfg.model)
        loss = objective(scores, batch, cfg, length_worth(params, batch))
        return loss, preference.per_answer(scores.values, batch)

    held_out = HeldOut(cfg, corpus, mesh, step)
    return Task(
        loss_fn,
        evaluate=held_out.evaluate,
        finish=lambda params: ({}, held_out.blocks()),
        notes=summary_rows(corpus),
    )


def train(cfg: TrainConfig, workdir: str | Path, **options: Any) -> dict[str, Any]:
    """Trains, or goes on training, the reward model that `cfg` describes; returns the summary.
    `options`: those of `train.loop.train`.

    Raises:
      ValueError, OSError: what the user can mend, in one line.
    """
    check(cfg)
    cfg.model.head = heads.REWARD
    return loop.train(cfg, workdir, task=make_task, **options)


def check(cfg: TrainConfig) -> None:
    """Raises ValueError for what a reward model cannot be trained with."""
    if cfg.data.format != "preference":
        raise ValueError(
            f"data.format={cfg.data.format}: a reward model is trained on answers to compare; set "
            "data.format=preference, or take a recipe such as configs/reward_embedded.py"
        )
    if cfg.eval.tasks:
        raise ValueError(
            "eval.tasks asks a language model; a reward model cannot answer, drop them"
        )
    if cfg.reward.label_smoothing and cfg.reward.loss in ("listwise", "regression"):
        raise ValueError(
            f"reward.label_smoothing is for pairs; reward.loss={cfg.reward.loss} has none, set it to 0"
        )
    if cfg.peft.method not in ("none", "lora"):
        raise ValueError(
            f"peft.method={cfg.peft.method} is no change of the parameters, which a judge could be "
            "loaded with; use lora or none"
        )
    if cfg.reward.control_length and cfg.reward.loss == "regression":
        raise ValueError(
            "reward.control_length is for answers that are compared; reward.loss=regression fits each "
            "label by itself, set it to False"
        )
    if cfg.reward.margin and cfg.reward.loss != "logistic":
        raise ValueError(
            f"reward.margin is for reward.loss=logistic, not {cfg.reward.loss}; set it to 0"
        )
