"""How layers are stacked: a scan or a Python loop over the same block, with rematerialisation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm_jax.config import ModelConfig
from llm_jax.types import Array, PyTree

Block = Callable[[PyTree, Array, PyTree, PyTree, Array], tuple[Array, PyTree, Array]]


def remat(block: Block, policy: str) -> Block:
    """The block under `jax.checkpoint`: "full" keeps its input alone, "dots" the results of
    matmuls without a batch dimension, "attention" the attention output."""
    policies = jax.checkpoint_policies
    match policy:
        case "none":
            return block
        case "full":
            return jax.checkpoint(block, policy=policies.nothing_saveable)
        case "dots":
            return jax.checkpoint(block, policy=policies.dots_with_no_batch_dims_saveable)
        case "attention":
            return jax.checkpoint(block, policy=policies.save_only_these_names("attention"))
    raise ValueError(f"model.remat={policy!r} is unknown")


def stack(
    block: Block, params: PyTree, x_BxLxD: Array, side: PyTree, cache: PyTree, *, cfg: ModelConfig
) -> tuple[Array, PyTree, Array]:
    """Runs `block(p, x, side, cache, i) -> (x, cache, penalty [B])` for each layer i in turn.

    `params` leaves are stacked on a leading layer axis. The cache is a carry that blocks write
    slices of; penalties add up. Returns x, the cache and the summed penalties float32 [B].
    """
    n_layers = jax.tree.leaves(params)[0].shape[0]
    block = remat(block, cfg.remat)
    penalty_B = jnp.zeros(x_BxLxD.shape[0], jnp.float32)

    if cfg.scan:

        def body(carry, layer):
            x, cache, penalty = carry
            p, i = layer
            x, cache, more = block(p, x, side, cache, i)
            return (x, cache, penalty + more), None

        (x_BxLxD, cache, penalty_B), _ = jax.lax.scan(
            body,
            (x_BxLxD, cache, penalty_B),
            (params, jnp.arange(n_layers)),
            unroll=cfg.scan_unroll,
        )
        return x_BxLxD, cache, penalty_B

    # The transpose of split is one concatenation; that of slices would be n_layers padded sums.
    leaves, tree = jax.tree.flatten(params)
    split = [jax.lax.split(leaf, [1] * n_layers, axis=0) for leaf in leaves]
    for i in range(n_layers):
        p = tree.unflatten([pieces[i].reshape(pieces[i].shape[1:]) for pieces in split])
        x_BxLxD, cache, more = block(p, x_BxLxD, side, cache, jnp.int32(i))
        penalty_B = penalty_B + more
    return x_BxLxD, cache, penalty_B
