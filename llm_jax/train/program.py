"""Everything of a run that follows from its config and mesh: the jitted functions and layouts.

The only place where a train step is jitted, sharded and donated.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax import models, sharding
from llm_jax.config import ModelConfig, TrainConfig
from llm_jax.nn import params as nn_params
from llm_jax.objectives import likelihood
from llm_jax.train import distributed, host_memory
from llm_jax.train.optimizer import make_optimizer, state_shardings
from llm_jax.train.step import LossFn, make_train_step, micro_batches
from llm_jax.train.tuning import Tuning, frozen_shardings, make_tuning, without
from llm_jax.types import Array, Batch, Mean, PyTree, TrainState


class Program(NamedTuple):
    """A run's functions. All of them expect `mesh` to be entered with `jax.set_mesh`."""

    mesh: Mesh
    specs: PyTree  # of the whole model
    tuning: Tuning  # which of its parameters are trained, and what is trained beside them
    shardings: TrainState  # a NamedSharding for each leaf of the state
    init: Callable[..., TrainState]  # (key, beside) -> state, born sharded
    start: Callable[..., TrainState]  # (whole parameter tree, key, beside) -> state
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]  # donates the state
    evaluate: Callable[[PyTree, Batch], dict[str, Mean]]  # whole parameter tree, batch [B, ...]
    params: Callable[
        [TrainState], PyTree
    ]  # the whole tree to evaluate with: the EMA if there is one
    beside: dict[str, PyTree]  # specs of other models whose parameters the loss sees, by name


def penalty_scales(cfg: ModelConfig) -> dict[str, float]:
    """The factor of each of a model's own penalties in a loss."""
    return {
        "router_balance": cfg.moe.balance_loss,
        "router_z": cfg.moe.z_loss,
        "router_bias": 1.0,  # its value is 0; the optimizer reads the sign of its gradient alone
    }


def make_loss_fn(cfg: TrainConfig) -> LossFn:
    """Causal language modelling: cross-entropy of the model family's scores."""
    model = models.family(cfg.model.family)
    want = likelihood.wanted(cfg.label_smoothing)
    penalties = penalty_scales(cfg.model)

    def loss_fn(params: PyTree, batch: Batch, carry: PyTree, keys: Array | None):
        scores = model.scores(params, batch, cfg.model, rng=keys, want=want)
        loss = likelihood.cross_entropy(
            scores,
            batch,
            z_loss=cfg.z_loss,
            label_smoothing=cfg.label_smoothing,
            penalties=penalties,
        )
        return loss, carry

    return loss_fn


def build(
    cfg: TrainConfig,
    mesh: Mesh,
    loss_fn: LossFn | None = None,
    *,
    evaluates: LossFn | None = None,
    beside: dict[str, PyTree] | None = None,
    tuning: Tuning | None = None,
) -> Program:
    """The program of a frozen config on a mesh (an AbstractMesh will do for lowering).

    `loss_fn` is what is trained on (default: `make_loss_fn`), `evaluates` what evaluation measures
    (default: the same). `beside` has the specs of other models (a teacher): their parameters, given
    to `init` or `start`, ride in the state's frozen part, and `loss_fn` finds them in the parameter
    tree under their names. Nothing else sees them: neither evaluation, nor checkpoints. `tuning`
    says what is trained and what is frozen (default: `make_tuning`).
    """
    sharding.check_divisible(cfg, dict(mesh.shape))
    model = models.family(cfg.model.family)
    specs = model.specs(cfg.model)
    host_memory.fit(4 * nn_params.count(specs))
    tuning = tuning or make_tuning(cfg, specs)
    optimizer = make_optimizer(cfg.optimizer, cfg.steps, tuning.trained, cfg.model.moe.bias_rate)
    loss_fn, beside = loss_fn or make_loss_fn(cfg), beside or {}
    replicated = NamedSharding(mesh, PartitionSpec())

    def start(params: PyTree, key: Array, others: dict[str, PyTree] | None = None) -> TrainState:
        params, frozen = tuning.split(params, jax.random.fold_in(key, 1))
        frozen = {**(frozen or {}), **(others or {})} or None
        return TrainState(
            step=jnp.int32(0),
            key=key,
            params=params,
            frozen=frozen,
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if cfg.optimizer.ema_decay else None,
            carry=None,
            bad_steps=jnp.int32(0),
        )

    cut = nn_params.shardings(tuning.trained, mesh)
    _, frozen = jax.eval_shape(
        lambda: tuning.split(nn_params.init(specs, jax.random.key(0)), jax.random.key(0))
    )
    shardings = TrainState(
        step=replicated,
        key=replicated,
        params=cut,
        frozen={
            **frozen_shardings(frozen or {}, tuning.frozen or specs, mesh),
            **{name: nn_params.shardings(tree, mesh) for name, tree in beside.items()},
        }
        or None,
        opt_state=state_shardings(optimizer, tuning.trained, mesh),
        ema=cut if cfg.optimizer.ema_decay else None,
        carry=None,
        bad_steps=replicated,
    )

    def init(key: Array, others: dict[str, PyTree] | None = None) -> TrainState:
        return start(nn_params.init(specs, jax.random.fold_in(key, 0)), key, others)

    def evaluate(params: PyTree, batch: Batch) -> dict[str, Mean]:
        return (evaluates or loss_fn)(params, batch, None, None)[0].metrics

    def join(params: PyTree, frozen: PyTree | None) -> PyTree:
        others = {name: frozen[name] for name in beside}
        return {**tuning.join(params, without(frozen, beside)), **others}

    cast = partial(model.cast, dtype=cfg.model.dtype)
    return Program(
        mesh=mesh,
        specs=specs,
        tuning=tuning,
        shardings=shardings,
        init=jax.jit(init, out_shardings=shardings),
        start=jax.jit(start, out_shardings=shardings),
        step=jax.jit(
            make_train_step(loss_fn, optimizer, cfg, cast, join),
            in_shardings=(shardings, None),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        ),
        evaluate=jax.jit(evaluate, out_shardings=replicated),
        params=lambda state: tuning.join(
            state.params if state.ema is None else state.ema, without(state.frozen, beside)
        ),
        beside=beside,
    )


