"""The one training step, for every model and objective."""

from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.config import TrainConfig
from llm_jax.nn.params import flatten, unflatten
from llm_jax.train.optimizer import BALANCE_BIAS, make_schedule, merge
from llm_jax.train.regularization import penalise_norm
from llm_jax.types import Array, Batch, Loss, Mean, PyTree, TrainState

LossFn = Callable[[PyTree, Batch, PyTree, Array | None], tuple[Loss, PyTree]]


def micro_batches(batch: PyTree, k: int) -> PyTree:
    """Leaves [B, ...] -> [k, B/k, ...]: micro-batch j has rows j, j + k, ..., so that a device's
    rows are spread over all of them and none has to move."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // k, k, *x.shape[1:]).swapaxes(0, 1), batch)


def row_keys(key: Array, step: Array, k: int, rows: int) -> Array:
    """[k, rows] keys, one per row of the global batch: dropout depends on no mesh and no
    micro-batching."""
    key = jax.random.fold_in(key, step)
    number = micro_batches(jnp.arange(k * rows), k)
    return jax.vmap(jax.vmap(lambda i: jax.random.fold_in(key, i)))(number)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    cfg: TrainConfig,
    cast: Callable[[PyTree], PyTree] = lambda params: params,
    join: Callable[[PyTree, PyTree | None], PyTree] = merge,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """A pure (state, batch) -> (state, metrics); batch leaves come as [k, B/k, ...].

    `loss_fn(params, batch, carry, row_keys)` returns totals and weights. Their weights are summed
    over all micro-batches first, so that the gradient is that of the whole batch however many
    tokens each micro-batch holds. A step whose loss or gradient is not finite changes nothing but
    the counters. Metrics are float32 scalars, what the model reports in `Scores.stats`, and
    "grad_squares" [n leaves], whose entries are those of `flatten(params)` in order: they say where
    a non-finite gradient came from. Biases that balance experts are not part of the gradient norm:
    only the sign of theirs is used. `cast` makes the compute copy of the masters: micro-batches
    share one. `join` makes the whole tree of the trained and the frozen part.
    """
    opt = cfg.optimizer
    schedule = make_schedule(opt, cfg.steps)
    random = cfg.model.dropout or cfg.model.embed_noise or cfg.peft.dropout

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        k, rows = batch.tokens.shape[:2]
        keys = row_keys(state.key, state.step, k, rows) if random else None

        def run(params, part, carry, keys, frozen=state.frozen):
            return loss_fn(join(params, frozen), part, carry, keys)

        def gradient(params: PyTree) -> tuple[PyTree, tuple[Loss, PyTree]]:
            if k > 1:
                return _accumulate(run, cast, state.replace(params=params), batch, keys, k)

            def objective(params):
                part, part_keys = jax.tree.map(lambda x: x[0], (batch, keys))
                loss, carry = run(params, part, state.carry, part_keys)
                return loss.value(), (loss, carry)

            return jax.grad(objective, has_aux=True)(params)

        grads, (loss, carry) = gradient(state.params)
        if opt.gradient_penalty:
            grads = penalise_norm(
                lambda params: gradient(params)[0],
                state.params,
                grads,
                unflatten({name: not BALANCE_BIAS.search(name) for name in flatten(grads)}),
                strength=opt.gradient_penalty,
                radius=opt.gradient_penalty_radius,
            )

        flat = flatten(grads)
        squares = jnp.stack([jnp.sum(jnp.square(g.astype(jnp.float32))) for g in flat.values()])
        learned = jnp.array([not BALANCE_BIAS.search(name) for name in flat])
        norm, value = jnp.sqrt(jnp.sum(jnp.where(learned, squares, 0.0))), loss.value()
        good = jnp.isfinite(jnp.sum(squares)) & jnp.isfinite(value)
        if opt.clip_norm:
            factor = jnp.minimum(1.0, opt.clip_norm / jnp.maximum(norm, 1e-6))
            grads = jax.tree.map(lambda g: g * factor, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(
                lambda e, p: opt.ema_decay * e + (1 - opt.ema_decay) * p, ema, params
            )

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        new = state.replace(
            step=state.step + 1,
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            ema=keep(ema, state.ema),
            carry=keep(carry, state.carry),
            bad_steps=jnp.where(good, 0, state.bad_steps + 1),
        )
        means = {**loss.metrics, **(loss.terms if len(loss.terms) > 1 else {})}
        metrics = {name: mean.value() for name, mean in means.items()}
        metrics |= {
            "loss": value,
            "lr": schedule(state.step),
            "grad_norm": norm,
            "grad_squares": squares,
            "bad_steps": new.bad_steps,
            "weight": reduce(jnp.maximum, [t.weight for t in loss.terms.values()]),
        }
        return new, metrics

    return train_step


def readable(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """A step's metrics as numbers for a log: of the experts' loads [M, E] the largest and the
    smallest share of a layer's assignments that one expert got, over all layers."""
    out = {name: float(v) for name, v in metrics.items() if np.ndim(v) == 0}
    if "expert_load" in metrics:
        load = np.asarray(metrics["expert_load"])
        share = load / np.maximum(load.sum(axis=-1, keepdims=True), 1e-30)
        out |= {"expert_load_max": float(share.max()), "expert_load_min": float(share.min())}
    return out


def _accumulate(run, cast, state: TrainState, batch: Batch, keys: Array | None, k: int):
    """(gradient, (Loss, carry)) of k micro-batches that count as one batch."""
    run = partial(run, frozen=None if state.frozen is None else cast(state.frozen))
    params = cast(state.params)
    carry = micro_batches(state.carry, k)
    # Weights depend on the batch alone: XLA drops the model from this pass.
    weights = jax.lax.map(
        lambda part: {
            n: t.weight for n, t in run(params, part[0], part[1], part[2])[0].terms.items()
        },
        (batch, carry, keys),
    )
    weights = jax.tree.map(lambda w: jnp.sum(w, axis=0), weights)

    def objective(params, part, carry, keys):
        loss, carry = run(params, part, carry, keys)
        shares = {n: Mean(t.total, weights[n]).value() for n, t in loss.terms.items()}
        return sum(loss.scales.get(n, 1.0) * share for n, share in shares.items()), (loss, carry)

    def body(total, part):
        grads, (loss, carry) = jax.grad(objective, has_aux=True)(params, *part)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), (loss, carry)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, (losses, carry) = jax.lax.scan(body, zeros, (batch, carry, keys))
    loss = jax.tree.map(lambda x: jnp.sum(x, axis=0), losses)
    carry = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), carry)
    return grads, (loss, carry)
