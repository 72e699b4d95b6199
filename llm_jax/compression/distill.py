"""Distillation: a small model learns from the distributions of a larger one.

With `top_k=0` the teacher runs inside every step, on the same batch, and its whole distribution
counts. Its parameters ride in the state's frozen part, cut as their specs say: they are not
differentiated, the optimizer has no state of them, and no checkpoint holds them. With `top_k=n` its
n most probable tokens are written to disk once (`teacher.TopK`), and it is gone in training.
"""

import json
from pathlib import Path
from typing import Any

import jax

from llm_jax import config as configs
from llm_jax import models
from llm_jax.compression.teacher import (
    check_teacher,
    check_tokenizer,
    prepare_top_k,
)
from llm_jax.config import ModelConfig, PeftConfig, TrainConfig
from llm_jax.config.tuning import DistillConfig
from llm_jax.data.prepare import Corpus
from llm_jax.eval import likelihood
from llm_jax.eval.output import write_json
from llm_jax.nn import distill_head
from llm_jax.nn import params as nn_params
from llm_jax.objectives import distillation
from llm_jax.train import base_model, companion, distributed, loop, program
from llm_jax.train.companion import Companion
from llm_jax.train.step import LossFn
from llm_jax.train.task import Task
from llm_jax.types import Array, Batch, PyTree, Scores

TEACHER = "teacher"  # where the whole tree has the teacher's parameters
RECORD = "distill.json"  # of a run: its teacher and its DistillConfig


def make_online_loss(cfg: TrainConfig, distill: DistillConfig, teacher: ModelConfig) -> LossFn:
    """The loss with the teacher in the step: the whole tree has its parameters under TEACHER."""
    student, other = models.family(cfg.model.family), models.family(teacher.family)
    between = distillation.divergence(distill.divergence, distill.beta)

    def loss_fn(params: PyTree, batch: Batch, carry: PyTree, keys: Array | None):
        own = {name: part for name, part in params.items() if name != TEACHER}
        frozen = jax.lax.stop_gradient(params[TEACHER])
        out = student.hidden(own, batch, cfg.model, rng=keys)
        x_t = other.hidden(frozen, batch, teacher).x
        terms = distill_head.compared_scores(
            student.head_side(own, out.x, cfg.model),
            other.head_side(frozen, x_t, teacher),
            batch.targets,
            between,
            vocab_size=cfg.model.vocab_size,
            temperature=distill.temperature,
        )
        scores = Scores(**terms, penalties=out.penalties, stats=out.stats)
        return _objective(scores, batch, cfg, distill), carry

    return loss_fn


def make_top_k_loss(cfg: TrainConfig, distill: DistillConfig) -> LossFn:
    """The loss of batches that hold a teacher's candidates."""
    model = models.family(cfg.model.family)
    between = distillation.divergence(distill.divergence, distill.beta)
    want = ("log_probs", "log_z", "correct", "candidate_log_probs")

    def loss_fn(params: PyTree, batch: Batch, carry: PyTree, keys: Array | None):
        scores = model.scores(params, batch, cfg.model, rng=keys, want=want)
        apart = distillation.bucket_divergence(
            scores, batch, between, temperature=distill.temperature
        )
        return _objective(scores.replace(divergence=apart), batch, cfg, distill), carry

    return loss_fn


def _objective(scores: Scores, batch: Batch, cfg: TrainConfig, distill: DistillConfig):
    return distillation.distillation(
        scores,
        batch,
        alpha=distill.alpha,
        temperature=distill.temperature,
        z_loss=cfg.z_loss,
        penalties=program.penalty_scales(cfg.model),
    )


def make_task(
    cfg: TrainConfig,
    mesh: jax.sharding.Mesh,
    corpus: Corpus,
    loader: Any,
    *,
    distill: DistillConfig,
    teacher: Companion,
) -> Task:
    """What a run of the frozen config learns from a teacher.

    Raises:
      ValueError: another tokenizer or vocabulary, several processes with `top_k`, and what `check`
        raises.
    """
    check(cfg, distill)
    check_tokenizer(teacher.tokenizer, corpus.tokenizer)
    check_teacher(teacher.cfg, cfg)
    notes = {
        "teacher_params": nn_params.count(teacher.specs),
        "teacher_eval_loss": _teacher_loss(teacher, cfg, corpus, mesh),
    }
    if not distill.top_k:
        return Task(
            make_online_loss(cfg, distill, teacher.cfg),
            program.make_loss_fn(cfg),
            specs={TEACHER: teacher.specs},
            params={TEACHER: teacher.params},
            notes=notes,
        )
    if jax.process_count() > 1:
        raise ValueError(
            "--top_k writes the teacher's tokens in one process; with several use --top_k=0"
        )
    folder = Path(corpus.directory) / "teacher"
    kept = prepare_top_k(teacher, loader, cfg, mesh, distill.top_k, folder)
    notes["top_k_folder"] = str(kept.folder)
    return Task(make_top_k_loss(cfg, distill), program.make_loss_fn(cfg), add=kept.add, notes=notes)


