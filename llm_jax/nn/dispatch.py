"""How tokens reach their experts on a mesh, and how the results come back.

One fully manual shard_map. Tokens arrive cut over the batch axes and along their length, experts
over "expert", their hidden width over "tensor", their matrices' last axis over "fsdp". In it,

  gather      every device of an expert group gets all tokens of the group, computes those that
              chose its experts, and the partial sums are added up on the way back. No token is
              dropped, and the result is exact.
  all_to_all  each device sends each expert at most `capacity` rows; what is over is dropped and
              counted. Sends top_k * capacity_factor rows a token instead of one to every device
              of the group, and computes that many (GShard, Lepikhin et al. 2020).

In `ids_BxLxC` (C choices a token) the number E means "no expert".
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from llm_jax import sharding
from llm_jax.config import ModelConfig
from llm_jax.nn import experts, weights
from llm_jax.types import Array, PyTree

# Logical axes of an expert layer's matrices.
AXES = {
    "up": ("expert", "expert_embed", "mlp"),
    "gate": ("expert", "expert_embed", "mlp"),
    "down": ("expert", "mlp", "expert_embed"),
}


def run(
    p: PyTree, x_BxLxD: Array, ids_BxLxC: Array, weights_BxLxC: Array, cfg: ModelConfig
) -> tuple[Array, Array]:
    """(sum of the weighted outputs of each token's experts [B, L, D], assignments that were dropped
    of each token [B, L], float32)."""
    w = {name: weights.dequantize(leaf["w"], x_BxLxD.dtype) for name, leaf in p.items()}
    mesh = sharding.ambient_mesh()
    if mesh is None:
        return _local(w, x_BxLxD, ids_BxLxC, weights_BxLxC, cfg=cfg, sizes={}, length=())
    stream = math.prod(mesh.shape[a] for a in sharding.RULES["stream_length"])
    length = "length" if x_BxLxD.shape[1] % stream else "stream_length"
    sizes = {axis: n for axis, n in mesh.shape.items() if n > 1}
    tokens = sharding.partition_spec(("batch", length, None), mesh)
    matrices = {name: sharding.partition_spec(AXES[name], mesh) for name in w}
    local = partial(_local, cfg=cfg, sizes=sizes, length=sharding.RULES[length])
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(matrices, tokens, tokens, tokens),
        out_specs=(tokens, sharding.partition_spec(("batch", length), mesh)),
        check_vma=False,
    )(w, x_BxLxD, ids_BxLxC, weights_BxLxC)


def _local(
    w: PyTree,
    x_BxLxD: Array,
    ids_BxLxC: Array,
    weights_BxLxC: Array,
    *,
    cfg: ModelConfig,
    sizes: dict[str, int],
    length: tuple[str, ...],
) -> tuple[Array, Array]:
    """One device's part; `sizes` are those of the mesh axes that cut anything."""
    B, L, D = x_BxLxD.shape
    flat = tuple(a.reshape(B * L, a.shape[2]) for a in (x_BxLxD, ids_BxLxC, weights_BxLxC))
    if "fsdp" in sizes:
        w = {
            name: jax.lax.all_gather(
                matrix, "fsdp", axis=AXES[name].index("expert_embed"), tiled=True
            )
            for name, matrix in w.items()
        }
    send = {"gather": _gather, "all_to_all": _all_to_all}[cfg.moe.dispatch]
    # The partial sums of "tensor" end where its tokens are, or everywhere if it does not cut them.
    cut = "tensor" if "tensor" in sizes and "tensor" in length else None

    def part(w, flat):
        if cut:
            flat = tuple(jax.lax.all_gather(a, cut, axis=0, tiled=True) for a in flat)
        y, dropped = send(w, *flat, cfg, sizes)
        if cut:
            y = jax.lax.psum_scatter(y, cut, scatter_dimension=0, tiled=True)
            n = dropped.shape[0] // sizes[cut]
            dropped = jax.lax.dynamic_slice_in_dim(dropped, jax.lax.axis_index(cut) * n, n)
        elif "tensor" in sizes:
            y = jax.lax.psum(y, "tensor")
        return y, dropped

    n = -(-B * L // (cfg.moe.chunk or B * L))
    if n == 1:
        y, dropped = part(w, flat)
    else:
        y, dropped = _in_chunks(part, w, flat, n, cfg.moe.n_experts)
    return y.reshape(B, L, D), dropped.reshape(B, L)


def _in_chunks(part, w: PyTree, flat: tuple[Array, ...], n: int, nobody: int):
    """`part` on n equal parts of the tokens, the last one padded with tokens that choose nobody."""
    N = flat[0].shape[0]
    size = -(-N // n)
    fill = (0, nobody, 0.0)
    padded = tuple(
        jnp.pad(a, ((0, n * size - N), (0, 0)), constant_values=value)
        for a, value in zip(flat, fill, strict=True)
    )
    chunks = tuple(a.reshape(n, size, a.shape[1]) for a in padded)
    # A scan adds the chunks' gradients up in the type of what it closes over.
    w = {name: matrix.astype(jnp.float32) for name, matrix in w.items()}
    body = jax.checkpoint(lambda w, chunk: part(w, chunk), prevent_cse=False)
    _, (y, dropped) = jax.lax.scan(lambda _, chunk: (None, body(w, chunk)), None, chunks)
    return y.reshape(n * size, -1)[:N], dropped.reshape(n * size)[:N]


def _gather(
    w: PyTree, x: Array, ids: Array, weights: Array, cfg: ModelConfig, sizes: dict[str, int]
) -> tuple[Array, Array]:
    """[N, D] tokens of this device -> their outputs, a partial sum along "tensor"."""
    dropped, group = jnp.zeros(x.shape[0], jnp.float32), "expert" in sizes
    if group:
        x, ids, weights = (
            jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x, ids, weights)
        )
        mine = cfg.moe.n_experts // sizes["expert"]
        ids = ids - jax.lax.axis_index("expert") * mine
        ids = jnp.where((ids >= 0) & (ids < mine), ids, mine)
    how = cfg.moe.implementation
    y = experts.compute(
        w,
        x,
        ids,
        weights,
        implementation="blocks" if how == "auto" else how,
        activation=cfg.activation,
        n_experts=cfg.moe.n_experts,
    )
    if group:
        y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
    return y, dropped


def _all_to_all(
    w: PyTree, x: Array, ids: Array, weights: Array, cfg: ModelConfig, sizes: dict[str, int]
) -> tuple[Array, Array]:
    """The same with at most `capacity` rows from this device to each expert."""
    moe, (N, C) = cfg.moe, ids.shape
    E = moe.n_experts
    capacity = min(N, math.ceil(moe.capacity_factor * N * C / E))
    at = experts.plan(ids, E, capacity=capacity)
    rows = experts.spread(x, at.choice_R // C, at.row_NxC).reshape(E, capacity, -1)
    back = at.row_NxC.reshape(N * C, 1)
    scales = experts.spread(weights.reshape(N * C), at.choice_R, back).reshape(E, capacity)
    if "expert" in sizes:
        rows, scales = (
            jax.lax.all_to_all(a, "expert", split_axis=0, concat_axis=1, tiled=True)
            for a in (rows, scales)
        )
    y = experts.with_capacity(w, rows, scales, cfg.activation)
    if "expert" in sizes:
        y = jax.lax.all_to_all(y, "expert", split_axis=1, concat_axis=0, tiled=True)
    y = experts.collect(y.reshape(E * capacity, -1), at.choice_R // C, at.row_NxC)
    lost = (ids < E) & (at.row_NxC == E * capacity)
    return y, jnp.sum(lost, axis=1, dtype=jnp.float32)
