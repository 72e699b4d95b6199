"""Every way to compute routed experts equals the plain one, and a plan gives each assignment a row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn import experts, layers
from tests.tiny import tiny_model

E, N, C, D, F = 5, 200, 2, 16, 24


def arrays():
    """Expert 3 gets nothing, and a tenth of the choices are nobody's (id E)."""
    k = jax.random.split(jax.random.key(0), 6)
    w = {
        "gate": jax.random.normal(k[0], (E, D, F)) / 4,
        "up": jax.random.normal(k[1], (E, D, F)) / 4,
        "down": jax.random.normal(k[2], (E, F, D)) / 5,
    }
    ids = jnp.array([0, 0, 0, 0, 1, 2, 2, 4, 4, 5])[jax.random.randint(k[3], (N, C), 0, 10)]
    return w, jax.random.normal(k[4], (N, D)), ids, jax.random.uniform(k[5], (N, C))


@functools.cache
def results(implementation, activation):
    w, x, ids, weights = arrays()
    if activation == "relu2":
        w = {n: m for n, m in w.items() if n != "gate"}

    def loss(w, x, weights):
        y = experts.compute(
            w,
            x,
            ids,
            weights,
            implementation=implementation,
            activation=activation,
            n_experts=E,
        )
        return jnp.sum(jnp.sin(jnp.arange(N * D).reshape(N, D)) * y), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
        w, x, weights
    )
    return y, grads


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("implementation", ["ragged", "blocks"])
def test_equals_every_expert_on_every_token(implementation, activation):
    assert experts.block_size(N * C, E) < N * C // E  # some experts have several blocks
    want, got = results("dense", activation), results(implementation, activation)
    np.testing.assert_allclose(got[0], want[0], atol=2e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got[1]), jax.tree.leaves(want[1]), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4, err_msg=str(path))
    d_w, _, d_weights = got[1]
    assert (np.asarray(d_w["down"])[3] == 0).all() and (np.asarray(d_w["down"])[4] != 0).any()
    assert (np.asarray(d_weights)[np.asarray(arrays()[2]) == E] == 0).all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_erf", "swiglu", "geglu", "relu2"])
def test_the_expert_that_all_choose_is_the_dense_mlp(activation):
    cfg = tiny_model(d_model=D, d_ff=F, activation=activation)
    w, x, _, _ = arrays()
    names = layers.mlp_specs(cfg, 0.02)
    plain = layers.mlp({n: {"w": w[n][2]} for n in names}, x[None], cfg)[0]
    y = experts.compute(
        {n: w[n] for n in names},
        x,
        jnp.full((N, 1), 2),
        jnp.full((N, 1), 0.5),
        implementation="dense",
        activation=activation,
        n_experts=E,
    )
    np.testing.assert_allclose(y, 0.5 * plain, atol=1e-5)


@pytest.mark.parametrize("block, capacity", [(1, 0), (16, 0), (1, 60)])
def test_a_plan_sorts_by_expert_and_keeps_the_order_of_tokens(block, capacity):
    ids = np.asarray(arrays()[2])
    at = jax.tree.map(np.asarray, experts.plan(jnp.asarray(ids), E, block=block, capacity=capacity))
    R = at.choice_R.size
    for e in range(E):
        choices = np.flatnonzero(ids.reshape(-1) == e)
        choices = choices[: capacity or None]  # the first tokens are served
        start, size = at.start_E[e], at.size_E[e]
        rows = at.choice_R[start : start + size]
        np.testing.assert_array_equal(rows[: len(choices)], choices)
        assert (rows[len(choices) :] == N * C).all()
        np.testing.assert_array_equal(
            at.row_NxC.reshape(-1)[choices], start + np.arange(len(choices))
        )
        assert size == capacity or size == -(-len(choices) // block) * block
    wanted, served = np.sum(ids < E), np.sum(at.row_NxC < R)
    assert served == np.sum(at.choice_R < N * C)
    assert served < wanted if capacity else served == wanted


def test_too_many_assignments_for_one_sort_name_the_key():
    ids = jax.ShapeDtypeStruct((1 << 24, 8), jnp.int32)
    with pytest.raises(ValueError, match=r"model\.moe\.chunk"):
        jax.eval_shape(lambda i: experts.plan(i, 64), ids)


def test_blocks_hold_no_hidden_layer_of_all_rows():
    """4,096 tokens of 2 choices and 64 experts: the hidden layers are 34 MB in float32, those of
    every expert on every token 1,074 MB."""
    n, e, d, f = 4096, 64, 16, 1024
    shape = jax.ShapeDtypeStruct
    w = {name: shape((e, d, f), jnp.float32) for name in ("gate", "up")}
    w["down"] = shape((e, f, d), jnp.float32)
    rest = shape((n, d), jnp.float32), shape((n, 2), jnp.int32), shape((n, 2), jnp.float32)

    def temporary(implementation):
        def loss(w, x, ids, weights):
            return jnp.sum(
                experts.compute(
                    w,
                    x,
                    ids,
                    weights,
                    implementation=implementation,
                    activation="swiglu",
                    n_experts=e,
                )
            )

        grad = jax.jit(jax.grad(loss, argnums=(0, 1, 3)))
        return grad.lower(w, *rest).compile().memory_analysis().temp_size_in_bytes

    assert temporary("blocks") < 0.3 * 4 * 2 * n * f
    assert temporary("dense") > 4 * e * n * f  # what the test would see
