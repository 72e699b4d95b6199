"""Output heads that see more of a distribution than its targets: two models' against each other,
its most probable tokens, and its logits of given candidates.

They go through tokens in chunks, and the backward pass makes a chunk's logits again: no [B, L, V]
array of all tokens exists. Layouts under a mesh are left to the partitioner.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax import sharding
from llm_jax.nn.head import CHUNK_LOGITS, CHUNK_LOGITS_DEFAULT, MASKED
from llm_jax.types import Array, PyTree

ARRAYS = 4  # of a chunk's size that are alive at a time, more or less

# (teacher's, student's) log-probabilities [..., V] -> [...]
Divergence = Callable[[Array, Array], Array]


class Side(NamedTuple):
    """A model's part of a comparison."""

    table_VxD: Array  # the head's, perhaps with rows of padding
    x_BxLxD: Array  # what it multiplies, already scaled
    softcap: float = 0.0


def compared_scores(
    student: Side,
    teacher: Side,
    targets_BxL: Array,
    divergence: Divergence,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    chunk: int = 0,
) -> dict[str, Array]:
    """The student's log_probs, log_z and correct at the targets, and its divergence from the teacher
    where the logits of both are divided by the temperature; float32 [B, L] each.

    Widths may differ, the vocabulary may not. Nothing of the teacher is differentiated. `chunk`
    tokens of each row are worked on at a time (0: by the size of the logits).
    """
    teacher = Side(*jax.lax.stop_gradient(teacher[:2]), teacher.softcap)
    rows = max(student.table_VxD.shape[0], teacher.table_VxD.shape[0])

    def one(tables: tuple[Array, Array], part: PyTree) -> dict[str, Array]:
        x_s, x_t, targets_BxC = part
        z = _logits(tables[0], x_s, student.softcap, vocab_size, rows)
        z_t = _logits(tables[1], x_t, teacher.softcap, vocab_size, rows)
        log_z = jax.nn.logsumexp(z, axis=-1)
        here = jnp.arange(rows)[None, None, :] == targets_BxC[..., None]
        at_target = jnp.sum(jnp.where(here, z, 0.0), axis=-1)
        log_p = jax.nn.log_softmax(z / temperature, axis=-1)
        log_t = jax.nn.log_softmax(z_t / temperature, axis=-1)
        correct = (at_target >= jnp.max(z, axis=-1)).astype(jnp.float32)
        return {
            "log_probs": at_target - log_z,
            "log_z": log_z,
            "correct": jax.lax.stop_gradient(correct),
            "divergence": divergence(log_t, log_p),
        }

    tables = (student.table_VxD, teacher.table_VxD)
    parts = (student.x_BxLxD, teacher.x_BxLxD, targets_BxL)
    return _by_tokens(one, tables, parts, chunk, rows)


def top_k(side: Side, k: int, *, vocab_size: int, chunk: int = 0) -> tuple[Array, Array]:
    """The k most probable tokens: ids int32 [B, L, k] and log-probabilities float32 [B, L, k]."""

    def one(table: Array, x_BxCxD: Array) -> tuple[Array, Array]:
        z = _logits(table, x_BxCxD, side.softcap, vocab_size, table.shape[0])
        log_p, ids = jax.lax.top_k(jax.nn.log_softmax(z, axis=-1), k)
        return ids.astype(jnp.int32), log_p

    return _by_tokens(one, side.table_VxD, side.x_BxLxD, chunk, side.table_VxD.shape[0])


def candidate_logits(side: Side, candidates_BxLxn: Array, *, chunk: int = 0) -> Array:
    """float32 [B, L, n]: logits of given tokens, of which the table's rows are gathered."""

    def one(table: Array, part: tuple[Array, Array]) -> Array:
        x_BxCxD, ids_BxCxn = part
        rows = jnp.take(table, ids_BxCxn, axis=0, mode="clip").astype(x_BxCxD.dtype)
        z = jnp.einsum("bcd,bcnd->bcn", x_BxCxD, rows, preferred_element_type=jnp.float32)
        return side.softcap * jnp.tanh(z / side.softcap) if side.softcap else z

    size = candidates_BxLxn.shape[-1] * side.x_BxLxD.shape[-1]
    return _by_tokens(one, side.table_VxD, (side.x_BxLxD, candidates_BxLxn), chunk, size)


def _logits(table: Array, x_BxCxD: Array, softcap: float, vocab_size: int, rows: int) -> Array:
    """float32 [B, C, rows]; columns past the vocabulary can never be drawn."""
    table = jnp.pad(table, ((0, rows - table.shape[0]), (0, 0))).astype(x_BxCxD.dtype)
    z = jnp.einsum("bcd,vd->bcv", x_BxCxD, table, preferred_element_type=jnp.float32)
    z = sharding.constrain(z, "batch", None, "vocab")
    if softcap:
        z = softcap * jnp.tanh(z / softcap)
    if rows == vocab_size:
        return z
    return jnp.where((jnp.arange(rows) < vocab_size)[None, None, :], z, MASKED)


def _by_tokens(f: Callable, tables: PyTree, parts: PyTree, chunk: int, size: int) -> PyTree:
    """f(tables, part) for pieces [B, C, ...] of `parts` [B, L, ...] one after another, remade in the
    backward pass; `size` is that of a token's intermediate array."""
    B, L = jax.tree.leaves(parts)[0].shape[:2]
    budget, mesh = (
        CHUNK_LOGITS.get(sharding.platform(), CHUNK_LOGITS_DEFAULT),
        sharding.ambient_mesh(),
    )
    shards = 1 if mesh is None else math.prod(mesh.shape[a] for a in sharding.RULES["batch"])
    chunk = min(chunk or max(budget // ARRAYS // size * shards // B, 1), L)
    n = -(-L // chunk)
    chunk = -(-L // n)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, n * chunk - L), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(B, n, chunk, *x.shape[2:]).swapaxes(0, 1)

    def joined(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(B, n * chunk, *x.shape[3:])[:, :L]

    remade = jax.checkpoint(lambda part: f(tables, part))
    return jax.tree.map(joined, jax.lax.map(remade, jax.tree.map(cut, parts)))
