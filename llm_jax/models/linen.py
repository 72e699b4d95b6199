"""A model family as a Flax Linen module, for people who compose with Flax."""

import flax.linen as nn

from llm_jax import models
from llm_jax.config import ModelConfig
from llm_jax.nn.params import flatten, unflatten
from llm_jax.types import Array, Batch


def as_linen(family: str, cfg: ModelConfig) -> nn.Module:
    """A Linen module tokens [B, L] -> logits [B, L, V], whose variables["params"] is the parameter
    tree of `family` itself: either side can use what the other has trained."""
    model = models.family(family)

    class Module(nn.Module):
        @nn.compact
        def __call__(self, tokens: Array, *, row_keys: Array | None = None) -> Array:
            scope = self.scope
            params = {}
            for path, spec in flatten(model.specs(cfg)).items():
                *parents, name = path.split("/")
                holder = scope
                for parent in parents:
                    holder = holder.push(parent, reuse=True)
                params[path] = holder.param(name, lambda key, s=spec: s.init(key, s.shape, s.dtype))
            params = unflatten(params)
            out = model.hidden(params, Batch(tokens=tokens), cfg, rng=row_keys)
            return model.logits(params, out.x, cfg)

    Module.__name__ = f"{family.title()}Module"
    return Module()
