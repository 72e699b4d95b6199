"""What a run trains, what it keeps as it is, and how both make the tree that a model takes.

Without PEFT the trained and the frozen parameters are two halves of the model's tree. With it the
trained arrays are few and new, and the frozen ones are the base model, perhaps quantised.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax import models, sharding
from llm_jax.config import OptimizerConfig, PeftConfig, TrainConfig
from llm_jax.models import heads
from llm_jax.nn import params as nn_params
from llm_jax.nn.params import flatten, unflatten
from llm_jax.nn.weights import is_weight
from llm_jax.peft import adapters, lora, prompts, quantization
from llm_jax.train.optimizer import merge, partition
from llm_jax.types import Array, PyTree

METHODS = {"lora": lora, "adapter": adapters, "prompt": prompts, "prefix": prompts}


class Tuning(NamedTuple):
    """The two parts of a model's parameters in a run."""

    trained: PyTree  # ParamSpecs of what the optimizer sees
    split: Callable[[PyTree, Array], tuple[PyTree, PyTree | None]]  # (whole tree, key) -> parts
    join: Callable[[PyTree, PyTree | None], PyTree]  # (trained, frozen) -> what models take
    # (path, parameter) -> the leaf that is kept of it; `split` does it too, this is for loading
    hold: Callable[[str, PyTree], PyTree] | None = None
    frozen: PyTree = (
        None  # ParamSpecs of the frozen part, where it is not of the model's parameters
    )


def make_tuning(cfg: TrainConfig, specs: PyTree) -> Tuning:
    """The parts of a model with the given `specs` under a frozen config.

    Raises:
      ValueError: patterns that match nothing, and `optimizer.freeze_rules` beside PEFT.
    """
    if cfg.peft.method == "none":
        if cfg.peft.base != "float":
            raise ValueError(
                f"peft.base={cfg.peft.base} holds a frozen base, but peft.method=none trains every "
                "parameter; set peft.method"
            )
        trained, _ = partition(specs, cfg.optimizer)
        return Tuning(trained, lambda params, key: partition(params, cfg.optimizer), merge)
    if cfg.optimizer.freeze_rules != OptimizerConfig().freeze_rules:
        raise ValueError(
            f"optimizer.freeze_rules and peft.method={cfg.peft.method} both say what is trained; "
            "with PEFT name parameters that are trained beside it in peft.also"
        )
    method, scheme = METHODS[cfg.peft.method], _scheme(cfg.peft)
    new = method.specs(specs, cfg.peft)
    whole = _also(specs, new, cfg)
    cast = partial(models.family(cfg.model.family).cast, dtype=cfg.model.dtype)
    quantised = set()
    if scheme is not None:
        quantised = set(lora.matrices(specs, cfg.peft.base_targets, "peft.base_targets")) - set(
            whole
        )

    def hold(path: str, leaf: PyTree) -> PyTree:
        if path in whole or is_weight(leaf):
            return leaf
        leaf = unflatten({path: leaf})
        if path in quantised:
            leaf = quantization.quantize_tree(leaf, specs, scheme, cfg.peft.base_targets)
        return flatten(cast(leaf))[path]

    def split(params: PyTree, key: Array) -> tuple[PyTree, PyTree]:
        flat = flatten(params)
        own = {path: flat[path] for path in whole}
        base = {path: hold(path, leaf) for path, leaf in flat.items() if path not in whole}
        if hasattr(method, "start"):
            size = cfg.model.vocab_size
            trained = method.start(params, new, key, cfg.peft, vocab_size=size)
        else:
            trained = nn_params.init(new, key)
        if cfg.peft.method == "prefix" and cfg.peft.start_ids:
            asked = {**params, **trained}  # a prompt still
            trained = {"prefix": models.family(cfg.model.family).prefix_of(asked, cfg.model)}
            trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
        return unflatten({**flatten(trained), **own}), unflatten(base)

    def join(trained: PyTree, frozen: PyTree) -> PyTree:
        flat = flatten(trained)
        own = {path: flat.pop(path) for path in whole}
        return method.attach(unflatten({**flatten(frozen), **own}), unflatten(flat), cfg.peft)

    return Tuning(unflatten({**flatten(new), **whole}), split, join, hold)


def _scheme(cfg: PeftConfig) -> quantization.Scheme | None:
    """How the matrices of a frozen base are quantised; None: not at all."""
    match cfg.base:
        case "nf4":
            double = "-double" if cfg.base_double else ""
            return quantization.parse(f"nf4-{cfg.base_block}{double}")
        case "int8":
            return quantization.parse("int8-channel")
    return None


def without(frozen: PyTree | None, names: Iterable[str]) -> PyTree | None:
    """The model's own frozen part: that of a state without the other models in it."""
    return {name: part for name, part in (frozen or {}).items() if name not in names} or None


def frozen_shardings(frozen: PyTree, specs: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """A NamedSharding for each array of the frozen part, given its shapes."""
    axes = {path: spec.axes for path, spec in flatten(specs).items()}

    def one(path: str, leaf: PyTree) -> PyTree:
        layout = leaf.layout(axes[path]) if is_weight(leaf) else axes[path]
        return jax.tree.map(
            lambda a: sharding.named(a, mesh), layout, is_leaf=lambda a: isinstance(a, tuple)
        )

    return unflatten({path: one(path, leaf) for path, leaf in flatten(frozen).items()})


def _also(specs: PyTree, new: PyTree, cfg: TrainConfig) -> dict[str, nn_params.ParamSpec]:
    """The model's own parameters that are trained whole: a head that is not of a language model,
    and those of `peft.also`."""
    flat = flatten(specs)
    found = {path: spec for path, spec in flat.items() if path.startswith(f"{heads.REWARD}/")}
    for pattern in cfg.peft.also:
        hits = {path: spec for path, spec in flat.items() if re.search(pattern, path)}
        if not hits:
            raise ValueError(f"peft.also: the pattern {pattern!r} matches no parameter")
        found |= hits
    if both := [path for path in found if any(p.startswith(f"{path}/") for p in flatten(new))]:
        raise ValueError(
            f"peft.also trains {both[0]!r} whole, and peft.method={cfg.peft.method} gives it an update; "
            "narrow peft.also or peft.targets"
        )
    return found
