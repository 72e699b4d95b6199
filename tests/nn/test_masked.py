"""Pruned leaves: what they multiply by, and what gets a gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.nn import weights
from llm_jax.nn.masked import Masked, Scored

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.standard_normal((4, 6), np.float32))
X = jnp.asarray(RNG.standard_normal((3, 4), np.float32))
G = jnp.asarray(RNG.standard_normal((3, 6), np.float32))


def test_masked_weights_count_as_zero_and_get_no_gradient():
    mask = jnp.asarray(RNG.random((4, 6)) < 0.5)
    leaf = Masked(W, mask)
    assert weights.is_weight(leaf) and leaf.shape == W.shape

    @jax.jit
    def run(w):
        value = lambda w: jnp.sum(Masked(w, mask).matmul(X) * G)  # noqa: E731
        return leaf.matmul(X), jax.grad(value)(w), leaf.rows(jnp.array([3, 0]))

    y, grad, rows = run(W)
    np.testing.assert_allclose(y, X @ (W * mask), rtol=1e-5)
    np.testing.assert_allclose(grad, (X.T @ G) * mask, rtol=1e-5)
    np.testing.assert_array_equal(rows, (W * mask)[jnp.array([3, 0])])


def test_scores_get_the_straight_through_gradient_of_pruned_weights_too():
    """dL/dscores = dL/dw_used * w everywhere (Sanh et al. 2020, equation 2); a gradient through the
    masked product alone would be 0 where a weight is pruned, which then never comes back."""
    scores = jnp.asarray(RNG.standard_normal((4, 6), np.float32))
    threshold = jnp.float32(0.1)

    @jax.jit
    def run(w, scores):
        value = lambda w, s: jnp.sum(Scored(w, s, threshold).matmul(X) * G)  # noqa: E731
        return Scored(w, scores, threshold).matmul(X), jax.grad(value, argnums=(0, 1))(w, scores)

    y, (grad_w, grad_scores) = run(W, scores)
    kept = scores >= threshold
    assert 0 < int(kept.sum()) < kept.size
    np.testing.assert_allclose(y, X @ (W * kept), rtol=1e-5)
    np.testing.assert_allclose(grad_w, (X.T @ G) * kept, rtol=1e-5)
    np.testing.assert_allclose(grad_scores, (X.T @ G) * W, rtol=1e-5)


def test_stacked_leaves_have_a_threshold_a_layer():
    leaf = Scored(jnp.ones((2, 3, 4)), jnp.zeros((2, 3, 4)), jnp.array([-1.0, 1.0]))
    plain = leaf.dequantize(jnp.float32)
    assert (plain[0] == 1).all() and (plain[1] == 0).all()
    axes = ("layer", "embed", "mlp")
    assert leaf.layout(axes) == Scored(axes, axes, ("layer",))
    assert Masked(leaf.w, leaf.w > 0).layout(axes) == Masked(axes, axes)
