"""Direct preference optimisation: a task of `train.loop`.

The reference's log-probabilities are computed once and kept on disk ("cached"), or come from the
model itself without its adapter ("adapter": no second model, and the backbone's arrays are shared),
or from a second model in every step ("model").
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import models
from llm_jax.align.direct import generated, reference
from llm_jax.align.held_out import HeldOut, summary_rows
from llm_jax.config import TrainConfig
from llm_jax.data.comparisons import Comparisons
from llm_jax.nn.params import fingerprint
from llm_jax.objectives import likelihood, preference
from llm_jax.peft import lora
from llm_jax.train import companion, loop, program
from llm_jax.train.companion import Companion
from llm_jax.train.step import LossFn
from llm_jax.train.task import Task
from llm_jax.types import Array, Batch, Loss, PyTree, Scores

REFERENCE = "reference"  # where the whole tree has a second model's parameters
PAIRED = {"dpo": "logistic", "robust": "logistic", "ipo": "ipo", "hinge": "hinge"}
WITHOUT_REFERENCE = ("orpo", "simpo")


def objective(scores: Scores, batch: Batch, cfg: TrainConfig) -> Loss:
    """What `cfg.dpo` asks for, of log-probabilities."""
    d, data = cfg.dpo, cfg.data.preference
    weighting = {"ties": data.ties, "per_prompt": data.per_prompt}
    if d.loss == "kto":
        return preference.kto(
            scores, batch, beta=d.beta, desirable=d.desirable, undesirable=d.undesirable
        )
    if d.loss in WITHOUT_REFERENCE:
        return preference.reference_free(
            scores,
            batch,
            loss=d.loss,
            beta=d.beta,
            gamma=d.gamma,
            label_smoothing=d.label_smoothing,
            **weighting,
        )
    return preference.direct(
        scores,
        batch,
        loss=PAIRED[d.loss],
        beta=d.beta,
        label_smoothing=d.label_smoothing,
        robust=d.loss == "robust",
        per_token=d.per_token,
        length_penalty=d.length_penalty,
        sft=d.sft,
        **weighting,
    )


def implicit_rewards(scores: Scores, batch: Batch, cfg: TrainConfig) -> Array:
    """[R, A]: beta times an answer's log-ratio, or its mean log-probability without a reference."""
    if cfg.dpo.loss in WITHOUT_REFERENCE:
        tokens = jnp.maximum(preference.answers_of(batch).tokens, 1.0)
        return cfg.dpo.beta * preference.per_answer(scores.log_probs, batch) / tokens
    ratio = preference.per_answer(scores.log_probs - batch.ref_log_probs, batch)
    if cfg.dpo.per_token:
        ratio = ratio / jnp.maximum(preference.answers_of(batch).tokens, 1.0)
    return cfg.dpo.beta * ratio


def resolve_reference(cfg: TrainConfig) -> str:
    """cached, adapter, model, or none, of a recipe.

    Raises:
      ValueError: a reference that this recipe cannot have.
    """
    d = cfg.dpo
    if d.loss in WITHOUT_REFERENCE:
        if d.reference_path:
            raise ValueError(f"dpo.loss={d.loss} has no reference; drop dpo.reference_path")
        return "none"
    tunes = cfg.peft.method != "none"
    chosen = d.reference
    if chosen == "auto":
        chosen = "adapter" if tunes and not cfg.peft.also and not d.reference_path else "cached"
    if chosen == "adapter":
        if not tunes:
            raise ValueError(
                "dpo.reference=adapter is the model without its adapter; set peft.method=lora, or "
                "dpo.reference=cached"
            )
        if cfg.peft.also:
            raise ValueError(
                "dpo.reference=adapter: peft.also trains parameters of the model itself, so that it is "
                "no reference without its adapter; use dpo.reference=cached"
            )
        if d.reference_path:
            raise ValueError(
                "dpo.reference=adapter is the model itself; drop dpo.reference_path, or use "
                "dpo.reference=cached"
            )
    return chosen


def make_loss_fn(cfg: TrainConfig, kind: str, other: Companion | None = None) -> LossFn:
    """The loss of a frozen config, whose reference is of the given kind."""
    model, factors = models.family(cfg.model.family), program.penalty_scales(cfg.model)

    def loss_fn(params: PyTree, batch: Batch, carry: PyTree, keys: Array | None):
        own = {name: part for name, part in params.items() if name != REFERENCE}
        theirs = params.get(REFERENCE) if other is not None else own
        batch = with_reference(batch, theirs, cfg, kind, other)
        scores = model.scores(own, batch, cfg.model, rng=keys, want=("log_probs",))
        loss = objective(scores, batch, cfg)
        return likelihood.with_penalties(loss, scores, batch, factors), carry

    return loss_fn


