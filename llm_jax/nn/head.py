"""The output head fused with what losses need of it: per-token numbers, never [B, L, V] logits.

Tokens go through in chunks; the backward pass recomputes a chunk's logits. Under a mesh both
passes are fully manual `shard_map`s, with the vocabulary cut along "tensor": only per-token
vectors cross devices within a chunk, and the head's gradient is reduced once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax import sharding
from llm_jax.types import Array

MASKED = -1e30
# Logits per chunk by default: 64 MB of float32 on a CPU, 1 GB where large matmuls matter more.
CHUNK_LOGITS = {"cpu": 1 << 24}
CHUNK_LOGITS_DEFAULT = 1 << 28
TERMS = ("log_probs", "log_z", "correct", "entropy", "mean_log_probs")


class Shape(NamedTuple):
    """The static side of a call."""

    vocab_size: int  # columns past it are padding of the table
    softcap: float
    chunk: int
    want: tuple[str, ...]
    tensor: str | None = None  # mesh axis the vocabulary is cut along
    rows: tuple[str, ...] = ()  # mesh axes the tokens are cut along


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

    `chunk` tokens are worked on at a time (0: by vocabulary size). If all tokens fit in one chunk
    its logits are kept for the backward pass. All but "correct" are differentiable in table and x.
    """
    if unknown := set(want) - set(TERMS):
        raise ValueError(f"unknown scores {sorted(unknown)}; there are {', '.join(TERMS)}")
    mesh = sharding.ambient_mesh()
    if mesh is None:
        shape = Shape(vocab_size, softcap, chunk, want)
    else:
        rows = tuple(
            a for a in sharding.RULES["batch"] + sharding.RULES["length"] if mesh.shape[a] > 1
        )
        tensor = "tensor" if mesh.shape["tensor"] > 1 else None
        shape = Shape(vocab_size, softcap, chunk, want, tensor, rows)
        # Gathered over fsdp here, so that each chunk finds the embed axis whole.
        table_VxD = sharding.constrain(table_VxD, "vocab", None)
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
    return jax.shard_map(
        f,
        mesh=mesh,
        in_specs=spec(inputs, **is_axes),
        out_specs=spec(outputs, **is_axes),
        check_vma=False,
    )


TABLE, ROWS, TOKENS = ("vocab", None), ("batch", "length", None), ("batch", "length")


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


