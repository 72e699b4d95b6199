"""The one training step, for every model and objective."""

from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp
import optax

from llm_jax.config import TrainConfig
from llm_jax.nn.params import flatten
from llm_jax.train.optimizer import make_schedule, merge
from llm_jax.types import Array, Batch, Loss, Mean, PyTree, TrainState

LossFn = Callable[[PyTree, Batch, PyTree, Array | None], tuple[Loss, PyTree]]


def micro_batches(batch: Batch, k: int) -> Batch:
    """Leaves [B, ...] -> [k, B/k, ...]."""
    return jax.tree.map(lambda x: x.reshape(k, x.shape[0] // k, *x.shape[1:]), batch)


def row_keys(key: Array, step: Array, rows: int) -> Array:
    """One key per row of the global batch: dropout depends on no mesh and no micro-batching."""
    key = jax.random.fold_in(key, step)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(rows))


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, cfg: TrainConfig
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """A pure (state, batch) -> (state, metrics); batch leaves come as [k, B/k, ...].

    `loss_fn(params, batch, carry, row_keys)` returns totals and weights. Their weights are summed
    over all micro-batches first, so that the gradient is that of the whole batch however many
    tokens each micro-batch holds. A step whose loss or gradient is not finite changes nothing but
    the counters. Metrics are float32 scalars, and "grad_squares" [n leaves], whose entries are
    those of `flatten(params)` in order: they say where a non-finite gradient came from.
    """
    opt = cfg.optimizer
    schedule = make_schedule(opt, cfg.steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        k, rows = batch.tokens.shape[:2]
        keys = row_keys(state.key, state.step, k * rows).reshape(k, rows)
        if cfg.model.dropout == 0.0:
            keys = None

        def run(params, part, carry, keys):
            return loss_fn(merge(params, state.frozen), part, carry, keys)

        if k == 1:

            def objective(params):
                part, part_keys = jax.tree.map(lambda x: x[0], (batch, keys))
                loss, carry = run(params, part, state.carry, part_keys)
                return loss.value(), (loss, carry)

            grads, (loss, carry) = jax.grad(objective, has_aux=True)(state.params)
        else:
            grads, loss, carry = _accumulate(run, state, batch, keys, k)

        flat = flatten(grads)
        squares = jnp.stack([jnp.sum(jnp.square(g.astype(jnp.float32))) for g in flat.values()])
        norm, value = jnp.sqrt(jnp.sum(squares)), loss.value()
        good = jnp.isfinite(norm) & jnp.isfinite(value)
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


def _accumulate(run, state: TrainState, batch: Batch, keys: Array | None, k: int):
    """(gradient, Loss, carry) of k micro-batches that count as one batch."""
    carry = micro_batches(state.carry, k)
    # Weights depend on the batch alone: XLA drops the model from this pass.
    weights = jax.lax.map(
        lambda part: {
            n: t.weight for n, t in run(state.params, part[0], part[1], part[2])[0].terms.items()
        },
        (batch, carry, keys),
    )
    weights = jax.tree.map(lambda w: jnp.sum(w, axis=0), weights)

    def objective(params, part, carry, keys):
        loss, carry = run(params, part, carry, keys)
        shares = {n: Mean(t.total, weights[n]).value() for n, t in loss.terms.items()}
        return sum(loss.scales.get(n, 1.0) * share for n, share in shares.items()), (loss, carry)

    def body(total, part):
        grads, (loss, carry) = jax.grad(objective, has_aux=True)(state.params, *part)
        return jax.tree.map(jnp.add, total, grads), (loss, carry)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, (losses, carry) = jax.lax.scan(body, zeros, (batch, carry, keys))
    loss = jax.tree.map(lambda x: jnp.sum(x, axis=0), losses)
    carry = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), carry)
    return grads, loss, carry
