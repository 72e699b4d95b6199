"""The output head fused with what losses need of it: per-token numbers, never [B, L, V] logits.

The vocabulary goes through in chunks with a running softmax; the backward pass recomputes a
chunk's logits. Under a mesh both passes are fully manual `shard_map`s: the vocabulary is cut along
"tensor", and of a table whose width is cut (fully sharded data parallelism) each chunk gathers its
own rows, so that neither the whole table nor its whole gradient is ever on one device. Per-token
vectors cross devices once a pass.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax import sharding
from llm_jax.types import Array

MASKED = -1e30
# Logits per chunk by default: 64 MB of float32 on a CPU, 256 MB where large matmuls matter more.
CHUNK_LOGITS = {"cpu": 1 << 24}
CHUNK_LOGITS_DEFAULT = 1 << 26
MIN_CHUNK = 512
TERMS = ("log_probs", "log_z", "correct", "entropy", "mean_log_probs")


class Shape(NamedTuple):
    """The static side of a call."""

    vocab_size: int  # columns past it are padding of the table
    softcap: float
    chunk: int
    want: tuple[str, ...]
    padded: bool  # the table has rows past the vocabulary
    tensor: str | None = None  # mesh axis the vocabulary is cut along
    rows: tuple[str, ...] = ()  # mesh axes the tokens are cut along
    width: tuple[
        str, ...
    ] = ()  # mesh axes the table's width is cut along; tokens are cut there too


def logits(table_VxD: Array, x: Array, *, vocab_size: int, softcap: float) -> Array:
    """float32 [..., vocab_size] logits; for decoding and for tests."""
    z = jnp.einsum(
        "...d,vd->...v", x, table_VxD.astype(x.dtype), preferred_element_type=jnp.float32
    )
    if softcap:
        z = softcap * jnp.tanh(z / softcap)
    return z[..., :vocab_size]


def token_scores(
    table_VxD: Array,
    x_BxLxD: Array,
    targets_BxL: Array,
    *,
    vocab_size: int,
    softcap: float = 0.0,
    chunk: int = 0,
    want: tuple[str, ...] = ("log_probs", "log_z", "correct"),
) -> dict[str, Array]:
    """The numbers of TERMS in `want`, each float32 [B, L], of softmax(x @ table.T) at the targets.

    `chunk` rows of the table are worked on at a time (0: by the number of tokens). If there is one
    chunk its logits are kept for the backward pass. All but "correct" are differentiable in table
    and x.
    """
    if unknown := set(want) - set(TERMS):
        raise ValueError(f"unknown scores {sorted(unknown)}; there are {', '.join(TERMS)}")
    mesh = sharding.ambient_mesh()
    shape = Shape(vocab_size, softcap, chunk, want, table_VxD.shape[0] > vocab_size)
    if mesh is not None:
        cut = lambda *names: tuple(  # noqa: E731
            a for name in names for a in sharding.RULES[name] if mesh.shape[a] > 1
        )
        shape = shape._replace(
            tensor="tensor" if mesh.shape["tensor"] > 1 else None,
            rows=cut("batch", "length"),
            width=cut("embed"),
        )
        x_BxLxD = sharding.constrain(x_BxLxD, "batch", "length", None)
    return dict(
        zip(
            want, _scores(table_VxD.astype(x_BxLxD.dtype), x_BxLxD, targets_BxL, shape), strict=True
        )
    )


def _over_mesh(f, inputs: tuple, outputs: tuple):
    """f under a fully manual shard_map; inputs and outputs are tuples of logical axes."""
    mesh = sharding.ambient_mesh()
    if mesh is None:
        return f
    spec = partial(jax.tree.map, lambda axes: sharding.partition_spec(axes, mesh))
    is_axes = {
        "is_leaf": lambda a: (
            isinstance(a, tuple) and all(x is None or isinstance(x, str) for x in a)
        )
    }
    return sharding.over_mesh(f, spec(inputs, **is_axes), spec(outputs, **is_axes))


TABLE, ROWS, TOKENS = ("vocab", "embed"), ("batch", "length", None), ("batch", "length")


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scores(table: Array, x: Array, targets: Array, shape: Shape) -> tuple[Array, ...]:
    forward = lambda *args: _forward(*args, shape=shape, keep=False)[0]  # noqa: E731
    return _over_mesh(forward, (TABLE, ROWS, TOKENS), (TOKENS,) * len(shape.want))(
        table, x, targets
    )


def _scores_forward(table: Array, x: Array, targets: Array, shape: Shape) -> tuple:
    keep = _keeps_logits(table, x, shape)
    saved = (TOKENS, TOKENS, ("batch", "length", "vocab") if keep else None)
    forward = partial(_forward, shape=shape, keep=keep)
    run = _over_mesh(forward, (TABLE, ROWS, TOKENS), ((TOKENS,) * len(shape.want), saved))
    out, residuals = run(table, x, targets)
    return out, (table, x, targets, residuals)


def _scores_backward(shape: Shape, saved: tuple, grads: tuple[Array, ...]) -> tuple:
    table, x, targets, residuals = saved
    axes = (TOKENS, TOKENS, ("batch", "length", "vocab") if residuals[2] is not None else None)
    run = _over_mesh(
        partial(_backward, shape=shape),
        (TABLE, ROWS, TOKENS, axes, (TOKENS,) * len(grads)),
        (TABLE, ROWS),
    )
    d_table, d_x = run(table, x, targets, residuals, tuple(grads))
    return d_table.astype(table.dtype), d_x, None


_scores.defvjp(_scores_forward, _scores_backward)


def _chunks(V: int, N: int, shape: Shape) -> tuple[int, int]:
    """(number of chunks, rows of the table in each) for V rows and N tokens of one device."""
    budget = CHUNK_LOGITS.get(sharding.platform(), CHUNK_LOGITS_DEFAULT)
    n = -(-V // (shape.chunk or max(MIN_CHUNK, budget // N)))
    return n, -(-V // n)


def _keeps_logits(table: Array, x: Array, shape: Shape) -> bool:
    """Whether one device's vocabulary is one chunk; the shapes here are global."""
    mesh, n_rows, n_vocab = sharding.ambient_mesh(), 1, 1
    if mesh is not None:
        n_vocab = mesh.shape[shape.tensor] if shape.tensor else 1
        for axis in shape.rows:
            n_rows *= mesh.shape[axis]
    return _chunks(table.shape[0] // n_vocab, x.shape[0] * x.shape[1] // n_rows, shape)[0] == 1


def _split(table_VxD: Array, n: int, size: int, shape: Shape) -> tuple[Array, Array]:
    """The table in chunks [n, size, D or less], padded, and the ids of their rows, int32 [n, size];
    rows that are padding have ids past the vocabulary."""
    V = table_VxD.shape[0]
    first = jax.lax.axis_index(shape.tensor) * V if shape.tensor else 0
    local = jnp.arange(n * size)
    ids = jnp.where(local < V, first + local, shape.vocab_size)
    table = jnp.pad(table_VxD, ((0, n * size - V), (0, 0)))
    return table.reshape(n, size, -1), ids.reshape(n, size)


def _gather(rows: Array, shape: Shape) -> Array:
    """A chunk's rows in their whole width."""
    return sharding.gather_pieces(rows, shape.width, axis=1)


def _capped_logits(rows: Array, x: Array, ids: Array, shape: Shape) -> Array:
    z = jnp.einsum("nd,vd->nv", x, rows, preferred_element_type=jnp.float32)
    if shape.softcap:
        z = shape.softcap * jnp.tanh(z / shape.softcap)
    return _where_real(ids, z, MASKED, shape)


def _where_real(ids: Array, x: Array, other: float, shape: Shape) -> Array:
    """x, and `other` in the columns that are padding; nothing to do where there is none."""
    if not shape.padded:
        return x
    return jnp.where((ids < shape.vocab_size)[None, :], x, other)


def _at_targets(z: Array, ids: Array, targets: Array) -> Array:
    """The logits [N] of the targets that this chunk holds, 0 for the others."""
    if sharding.platform() != "cpu":
        return jnp.sum(jnp.where(ids[None, :] == targets[:, None], z, 0.0), axis=1)
    # XLA:CPU would write the masked logits out before it sums them.
    place = jnp.clip(targets - ids[0], 0, ids.shape[0] - 1)
    found = jnp.take_along_axis(z, place[:, None], axis=1, mode="clip")[:, 0]
    return jnp.where(ids[place] == targets, found, 0.0)


class _Sums(NamedTuple):
    """What is known of each token's softmax so far, float32 [N]."""

    top: Array  # largest logit
    total: Array  # sum of exp(z - top)
    at_target: Array  # the target's logit, 0 while it has not been seen
    weighted: Array  # sum of z exp(z - top), for the entropy
    plain: Array  # sum of z


def _forward(table_VxD: Array, x_BxLxD: Array, targets_BxL: Array, *, shape: Shape, keep: bool):
    B, L, D = x_BxLxD.shape
    x, targets = x_BxLxD.reshape(B * L, D), targets_BxL.reshape(B * L)
    n, size = _chunks(table_VxD.shape[0], B * L, shape)
    shape = shape._replace(padded=shape.padded or n * size > table_VxD.shape[0])
    chunks = _split(table_VxD, n, size, shape)

    def one(sums: _Sums, chunk: tuple[Array, Array]) -> tuple[_Sums, Array | None]:
        rows, ids = chunk
        z = _capped_logits(_gather(rows, shape), x, ids, shape)
        top = jnp.maximum(sums.top, jnp.max(z, axis=1))
        fade, e = jnp.exp(sums.top - top), jnp.exp(z - top[:, None])
        weighted, plain = sums.weighted, sums.plain
        if "entropy" in shape.want:
            weighted = weighted * fade + jnp.sum(e * _where_real(ids, z, 0.0, shape), axis=1)
        if "mean_log_probs" in shape.want:
            plain = plain + jnp.sum(_where_real(ids, z, 0.0, shape), axis=1)
        new = _Sums(
            top,
            sums.total * fade + jnp.sum(e, axis=1),
            sums.at_target + _at_targets(z, ids, targets),
            weighted,
            plain,
        )
        return new, z if keep else None

    zero = jnp.zeros(B * L, jnp.float32)
    start = _Sums(jnp.full(B * L, MASKED), zero, zero, zero, zero)
    if n == 1:
        sums, kept = one(start, (chunks[0][0], chunks[1][0]))
    else:
        sums, kept = jax.lax.scan(one, start, chunks)
    top, total, at_target, weighted, plain = sums
    if shape.tensor:
        top = jax.lax.pmax(top, shape.tensor)
        fade = jnp.exp(sums.top - top)
        total, at_target, weighted, plain = jax.lax.psum(
            (total * fade, at_target, weighted * fade, plain), shape.tensor
        )
    log_z = top + jnp.log(total)
    entropy = log_z - weighted / total
    out = {
        "log_probs": at_target - log_z,
        "log_z": log_z,
        "correct": (at_target >= top).astype(jnp.float32),
        "entropy": entropy,
        "mean_log_probs": plain / shape.vocab_size - log_z,
    }
    tokens = lambda a: a.reshape(B, L)  # noqa: E731
    kept = kept.reshape(B, L, size) if keep else None
    return tuple(tokens(out[name]) for name in shape.want), (tokens(log_z), tokens(entropy), kept)


def _backward(
    table_VxD: Array,
    x_BxLxD: Array,
    targets_BxL: Array,
    residuals: tuple,
    grads: tuple,
    *,
    shape: Shape,
):
    B, L, D = x_BxLxD.shape
    V, N = table_VxD.shape[0], B * L
    x, targets = x_BxLxD.reshape(N, D), targets_BxL.reshape(N)
    log_z, entropy, kept = residuals
    log_z, entropy = log_z.reshape(N, 1), entropy.reshape(N, 1)
    g = {name: grad.reshape(N, 1) for name, grad in zip(shape.want, grads, strict=True)}
    zero = jnp.zeros_like(log_z)
    g_target, g_mean = g.get("log_probs", zero), g.get("mean_log_probs", zero)
    n, size = _chunks(V, N, shape)
    shape = shape._replace(padded=shape.padded or n * size > V)
    chunks = _split(table_VxD, n, size, shape)

    def one(d_x: Array, chunk: tuple[Array, Array], z: Array | None = None) -> tuple[Array, Array]:
        rows, ids = _gather(chunk[0], shape), chunk[1]
        if z is None:
            z = _capped_logits(rows, x, ids, shape)
        p = jnp.exp(z - log_z)
        dz = p * (g.get("log_z", zero) - g_target - g_mean)
        dz = dz + jnp.where(ids[None, :] == targets[:, None], g_target, 0.0)
        if "entropy" in g:
            dz = dz - p * jnp.where(p > 0, z - (log_z - entropy), 0.0) * g["entropy"]
        if "mean_log_probs" in g:
            real = _where_real(ids, jnp.ones_like(z), 0.0, shape)
            dz = dz + real * (g_mean / shape.vocab_size)
        if shape.softcap:
            dz = dz * (1.0 - jnp.square(_where_real(ids, z, 0.0, shape) / shape.softcap))
        dz = dz.astype(x.dtype)
        d_rows = jnp.einsum("nv,nd->vd", dz, x, preferred_element_type=jnp.float32)
        d_x = d_x + jnp.einsum("nv,vd->nd", dz, rows, preferred_element_type=jnp.float32)
        d_rows = sharding.sum_pieces(d_rows, shape.width, axis=1)
        if over := tuple(a for a in shape.rows if a not in shape.width):
            d_rows = jax.lax.psum(d_rows, over)
        return d_x, d_rows

    start = jnp.zeros((N, D), jnp.float32)
    if n == 1:
        kept = None if kept is None else kept.reshape(N, size)
        d_x, d_table = one(start, (chunks[0][0], chunks[1][0]), kept)
    else:
        d_x, d_table = jax.lax.scan(one, start, chunks)
    if shape.tensor:
        d_x = jax.lax.psum(d_x, shape.tensor)
    d_table = d_table.reshape(n * size, -1)[:V]
    return d_table, d_x.astype(x.dtype).reshape(B, L, D)
