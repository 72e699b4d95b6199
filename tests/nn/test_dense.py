"""Matrices that read one input: one matmul where that is faster, the same numbers either way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn import dense


def weights(bias, widths=(12, 4, 4), D=8):
    keys = jax.random.split(jax.random.key(1), 2 * len(widths))
    ps = [{"w": jax.random.normal(k, (D, n))} for k, n in zip(keys, widths, strict=False)]
    if bias:
        for p, k in zip(ps, keys[len(widths) :], strict=True):
            p["bias"] = jax.random.normal(k, (p["w"].shape[1],))
    return ps


@pytest.mark.parametrize("bias", [False, True])
def test_merged_matrices_equal_separate_ones(bias, monkeypatch):
    x, ps, outs = jax.random.normal(jax.random.key(0), (2, 5, 8)), weights(bias), ["heads"] * 3

    def value(ps, x):
        ys = dense.read(ps, x, outs)
        return sum(jnp.sum(jnp.sin((i + 1) * y)) for i, y in enumerate(ys)), ys

    def measured(from_tokens):
        monkeypatch.setattr(dense, "MERGED_FROM", from_tokens)
        f = lambda ps, x: jax.value_and_grad(value, (0, 1), has_aux=True)(ps, x)  # noqa: E731
        # New functions each time: a cached trace would not see the attribute.
        return jax.jit(f)(ps, x), str(jax.make_jaxpr(lambda ps, x: value(ps, x))(ps, x))

    merged, program = measured(10)
    separate, plain = measured(11)
    assert program.count("dot_general") == 1 and plain.count("dot_general") == 3
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(separate), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
