"""Training that leaves nothing behind: for experiments that train many small models."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from llm_jax import sharding
from llm_jax.config import TrainConfig
from llm_jax.data.progress import bar
from llm_jax.train import program
from llm_jax.train.tuning import Tuning
from llm_jax.types import Batch, PyTree, TrainState


class Trained(NamedTuple):
    """What a run in memory ends with."""

    params: PyTree  # the EMA if there is one
    losses: np.ndarray  # [steps] training loss of each step, nats per token
    program: program.Program
    state: TrainState


def train(
    cfg: TrainConfig,
    batch: Callable[[int], Batch],
    *,
    start: PyTree | None = None,
    devices: Sequence[jax.Device] | None = None,
    tuning: Tuning | None = None,
    before: Callable[[int, TrainState], TrainState] | None = None,
    watch: Callable[[int, PyTree], None] | None = None,
) -> Trained:
    """Trains the frozen, resolved `cfg` on `batch(step)` for steps 0, 1, ... of numpy rows.

    It goes on from `start`, a whole parameter tree, or else from a fresh one, on `devices` (default:
    all). `tuning` says what is trained (default: as `cfg` does); `before(step, state)` may change
    the state before a step; `watch(step, params)` sees the parameters before the first step and
    after each. Steps whose loss is not finite are skipped, as in every run; their loss is in
    `losses` as it was.
    """
    mesh = sharding.make_mesh(cfg.mesh, devices)
    with jax.set_mesh(mesh):
        made = program.build(cfg, mesh, tuning=tuning)
        key = jax.random.key(cfg.seed)
        state = made.init(key) if start is None else made.start(start, key)
        if watch:
            watch(0, made.params(state))
        progress = bar(cfg.name, cfg.steps, "step")
        losses = []
        for step in range(cfg.steps):
            state = before(step, state) if before else state
            rows = program.put(batch(step), mesh, cfg.accumulation)
            state, metrics = made.step(state, rows)
            losses.append(metrics["loss"])
            if step:  # the device is a step ahead of the host, and no more
                losses[-2] = float(losses[-2])
            if watch:
                watch(step + 1, made.params(state))
            progress.update(1)
        progress.close()
        losses = np.array([float(x) for x in losses])
        return Trained(made.params(state), losses, made, state)
