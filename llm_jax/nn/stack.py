"""How layers are stacked: a scan or a Python loop over the same block, or a pipeline of stages."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm_jax import sharding
from llm_jax.config import ModelConfig
from llm_jax.nn import pipeline
from llm_jax.types import Array, PyTree

Block = Callable[[PyTree, Array, PyTree, PyTree, Array], tuple[Array, PyTree, dict[str, Array]]]


def remat(block: Block, cfg: ModelConfig) -> Block:
    """The block under `jax.checkpoint`: "full" keeps its input alone, "dots" the results of
    matmuls without a batch dimension, "attention" the attention output."""
    policies = jax.checkpoint_policies
    match cfg.remat:
        case "none":
            return block
        case "full":
            keep = policies.nothing_saveable
        case "dots":
            keep = policies.dots_with_no_batch_dims_saveable
        case "attention":
            keep = policies.save_only_these_names("attention")
        case other:
            raise ValueError(f"model.remat={other!r} is unknown")
    # In a scan the forward and the backward pass are loops of their own, and nothing can be shared
    # between them; the barriers that would prevent it only cost memory.

    def checkpointed(p, x, side, cache, i):  # i is not an argument: it may be a Python int
        run = jax.checkpoint(lambda *args: block(*args, i), policy=keep, prevent_cse=not cfg.scan)
        return run(p, x, side, cache)

    return checkpointed


def stack(
    block: Block,
    params: PyTree,
    x_BxLxD: Array,
    side: PyTree,
    cache: PyTree,
    extras: dict[str, Array] | None = None,
    *,
    cfg: ModelConfig,
    first: int = 0,
) -> tuple[Array, PyTree, dict[str, Array]]:
    """Runs `block(p, x, side, cache, i) -> (x, cache, more)` for each layer i in turn, from `first`.

    `params` leaves are stacked on a leading layer axis; `side` leaves lead with B. In a Python loop
    `i` is an int, so that a block can tell its layer while it is traced. The cache is a
    carry that blocks write slices of. What blocks return besides is added to `extras`, named
    arrays [B, ...]. Returns x, the cache and the sums.
    """
    block, extras = remat(block, cfg), extras or {}
    mesh = sharding.ambient_mesh()
    if mesh is not None and mesh.shape["stage"] > 1 and cache is None:

        def run(params, x, side, extras, first):
            x, _, extras = _in_turn(block, params, x, side, None, extras, first, cfg)
            return x, extras

        x_BxLxD, extras = pipeline.run(run, params, x_BxLxD, side, extras, cfg)
        return x_BxLxD, None, extras
    return _in_turn(block, params, x_BxLxD, side, cache, extras, first, cfg)


def _in_turn(
    block: Block,
    params: PyTree,
    x: Array,
    side: PyTree,
    cache: PyTree,
    extras: dict[str, Array],
    first: Array | int,
    cfg: ModelConfig,
) -> tuple[Array, PyTree, dict[str, Array]]:
    """The layers of `params` one after the other, numbered from `first`."""
    n_layers = jax.tree.leaves(params)[0].shape[0]
    if cfg.scan:

        def body(carry, layer):
            x, cache, extras = carry
            p, i = layer
            x, cache, more = block(p, x, side, cache, i)
            return (x, cache, {n: extras[n] + more[n] for n in extras}), None

        carry, _ = jax.lax.scan(
            body, (x, cache, extras), (params, first + jnp.arange(n_layers)), unroll=cfg.scan_unroll
        )
        return carry

    # The transpose of split is one concatenation; that of slices would be n_layers padded sums.
    leaves, tree = jax.tree.flatten(params)
    split = [jax.lax.split(leaf, [1] * n_layers, axis=0) for leaf in leaves]
    for i in range(n_layers):
        p = tree.unflatten([pieces[i].reshape(pieces[i].shape[1:]) for pieces in split])
        x, cache, more = block(p, x, side, cache, first + i)
        extras = {n: extras[n] + more[n] for n in extras}
    return x, cache, extras
