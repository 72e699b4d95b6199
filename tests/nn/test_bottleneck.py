"""A bottleneck adapter behind a matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn import weights
from llm_jax.nn.bottleneck import Bottleneck

F, D, R = 6, 4, 3


def leaf(rng, **more):
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    return Bottleneck(make(F, D), make(D, R), make(R), make(R, D), make(D), **more)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("shape", [(5, F), (2, 3, F)])
def test_it_works_on_the_product_with_its_bias(shape):
    """The adapter in front of the bias would be the wrong answer."""
    rng = np.random.default_rng(0)
    w, x, bias = leaf(rng), rng.standard_normal(shape, np.float32), rng.standard_normal(D)
    base, down, down_bias, up, up_bias = (np.asarray(a) for a in jax.tree.leaves(w))
    y = x @ base + bias
    want = y + gelu(y @ down + down_bias) @ up + up_bias
    p = {"w": w, "bias": jnp.asarray(bias, jnp.float32)}
    np.testing.assert_allclose(weights.affine(p, jnp.asarray(x)), want, atol=2e-5)
    assert not np.allclose(np.asarray(w.after(w.matmul(jnp.asarray(x)))) + bias, want, atol=1e-2)


def test_layout_follows_the_matrix():
    axes = leaf(np.random.default_rng(0)).layout(("layer", "mlp", "embed"))
    assert axes.base == ("layer", "mlp", "embed") and axes.down == ("layer", "embed", None)
    assert axes.up == ("layer", None, "embed") and axes.up_bias == axes.down_bias == ("layer", None)


def test_dropout_belongs_to_rows():
    """The same for rows flattened into tokens; rows keep theirs in a smaller batch."""
    w = leaf(np.random.default_rng(0), rate=0.5, salt=3)
    y = jnp.asarray(np.random.default_rng(1).standard_normal((4, 7, D), np.float32))
    keys = jax.random.split(jax.random.key(0), 4)
    dropped = w.seeded(keys).after(y)
    np.testing.assert_array_equal(w.seeded(keys).after(y.reshape(28, D)).reshape(y.shape), dropped)
    np.testing.assert_allclose(w.seeded(keys[2:]).after(y[2:]), dropped[2:], atol=1e-6)
    assert not np.allclose(dropped, w.after(y))
    assert w.replace(rate=0.0).seeded(keys).keys_B is None


def test_it_is_no_matrix():
    with pytest.raises(
        ValueError, match=r"peft\.method=adapter is no change of the model's matrices"
    ):
        weights.dequantize(leaf(np.random.default_rng(0)), "float32")
