"""Attention over a cache against the reference, through both forms of a cache."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn import cached
from llm_jax.nn.blockwise import Mask, Shape, reference

B, S, H, K, DH, M = 3, 12, 4, 2, 8, 3
PADDING = np.array([0, 2, 5])  # slots on the left of each row


def attend(q, k, v, mask, shape, queued):
    """All of k and v go into layer 1 of a cache of 3, the last L as this call's; -> (o, cache)."""
    L = q.shape[1]
    stored = {
        n: jnp.full((M, B, k.shape[2], S, DH), 7.0)
        .at[1, :, :, : S - L]
        .set(x[:, : S - L].transpose(0, 2, 1, 3))
        for n, x in (("k", k), ("v", v))
    }
    layers = cached.queue(stored, M) if queued else stored
    if queued:
        layers = (*layers[1:], layers[0])  # layer 0 has had its turn
    new_k, new_v = k[:, S - L :], v[:, S - L :]
    whole_k, whole_v, layers = cached.append(new_k, new_v, layers, jnp.int32(S - L), jnp.int32(1))
    return cached.attend(q, whole_k, whole_v, mask, shape), layers


@pytest.mark.parametrize("queued", [False, True], ids=["stacked", "queue"])
@pytest.mark.parametrize("L", [1, 4])
@pytest.mark.parametrize(
    ("heads", "window", "softcap"), [(K, 0, 0.0), (H, 0, 0.0), (1, 4, 0.0), (K, 3, 0.7)]
)
def test_equals_the_reference(heads, window, softcap, L, queued):
    """Grouped heads (MHA, GQA, MQA), window, cap, rows padded on the left, several queries."""
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    q, k, v = make(B, L, H, DH), make(B, S, heads, DH), make(B, S, heads, DH)
    position = jnp.arange(S)[None] - PADDING[:, None]
    segments = (position >= 0).astype(jnp.int32)
    position = jnp.maximum(position, 0)
    mask = Mask((segments[:, S - L :], segments), (position[:, S - L :], position), S - L)
    shape = Shape(True, window, softcap, 1 / math.sqrt(DH))
    o, layers = attend(q, k, v, mask, shape, queued)
    np.testing.assert_allclose(o, reference(q, k, v, mask, shape), atol=2e-6)

    # What was written: all of layer 1, and the other layers' 7s are untouched.
    if queued:
        assert [bool((x["k"] == 7).all()) for x in layers] == [True, True, False]  # 2, 0, 1
        written = layers[-1]["v"].reshape(B, heads, S, DH)
    else:
        assert bool((layers["k"][0::2] == 7).all())
        written = layers["v"][1]
    np.testing.assert_array_equal(written, v.transpose(0, 2, 1, 3))


def test_a_row_of_padding_gives_zero_and_slots_ahead_are_not_seen():
    """Not NaN, and not the average of what an empty cache holds."""
    q = jnp.ones((2, 1, H, DH))
    k = jnp.ones((2, K, S, DH))
    v = jnp.where(jnp.arange(S)[:, None] > 5, 1e9, k)  # the query stands in slot 5
    segments = jnp.stack([jnp.ones(S, jnp.int32), jnp.zeros(S, jnp.int32)])
    mask = Mask((segments[:, :1], segments), None, 5)
    o = cached.attend(q, k, v, mask, Shape())
    np.testing.assert_allclose(o[0], 1.0, atol=1e-6)
    np.testing.assert_array_equal(o[1], 0.0)


def test_a_queue_stands_as_before_after_all_layers():
    k = jnp.arange(M * B * K, dtype=jnp.float32).reshape(M, B, 1, K, 1)
    stacked = {"k": jnp.zeros((M, B, K, 2, 1)), "v": jnp.zeros((M, B, K, 2, 1))}
    layers = cached.queue(stacked, M)
    for i in range(M):
        *_, layers = cached.append(k[i], -k[i], layers, jnp.int32(1), jnp.int32(99))
        *_, stacked = cached.append(k[i], -k[i], stacked, jnp.int32(1), jnp.int32(i))
    for i, layer in enumerate(layers):
        for name in ("k", "v"):
            np.testing.assert_array_equal(layer[name].reshape(B, K, 2, 1), stacked[name][i])
    assert jax.tree.all(jax.tree.map(lambda x: bool((x[..., 0, :] == 0).all()), layers))
