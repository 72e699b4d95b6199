"""Norms, positions and activations against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from llm_jax.config import ModelConfig
from llm_jax.nn import layers, params, positions, weights
from llm_jax.nn.dense import embed, read


def test_norms():
    x = jax.random.normal(jax.random.key(0), (2, 3, 32)) * 3 + 1
    p = {"scale": jnp.linspace(0.5, 2, 32), "bias": jnp.linspace(-1, 1, 32)}
    ln = ModelConfig(norm="layernorm", norm_bias=True)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        layers.norm(p, x, ln), want * p["scale"][None, None] + p["bias"][None, None], atol=2e-6
    )
    rms = layers.norm({"scale": p["scale"]}, x, ModelConfig(norm="rmsnorm"))
    want = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * p["scale"][None, None]
    np.testing.assert_allclose(rms, want, atol=2e-6)


@pytest.mark.parametrize("activation", ["gelu", "gelu_erf", "swiglu", "geglu", "relu2"])
def test_mlp(activation):
    from scipy.special import erf

    cfg = tiny_model(activation=activation, mlp_bias=True)
    p = params.init(layers.mlp_specs(cfg, 0.3), jax.random.key(0))
    p = jax.tree.map(lambda a: a + 0.1, p)
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, 3, 32)), np.float64)
    lin = lambda n, v: v @ np.float64(p[n]["w"]) + np.float64(p[n]["bias"])  # noqa: E731
    tanh = lambda v: 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))  # noqa: E731
    up = lin("up", x)
    h = {
        "gelu": lambda: tanh(up),
        "gelu_erf": lambda: 0.5 * up * (1 + erf(up / np.sqrt(2))),
        "relu2": lambda: np.maximum(up, 0) ** 2,
        "swiglu": lambda: lin("gate", x) / (1 + np.exp(-lin("gate", x))) * up,
        "geglu": lambda: tanh(lin("gate", x)) * up,
    }[activation]()
    np.testing.assert_allclose(layers.mlp(p, jnp.float32(x), cfg), lin("down", h), atol=2e-4)


def test_rope_turns_and_keeps_relative_positions():
    cfg = tiny_model(n_heads=4, head_dim=8)
    x = jax.random.normal(jax.random.key(0), (1, 6, 1, 8))
    at = lambda start: positions.rope_tables(jnp.arange(start, start + 6)[None], cfg)[0]  # noqa: E731
    a, b = positions.rotate(x, at(0), cfg), positions.rotate(x, at(100), cfg)
    np.testing.assert_allclose(
        jnp.einsum("blhd,bmhd->blm", a, a), jnp.einsum("blhd,bmhd->blm", b, b), atol=3e-5
    )
    np.testing.assert_allclose(a[:, 0], x[:, 0], atol=1e-6)  # position 0 does not turn
    # Angle of the first pair is the position; the halves convention pairs (0, 4).
    np.testing.assert_allclose(
        a[0, 1, 0, 0], x[0, 1, 0, 0] * np.cos(1) - x[0, 1, 0, 4] * np.sin(1), rtol=1e-5
    )
    inter = positions.rotate(x, at(0), tiny_model(n_heads=4, head_dim=8, rope_interleaved=True))
    np.testing.assert_allclose(
        inter[0, 1, 0, 0], x[0, 1, 0, 0] * np.cos(1) - x[0, 1, 0, 1] * np.sin(1), rtol=1e-5
    )
    half = tiny_model(head_dim=8, rope_fraction=0.5)
    part = positions.rotate(x, positions.rope_tables(jnp.arange(6)[None], half)[0], half)
    np.testing.assert_array_equal(part[..., 4:], x[..., 4:])


def test_rope_scaling():
    plain, _ = positions.rope_frequencies(tiny_model(head_dim=64))
    linear, _ = positions.rope_frequencies(
        tiny_model(head_dim=64, rope_scaling="linear", rope_factor=4.0)
    )
    np.testing.assert_allclose(linear, plain / 4)
    ntk, _ = positions.rope_frequencies(
        tiny_model(head_dim=64, rope_scaling="ntk", rope_factor=4.0, rope_original_length=512)
    )
    np.testing.assert_allclose(ntk[[0, -1]], [plain[0], plain[-1] / 4], rtol=1e-9)
    yarn, scale = positions.rope_frequencies(
        tiny_model(head_dim=64, rope_scaling="yarn", rope_factor=4.0, rope_original_length=512)
    )
    turns = 512 * plain / (2 * np.pi)
    np.testing.assert_allclose(yarn[turns > 40], plain[turns > 40])
    np.testing.assert_allclose(yarn[turns < 0.8], plain[turns < 0.8] / 4)
    assert ((yarn <= plain) & (yarn >= plain / 4)).all()
    assert scale == pytest.approx(0.1 * np.log(4) + 1)


def test_sinusoids_are_unique_and_bounded():
    table = positions.sinusoids(jnp.arange(50)[None], 32)[0]
    np.testing.assert_allclose(table[0], [0] * 16 + [1] * 16, atol=1e-7)
    gram = np.asarray(table @ table.T)
    assert (gram.argmax(axis=1) == np.arange(50)).all()


def test_dropout_belongs_to_rows():
    x = jnp.ones((4, 8, 16))
    keys = jax.random.split(jax.random.key(0), 4)
    whole = layers.dropout(x, keys, 0.25, salt=1)
    np.testing.assert_array_equal(layers.dropout(x[2:3], keys[2:3], 0.25, salt=1)[0], whole[2])
    assert set(np.unique(whole)) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(whole.mean()) - 1) < 0.15
    assert (layers.dropout(x, keys, 0.25, salt=2) != whole).any()
    assert layers.dropout(x, None, 0.25, salt=1) is x


def test_dense_and_embed_accept_any_weight_leaf():
    class Doubled:
        shape = (4, 6)

        def __init__(self, w):
            self.w = w

        def matmul(self, x):
            return 2 * x @ self.w

        def rows(self, ids):
            return 2 * self.w[ids]

        def dequantize(self, dtype):
            return (2 * self.w).astype(dtype)

        def layout(self, axes):
            return Doubled(axes)

    w = jax.random.normal(jax.random.key(0), (4, 6))
    x = jax.random.normal(jax.random.key(1), (2, 3, 4))
    np.testing.assert_allclose(read([{"w": Doubled(w)}], x, ["mlp"])[0], 2 * x @ w, rtol=1e-5)
    ids = jnp.array([[0, 3], [1, 1]])
    np.testing.assert_allclose(embed(Doubled(w), ids), 2 * w[ids])
    np.testing.assert_allclose(weights.dequantize(Doubled(w), jnp.float32), 2 * w)
