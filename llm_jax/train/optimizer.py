"""Optimizers and schedules from a config, which parameters they touch, and how their state is cut."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax import sharding
from llm_jax.config import OptimizerConfig
from llm_jax.nn.params import ParamSpec, abstract, flatten, map_specs, select, unflatten
from llm_jax.train.moments import stored_as
from llm_jax.train.regularization import toward_start
from llm_jax.types import PyTree

# Biases that balance a router's experts without a loss: not AdamW's, whatever optimizer is chosen.
BALANCE_BIAS = re.compile(r"(^|/)router/bias$")


def make_schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate at each optimizer step, 0-based: linear warm-up, then the named decay.

    cosine and linear fall to `final_learning_rate` at the last step; wsd (Hu et al. 2024) stays
    at the peak and falls linearly over the last `decay_steps`; constant stays.
    """
    peak, end, warm = cfg.learning_rate, cfg.final_learning_rate, cfg.warmup_steps
    if warm >= steps and warm > 0:
        raise ValueError(f"optimizer.warmup_steps={warm} leaves nothing of steps={steps}; lower it")
    decay = cfg.decay_steps or max(steps // 5, 1)
    if cfg.schedule == "wsd" and warm + decay > steps:
        raise ValueError(
            f"optimizer.warmup_steps={warm} and decay_steps={decay} do not fit in steps={steps}"
        )

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warm) / max(steps - warm, 1), 0.0, 1.0)
        match cfg.schedule:
            case "cosine":
                rate = end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * done))
            case "linear":
                rate = peak + (end - peak) * done
            case "wsd":
                rate = peak + (end - peak) * jnp.clip((step - (steps - decay)) / decay, 0.0, 1.0)
            case _:
                rate = jnp.full_like(step, peak)
        return jnp.where(step < warm, peak * (step + 1) / (warm + 1), rate) if warm else rate

    return schedule


def partition(tree: PyTree, cfg: OptimizerConfig) -> tuple[PyTree, PyTree | None]:
    """(trainable, frozen) halves of a parameter or spec tree, by `freeze_rules`; frozen may be None."""
    flat = flatten(tree)
    is_frozen = select(list(flat), cfg.freeze_rules, "optimizer.freeze_rules")
    if all(is_frozen.values()):
        raise ValueError("optimizer.freeze_rules freeze every parameter; nothing is left to train")
    frozen = unflatten({k: v for k, v in flat.items() if is_frozen[k]})
    return unflatten({k: v for k, v in flat.items() if not is_frozen[k]}), frozen or None


def merge(params: PyTree, frozen: PyTree | None) -> PyTree:
    """The whole tree again."""
    return params if frozen is None else unflatten({**flatten(frozen), **flatten(params)})


def decay_mask(specs: PyTree, cfg: OptimizerConfig) -> PyTree:
    """Which parameters decay, a bool for each, by `decay_rules`."""
    flat = flatten(specs)
    own = cfg.decay_rules != OptimizerConfig().decay_rules  # ours may find nothing to spare
    return unflatten(select(list(flat), cfg.decay_rules, "optimizer.decay_rules", all_used=own))


def make_optimizer(
    cfg: OptimizerConfig, steps: int, specs: PyTree, balance_rate: float = 0.0
) -> optax.GradientTransformation:
    """The optimizer for the trainable `specs`. Clipping is the step's.

    Routers' biases move by `balance_rate` against the sign of their gradient, which is each
    expert's load above the mean (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    """
    optimizer = _make_optimizer(cfg, steps, specs)
    if any(s.rate != 1.0 for s in flatten(specs).values()):
        optimizer = _with_rates(cfg, steps, specs)
    if cfg.moment_dtype != "float32":
        optimizer = stored_as(optimizer, jnp.dtype(cfg.moment_dtype))
    if cfg.l2_to_start:
        optimizer = optax.chain(toward_start(cfg.l2_to_start), optimizer)
    labels = {p: "balance" if BALANCE_BIAS.search(p) else "learn" for p in flatten(specs)}
    if "balance" not in labels.values():
        return optimizer
    return optax.partition(
        {"learn": optimizer, "balance": optax.sign_sgd(balance_rate)}, unflatten(labels)
    )


