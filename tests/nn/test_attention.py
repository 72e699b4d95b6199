"""Every fast path equals the plain reference, in value and gradient; masks as literal matrices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn import attention as A
from llm_jax.nn import blockwise


def inputs(B=2, L=12, H=4, K=2, Dh=8, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(B, L, H, Dh), (B, L, K, Dh), (B, L, K, Dh), (B, L, H, Dh)]
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0], [1] * 9 + [0] * 3])
POSITIONS = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 0, 0], [*range(9), 0, 0, 0]])
PACKED = A.Mask((SEGMENTS, SEGMENTS), (POSITIONS, POSITIONS))


@pytest.mark.parametrize(
    ("block", "strip"), [(64, 64), (64, 5), (64, 3), (5, 64)], ids=["whole", "2", "4", "blocks"]
)
@pytest.mark.parametrize(
    ("H", "K", "packed", "shape"),
    [
        (4, 4, False, {}),
        (4, 2, True, {}),
        (4, 1, True, {"window": 3}),
        (4, 2, False, {"window": 3, "softcap": 2.0}),
        (4, 2, True, {"softcap": 2.0}),
        (4, 4, False, {"causal": False}),
        (4, 2, True, {"causal": False, "window": 2}),
    ],
)
def test_xla_equals_reference_in_value_and_gradient(H, K, packed, shape, block, strip, monkeypatch):
    monkeypatch.setattr(blockwise, "MIN_STRIP", strip)  # 12 queries: 1, 2 or 4 strips
    q, k, v, weight = inputs(H=H, K=K)
    mask = PACKED if packed else A.Mask()
    shape = A.Shape(**{"scale": 0.3, "block": block, **shape})

    def value(f):
        return jax.jit(
            jax.value_and_grad(
                lambda q, k, v: jnp.sum(f(q, k, v, mask, shape) * weight), argnums=(0, 1, 2)
            )
        )

    (a, grads_a), (b, grads_b) = value(A.xla)(q, k, v), value(A.reference)(q, k, v)
    np.testing.assert_allclose(a, b, rtol=2e-6)
    for x, y in zip(grads_a, grads_b, strict=True):
        np.testing.assert_allclose(x, y, atol=3e-6)
    np.testing.assert_allclose(
        A.xla(q, k, v, mask, shape), A.reference(q, k, v, mask, shape), atol=2e-6
    )


def test_strips_leave_out_what_nobody_sees(monkeypatch):
    monkeypatch.setattr(blockwise, "MIN_STRIP", 3)
    q, k = jnp.zeros((1, 1, 1, 12, 4)), jnp.zeros((1, 1, 12, 4))

    def cut(mask=None, **shape):
        strips = blockwise._strips(q, k, mask or A.Mask(), A.Shape(**shape))
        return [tuple(s) for s in strips]

    assert cut() == [(0, 3, 0, 3), (3, 6, 0, 6), (6, 9, 0, 9), (9, 12, 0, 12)]
    # Query 6 sees keys 5 and 6 in a window of 2; from key 4 on would be too many, from 6 too few.
    assert cut(window=2) == [(0, 3, 0, 3), (3, 6, 2, 6), (6, 9, 5, 9), (9, 12, 8, 12)]
    assert cut(causal=False) == [(0, 12, 0, 12)]
    assert cut(A.Mask(start=jnp.int32(0))) == [(0, 12, 0, 12)]  # queries of any slot


def matrix(mask, queries=4, keys=4, **shape):
    slots = (mask.start + jnp.arange(queries), jnp.arange(keys))
    return blockwise.visible(mask, A.Shape(**shape), *slots)[0].astype(int)


def test_masks_are_these_matrices():
    np.testing.assert_array_equal(
        matrix(A.Mask()), [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    )
    np.testing.assert_array_equal(
        matrix(A.Mask(), window=2), [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    )
    seg = jnp.array([[1, 1, 2, 0]])
    packed = A.Mask((seg, seg))
    np.testing.assert_array_equal(
        matrix(packed), [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        matrix(packed, causal=False), [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    )
    # Slots 0-1 are cached, the query writes slot 2; slot 1 is a hole (padding).
    cached = A.Mask((jnp.array([[1]]), jnp.array([[1, 0, 1, 0]])), None, 2)
    np.testing.assert_array_equal(matrix(cached, queries=1), [[1, 0, 1, 0]])


def test_padding_gives_zero_and_no_gradient():
    q, k, v, _ = inputs()
    out = A.xla(q, k, v, PACKED, A.Shape(scale=0.3))
    assert (out[0, 10:] == 0).all() and np.isfinite(out).all()
    grad = jax.grad(lambda v: jnp.sum(A.xla(q, k, v, PACKED, A.Shape(scale=0.3))))(v)
    assert (grad[0, 10:] == 0).all() and np.isfinite(grad).all()


def test_asked_for_but_not_available_is_an_error():
    q, k, v, _ = inputs()
    with pytest.raises(
        ValueError, match=r"model.attention=cudnn is not available: the backend is cpu"
    ):
        A.attention(q, k, v, A.Mask(), A.Shape(), "cudnn")


def test_long_rows_keep_no_square_array():
    q, k = jnp.zeros((1, 2, 1, 1024, 8)), jnp.zeros((1, 2, 1024, 8))

    def temporary(block):
        f = jax.grad(lambda q: jnp.sum(blockwise._xla(q, k, k, A.Mask(), A.Shape(block=block))))
        return jax.jit(f).lower(q).compile().memory_analysis().temp_size_in_bytes

    square = 2 * 1024 * 1024 * 4
    assert temporary(128) < 0.2 * square < square < temporary(1024)


def test_blocks_that_cannot_see_each_other_are_left_out():
    q, k = jnp.zeros((1, 1, 1, 64, 8)), jnp.zeros((1, 1, 64, 8))

    def pairs(**shape):
        i, j = blockwise._cut(q, k, k, A.Mask(), A.Shape(block=16, **shape)).pairs
        return list(zip(i.tolist(), j.tolist(), strict=True))

    assert pairs() == [(i, j) for i in range(4) for j in range(i + 1)]
    assert pairs(window=8) == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3)]
    assert len(pairs(causal=False)) == 16


def test_left_out_with_and_without_a_gradient():
    """Slot 0 of the first query is known before anything runs, also where JAX traces it."""
    q = jnp.zeros((1, 64, 1, 8))

    def pairs(f):
        jaxpr = str(jax.make_jaxpr(jax.jit(f))(q))
        return max(int(n) for n in re.findall(r"length=(\d+)", jaxpr))

    f = lambda q: jnp.sum(A.xla(q, q, q, A.Mask(), A.Shape(block=16)))  # noqa: E731
    assert pairs(f) == pairs(jax.grad(f)) == pairs(jax.grad(jax.checkpoint(f))) == 10  # not 16


def test_masks_of_blocks_are_not_kept_for_the_backward_pass():
    """Made ahead of the loop for all pairs of blocks, they would grow with the square of the length:
    of 128 tokens in blocks of 16 that would be 36 masks of [2, 1, 1, 16, 16]."""
    ids = jnp.repeat(jnp.arange(1, 5), 32)[None].repeat(2, 0)
    q, k, v, _ = inputs(L=128)
    mask = A.Mask((ids, ids), (ids, ids))

    @jax.checkpoint
    def layer(x, _):
        return A.xla(x, k, v, mask, A.Shape(scale=0.3, block=16, window=40)), None

    def value(q):
        return jnp.sum(jax.lax.scan(layer, q, None, length=2)[0])

    text = jax.jit(jax.grad(value)).lower(q).as_text()
    assert re.search(r"16x16xi1", text)  # masks there are, one pair's at a time
    assert not re.search(r"tensor<\d+x2x(1x1x)?16x16xi1>", text)