def check(cfg: TrainConfig, distill: DistillConfig) -> None:
    """Raises ValueError for a number out of its range, and for label smoothing, which the teacher's
    distribution takes the place of."""
    if not 0 <= distill.alpha <= 1:
        raise ValueError(f"--alpha={distill.alpha} has to be in [0, 1]")
    if not distill.temperature > 0:
        raise ValueError(f"--temperature={distill.temperature} has to be above 0")
    if distill.top_k < 0:
        raise ValueError(f"--top_k={distill.top_k} has to be at least 0")
    distillation.divergence(distill.divergence, distill.beta)
    if distill.top_k and cfg.data.packing == "bucket":
        raise ValueError(
            f"--top_k={distill.top_k} keeps rows of one length, and data.packing=bucket makes several; "
            "use data.packing=first_fit, or --top_k=0"
        )
    if cfg.label_smoothing:
        raise ValueError(
            f"label_smoothing={cfg.label_smoothing}: in distillation the teacher's distribution takes "
            "its place; set it to 0"
        )


def train(
    cfg: TrainConfig,
    distill: DistillConfig,
    teacher_path: str | Path,
    workdir: str | Path,
    **options: Any,
) -> dict[str, Any]:
    """Trains, or goes on training, the student that `cfg` describes (from `checkpoint.init_from` if
    given) in `workdir`; returns the summary. `options`: those of `train.loop.train`.

    Without a `tokenizer.path` it takes the teacher's tokenizer.

    Raises:
      ValueError, OSError: what the user can mend, in one line.
    """
    check(cfg, distill)
    workdir = Path(workdir)
    teacher_cfg, tokenizer = companion.describe(teacher_path)
    if cfg.checkpoint.init_from:
        own = base_model.load_tokenizer(cfg.checkpoint.init_from)
        check_tokenizer(tokenizer, own)
        tokenizer = own  # with its chat template
    if not cfg.tokenizer.path:
        cfg.tokenizer.path = base_model.keep_tokenizer(tokenizer, workdir)
    cfg.model.vocab_size = cfg.model.vocab_size or teacher_cfg.vocab_size
    record: dict[str, Any] = {"teacher": str(Path(teacher_path).expanduser().absolute())}

    def task(cfg: TrainConfig, mesh: jax.sharding.Mesh, corpus: Corpus, loader: Any) -> Task:
        teacher = companion.load(teacher_path, mesh)
        record["weights"] = nn_params.fingerprint(teacher.params)
        record.update(configs.to_dict(distill))
        if distributed.is_main() and not options.get("dry_run"):
            _note_changes(workdir, record)
        return make_task(cfg, mesh, corpus, loader, distill=distill, teacher=teacher)

    before = _saved_steps(workdir)
    summary = loop.train(cfg, workdir, task=task, **options)
    if distributed.is_main() and before != _saved_steps(workdir):
        write_json(str(workdir / RECORD), record)
    return summary


def _saved_steps(workdir: Path) -> set[Path]:
    return set(workdir.glob("checkpoints/[0-9]*"))


def _note_changes(workdir: Path, record: dict[str, Any]) -> None:
    """Says what differs from the record of a run that goes on; writes that of a new one."""
    path = workdir / RECORD
    if not path.exists() or not _saved_steps(workdir):
        write_json(str(path), record)
        return
    known = json.loads(path.read_text())
    for name in record:
        if name != "teacher" and known.get(name) != record[name]:
            print(f"note: this run goes on with {name}={record[name]!r} (was {known.get(name)!r})")


def _teacher_loss(
    teacher: Companion, cfg: TrainConfig, corpus: Corpus, mesh: jax.sharding.Mesh
) -> float | None:
    """Held-out cross-entropy of the teacher in nats a token; None if nothing is held out."""
    held_out = corpus.eval_batches(cfg, *distributed.row_blocks(mesh))
    if held_out is None:
        return None
    as_student = configs.thaw(cfg)
    as_student.model, as_student.peft = configs.thaw(teacher.cfg), PeftConfig()
    made = program.build(configs.freeze(as_student), mesh)
    batches = (program.put(rows, mesh) for rows in held_out)
    return likelihood.evaluate(made.evaluate, teacher.params, batches)["eval_loss"]