def abstract_state(program: Program) -> TrainState:
    """ShapeDtypeStructs of the state with their shardings; what a restore aims at."""
    # No key is made: the mesh's devices may not exist (compiling ahead of time).
    others = {name: nn_params.abstract(tree) for name, tree in program.beside.items()}
    shapes = jax.eval_shape(lambda others: program.init(jax.random.key(0), others), others)
    return jax.tree.map(
        lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, program.shardings
    )


def put(batch: Any, mesh: Mesh, k: int | None = None) -> Batch:
    """This process's numpy rows -> the global sharded batch, in k micro-batches if given.

    The rows are those of the blocks that `distributed.row_blocks` names. Micro-batch j of k has
    the rows j, j + k, ... (`step.micro_batches`): of every block the same share.
    """
    if k is not None:
        batch = micro_batches(batch, k)
    blocks, count = distributed.row_blocks(mesh)
    axis = 0 if k is None else 1  # of the rows
    whole = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (*x.shape[:axis], x.shape[axis] // len(blocks) * count, *x.shape[axis + 1 :]), x.dtype
        ),
        batch,
    )
    layout = sharding.batch_shardings(whole, mesh, leading=axis)
    if jax.process_count() == 1:
        return jax.device_put(batch, layout)

    def one(local: np.ndarray, leaf: jax.ShapeDtypeStruct, cut: NamedSharding) -> Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            rows = distributed.local_rows(index[axis], leaf.shape[axis], mesh)
            return local[(*index[:axis], rows, *index[axis + 1 :])]

        return jax.make_array_from_callback(leaf.shape, cut, part)

    return jax.tree.map(one, batch, whole, layout)


def abstract_batch(cfg: TrainConfig, mesh: Mesh) -> Batch:
    """The batch that a train step of this config gets, as sharded ShapeDtypeStructs [k, B/k, L]."""
    k = cfg.accumulation

    def leaf(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((k, cfg.batch_size // k, cfg.length), dtype)

    whole_rows = cfg.data.packing in ("split", "random") and not cfg.data.isolate_documents
    batch = Batch(
        tokens=leaf(jnp.int32),
        segments=None if whole_rows else leaf(jnp.int32),
        positions=None if whole_rows else leaf(jnp.int32),
        targets=leaf(jnp.int32),
        weights=leaf(jnp.float32),
        bytes=leaf(jnp.int32),
    )
    if cfg.data.format == "preference":  # a pair to a row
        pair = lambda dtype: jax.ShapeDtypeStruct((k, cfg.batch_size // k, 2), dtype)  # noqa: E731
        batch = batch.replace(
            parents=leaf(jnp.int32),
            answers=leaf(jnp.int32),
            ref_log_probs=leaf(jnp.float32),
            groups=pair(jnp.int32),
            labels=pair(jnp.float32),
        )
    return jax.tree.map(
        lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh),
        batch,
        sharding.batch_shardings(batch, mesh, leading=1),
    )


def lower(
    cfg: TrainConfig,
    mesh: jax.sharding.AbstractMesh,
    platform: str = "tpu",
    loss_fn: LossFn | None = None,
) -> jax.stages.Lowered:
    """Lowers the train step of a frozen config, on `loss_fn` (default: `make_loss_fn`), for a mesh
    that need not exist."""
    with jax.sharding.use_abstract_mesh(mesh):
        program = build(cfg, mesh, loss_fn)
        traced = program.step.trace(abstract_state(program), abstract_batch(cfg, mesh))
        return traced.lower(lowering_platforms=(platform,))