def with_reference(
    batch: Batch, params: PyTree, cfg: TrainConfig, kind: str, other: Companion | None = None
) -> Batch:
    """The batch with `ref_log_probs` of the model's own tree, or of the second model's."""
    if kind in ("none", "cached"):
        return batch
    model = other.cfg if other is not None else cfg.model
    if kind == "adapter":
        params = lora.detach(params)
    params = jax.lax.stop_gradient(params)
    scores = models.family(model.family).scores(params, batch, model, want=("log_probs",))
    return batch.replace(ref_log_probs=jax.lax.stop_gradient(scores.log_probs))


def make_task(cfg: TrainConfig, mesh: jax.sharding.Mesh, corpus: Comparisons, loader: Any) -> Task:
    """What a run of the frozen config learns from `data.comparisons`.

    Raises:
      ValueError: a reference with another vocabulary, and what `resolve_reference` raises.
    """
    kind = resolve_reference(cfg)
    path = cfg.dpo.reference_path or cfg.checkpoint.init_from
    second, notes = None, {"reference": kind, **summary_rows(corpus)}
    prepare = Task.prepare
    if kind in ("cached", "model"):
        second = companion.load(path, mesh, like=cfg.model)
        reference.check(second, path, cfg, corpus)
        # A run that goes on has to go on with the same reference.
        loader.identity["reference"] = fingerprint(second.params)
    if kind == "cached":
        needed, second = [second], None

        def prepare() -> None:  # and lets go of the second model
            reference.keep(needed.pop(), corpus, loader, cfg, mesh)

    model, loss_fn = models.family(cfg.model.family), make_loss_fn(cfg, kind, second)

    def step(params: PyTree, batch: Batch) -> tuple[Loss, Array]:
        other = second.params if second is not None else params
        batch = with_reference(batch, other, cfg, kind, second)
        scores = model.scores(params, batch, cfg.model, want=("log_probs",))
        return objective(scores, batch, cfg), implicit_rewards(scores, batch, cfg)

    held_out = HeldOut(cfg, corpus, mesh, step) if corpus.evaluation is not None else None
    answers = generated.Generated(cfg, corpus, mesh, cfg.checkpoint.init_from)

    def finish(params: PyTree) -> tuple[dict[str, Any], list]:
        found, blocks = answers.compare(params)
        return found, [*(held_out.blocks() if held_out else []), *blocks]

    return Task(
        loss_fn,
        evaluate=held_out.evaluate if held_out else None,
        finish=finish,
        specs={REFERENCE: second.specs} if second is not None else {},
        params={REFERENCE: second.params} if second is not None else {},
        prepare=prepare,
        notes=notes,
    )


def train(cfg: TrainConfig, workdir: str | Path, **options: Any) -> dict[str, Any]:
    """Optimises, or goes on optimising, the policy that `cfg` describes; returns the summary.
    `options`: those of `train.loop.train`.

    Raises:
      ValueError, OSError: what the user can mend, in one line.
    """
    check(cfg)
    return loop.train(cfg, workdir, task=make_task, **options)


def check(cfg: TrainConfig) -> None:
    """Raises ValueError for what cannot be optimised."""
    d = cfg.dpo
    if cfg.data.format != "preference":
        raise ValueError(
            f"data.format={cfg.data.format}: preferences are learned from answers to compare; set "
            "data.format=preference, or take a recipe such as configs/dpo_embedded.py"
        )
    if not cfg.checkpoint.init_from:
        raise ValueError("--init_from is needed: the model to optimise, such as a run of sft")
    resolve_reference(cfg)
    if d.length_penalty and (d.loss in ("kto", *WITHOUT_REFERENCE) or d.per_token):
        raise ValueError(
            f"dpo.length_penalty is for sums of log-ratios; dpo.loss={d.loss}"
            f"{', dpo.per_token=True' if d.per_token else ''} cannot have it, set it to 0"
        )
    if d.loss == "kto" and (d.label_smoothing or d.sft or d.per_token):
        raise ValueError(
            "dpo.loss=kto judges single answers: dpo.label_smoothing, dpo.sft and dpo.per_token are "
            "not for it"
        )
    if d.sft and d.loss in WITHOUT_REFERENCE:
        raise ValueError(f"dpo.sft is not for dpo.loss={d.loss}; set it to 0")
