"""LoRA (Hu et al. 2021): a low-rank update of chosen matrices; over a quantised base it is QLoRA
(Dettmers et al. 2023)."""

import math
import re
import zlib

import jax
import jax.numpy as jnp

from llm_jax.config import PeftConfig
from llm_jax.nn import weights
from llm_jax.nn.bottleneck import Bottleneck
from llm_jax.nn.low_rank import LowRank
from llm_jax.nn.params import Constant, ParamSpec, Uniform, flatten, unflatten
from llm_jax.types import Array, PyTree


def scale(cfg: PeftConfig) -> float:
    """The factor on a @ b: alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023), with which the size
    of the update does not fall as r grows."""
    return cfg.alpha / (math.sqrt(cfg.rank) if cfg.rank_stabilized else cfg.rank)


def specs(base_specs: PyTree, cfg: PeftConfig) -> PyTree:
    """ "a" [D_in, r] and "b" [r, D_out] for each matrix that `cfg.targets` finds.

    a starts uniform within 1 / sqrt(D_in), b at 0, so that nothing changes at the start.

    Raises:
      ValueError: the pattern finds no parameter, or one that is no matrix.
    """
    flat = {}
    for path, spec in matrices(base_specs, cfg.targets, "peft.targets").items():
        *lead, d_in, d_out = spec.shape
        *axes, rows, columns = spec.axes
        flat[f"{path}/a"] = ParamSpec(
            (*lead, d_in, cfg.rank), (*axes, rows, None), Uniform(1 / math.sqrt(d_in))
        )
        flat[f"{path}/b"] = ParamSpec(
            (*lead, cfg.rank, d_out), (*axes, None, columns), Constant(0.0)
        )
    return unflatten(flat)


def matrices(base_specs: PyTree, pattern: str, key: str) -> dict[str, ParamSpec]:
    """{path: spec} of the matrices, one or one a layer, whose path a pattern finds.

    Raises:
      ValueError: the pattern finds no parameter, or one that is no matrix; it names the config key.
    """
    flat = flatten(base_specs)
    found = {path: spec for path, spec in flat.items() if re.search(pattern, path)}
    if not found:
        raise ValueError(
            f"{key}={pattern!r} matches no parameter; there are {', '.join(sorted(flat)[:6])}, ..."
        )
    for path, spec in found.items():
        if len(spec.shape) - (spec.axes[:1] == ("layer",)) != 2:
            raise ValueError(
                f"{key}={pattern!r} matches {path!r} of shape {spec.shape}, which is no matrix; "
                "give a narrower pattern"
            )
    return found


def attach(base: PyTree, trained: PyTree, cfg: PeftConfig) -> PyTree:
    """The base with its updates beside it. No array is copied: several adapters can share a base,
    and to switch is to take another tree."""
    flat, pairs = flatten(base), flatten(trained)
    for path in [p.removesuffix("/a") for p in pairs if p.endswith("/a")]:
        flat[path] = LowRank(
            base=flat[path],
            a=pairs[f"{path}/a"],
            b=pairs[f"{path}/b"],
            scale=scale(cfg),
            rate=cfg.dropout,
            salt=zlib.crc32(path.encode()) & 0x7FFFFFFF,
        )
    return unflatten(flat)


def merge(params: PyTree) -> PyTree:
    """A tree with leaves -> one of plain arrays: the updates added to their matrices, quantised
    ones as they are computed with. Arrays stay the same arrays."""
    return jax.tree.map(
        lambda w: weights.dequantize(w, jnp.float32) if weights.is_weight(w) else w,
        params,
        is_leaf=weights.is_weight,
    )


def detach(params: PyTree) -> PyTree:
    """A tree with adapters of any method -> that of the model underneath. No array is copied."""
    adapters = (LowRank, Bottleneck)
    params = {name: part for name, part in params.items() if name != "prefix"}
    return jax.tree.map(
        lambda w: w.base if isinstance(w, adapters) else w,
        params,
        is_leaf=lambda w: isinstance(w, adapters),
    )


def unmerge(params: PyTree, trained: PyTree, cfg: PeftConfig) -> PyTree:
    """The base again, to rounding: what `merge` added is taken off."""
    flat, pairs = flatten(params), flatten(trained)

    def update(path: str) -> Array:
        return scale(cfg) * pairs[f"{path}/a"] @ pairs[f"{path}/b"]

    return unflatten({p: w - update(p) if f"{p}/a" in pairs else w for p, w in flat.items()})