def _chunk_size(V_local: int, shape: Shape) -> int:
    budget = CHUNK_LOGITS.get(jax.default_backend(), CHUNK_LOGITS_DEFAULT)
    return shape.chunk or max(256, budget // V_local)


def _keeps_logits(table: Array, x: Array, shape: Shape) -> bool:
    """Whether one device's tokens fit in one chunk; the shapes here are global."""
    mesh, n_rows, n_vocab = sharding.ambient_mesh(), 1, 1
    if mesh is not None:
        n_vocab = mesh.shape[shape.tensor] if shape.tensor else 1
        for axis in shape.rows:
            n_rows *= mesh.shape[axis]
    return x.shape[0] * x.shape[1] // n_rows <= _chunk_size(table.shape[0] // n_vocab, shape)


def _columns(V: int, shape: Shape) -> Array:
    """Ids of this device's columns, int32 [1, V]."""
    first = jax.lax.axis_index(shape.tensor) * V if shape.tensor else 0
    return (first + jnp.arange(V))[None, :]


def _reduce(x: Array, shape: Shape, over=jax.lax.psum) -> Array:
    return over(x, shape.tensor) if shape.tensor else x


def _capped_logits(table: Array, x: Array, columns: Array, shape: Shape) -> Array:
    z = jnp.einsum("nd,vd->nv", x, table, preferred_element_type=jnp.float32)
    if shape.softcap:
        z = shape.softcap * jnp.tanh(z / shape.softcap)
    if shape.tensor or table.shape[0] > shape.vocab_size:
        z = jnp.where(columns < shape.vocab_size, z, MASKED)
    return z


def _target_logit(z: Array, targets: Array, columns: Array, shape: Shape) -> Array:
    if not shape.tensor:
        return jnp.take_along_axis(z, targets[:, None], axis=1, mode="clip")[:, 0]
    return _reduce(jnp.sum(jnp.where(columns == targets[:, None], z, 0.0), axis=1), shape)


def _chunked(shape: Shape, V: int, N: int) -> tuple[int, int]:
    """(number of chunks, tokens in each); the last one may be padded."""
    n = -(-N // _chunk_size(V, shape))
    return n, -(-N // n)


def _split(x: Array, n: int, size: int) -> Array:
    """[N, ...] -> [n, size, ...], padded with zeros."""
    x = jnp.pad(x, ((0, n * size - x.shape[0]),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(n, size, *x.shape[1:])


def _forward(table: Array, x_BxLxD: Array, targets_BxL: Array, *, shape: Shape, keep: bool):
    B, L, D = x_BxLxD.shape
    V = table.shape[0]
    columns = _columns(V, shape)
    n_real = shape.vocab_size

    def one(args):
        x, targets = args
        z = _capped_logits(table, x, columns, shape)
        top = _reduce(jax.lax.stop_gradient(jnp.max(z, axis=1)), shape, jax.lax.pmax)
        e = jnp.exp(z - top[:, None])
        log_z = top + jnp.log(_reduce(jnp.sum(e, axis=1), shape))
        at_target = _target_logit(z, targets, columns, shape)
        out = {
            "log_probs": at_target - log_z,
            "log_z": log_z,
            "correct": (at_target >= top).astype(jnp.float32),
        }
        if "entropy" in shape.want:
            p = jnp.exp(z - log_z[:, None])
            out["entropy"] = log_z - _reduce(jnp.sum(p * jnp.where(p > 0, z, 0.0), axis=1), shape)
        if "mean_log_probs" in shape.want:
            real = jnp.where(columns < n_real, z, 0.0)
            out["mean_log_probs"] = _reduce(jnp.sum(real, axis=1), shape) / n_real - log_z
        entropy = out.get("entropy", log_z)
        return tuple(out[name] for name in shape.want), log_z, entropy, z if keep else None

    x, targets = x_BxLxD.reshape(B * L, D), targets_BxL.reshape(B * L)
    n, size = _chunked(shape, V, B * L)
    if n == 1:
        out, log_z, entropy, z = one((x, targets))
    else:
        out, log_z, entropy, z = jax.lax.map(one, (_split(x, n, size), _split(targets, n, size)))
    rows = lambda a: a.reshape(n * size)[: B * L].reshape(B, L)  # noqa: E731
    z = z.reshape(B, L, V) if keep else None
    return tuple(rows(a) for a in out), (rows(log_z), rows(entropy), z)


def _backward(
    table: Array,
    x_BxLxD: Array,
    targets_BxL: Array,
    residuals: tuple,
    grads: tuple,
    *,
    shape: Shape,
):
    B, L, D = x_BxLxD.shape
    V = table.shape[0]
    N = B * L
    columns = _columns(V, shape)
    log_z, entropy, kept = residuals
    n, size = _chunked(shape, V, N)

    def one(x, targets, log_z, entropy, z, grads):
        g = dict(zip(shape.want, grads, strict=True))
        zero = jnp.zeros_like(log_z)
        g_target, g_mean = g.get("log_probs", zero), g.get("mean_log_probs", zero)
        if z is None:
            z = _capped_logits(table, x, columns, shape)
        p = jnp.exp(z - log_z[:, None])
        dz = p * (g.get("log_z", zero) - g_target - g_mean)[:, None]
        dz = dz + jnp.where(columns == targets[:, None], g_target[:, None], 0.0)
        if "entropy" in g:
            dz = (
                dz
                - p * jnp.where(p > 0, z - (log_z - entropy)[:, None], 0.0) * g["entropy"][:, None]
            )
        if "mean_log_probs" in g:
            dz = dz + jnp.where(columns < shape.vocab_size, g_mean[:, None] / shape.vocab_size, 0.0)
        if shape.softcap:
            dz = dz * (
                1.0 - jnp.square(jnp.where(columns < shape.vocab_size, z, 0.0) / shape.softcap)
            )
        dz = dz.astype(x.dtype)
        d_table = jnp.einsum("nv,nd->vd", dz, x, preferred_element_type=jnp.float32)
        d_x = jnp.einsum("nv,vd->nd", dz, table, preferred_element_type=jnp.float32)
        return d_table, _reduce(d_x, shape).astype(x.dtype)

    flat = (x_BxLxD.reshape(N, D), targets_BxL.reshape(N), log_z.reshape(N), entropy.reshape(N))
    grads = tuple(g.reshape(N) for g in grads)
    if n == 1:
        d_table, d_x = one(*flat, None if kept is None else kept.reshape(N, V), grads)
    else:

        def body(total, args):
            *rest, g = args
            d_table, d_x = one(*rest, None, g)
            return total + d_table, d_x

        chunks = (*(_split(a, n, size) for a in flat), tuple(_split(g, n, size) for g in grads))
        d_table, d_x = jax.lax.scan(body, jnp.zeros((V, D), jnp.float32), chunks)
        d_x = d_x.reshape(n * size, D)[:N]
    if shape.rows:
        d_table = jax.lax.psum(d_table, shape.rows)
    return d_table, d_x.reshape(B, L, D)
