"""Remedies against forgetting that change the gradient: a pull towards the start, and flatness."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.types import Array, PyTree


class Start(NamedTuple):
    """The state of `toward_start`."""

    start: PyTree  # the parameters at the first step


def toward_start(strength: float) -> optax.GradientTransformation:
    """Adds strength * (theta - theta_0) to the gradient: that of strength / 2 * ||theta - theta_0||^2.

    L2-SP (Li et al. 2018, arXiv 1802.01483, equation 2), on every trained parameter. theta_0 is part
    of the optimizer's state, so that it is sharded and resumed with it. The term has its place
    after the clipping, which sees the data's gradient alone, and before the optimizer's moments.
    """

    def init(params: PyTree) -> Start:
        return Start(jax.tree.map(jnp.copy, params))

    def update(updates: PyTree, state: Start, params: PyTree | None = None):
        pulled = jax.tree.map(
            lambda g, p, p0: g + strength * (p - p0), updates, params, state.start
        )
        return pulled, state

    return optax.GradientTransformation(init, update)


def penalise_norm(
    gradient: Callable[[PyTree], PyTree],
    params: PyTree,
    grads: PyTree,
    learned: PyTree,
    *,
    strength: float,
    radius: float,
) -> PyTree:
    """The gradient of L(theta) + strength * ||grad L(theta)||, by one more gradient.

        (1 - a) grad L(theta) + a grad L(theta + radius * g / ||g||),    g = grad L(theta),
        a = strength / radius

    (Zhao et al. 2022, arXiv 2202.03599, equation 7: the Hessian's product with g / ||g|| as a
    difference of gradients; exact where L is quadratic. a = 1 is sharpness-aware minimisation.)
    ||g|| is over all `learned` leaves (a bool for each); the others neither move nor change.
    """
    squares = jax.tree.map(
        lambda g, is_learned: jnp.sum(jnp.square(g.astype(jnp.float32))) * is_learned,
        grads,
        learned,
    )
    norm: Array = jnp.sqrt(sum(jax.tree.leaves(squares)))
    step = radius / jnp.maximum(norm, 1e-12)
    beyond = jax.tree.map(
        lambda p, g, is_learned: p + (step * g).astype(p.dtype) if is_learned else p,
        params,
        grads,
        learned,
    )
    share = strength / radius
    return jax.tree.map(
        lambda g, there, is_learned: (1 - share) * g + share * there if is_learned else g,
        grads,
        gradient(beyond),
        learned,
    )