def _make_optimizer(
    cfg: OptimizerConfig, steps: int, specs: PyTree
) -> optax.GradientTransformation:
    schedule = make_schedule(cfg, steps)
    mask = decay_mask(specs, cfg)
    match cfg.name:
        case "adamw":
            optimizer = optax.adamw(
                schedule,
                b1=cfg.b1,
                b2=cfg.b2,
                eps=cfg.eps,
                weight_decay=cfg.weight_decay,
                mask=mask,
            )
        case "adafactor":
            optimizer = optax.adafactor(
                schedule,
                # optax adds decay after the learning rate; multiply it in, as AdamW does.
                weight_decay_rate=(lambda n: schedule(n) * cfg.weight_decay)
                if cfg.weight_decay
                else None,
                weight_decay_mask=mask,
            )
        case "muon":
            optimizer = optax.contrib.muon(
                schedule,
                weight_decay=cfg.weight_decay,
                weight_decay_mask=mask,
                adam_learning_rate=lambda n: cfg.muon_adam_rate * schedule(n),
                adam_b1=cfg.b1,
                adam_b2=cfg.b2,
                muon_weight_dimension_numbers=map_specs(_muon_axes, specs),
                consistent_rms=0.2,
            )
        case other:
            raise ValueError(
                f"optimizer.name={other!r} is unknown; there are adamw, adafactor, muon"
            )
    return optimizer


def _with_rates(cfg: OptimizerConfig, steps: int, specs: PyTree) -> optax.GradientTransformation:
    """The optimizer with each parameter's own factor on its step, decay left alone."""
    rates = map_specs(lambda s: s.rate, specs)
    schedule = make_schedule(cfg, steps)

    def masked(u) -> bool:  # a parameter of another optimizer
        return isinstance(u, optax.MaskedNode)

    def times_rates(updates: PyTree, _: PyTree) -> PyTree:
        return jax.tree.map(lambda u, r: u if masked(u) else u * r, updates, rates, is_leaf=masked)

    return optax.chain(
        _make_optimizer(dataclasses.replace(cfg, weight_decay=0.0), steps, specs),
        optax.stateless(times_rates),
        optax.add_decayed_weights(
            lambda n: -schedule(n) * cfg.weight_decay, mask=decay_mask(specs, cfg)
        ),
    )


def _muon_axes(spec: ParamSpec) -> optax.contrib.MuonDimensionNumbers | None:
    """Matrices inside layers are orthogonalised, each layer's alone; embeddings, the head, norms
    and biases are Adam's (Jordan et al. 2024)."""
    matrix = tuple(a for a in spec.axes if a != "layer")
    if len(matrix) != 2 or "vocab" in matrix or "layer" not in spec.axes:
        return None
    return optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


def state_shardings(
    optimizer: optax.GradientTransformation, specs: PyTree, mesh: jax.sharding.Mesh
) -> PyTree:
    """A sharding for each leaf of the optimizer's state: that of the parameter it belongs to.

    Adafactor's row and column statistics lose the axis that they average over; counters are
    replicated. Raises ValueError for a leaf that belongs to no rule.
    """
    by_path = flatten(specs)
    state = jax.eval_shape(optimizer.init, abstract(specs))

    def one(path, leaf):
        names, field = [], ""
        for entry in reversed(path):
            if not isinstance(entry, jax.tree_util.DictKey):
                field = getattr(entry, "name", "")
                break
            names.insert(0, entry.key)
        if not names or math.prod(leaf.shape) == 1:  # counters, coefficients, placeholders
            return NamedSharding(mesh, PartitionSpec())
        spec = by_path["/".join(names)]
        if leaf.shape == spec.shape:
            return sharding.named(spec.axes, mesh)
        second, first = np.argsort(spec.shape)[-2:]  # optax averages rows over the largest axis
        gone = {"v_row": first, "v_col": second}.get(field)
        kept = [n for n in range(len(spec.shape)) if n != gone]
        if leaf.shape != tuple(spec.shape[n] for n in kept):
            raise ValueError(
                f"no sharding for the optimizer state {jax.tree_util.keystr(path)} {leaf.shape}"
            )
        return sharding.named([spec.axes[n] for n in kept], mesh)

    return jax.tree_util.tree_map_with_path(one, state)
