"""Quantised matrices: the numbers of the papers, and a leaf against the array it stands for."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from llm_jax.nn import quantized, weights
from llm_jax.peft.quantization import errors, nbytes, parse

plain_of = jax.jit(lambda w: w.dequantize(jnp.float32))
indices_of = jax.jit(lambda w: w.indices())
LECTURE = (-1.0, 0.3, 0.5, 1.0)


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 7.3, 1e-4])
def test_two_bit_map_with_a_tie(scale):
    """4 / 10 lies half-way between 0.3 and 0.5: up. The nearest in plain float32 gives [3, 1, 2, 1],
    or depends on how the block is scaled."""
    x = jnp.array([10.0, -3.0, 5.0, 4.0]) * scale
    w = quantized.blockwise(x, LECTURE, bits=2, block=4)
    assert indices_of(w).tolist() == [3, 1, 2, 2]
    np.testing.assert_allclose(plain_of(w) / scale, [10, 3, 5, 5], rtol=1e-6)
    assert w.codes.shape == (1,)  # four codes in a byte


def test_ties_go_up_not_to_even():
    x = jnp.array([1.0, -1.0, 0.5, -0.5])  # half-way between the levels -1, 0, 1
    w = quantized.blockwise(x, "linear", bits=2, block=4)
    assert plain_of(w).tolist() == [1, -1, 1, 0]


@pytest.mark.parametrize(("per", "axis"), [("tensor", None), ("row", 1), ("channel", 0)])
def test_int8_is_round_of_127_x_over_the_maximum(per, axis):
    x = np.random.default_rng(0).standard_normal((6, 10)).astype(np.float32)
    top = np.abs(x).max(axis=axis, keepdims=True)
    w = quantized.int8(jnp.asarray(x), per)
    np.testing.assert_array_equal(w.codes, np.round(127 * x / top))
    assert w.codes.dtype == jnp.int8 and w.scale.size == top.size
    assert np.abs(plain_of(w) - x).max() <= (top / 254).max() * 1.00001


def test_zeros_stay_zeros():
    """Not NaN, although the largest magnitude is 0."""
    x = jnp.zeros((4, 8))
    for name in ("int8-row", "nf4-8-double"):
        assert (plain_of(parse(name).quantize(x)) == 0).all(), name


def test_nf4_has_the_published_levels():
    """The quantiles of a normal distribution that Dettmers et al. (2023) describe: eight below 0 and
    seven above, 0 itself, over the largest."""
    edge = 0.9677083
    above = norm.ppf(np.linspace(edge, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(edge, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, below, [0.0]]))
    np.testing.assert_allclose(quantized.NF4, levels / levels.max(), atol=1e-6)
    assert quantized.NF4[1] == -0.6961928009986877 and quantized.NF4[8] == 0.07958029955625534
    x = jnp.asarray(quantized.NF4) * 3.0
    w = quantized.blockwise(x, "nf4", bits=4, block=16)
    assert indices_of(w).tolist() == list(range(16))
    np.testing.assert_array_equal(plain_of(w), x)


def test_an_outlier_spoils_one_scale_for_all_but_of_blocks_only_its_own():
    x = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    clean = errors(x, quantized.int8(jnp.asarray(x), "tensor"))
    x[3, 5] = 300.0
    spoilt = jnp.asarray(x)
    whole = errors(spoilt, quantized.int8(spoilt, "tensor"))
    leaf = quantized.blockwise(spoilt, "linear", bits=8, block=64)
    assert clean.used_levels > 150 and whole.used_levels < 10
    assert whole.saturated == 1 / x.size
    assert whole.rms > 30 * clean.rms
    apart = np.abs(plain_of(leaf) - x).max(axis=1)  # of each block
    assert apart[3] > 0.5 and np.delete(apart, 3).max() < 0.02


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", [(3, 40), (5, 7)], ids=["whole_rows", "straddling"])
def test_codes_survive_packing_and_take_their_bits(bits, shape):
    """Also where rows are no whole number of bytes or blocks; codes of 3 bits take 3, not 4."""
    codes = np.random.default_rng(bits).integers(0, 2**bits - 1, shape).astype(np.uint8)
    codes.reshape(-1)[::8] = 0  # -1: every block's largest
    x = jnp.asarray(quantized.table("linear", bits))[codes] * 5.0
    w = quantized.blockwise(x, "linear", bits=bits, block=8)
    np.testing.assert_array_equal(indices_of(w), codes)
    np.testing.assert_allclose(plain_of(w), x, rtol=1e-6)
    assert w.codes.size == -(-codes.size // 8) * 8 * bits // 8


SCHEMES = ("int8-row", "int8-tensor", "int8-channel", "nf4-8", "nf4-64-double", "int3-16")


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(16, 64), (6, 28)], ids=["whole_rows", "straddling"])
def test_a_leaf_equals_its_plain_matrix(name, shape):
    """Product, gradient and rows; a backward pass that took the scales twice would be far off."""
    rng = np.random.default_rng(1)
    w = parse(name).quantize(jnp.asarray(rng.standard_normal(shape, np.float32)))
    x = jnp.asarray(rng.standard_normal((3, 2, shape[0]), np.float32))
    plain = plain_of(w)
    assert weights.is_weight(w) and w.shape == shape

    def loss(x, product):
        return jnp.sum(jnp.sin(product(x)))

    @jax.jit
    def both(w, x, plain):
        ours = jax.value_and_grad(partial(loss, product=w.matmul))(x)
        return ours, jax.value_and_grad(partial(loss, product=lambda x: x @ plain))(x), w.rows(ids)

    ids = jnp.array([[0, shape[0] - 1], [2, 2]])
    (ours, grad), (expected, expected_grad), rows = both(w, x, plain)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-5)
    np.testing.assert_allclose(rows, plain[ids], rtol=1e-6)


def test_bfloat16_products_come_from_float32_constants():
    w = parse("nf4-8").quantize(jnp.linspace(-1, 1, 64).reshape(4, 16))
    y = w.matmul(jnp.eye(4, dtype=jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, plain_of(w).astype(jnp.bfloat16))


def test_double_quantisation_takes_an_eighth_of_a_bit_and_little_precision():
    """32 / 64 bits a weight for the constants become 8 / 64 + 32 / (64 * 256)."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((256, 256), np.float32))
    once, twice = (parse(n).quantize(x) for n in ("nf4-64", "nf4-64-double"))
    assert nbytes(once) * 8 / x.size == 4.5
    assert nbytes(twice) * 8 / x.size == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)
    assert errors(x, twice).rms < 1.02 * errors(x, once).rms


