"""Heads in place of the output over the vocabulary: a reward.

A head asks of a model family for `hidden` alone, and of a batch for the weights that pick the token
that it reads: the last of an answer for a decoder, [CLS] for an encoder.
"""

from types import ModuleType

import jax
import jax.numpy as jnp

from llm_jax.config import ModelConfig
from llm_jax.nn.params import Constant, ParamSpec, init
from llm_jax.types import Array, Batch, PyTree, Scores

REWARD = "reward"  # where a tree has the head's parameters


def specs(cfg: ModelConfig) -> PyTree:
    """What `cfg.head` adds to a family's parameters.

    A reward is w . x + bias. It starts at 0, so that the first loss of pairs is log 2. "length" is
    what a pair's difference in log length is worth where training controls for it
    (objectives.preference.reward); it is no part of the reward.
    """
    if cfg.head != REWARD:
        return {}
    zero = Constant(0.0)
    return {
        REWARD: {
            "w": ParamSpec((cfg.d_model,), ("embed",), zero),
            "bias": ParamSpec((), (), zero),
            "length": ParamSpec((), (), zero),
        }
    }


def without(tree: PyTree) -> PyTree:
    """A model's tree without its heads."""
    return {name: part for name, part in tree.items() if name != REWARD}


def fitted(params: PyTree, wanted: PyTree, key: Array) -> PyTree:
    """The parameters of a model with another head -> those of the specs `wanted`: a head that is
    missing is made, one that is not asked for is left out."""
    kept = {name: part for name, part in params.items() if name in wanted}
    new = {name: part for name, part in wanted.items() if name not in kept}
    return {**kept, **init(new, key)} if new else kept


def rewards(params: PyTree, x_BxLxD: Array) -> Array:
    """float32 [B, L]: the reward at each token."""
    p = params[REWARD]
    w, bias = (p[name].astype(jnp.float32) for name in ("w", "bias"))
    x_BxLxD = x_BxLxD.astype(jnp.float32)
    return jnp.einsum("bld,d->bl", x_BxLxD, w) + bias[None, None]


def reward_scores(
    model: ModuleType, params: PyTree, batch: Batch, cfg: ModelConfig, *, rng: Array | None = None
) -> Scores:
    """`Scores.values` of a family's module."""
    out = model.hidden(params, batch, cfg, rng=rng)
    with jax.named_scope("reward"):
        values = rewards(params, out.x)
    return Scores(values=values, penalties=out.penalties, stats=out.stats)
