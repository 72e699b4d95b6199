"""Bottleneck adapters (Houlsby et al. 2019) behind the two output projections of each layer."""

import math
import re
import zlib

from llm_jax.config import PeftConfig
from llm_jax.nn.bottleneck import Bottleneck
from llm_jax.nn.params import Constant, Normal, ParamSpec, flatten, unflatten
from llm_jax.types import PyTree

TARGETS = re.compile(r"/(attn/o|mlp/down)/w$")
PARTS = ("down", "down_bias", "up", "up_bias")


def specs(base_specs: PyTree, cfg: PeftConfig) -> PyTree:
    """ "down" [D, r], "down_bias" [r], "up" [r, D] and "up_bias" [D], stacked, for attn/o and mlp/down:
    2 L (2 D r + D + r) parameters. up starts at 0, so that nothing changes at the start.

    Raises:
      ValueError: a rank below 1, or experts, which have no single output projection.
    """
    r, flat = cfg.rank, flatten(base_specs)
    if r < 1:
        raise ValueError(f"peft.rank={r} has to be at least 1")
    if any("/moe/" in path for path in flat):
        raise ValueError(
            "peft.method=adapter stands behind a layer's MLP, but this model has experts "
            "(model.moe.n_experts); use peft.method=lora"
        )
    new = {}
    for path, spec in flat.items():
        if TARGETS.search(path):
            (*lead, _, D), (*axes, _, width) = spec.shape, spec.axes
            shapes = (
                ((D, r), (width, None)),
                ((r,), (None,)),
                ((r, D), (None, width)),
                ((D,), (None,)),
            )
            for name, (shape, own) in zip(PARTS, shapes, strict=True):
                init = Normal(1 / math.sqrt(D)) if name == "down" else Constant(0.0)
                new[f"{path}/{name}"] = ParamSpec((*lead, *shape), (*axes, *own), init)
    return unflatten(new)


def attach(base: PyTree, trained: PyTree, cfg: PeftConfig) -> PyTree:
    """The base with its adapters. No array is copied: several can share a base, and to switch is to
    take another tree."""
    flat, new = flatten(base), flatten(trained)
    for path in [path for path in flat if f"{path}/down" in new]:
        flat[path] = Bottleneck(
            base=flat[path],
            **{name: new[f"{path}/{name}"] for name in PARTS},
            rate=cfg.dropout,
            salt=zlib.crc32(path.encode()) & 0x7FFFFFFF,
        )
    return unflatten(flat)
