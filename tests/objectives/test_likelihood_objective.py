"""Cross-entropy against hand-made numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.objectives.likelihood import cross_entropy, wanted
from llm_jax.types import Batch, Scores


def example():
    scores = Scores(
        log_probs=jnp.array([[-1.0, -2.0], [-4.0, -jnp.inf]]),
        log_z=jnp.array([[0.0, 3.0], [1.0, 5.0]]),
        correct=jnp.array([[1.0, 0.0], [1.0, 0.0]]),
        mean_log_probs=jnp.array([[-5.0, -5.0], [-6.0, -jnp.inf]]),
    )
    weights = jnp.array([[1.0, 1.0], [1.0, 0.0]])  # the infinite one does not count
    batch = Batch(tokens=jnp.zeros((2, 2), int), weights=weights, bytes=jnp.array([[4, 2], [1, 9]]))
    return scores, batch


def test_per_token_mean():
    loss = cross_entropy(*example())
    assert float(loss.value()) == pytest.approx(
        7 / 3
    )  # a per-row mean would give (1.5 + 4) / 2 = 2.75
    assert float(loss.metrics["accuracy"].value()) == pytest.approx(2 / 3)
    assert float(loss.metrics["nats_per_byte"].value()) == pytest.approx(
        7 / 7
    )  # the 9 does not count


def test_z_loss_and_smoothing():
    loss = cross_entropy(*example(), z_loss=0.1, label_smoothing=0.25)
    smooth = (0.75 * 7 + 0.25 * 16) / 3
    assert float(loss.value()) == pytest.approx(smooth + 0.1 * (0 + 9 + 1) / 3)
    assert float(loss.metrics["nll"].value()) == pytest.approx(7 / 3)
    assert np.isfinite(float(loss.value()))
    assert "mean_log_probs" in wanted(0.1) and "mean_log_probs" not in wanted(0.0)


def test_shapes_are_checked():
    scores, batch = example()
    with pytest.raises(AssertionError):
        cross_entropy(scores, batch.replace(weights=jnp.ones((2, 3))))
