"""Maximal update parametrisation: the learning rate found on a narrow model serves a wide one.

Yang et al. 2022, "Tensor Programs V" (arXiv 2203.03466), table 8, for Adam-like optimizers. With
m = d_model / mup_base_width, and everything as it was where m = 1:

                                          init std      learning rate    forward
    embeddings, norms, biases             unchanged     unchanged
    matrices width -> width               / sqrt(m)     / m
    matrices width -> a constant number   / m           / m              (routers of experts)
    output head, also a tied one          unchanged     unchanged        logits / m
    attention                                                            q . k / head_dim

Inner widths (d_ff, heads * head_dim) are taken to grow as d_model does. The scale of q . k leaves
1 / sqrt(head_dim) only where heads become wider instead of more (`mup_base_head_dim`); it and the
logits' factor are filled in by `config.resolve_model`. Weight decay
stays what it was (learning rate * decay the same for all widths; Wortsman et al. 2023), as the
optimizer adds it after the factors.
"""

import dataclasses
import math

from llm_jax.config import ModelConfig
from llm_jax.nn.params import Normal, ParamSpec, map_specs
from llm_jax.types import PyTree

WIDE = {"embed", "expert_embed", "heads", "kv_heads", "mlp"}  # logical axes that grow with width


def parametrize(specs: PyTree, cfg: ModelConfig) -> PyTree:
    """The specs of a model with starts and rates by the table above; unchanged without a base."""
    if not cfg.mup_base_width:
        return specs
    m = cfg.d_model / cfg.mup_base_width

    def one(spec: ParamSpec) -> ParamSpec:
        axes = [a for a in spec.axes if a not in ("layer", "expert")]
        if len(axes) != 2 or axes[0] not in WIDE:
            return spec
        shrink = math.sqrt(m) if axes[1] in WIDE else m
        return dataclasses.replace(spec, init=Normal(spec.init.std / shrink), rate=spec.rate / m)

    return map_specs(one, specs)
