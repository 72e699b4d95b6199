"""Ways to make a model smaller, by name: quantised, pruned at once, pruned while training.

float32, bfloat16      the weights as they are
int8-channel, nf4-64   quantised (`peft.quantization.parse`)
prune-50, prune-50-global, prune-2:4   the smallest half of each matrix, of all together, n of m
retrain-50, gradual-50, movement-50    the same with training: pruned at once and then trained,
                                       gradually over half of the steps, or by movement
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import config as configs
from llm_jax import models
from llm_jax.compression import pruned_training
from llm_jax.config import TrainConfig
from llm_jax.nn.params import flatten
from llm_jax.peft import pruning, quantization
from llm_jax.peft.quantization import LINEAR, nbytes
from llm_jax.types import Array, Batch, PyTree

FLOATS = ("float32", "bfloat16")
PRUNED = re.compile(r"prune-(?:(\d+):(\d+)|(\d+)(-global)?)$")
TRAINED = re.compile(r"(retrain|gradual|movement)-(\d+)$")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained while it is pruned: AdamW, warm-up over a tenth, then cosine to 0.

    Attributes:
      ids: tokens of the training text; every batch has random windows of them.
    """

    ids: np.ndarray
    steps: int = 100
    batch_size: int = 8
    length: int = 128
    learning_rate: float = 1e-4
    seed: int = 0


class Compressed(NamedTuple):
    """A smaller model."""

    params: PyTree
    nbytes: int  # of the weights; pruned matrices count a bit a weight and those that are left
    plain: bool  # all arrays: a checkpoint can hold it
    sparsity: float | None  # of the pruned matrices


def check(name: str, trains: bool = True) -> None:
    """Raises ValueError for a name of no scheme, a share outside 0 .. 99, a pattern that cannot
    be kept, or one that needs training where there is none."""
    if name in FLOATS:
        return
    if m := PRUNED.match(name):
        if m[3] is not None and int(m[3]) > 99:
            raise ValueError(f"{name!r} prunes everything; take 99 or less")
        if m[1] and not 1 <= int(m[1]) <= int(m[2]):
            raise ValueError(f"{name!r} keeps {m[1]} of {m[2]}; take 1 to {m[2]}")
        return
    if m := TRAINED.match(name):
        if int(m[2]) > 99:
            raise ValueError(f"{name!r} prunes everything; take 99 or less")
        if not trains:
            raise ValueError(f"{name!r} trains the model; give it --train_steps")
        return
    try:
        quantization.parse(name)
    except ValueError:
        known = f"{', '.join(FLOATS)}, {quantization.NAMES}, prune-50, prune-50-global, prune-2:4"
        raise ValueError(
            f"{name!r} is no scheme; there are for example {known}, retrain-50, gradual-50, movement-50"
        ) from None


def compress(
    name: str,
    cfg: TrainConfig,
    params: PyTree,
    *,
    targets: str = LINEAR,
    training: Training | None = None,
) -> Compressed:
    """The model `params` of `cfg` by a scheme, which is applied to the matrices that `targets` finds.

    Raises:
      ValueError: as `check`, and targets that match no matrix.
    """
    check(name, training is not None)
    specs = models.family(cfg.model.family).specs(cfg.model)
    if name in FLOATS:
        held = jax.tree.map(lambda x: x.astype(name), params)
        return Compressed(held, nbytes(held), True, None)
    if m := PRUNED.match(name):
        if m[1]:
            masks = pruning.n_of_m_masks(params, specs, int(m[1]), int(m[2]), targets=targets)
        else:
            scope = "global" if m[4] else "matrix"
            masks = pruning.magnitude_masks(
                params, specs, int(m[3]) / 100, targets=targets, scope=scope
            )
        return _pruned(pruning.pruned(params, masks), masks)
    if m := TRAINED.match(name):
        run, plan = _run(cfg, training), _plan(m[1], int(m[2]) / 100, training.steps, targets)
        done = pruned_training.train(run, windows(training), params, plan)
        # Where the model was, which need not be where it is trained.
        back = jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), done.params, params)
        return _pruned(back, done.masks)
    held = quantization.quantize_tree(params, specs, quantization.parse(name), targets)
    return Compressed(held, nbytes(held), False, None)


def windows(training: Training) -> Callable[[int], Batch]:
    """batch(step): random windows of the text.

    Raises:
      ValueError: a text shorter than one.
    """
    ids, L = np.asarray(training.ids, np.int32), training.length
    if len(ids) <= L:
        raise ValueError(f"--train_input has {len(ids)} tokens; --train_length={L} takes more")

    def batch(step: int) -> Batch:
        rng = np.random.default_rng((training.seed, step))
        starts_B = rng.integers(0, len(ids) - L, training.batch_size)
        rows = ids[starts_B[:, None] + np.arange(L + 1)]
        return Batch(
            tokens=rows[:, :-1], targets=rows[:, 1:], weights=np.ones(rows[:, 1:].shape, np.float32)
        )

    return batch


def _run(cfg: TrainConfig, training: Training) -> TrainConfig:
    new = TrainConfig(
        name="pruning",
        steps=training.steps,
        batch_size=training.batch_size,
        length=training.length,
        seed=training.seed,
        model=configs.thaw(cfg.model),
    )
    new.optimizer.learning_rate = training.learning_rate
    new.optimizer.warmup_steps = training.steps // 10
    new.optimizer.weight_decay = 0.0
    configs.validate(new)
    return configs.freeze(new)


def _plan(kind: str, share: float, steps: int, targets: str) -> pruned_training.Pruning:
    end = 0 if kind == "retrain" else steps // 2
    return pruned_training.Pruning(
        method="movement" if kind == "movement" else "magnitude",
        sparsity=share,
        end=end,
        every=max(end // 10, 1),
        targets=targets,
    )


def _pruned(params: PyTree, masks: Mapping[str, Array]) -> Compressed:
    size = nbytes({path: x for path, x in flatten(params).items() if path not in masks})
    for path, mask in masks.items():
        left = int(jnp.sum(mask))
        size += math.ceil(mask.size / 8) + left * flatten(params)[path].dtype.itemsize
    return Compressed(params, size, True, pruning.sparsity(masks))
