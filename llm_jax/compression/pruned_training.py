"""Training while weights are pruned: gradual magnitude pruning and movement pruning.

Masks, or the scores' thresholds, are the frozen part of the state. The host renews them every few
steps; between two renewals a step is as any other.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import config as configs
from llm_jax import models
from llm_jax.config import TrainConfig
from llm_jax.nn import params as nn_params
from llm_jax.nn.params import Constant, ParamSpec, flatten, unflatten
from llm_jax.peft import pruning
from llm_jax.peft.quantization import LINEAR
from llm_jax.train import in_memory
from llm_jax.train.tuning import Tuning
from llm_jax.types import Array, Batch, PyTree, TrainState

METHODS = ("magnitude", "movement")
UNDECAYED = ((r"^scores/", False),)


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What is pruned while training.

    Attributes:
      method: "magnitude" prunes what is small (Zhu & Gupta 2017), "movement" what training moves
        towards 0 (Sanh et al. 2020), by scores that are trained beside the weights.
      sparsity: share of each matrix, or of all together, that is pruned in the end.
      begin, end: steps between which the share rises (`pruning.cubic_sparsity`); from `end` on the
        rest is trained. Equal ones prune all at once.
      every: steps from one renewal to the next.
      targets: a pattern that is searched in the paths of the matrices.
      scope: "matrix" (each layer's) or "global", of magnitudes.
      score_rate: the scores' learning rate as a multiple of the weights'.
    """

    method: str = "magnitude"
    sparsity: float = 0.5
    begin: int = 0
    end: int = 0
    every: int = 10
    targets: str = LINEAR
    scope: str = "matrix"
    score_rate: float = 100.0

    def at(self, step: int) -> float:
        """The share that is pruned from this step on."""
        return pruning.cubic_sparsity(step, begin=self.begin, end=self.end, final=self.sparsity)

    def renews(self, step: int) -> bool:
        """Whether masks or thresholds are made anew before this step; scores keep moving, so theirs
        also after `end`."""
        regular = step >= self.begin and (step - self.begin) % self.every == 0
        return step == self.end or (regular and (step < self.end or self.method == "movement"))


class Pruned(NamedTuple):
    """What a run ends with."""

    params: PyTree  # plain arrays, 0 where the masks are false
    masks: dict[str, Array]  # {path: bool}
    losses: np.ndarray  # [steps] nats per token
    sparsities: np.ndarray  # [steps] share that the schedule asked for


def train(
    cfg: TrainConfig,
    batch: Callable[[int], Batch],
    params: PyTree,
    plan: Pruning,
) -> Pruned:
    """Trains `params` with the frozen, resolved `cfg` on `batch(step)` of numpy rows, while pruning.

    Pruned weights get no gradient and are exactly 0 in the result.

    Raises:
      ValueError: a plan that does not end within the run, PEFT or frozen parameters beside it, an
        unknown method, or targets that match nothing.
    """
    _check(cfg, plan)
    if plan.method == "movement":
        cfg = configs.thaw(cfg)
        cfg.optimizer.decay_rules = (*UNDECAYED, *cfg.optimizer.decay_rules)
        cfg = configs.freeze(cfg)
    specs = models.family(cfg.model.family).specs(cfg.model)
    paths = pruning.target_paths(params, specs, plan.targets)
    shares = []

    def renew(step: int, state: TrainState) -> TrainState:
        share = shares[-1] if shares else 0.0
        if plan.renews(step):
            share = plan.at(step)
            state = state.replace(frozen=_renewed(state, specs, plan, share))
        shares.append(share)
        return state

    tuning = _tuning(specs, paths, plan)
    done = in_memory.train(cfg, batch, start=params, tuning=tuning, before=renew)
    state = done.state
    final = state.params if state.ema is None else state.ema
    if plan.method == "movement":
        scores = flatten(final["scores"])
        cut = pruning.score_thresholds(scores, specs, plan.sparsity)
        trained, masks = final["model"], _above(scores, cut)
    else:
        trained, masks = final, flatten(state.frozen)
    return Pruned(pruning.pruned(trained, masks), masks, done.losses, np.array(shares))


def _tuning(specs: PyTree, paths: list[str], plan: Pruning) -> Tuning:
    """Weights are trained, and with movement pruning scores beside them; the frozen part is a mask
    or a threshold a layer for each pruned matrix."""
    declared = {path: flatten(specs)[path] for path in paths}
    if plan.method == "magnitude":
        masks = {p: replace(s, init=Constant(True), dtype=bool) for p, s in declared.items()}
        made = unflatten(masks)
        return Tuning(
            trained=specs,
            split=lambda params, key: (params, nn_params.init(made, key)),
            join=lambda params, frozen: pruning.masked(params, flatten(frozen)),
            frozen=made,
        )
    scores = unflatten(
        {
            path: ParamSpec(s.shape, s.axes, Constant(0.0), rate=s.rate * plan.score_rate)
            for path, s in declared.items()
        }
    )
    none = Constant(-jnp.inf)
    cuts = unflatten({p: ParamSpec(s.shape[:-2], s.axes[:-2], none) for p, s in declared.items()})

    def split(params: PyTree, key: Array) -> tuple[PyTree, PyTree]:
        return {"model": params, "scores": nn_params.init(scores, key)}, nn_params.init(cuts, key)

    def join(trained: PyTree, frozen: PyTree) -> PyTree:
        return pruning.scored(trained["model"], flatten(trained["scores"]), flatten(frozen))

    return Tuning({"model": specs, "scores": scores}, split, join, frozen=cuts)


def _renewed(state: TrainState, specs: PyTree, plan: Pruning, share: float) -> PyTree:
    """The frozen part for a share. Of magnitudes what is pruned stays pruned."""
    if plan.method == "movement":
        new = pruning.score_thresholds(flatten(state.params["scores"]), specs, share)
    else:
        new = pruning.magnitude_masks(
            pruning.pruned(state.params, flatten(state.frozen)),
            specs,
            share,
            targets=plan.targets,
            scope=plan.scope,
        )
    return jax.tree.map(
        lambda x, old: jax.device_put(x, old.sharding), unflatten(new), state.frozen
    )


def _above(scores: dict[str, Array], thresholds: dict[str, Array]) -> dict[str, Array]:
    return {p: s >= thresholds[p].reshape((*thresholds[p].shape, 1, 1)) for p, s in scores.items()}


def _check(cfg: TrainConfig, plan: Pruning) -> None:
    if plan.method not in METHODS:
        raise ValueError(f"pruning method {plan.method!r} is not one of {', '.join(METHODS)}")
    if not 0.0 <= plan.sparsity < 1.0:
        raise ValueError(f"a sparsity of {plan.sparsity}; it has to be in [0, 1)")
    if not 0 <= plan.begin <= plan.end < cfg.steps or plan.every < 1:
        raise ValueError(
            f"pruning from step {plan.begin} to {plan.end} every {plan.every} does not fit a run of "
            f"steps={cfg.steps}; it has to end before the last"
        )
    if plan.method == "movement" and plan.scope != "matrix":
        raise ValueError(f"scope={plan.scope!r} is for magnitudes; movement prunes each matrix")
    if cfg.peft.method != "none" or any(frozen for _, frozen in cfg.optimizer.freeze_rules):
        raise ValueError(
            f"pruning trains every parameter; set peft.method={cfg.peft.method} to none and leave "
            "optimizer.freeze_rules alone"
        )
