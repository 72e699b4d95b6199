"""The experts of one device on the tokens routed to them: several ways to the same sum.

Letters besides the glossary's: C choices of a token (top_k); R rows, one for each assignment of a
token to an expert, sorted by expert. In `ids_NxC` the number E means "no expert of this device".
A row is scaled by its routing weight before the down projection, so that coming back is a sum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from llm_jax import sharding
from llm_jax.types import Array, PyTree

# Rows of a block at most: what keeps a matmul busy. A backward pass adds every block's product to
# the gradient of an expert's matrices, which costs memory traffic, so accelerators take more rows.
BLOCK = {"cpu": 128}
BLOCK_DEFAULT = 1024


class Plan(NamedTuple):
    """Which assignment is computed in which row."""

    choice_R: Array  # int32, number n * C + c of the row's assignment; N * C: none
    row_NxC: Array  # int32, the assignment's row; R: none
    start_E: Array  # int32, first row of each expert
    size_E: Array  # int32, rows of each expert, padding included


def compute(
    w: PyTree,
    x_NxD: Array,
    ids_NxC: Array,
    weights_NxC: Array,
    *,
    implementation: str,
    activation: str,
    n_experts: int,
) -> Array:
    """sum_c weights[n, c] * mlp of expert ids[n, c] (x[n]): [N, D] in x's type.

    `w` has "up" [E, D, F], "down" [E, F, D] and, for gated activations, "gate" [E, D, F]. `weights`
    are float32. Choices with ids = E add nothing. `n_experts` are those of all devices together,
    among which the choices fall.
    """
    E = w["up"].shape[0]
    w = {name: matrix.astype(x_NxD.dtype) for name, matrix in w.items()}
    match implementation:
        case "dense":
            return _dense(w, x_NxD, ids_NxC, weights_NxC, activation)
        case "ragged":
            return _ragged(w, x_NxD, weights_NxC, plan(ids_NxC, E), activation)
        case "blocks":
            block = block_size(ids_NxC.size, n_experts)
            return _blocks(
                w, x_NxD, weights_NxC, plan(ids_NxC, E, block=block), (block, activation)
            )
    raise ValueError(f"model.moe.implementation={implementation!r} is unknown")


def with_capacity(w: PyTree, x_ExSxD: Array, weights_ExS: Array, activation: str) -> Array:
    """Each expert on its own S rows: [E, S, D]. Rows that nobody fills have weight 0."""
    inner = {n: _batched(x_ExSxD, w[n].astype(x_ExSxD.dtype)) for n in w if n != "down"}
    h = activate(inner, activation) * weights_ExS[:, :, None]
    down = w["down"].astype(x_ExSxD.dtype)
    return _batched(h.astype(x_ExSxD.dtype), down).astype(x_ExSxD.dtype)


def activate(inner: dict[str, Array], activation: str) -> Array:
    """float32 activations of the hidden layer from its pre-activations "up" (and "gate")."""
    inner = {name: x.astype(jnp.float32) for name, x in inner.items()}
    match activation:
        case "gelu":
            return jax.nn.gelu(inner["up"], approximate=True)
        case "gelu_erf":
            return jax.nn.gelu(inner["up"], approximate=False)
        case "relu2":
            return jnp.square(jax.nn.relu(inner["up"]))
        case "swiglu":
            return jax.nn.silu(inner["gate"]) * inner["up"]
        case "geglu":
            return jax.nn.gelu(inner["gate"], approximate=True) * inner["up"]
    raise ValueError(f"model.activation={activation!r} is unknown")


def block_size(n_choices: int, n_experts: int) -> int:
    """Rows of a block: a power of two, at most half of what an expert gets on average, because half
    a block of each expert is padding."""
    most = BLOCK.get(sharding.platform(), BLOCK_DEFAULT)
    half = max(n_choices // (2 * n_experts), 16)
    return min(most, 1 << (half.bit_length() - 1))


def plan(ids_NxC: Array, n_experts: int, *, block: int = 1, capacity: int = 0) -> Plan:
    """Sorts the assignments by expert, in the order of tokens within each.

    Every expert's rows start at a multiple of `block`; with a `capacity` each expert has exactly so
    many rows, and assignments past them get none.

    Raises:
      ValueError: more assignments than a sort key can hold.
    """
    (N, C), E = ids_NxC.shape, n_experts
    n = N * C
    if n * (E + 1) >= 1 << 31:
        raise ValueError(
            f"{N} tokens are too many for one dispatch; set model.moe.chunk below that"
        )
    flat, iota = ids_NxC.reshape(n), jnp.arange(n, dtype=jnp.int32)
    # One key that carries its index: several times faster to sort than a pair on a CPU.
    order = jnp.sort(flat * n + iota) % n
    count_E = jnp.sum(flat[:, None] == jnp.arange(E)[None, :], axis=0, dtype=jnp.int32)
    if capacity:
        taken_E, size_E, R = jnp.minimum(count_E, capacity), jnp.full(E, capacity), E * capacity
    else:
        taken_E, size_E = count_E, (count_E + block - 1) // block * block
        R = (n + E * (block - 1)) // block * block
    first_E, start_E = jnp.cumsum(count_E) - count_E, jnp.cumsum(size_E) - size_E

    row_R = jnp.arange(R, dtype=jnp.int32)
    expert_R = jnp.sum(row_R[:, None] >= (start_E + size_E)[None, :], axis=1)
    within_R = row_R - start_E.at[expert_R].get(mode="clip")
    real_R = (expert_R < E) & (within_R < taken_E.at[expert_R].get(mode="clip"))
    choice_R = order.at[first_E.at[expert_R].get(mode="clip") + within_R].get(mode="clip")

    rank = _inverse(order, iota) - first_E.at[flat].get(mode="clip")
    row = start_E.at[flat].get(mode="clip") + rank
    real = (flat < E) & (rank < taken_E.at[flat].get(mode="clip"))
    return Plan(
        jnp.where(real_R, choice_R, n), jnp.where(real, row, R).reshape(N, C), start_E, size_E
    )


def _inverse(order: Array, iota: Array) -> Array:
    """The inverse permutation: a scatter where that is quick, a sort on accelerators."""
    if sharding.platform() == "cpu":
        return jnp.zeros_like(order).at[order].set(iota, unique_indices=True)
    return jax.lax.sort_key_val(order, iota)[1]


def _rows(x: Array, index: Array) -> Array:
    """x[index], and zeros where the index is past the end."""
    return x.at[index].get(mode="fill", fill_value=0)


def _sum_rows(rows: Array, index_MxK: Array) -> Array:
    """sum_k rows[index[m, k]], added up in float32."""
    parts = (_rows(rows, index_MxK[:, k]).astype(jnp.float32) for k in range(index_MxK.shape[1]))
    return sum(parts).astype(rows.dtype)


# Both are gathers, and each is the other's gradient: without that JAX would scatter.
@jax.custom_vjp
def spread(x: Array, index_R: Array, back_MxK: Array) -> Array:
    """x [M, ...] -> x[index] [R, ...], where back[m] are the rows that x[m] went to."""
    return _rows(x, index_R)


@jax.custom_vjp
def collect(rows: Array, index_R: Array, back_MxK: Array) -> Array:
    """rows [R, ...] -> sum_k rows[back[m, k]] [M, ...]."""
    return _sum_rows(rows, back_MxK)


spread.defvjp(
    lambda x, index, back: (spread(x, index, back), (index, back)),
    lambda saved, d: (collect(d, *saved), None, None),
)
collect.defvjp(
    lambda rows, index, back: (collect(rows, index, back), (index, back)),
    lambda saved, d: (spread(d, *saved), None, None),
)


def _dense(w: PyTree, x: Array, ids: Array, weights: Array, activation: str) -> Array:
    """The plain reference: every expert on every token."""
    E = w["up"].shape[0]
    chosen_NxCxE = ids[:, :, None] == jnp.arange(E)[None, None, :]
    weights_ExN = jnp.sum(jnp.where(chosen_NxCxE, weights[:, :, None], 0.0), axis=1).T
    y = with_capacity(w, jnp.broadcast_to(x[None], (E, *x.shape)), weights_ExN, activation)
    return jnp.sum(y.astype(jnp.float32), axis=0).astype(x.dtype)


def _ragged(w: PyTree, x: Array, weights: Array, at: Plan, activation: str) -> Array:
    """`lax.ragged_dot` on sorted rows. XLA computes the gradient of the matrices (on CPUs and some
    GPUs every product) as if every expert had all rows."""
    N, C = weights.shape
    dot = lambda rows, matrix: jax.lax.ragged_dot(rows, matrix, at.size_E)  # noqa: E731
    x_RxD = spread(x, at.choice_R // C, at.row_NxC)
    weight_R = spread(weights.reshape(N * C), at.choice_R, at.row_NxC.reshape(N * C, 1))
    h = activate({n: dot(x_RxD, w[n]) for n in w if n != "down"}, activation) * weight_R[:, None]
    return collect(dot(h.astype(x.dtype), w["down"]), at.choice_R // C, at.row_NxC)


def _batched(x: Array, matrix: Array) -> Array:
    return jnp.einsum("esd,edf->esf", x, matrix, preferred_element_type=jnp.float32)


def _dot(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """a and b contracted over one axis of each, in float32."""
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _blocks(w: PyTree, x: Array, weights: Array, at: Plan, how: tuple[int, str]) -> Array:
    """Blocks of rows that share an expert, one after the other, as many as there are: neither work
    nor memory (but for [R, D]) grows with the rows that might have come. The backward pass
    computes a block's hidden layer again."""
    forward = sequential_vmap(lambda *args: _blocks_forward(*args, how))
    backward = sequential_vmap(lambda *args: _blocks_backward(*args, how))

    @jax.custom_vjp
    def run(w, x, weights, at):
        return forward(w, x, weights, at)

    run.defvjp(
        lambda *args: (forward(*args), args), lambda saved, dy: (*backward(*saved, dy), None)
    )
    return run(w, x, weights, at)


