"""Weights as the decoding loop holds them: the same numbers, cut and stored another way."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny import tiny_train

from llm_jax.decode.weights import Transposed, cut, joined
from llm_jax.models import decoder
from llm_jax.nn.params import flatten, init
from llm_jax.nn.weights import Weight


def test_transposed_is_a_weight_with_the_same_products():
    w, x = (
        jax.random.normal(jax.random.key(0), (6, 4)),
        jax.random.normal(jax.random.key(1), (3, 6)),
    )
    leaf = Transposed(w.T)
    assert isinstance(leaf, Weight) and leaf.shape == (6, 4)
    np.testing.assert_allclose(jax.jit(lambda leaf, x: leaf.matmul(x))(leaf, x), x @ w, rtol=1e-5)
    np.testing.assert_array_equal(leaf.rows(jnp.array([5, 0])), w[jnp.array([5, 0])])
    np.testing.assert_array_equal(leaf.dequantize("float32"), w)


def test_cut_and_joined_is_the_same_tree():
    cfg = tiny_train().model
    specs = decoder.specs(cfg)
    params = init(specs, jax.random.key(0))
    held = cut(params, specs)
    transposed = {path for path, leaf in held.items() if isinstance(leaf, tuple)}
    whole = flatten(joined(held))
    assert whole.keys() == flatten(params).keys() and transposed
    matrices = {path for path, leaf in whole.items() if isinstance(leaf, Transposed)}
    assert {"layers/attn/q/w", "layers/attn/o/w", "layers/mlp/down/w"} <= matrices
    for path, leaf in flatten(params).items():
        same = whole[path].dequantize(leaf.dtype) if path in matrices else whole[path]
        np.testing.assert_array_equal(same, leaf)
