"""The contracts of the whole codebase: what travels between data, models, objectives and the step.

Dimension letters, used in names (`q_BxLxHxDh`) and docstrings everywhere:

    B   rows of a batch                  D   d_model, width of the residual stream
    L   length of a row in tokens        F   d_ff, inner width of the MLP
    T   targets per row (L, 1 or 2)      H   query heads
    N   tokens, flattened (B * L)        K   key / value heads
    S   cache slots                      G   query heads per key head (H / K)
    V   vocabulary size                  Dh  width of one head
    M   layers (models' stacked axis)    k   micro-batches of a step
    E   experts of a layer                   P   stages of a pipeline
    A   answers of a row (preferences)
"""

from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any
# In `Batch.labels`: the label of an answer to another prompt, from which KTO estimates the KL
OTHERS = -(2.0**40)


@flax.struct.dataclass
class Source:
    """The input side of an encoder-decoder row; the same meanings as in `Batch`."""

    tokens: Array  # int32 [B, Ls]
    segments: Array | None = None  # int32 [B, Ls]
    positions: Array | None = None  # int32 [B, Ls]


@flax.struct.dataclass
class Batch:
    """One batch. Every leaf leads with B, so micro-batching and sharding are one `tree.map`.

    `segments` numbers the documents packed into a row from 1; 0 is padding. `segments=None` says,
    statically, that every row is one document without padding, which lets attention use a plain
    causal mask; `positions=None` then means 0..L-1.
    """

    tokens: Array  # int32 [B, L]
    segments: Array | None = None  # int32 [B, L]
    positions: Array | None = None  # int32 [B, L], restarts at 0 in each document
    # int32 [B, L], the segment that a token's own goes on from and sees, such as a prompt that has
    # several answers; its own where there is none
    parents: Array | None = None
    targets: Array | None = None  # int32 [B, T]
    weights: Array | None = None  # float32 [B, T], 0 where a target does not count
    bytes: Array | None = None  # int32 [B, T], UTF-8 bytes that each target stands for
    source: Source | None = None
    types: Array | None = None  # int32 [B, L], segment types (BERT)
    images: Array | None = None  # float [B, height, width, channels]
    # Of preferences: which answer of its row (from 1) a target belongs to, 0: none; and of each of
    # a row's answers the prompt (from 1, 0: there is no such answer). Without `answers` a row is one
    # answer, and rows 2i and 2i + 1 are those to one prompt, the preferred one first (for batches
    # that are not cut into micro-batches, which would part them).
    answers: Array | None = None  # int32 [B, T]
    groups: Array | None = None  # int32 [B, A]
    labels: Array | None = None  # int32 or float32 [B]; of preferences float32 [B, A], a score
    label_weights: Array | None = None  # float32 [B]
    candidates: Array | None = None  # int32 [B, T, n]: negative samples, distillation
    candidate_log_probs: Array | None = None  # float32 [B, T, n], a teacher's (distillation)
    ref_log_probs: Array | None = None  # float32 [B, T]
    old_log_probs: Array | None = None  # float32 [B, T]
    old_values: Array | None = None  # float32 [B, T]
    advantages: Array | None = None  # float32 [B, T]
    returns: Array | None = None  # float32 [B, T]


@flax.struct.dataclass
class Cache:
    """What a model keeps between calls of incremental decoding.

    A cache slot is not a position: all rows write at the same slot `index`, and each slot stores
    the segment and the position of the token in it. Padding is a hole with segment 0.
    """

    layers: PyTree  # leaves stacked over layers, [M, B, ...]; keys and values [M, B, K, S, Dh]
    segments: Array  # int32 [B, S], 0 = empty or padding
    positions: Array  # int32 [B, S]
    index: Array  # int32 scalar, the next slot to write

    @property
    def length(self) -> int:
        """Number of slots S."""
        return self.segments.shape[1]


@flax.struct.dataclass
class Hidden:
    """What a model's trunk returns, before any head."""

    x: Array  # [B, L, D], after the final norm
    cache: Cache | None
    penalties: dict[str, Array]  # name -> float32 [B], sums over a row's tokens (router balance)
    stats: dict[str, Array] = flax.struct.field(default_factory=dict)  # as in `Scores`


@flax.struct.dataclass
class Scores:
    """What objectives see of a model. What was not asked for is None.

    There are per-token numbers only: no [B, L, V] array exists in training.
    """

    log_probs: Array | None = None  # float32 [B, T], log p(target)
    log_z: Array | None = None  # float32 [B, T], log of the softmax denominator
    correct: Array | None = None  # float32 [B, T], 1 where the target has the highest logit
    entropy: Array | None = None  # float32 [B, T], of the predicted distribution, nats
    mean_log_probs: Array | None = None  # float32 [B, T], log p averaged over the vocabulary
    candidate_log_probs: Array | None = None  # float32 [B, T, n], log p of `Batch.candidates`
    divergence: Array | None = None  # float32 [B, T], from a teacher's distribution, nats
    values: Array | None = None  # float32 [B, L], value or reward head
    label_log_probs: Array | None = None  # float32 [B]
    penalties: dict[str, Array] = flax.struct.field(default_factory=dict)
    # name -> float32 [B, ...], sums over a row's tokens that are reported, not optimised
    stats: dict[str, Array] = flax.struct.field(default_factory=dict)
    cache: Cache | None = None


@flax.struct.dataclass
class Mean:
    """A mean that is not divided yet, so that it adds up over micro-batches and hosts."""

    total: Array  # float32 scalar
    weight: Array  # float32 scalar

    @classmethod
    def of(cls, values: Array, weights: Array) -> "Mean":
        """The weighted mean of `values` under `weights` of the same shape.

        A value whose weight is 0 does not enter, not even as 0 * inf.
        """
        chex.assert_equal_shape([values, weights])
        values, weights = values.astype(jnp.float32), weights.astype(jnp.float32)
        return cls(jnp.sum(jnp.where(weights == 0, 0.0, values * weights)), jnp.sum(weights))

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> Array:
        """total / weight, and 0 where nothing counted."""
        return jnp.where(
            self.weight == 0, 0.0, self.total / jnp.where(self.weight == 0, 1.0, self.weight)
        )


@flax.struct.dataclass
class Loss:
    """What an objective returns: the loss is the sum of `scales[n] * terms[n].value()`.

    Terms may have different denominators (MLM + NSP, policy + value + entropy). Their weights
    depend on the Batch alone, and only the step divides, after summing over all micro-batches:
    so accumulation, padding and packing never change the mathematics.
    """

    terms: dict[str, Mean]
    scales: dict[str, float] = flax.struct.field(pytree_node=False, default_factory=dict)
    metrics: dict[str, Mean] = flax.struct.field(default_factory=dict)

    def value(self) -> Array:
        """The loss as one float32 scalar; a term without a scale counts once."""
        return sum(self.scales.get(n, 1.0) * t.value() for n, t in self.terms.items())


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes, and everything that a checkpoint of training holds."""

    step: Array  # int32 scalar, optimizer steps taken (skipped ones count)
    key: Array  # the run's random key; never changes, steps fold their number in
    params: PyTree  # float32 masters, the only leaves that are differentiated
    frozen: PyTree  # leaves that never change (frozen or quantised weights), or None
    opt_state: PyTree
    ema: PyTree  # exponential moving average of params, or None
    carry: PyTree  # truncated back-propagation and memory models; else None
    bad_steps: Array  # int32 scalar, steps skipped for non-finite numbers, in a row
