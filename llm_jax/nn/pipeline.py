"""A circular pipeline over stacked stage parameters (GPipe, Huang et al. 2019; with several turns
the interleaved schedule of Narayanan et al. 2021).

The stages are one leading axis [P, ...] cut along the mesh axis "stage": each step of a scan runs
all of them at once (a vmap), then everything moves on by one stage (a roll, which becomes a
collective-permute). A micro-batch takes its rows, their `side` and what they have added up along
with it. With R turns stage s holds R runs of layers, s, s + P, ..., and micro-batches go round in
groups of P, one group right behind the other, so that nothing has to be stored between turns.

A stage works at n R of the n R + P - 1 steps: the rest is the bubble. Bubbles compute on copies of
real rows, never on zeros, so that no 0/0 can reach a gradient; their results are dropped.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import sharding
from llm_jax.config import ModelConfig
from llm_jax.types import Array, PyTree

Run = Callable[[PyTree, Array, PyTree, PyTree, Array], tuple[Array, PyTree]]
PER_STAGE = 4  # micro-batches a stage that are made where the config leaves it open


def microbatches(cfg: ModelConfig, rows: int, shards: int, stages: int) -> int:
    """Micro-batches that `rows` rows, cut in `shards` pieces by the mesh, go through the pipeline in.

    Raises:
      ValueError: the number that the config names does not fit.
    """
    n, turns = cfg.pipeline_microbatches, cfg.pipeline_turns
    if rows % shards:
        raise ValueError(f"{rows} rows cannot be cut into {shards} pieces over the mesh")
    step = stages if turns > 1 else 1
    mine = rows // shards
    if n:
        if mine % n or n % step:
            why = f"model.pipeline_turns={turns} needs a multiple of mesh.stage={stages}, and "
            raise ValueError(
                f"model.pipeline_microbatches={n} does not fit: {why if turns > 1 else ''}it has to "
                f"divide the {mine} rows that each of {shards} batch shards has; change one of them"
            )
        return n
    fitting = [m for m in range(step, min(mine, PER_STAGE * stages) + 1, step) if mine % m == 0]
    if not fitting:
        raise ValueError(
            f"model.pipeline_turns={turns} needs micro-batches in multiples of mesh.stage={stages}, "
            f"but each of {shards} batch shards has {mine} rows; raise batch_size or lower one of them"
        )
    return fitting[-1]


def bubble(n: int, stages: int, turns: int = 1) -> float:
    """Share of a pipeline's time in which a stage does nothing that counts."""
    return (stages - 1) / (n * turns + stages - 1)


def run(
    stage: Run, params: PyTree, x_BxLxD: Array, side: PyTree, extras: PyTree, cfg: ModelConfig
) -> tuple[Array, PyTree]:
    """`stage(params of its layers, x, side, extras, number of its first layer) -> (x, extras)` over
    all layers, where `params` leaves [M, ...] are cut along the mesh axis "stage"."""
    mesh = sharding.ambient_mesh()
    P, R = mesh.shape["stage"], cfg.pipeline_turns
    shards = math.prod(mesh.shape[a] for a in sharding.RULES["batch"])
    B, L = x_BxLxD.shape[:2]
    n = microbatches(cfg, B, shards, P)
    n_layers = jax.tree.leaves(params)[0].shape[0]
    per = n_layers // (P * R)

    # At step t stage s does job t - s: the jobs of a group of P micro-batches are its R turns.
    T = n * R + P - 1
    job_TxP = np.clip(np.arange(T)[:, None] - np.arange(P)[None, :], 0, n * R - 1)
    turn_TxP = job_TxP % (P * R) // P if R > 1 else job_TxP * 0
    micro_TxP = job_TxP // (P * R) * P + job_TxP % P if R > 1 else job_TxP
    first_TxP = (turn_TxP * P + np.arange(P)[None, :]) * per
    done = [t for t in range(T) if t >= P - 1 and turn_TxP[t, P - 1] == R - 1]

    def cut(p):  # [M, ...] -> [P, R, per, ...]; with one turn nothing moves between stages
        p = jnp.swapaxes(p.reshape(R, P, per, *p.shape[1:]), 0, 1)
        return p[:, 0] if R == 1 else p

    def pin(leaf, *lead):
        """Cuts [*lead, rows, ...] over the batch axes, and the length where there is one."""
        rest = leaf.shape[len(lead) + 1 :]
        length = ["length"] if rest[:1] == (L,) else [None] * len(rest[:1])
        return sharding.constrain(leaf, *lead, "batch", *length, *[None] * len(rest[1:]))

    def split(leaf):
        """[B, ...] -> [n, B/n, ...]; micro-batch j has rows j, j + n, ..., so none moves."""
        return pin(jnp.swapaxes(leaf.reshape(B // n, n, *leaf.shape[1:]), 0, 1), None)

    params = jax.tree.map(cut, params)
    micro = jax.tree.map(split, _plain((x_BxLxD, side, extras)))
    typed = jax.tree.map(lambda leaf: leaf.dtype, (x_BxLxD, side, extras))
    new = jax.tree.map(lambda leaf: leaf[micro_TxP[:, 0]], micro)  # what enters at stage 0
    state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], (P, *leaf.shape[1:])), micro)

    def one(params, turn, first, state):
        x, side, extras = _typed(state, typed)
        if R > 1:
            params = jax.tree.map(
                lambda p: jax.lax.dynamic_index_in_dim(p, turn, keepdims=False), params
            )
        x, extras = stage(params, x, side, extras, first)
        return x, extras

    stages = jax.vmap(one, in_axes=(0, 0, 0, 0), spmd_axis_name="stage")

    def step(state, now):
        def enter(new, old):
            return jnp.concatenate([jnp.where(starts, new, old[0])[None], old[1:]])

        entering, starts, turn_P, first_P = now
        with jax.named_scope("move"):
            state = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), state)
            state = jax.tree.map(enter, entering, state)
            state = jax.tree.map(lambda leaf: pin(leaf, "layer"), state)
        x, extras = stages(params, turn_P, first_P, state)
        state = (x, state[1], extras)
        return state, jax.tree.map(lambda leaf: pin(leaf, "layer"), (x, extras))

    starts_T = jnp.asarray(turn_TxP[:, 0] == 0)
    now = (new, starts_T, jnp.asarray(turn_TxP, jnp.int32), jnp.asarray(first_TxP, jnp.int32))
    _, out = jax.lax.scan(step, state, now)

    def join(leaf):
        """The last stage's results [T, P, B/n, ...] -> [B, ...]."""
        leaf = leaf[np.array(done), P - 1]
        return jnp.swapaxes(leaf, 0, 1).reshape(B, *leaf.shape[2:])

    x_BxLxD, extras = jax.tree.map(join, out)
    return sharding.stream(x_BxLxD), extras


def _is_key(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(tree: PyTree) -> PyTree:
    """Random keys as integers, which can be rolled and selected like everything else."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _typed(tree: PyTree, dtypes: PyTree) -> PyTree:
    """The inverse of `_plain`."""
    is_key = lambda dtype: jnp.issubdtype(dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(
        lambda x, dtype: jax.random.wrap_key_data(x) if is_key(dtype) else x, tree, dtypes
    )