def _expert(w: PyTree, e: Array) -> PyTree:
    """The matrices of one expert. Taken for each block: a matmul can read them in place."""
    return {name: jax.lax.dynamic_index_in_dim(m, e, keepdims=False) for name, m in w.items()}


def _hidden(w: PyTree, x: Array, weight: Array, activation: str):
    """(float32 hidden layer scaled by the rows' weights, what maps its gradient to those of the
    pre-activations and the weights)."""
    inner = {n: _dot(x, w[n], (1, 0)) for n in w if n != "down"}
    return jax.vjp(lambda inner, s: activate(inner, activation) * s[:, None], inner, weight)


def _blocks_forward(w: PyTree, x: Array, weights: Array, at: Plan, how: tuple[int, str]) -> Array:
    (block, activation), (N, C) = how, weights.shape
    flat = weights.reshape(N * C)

    def one(i, ys):
        row = i * block
        mine = _expert(w, jnp.sum(row >= at.start_E + at.size_E))
        choice = jax.lax.dynamic_slice_in_dim(at.choice_R, row, block)
        h, _ = _hidden(mine, _rows(x, choice // C), _rows(flat, choice), activation)
        y = _dot(h.astype(x.dtype), mine["down"], (1, 0)).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(ys, y, row, axis=0)

    ys = jnp.zeros((at.choice_R.size, x.shape[1]), x.dtype)
    ys = jax.lax.fori_loop(0, jnp.sum(at.size_E) // block, one, ys)
    return _sum_rows(ys, at.row_NxC)


def _blocks_backward(
    w: PyTree, x: Array, weights: Array, at: Plan, dy: Array, how: tuple[int, str]
) -> tuple[PyTree, Array, Array]:
    block, activation = how
    E, (N, C), R = w["up"].shape[0], weights.shape, at.choice_R.size
    flat = weights.reshape(N * C)

    def expert(e, carry):
        def one(i, carry):
            total, dxs, d_weight = carry
            mine, row = _expert(w, e), at.start_E[e] + i * block
            choice = jax.lax.dynamic_slice_in_dim(at.choice_R, row, block)
            xb, dyb = _rows(x, choice // C), _rows(dy, choice // C)
            h, to_inner = _hidden(mine, xb, _rows(flat, choice), activation)
            d_inner, d_s = to_inner(_dot(dyb, mine["down"], (1, 1)))
            d_inner = {n: d.astype(x.dtype) for n, d in d_inner.items()}
            dw = {n: _dot(xb, d, (0, 0)) for n, d in d_inner.items()}
            dw["down"] = _dot(h.astype(x.dtype), dyb, (0, 0))
            dx = sum(_dot(d, mine[n], (1, 1)) for n, d in d_inner.items()).astype(x.dtype)
            return (
                {n: total[n] + dw[n] for n in total},
                jax.lax.dynamic_update_slice_in_dim(dxs, dx, row, axis=0),
                jax.lax.dynamic_update_slice_in_dim(d_weight, d_s, row, axis=0),
            )

        dw, dxs, d_weight = carry
        zeros = {n: jnp.zeros(m.shape[1:], jnp.float32) for n, m in w.items()}
        n_blocks = at.size_E[e] // block
        total, dxs, d_weight = jax.lax.fori_loop(0, n_blocks, one, (zeros, dxs, d_weight))
        put = jax.lax.dynamic_update_index_in_dim
        return (
            {n: put(dw[n], t.astype(x.dtype), e, axis=0) for n, t in total.items()},
            dxs,
            d_weight,
        )

    dw = {n: jnp.zeros_like(m) for n, m in w.items()}
    start = (dw, jnp.zeros((R, x.shape[1]), x.dtype), jnp.zeros(R, jnp.float32))
    dw, dxs, d_weight = jax.lax.fori_loop(0, E, expert, start)
    return dw, _sum_rows(dxs, at.row_NxC), _rows(d_weight, at.row_NxC)
