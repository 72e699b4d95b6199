"""Distillation: a small model learns from the distributions of a larger one.

With `top_k=0` the teacher runs inside every step, on the same batch, and its whole distribution
counts. Its parameters ride in the state's frozen part, cut as their specs say: they are not
differentiated, the optimizer has no state of them, and no checkpoint holds them. With `top_k=n` its
n most probable tokens are written to disk once (`teacher.TopK`), and it is gone in training.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax import config as configs
from llm_jax import models, report, sharding
from llm_jax.compression.teacher import (
    Teacher,
    check_tokenizer,
    check_vocabulary,
    load_teacher,
    prepare_top_k,
)
from llm_jax.config import ModelConfig, TrainConfig
from llm_jax.config.tuning import DistillConfig
from llm_jax.data.progress import bar
from llm_jax.eval import likelihood
from llm_jax.eval.output import write_json
from llm_jax.nn import distill_head
from llm_jax.nn import params as nn_params
from llm_jax.objectives import distillation
from llm_jax.train import base_model, checkpoint, environment, inputs, program
from llm_jax.train.metrics import MetricsLog
from llm_jax.train.optimizer import make_optimizer
from llm_jax.train.step import LossFn, make_train_step, readable
from llm_jax.types import Array, Batch, PyTree, Scores, TrainState

TEACHER = "teacher"  # where the whole tree has the teacher's parameters


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
    moe = cfg.model.moe
    return distillation.distillation(
        scores,
        batch,
        alpha=distill.alpha,
        temperature=distill.temperature,
        z_loss=cfg.z_loss,
        penalties={
            "router_balance": moe.balance_loss,
            "router_z": moe.z_loss,
            "router_bias": 1.0,
        },
    )


def build(
    cfg: TrainConfig,
    mesh: jax.sharding.Mesh,
    distill: DistillConfig,
    teacher: Teacher | None = None,
) -> program.Program:
    """The program of a frozen config that learns from a teacher; with `top_k` it needs none.

    Its `init` and `start` make states without the teacher; `with_teacher` adds it for `step`.
    `evaluate` and `params` are those of the student alone.

    Raises:
      ValueError: a number out of its range, another vocabulary, or label smoothing, which the
        teacher's distribution takes the place of.
    """
    _check(cfg, distill)
    alone = program.build(cfg, mesh)
    if distill.top_k:
        return program.build(cfg, mesh, make_top_k_loss(cfg, distill))._replace(
            evaluate=alone.evaluate
        )
    if teacher is None:
        raise ValueError("--top_k=0 runs the teacher in every step, and there is none")
    check_vocabulary(teacher.cfg, cfg.model)
    tuning, cut = alone.tuning, nn_params.shardings(teacher.specs, mesh)
    optimizer = make_optimizer(cfg.optimizer, cfg.steps, tuning.trained, cfg.model.moe.bias_rate)
    cast = partial(models.family(cfg.model.family).cast, dtype=cfg.model.dtype)
    shardings = with_teacher(alone.shardings, cut)

    def join(trained: PyTree, frozen: PyTree) -> PyTree:
        rest, teacher_params = _without(frozen)
        return {**tuning.join(trained, rest), TEACHER: teacher_params}

    step = make_train_step(make_online_loss(cfg, distill, teacher.cfg), optimizer, cfg, cast, join)
    return alone._replace(
        shardings=shardings,
        step=jax.jit(
            step,
            in_shardings=(shardings, None),
            out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
            donate_argnums=0,
        ),
        params=lambda state: alone.params(state.replace(frozen=_without(state.frozen)[0])),
    )


def with_teacher(state: TrainState, params: PyTree) -> TrainState:
    """A student's state with a teacher's parameters in its frozen part."""
    return state.replace(frozen={**(state.frozen or {}), TEACHER: params})


def _without(frozen: PyTree) -> tuple[PyTree | None, PyTree]:
    """The student's own frozen part, and the teacher's parameters."""
    frozen = frozen or {}
    rest = {name: part for name, part in frozen.items() if name != TEACHER}
    return rest or None, frozen.get(TEACHER)


def _check(cfg: TrainConfig, distill: DistillConfig) -> None:
    if not 0 <= distill.alpha <= 1:
        raise ValueError(f"--alpha={distill.alpha} has to be in [0, 1]")
    if not distill.temperature > 0:
        raise ValueError(f"--temperature={distill.temperature} has to be above 0")
    if distill.top_k < 0:
        raise ValueError(f"--top_k={distill.top_k} has to be at least 0")
    distillation.divergence(distill.divergence, distill.beta)
    if cfg.label_smoothing:
        raise ValueError(
            f"label_smoothing={cfg.label_smoothing}: in distillation the teacher's distribution takes "
            "its place; set it to 0"
        )


def train(
    cfg: TrainConfig, distill: DistillConfig, teacher_path: str | Path, workdir: str | Path
) -> dict[str, Any]:
    """Trains the student that `cfg` describes (from `checkpoint.init_from` if given) in `workdir`.

    Without a `tokenizer.path` it takes the teacher's tokenizer. Writes config.json, metrics.jsonl,
    checkpoints (the student, ready for every other binary), summary.json and report.md. Returns
    the summary.

    Raises:
      ValueError: what the user can mend, in one line; also if `workdir` holds a finished run, or
        the job has several processes.
    """
    begin, workdir = time.perf_counter(), Path(workdir)
    if jax.process_count() > 1:
        raise ValueError("distillation runs in one process (over all of its devices)")
    if (workdir / "checkpoints").exists():
        raise ValueError(f"--workdir={workdir} holds a run already; choose another one")
    _check(cfg, distill)
    environment.check_accelerator()
    environment.use_compilation_cache(cfg.log.compilation_cache)
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = sharding.make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        teacher = load_teacher(teacher_path, mesh)
        if not cfg.tokenizer.path:
            teacher.tokenizer.save(workdir / "tokenizer")
            cfg.tokenizer.path = str(workdir / "tokenizer")
        configs.validate(cfg)
        corpus = inputs.prepare(cfg, workdir)
        check_tokenizer(teacher.tokenizer, corpus.tokenizer)
        vocab = cfg.model.vocab_size or teacher.cfg.vocab_size
        configs.resolve_model(
            cfg.model, vocab_size=vocab, length=cfg.length, backend=jax.default_backend()
        )
        check_vocabulary(teacher.cfg, cfg.model)
        configs.validate(cfg)
        configs.freeze(cfg)
        loader, held_out = corpus.loader(cfg), corpus.eval_batches(cfg)
        environment.write(workdir, cfg, corpus.tokenizer.fingerprint(), loader.identity)
        write_json(str(workdir / "distill.json"), configs.to_dict(distill))

        made = build(cfg, mesh, distill, teacher)
        state = _start(cfg, made, mesh)
        summary = {
            "teacher": str(teacher_path),
            "teacher_parameters": nn_params.count(teacher.specs),
            "parameters": nn_params.count(made.specs),
            "teacher_eval_loss": _teacher_loss(teacher, cfg, held_out, mesh),
            "eval_loss_before": _loss(made, made.params(state), held_out, mesh),
        }
        batch = loader.batch
        if distill.top_k:
            kept = prepare_top_k(
                teacher, loader, cfg, mesh, distill.top_k, Path(corpus.directory) / "teacher"
            )
            batch = lambda step: kept.add(loader.batch(step), step)  # noqa: E731
            summary["top_k_folder"] = str(kept.folder)
        else:
            state = with_teacher(state, teacher.params)
        del teacher
        state, lines = _steps(cfg, made, state, batch, mesh, workdir)
        params = made.params(state)
        summary |= {
            "loss": lines[-1]["loss"],
            "eval_loss": _loss(made, params, held_out, mesh),
            "seconds": time.perf_counter() - begin,
        }
        checkpoint.save_params(workdir / "checkpoints", cfg, corpus.tokenizer, params)
    write_json(str(workdir / "summary.json"), summary)
    _report(workdir, summary, distill, lines)
    return summary


def _start(cfg: TrainConfig, made: program.Program, mesh: jax.sharding.Mesh) -> TrainState:
    key = jax.random.key(cfg.seed)
    if not cfg.checkpoint.init_from:
        return made.init(key)
    return made.start(base_model.load_params(cfg.checkpoint.init_from, made.specs, mesh), key)


def _loss(
    made: program.Program, params: PyTree, held_out: Any, mesh: jax.sharding.Mesh
) -> float | None:
    """Held-out cross-entropy in nats a token; None if nothing is held out."""
    if held_out is None:
        return None
    batches = (program.put(rows, mesh) for rows in held_out)
    return likelihood.evaluate(made.evaluate, params, batches)["eval_loss"]


def _teacher_loss(
    teacher: Teacher, cfg: TrainConfig, held_out: Any, mesh: jax.sharding.Mesh
) -> float | None:
    as_student = configs.thaw(cfg)
    as_student.model = configs.thaw(teacher.cfg)
    made = program.build(configs.freeze(as_student), mesh)
    return _loss(made, teacher.params, held_out, mesh)


def _steps(
    cfg: TrainConfig,
    made: program.Program,
    state: TrainState,
    batch: Callable[[int], Batch],
    mesh: jax.sharding.Mesh,
    workdir: Path,
) -> tuple[TrainState, list[dict[str, float]]]:
    """The state after all steps, and what was logged of them."""
    log = MetricsLog(workdir, step=0, tensorboard=cfg.log.tensorboard)
    progress, lines, pending = bar(cfg.name, cfg.steps, "step"), [], None

    def record(step: int, metrics: dict[str, Array]) -> None:
        values = {"step": step, **readable(jax.device_get(metrics))}
        if values["bad_steps"] >= cfg.optimizer.max_bad_steps:
            raise ValueError(
                f"{cfg.optimizer.max_bad_steps} steps in a row had a loss or gradient that is not "
                "finite; lower optimizer.learning_rate"
            )
        if step % cfg.log.every == 0 or step in (1, cfg.steps):
            log.write(values)
            lines.append(values)

    try:
        for step in range(1, cfg.steps + 1):
            rows = program.put(batch(step - 1), mesh, cfg.accumulation)
            state, metrics = made.step(state, rows)
            if pending is not None:  # of the step before: the device never waits for the host
                record(*pending)
            pending = (step, metrics)
            progress.update(1)
        record(*pending)
    finally:
        progress.close()
        log.close()
    return state, lines


def _report(
    workdir: Path, summary: dict[str, Any], distill: DistillConfig, lines: list[dict[str, float]]
) -> None:
    steps = [line["step"] for line in lines]
    names = {"nll": "cross-entropy", "divergence": "divergence from the teacher"}
    plot = report.Plot(
        name="loss",
        series=[
            report.Series(label, steps, [x[key] for x in lines]) for key, label in names.items()
        ],
        xlabel="step",
        ylabel="nats per token",
    )
    blocks = [
        report.Table(
            [{"what": name.replace("_", " "), "": value} for name, value in summary.items()]
        ),
        plot,
        report.Text("## Settings"),
        report.Table([{"key": k, "value": v} for k, v in configs.to_dict(distill).items()]),
    ]
    report.write_report(workdir, "Distillation", blocks)