def test_layout_cuts_rows_where_they_are_apart():
    x = jnp.ones((4, 16))
    stacked = jax.vmap(parse("nf4-8-double").quantize)(jnp.ones((3, 4, 16)))
    axes = ("layer", "embed", "mlp")
    assert stacked.layout(axes).codes == ("layer", "embed", None)
    assert stacked.layout(axes).constants.codes == ("layer", None)
    assert stacked.layout(axes).constants.offset == ("layer",)
    assert stacked.shape == (3, 4, 16)
    assert parse("nf4-5").quantize(x).layout(("embed", "mlp")).codes == (None,)
    assert quantized.int8(x, "channel").layout(("embed", "mlp")).scale == (None, "mlp")
    assert quantized.int8(x, "row").layout(("embed", "mlp")).scale == ("embed", None)


@pytest.mark.parametrize(
    ("levels", "bits", "block", "words"),
    [
        ((-1.0, 0.0, 0.5, 0.7, 1.0), 2, 4, "5 levels do not fit 2 bits"),
        ((0.0, -1.0), 2, 4, "levels have to rise"),
        ((-1.0, 2.0), 2, 4, "levels have to rise"),
        ("nf4", 4, 0, "a block of 0"),
    ],
)
def test_errors_name_the_numbers(levels, bits, block, words):
    with pytest.raises(ValueError, match=words):
        quantized.blockwise(jnp.ones(4), levels, bits=bits, block=block)
