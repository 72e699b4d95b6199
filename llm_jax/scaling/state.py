"""Bytes that one device holds between steps: exact, from the real shapes and shardings."""

import math
from functools import lru_cache

import jax
import numpy as np
from jax.sharding import AbstractMesh

from llm_jax import models, sharding
from llm_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from llm_jax.nn import attention
from llm_jax.nn import params as nn_params
from llm_jax.train import optimizer as optimizers
from llm_jax.train import program
from llm_jax.types import PyTree

KEY_BYTES = 8  # of a random key


def state_bytes(cfg: TrainConfig, mesh: AbstractMesh) -> dict[str, int]:
    """What a step of a frozen config takes as arguments, by kind: parameters (frozen ones too),
    optimizer, average, batch."""
    trainable, frozen, optimizer, state = _shapes(
        cfg.model, cfg.optimizer, cfg.steps, cfg.model.moe.bias_rate
    )
    own = _bytes(nn_params.abstract(trainable), nn_params.shardings(trainable, mesh))
    held = _bytes(nn_params.abstract(frozen), nn_params.shardings(frozen, mesh)) if frozen else 0
    batch = program.abstract_batch(cfg, mesh)
    return {
        "parameters": own + held,
        "optimizer": _bytes(state, optimizers.state_shardings(optimizer, trainable, mesh)),
        "average": own if cfg.optimizer.ema_decay else 0,
        "batch": _bytes(batch, jax.tree.map(lambda s: s.sharding, batch)) + 8 + KEY_BYTES,
    }


@lru_cache(maxsize=8)
def _shapes(model: ModelConfig, optimizer: OptimizerConfig, steps: int, rate: float) -> tuple:
    """(trainable specs, frozen specs, the optimizer, shapes of its state)."""
    trainable, frozen = optimizers.partition(specs_of(model), optimizer)
    made = optimizers.make_optimizer(optimizer, steps, trainable, rate)
    return trainable, frozen, made, jax.eval_shape(made.init, nn_params.abstract(trainable))


def specs_of(model: ModelConfig) -> PyTree:
    """The specs of a resolved model config."""
    return models.family(model.family).specs(model)


def _bytes(shapes: PyTree, shardings: PyTree) -> int:
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(sh.shard_shape(s.shape)) * np.dtype(s.dtype).itemsize for s, sh in pairs)


def cache_bytes(cfg: TrainConfig, mesh: AbstractMesh, rows: int, length: int) -> int:
    """Keys and values that decoding `rows` rows of up to `length` tokens keeps, on one device."""
    axes = (None, "batch", "kv_heads", None, None)
    cut = sharding.named(axes, mesh)
    shapes = attention.cache_specs(cfg.model, rows, length).values()
    itemsize = 2 if cfg.model.dtype == "bfloat16" else 4
    if cfg.model.cache_dtype == "int8":
        itemsize = 1 + 4 / cfg.model.head_dim  # a code, and its share of a float32 scale
    try:
        return sum(math.prod(cut.shard_shape(shape)) for shape in shapes) * itemsize
    except ValueError:
        raise ValueError(
            f"--decode_rows={rows} or model.kv_heads={cfg.model.kv_heads} is not divisible by the "
            f"mesh {cut.spec}; change one of them"
        ) from None
