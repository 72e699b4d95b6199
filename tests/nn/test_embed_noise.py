"""Noise on embeddings (NEFTune): its size, and that evaluation has none."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny import random_batch, tiny_model

from llm_jax.models.decoder import _noisy


def test_noise_is_within_its_bound_and_depends_on_the_documents_length():
    B, L, D = 4, 12, 16
    keys = jax.vmap(jax.random.key)(jnp.arange(B))
    segments = jnp.array([[1] * 9 + [2] * 3] * B)
    noise = _noisy(jnp.zeros((B, L, D)), segments, keys, 5.0)
    for part, length in ((noise[:, :9], 9), (noise[:, 9:], 3)):
        bound = 5.0 / np.sqrt(length * D)
        assert 0.97 * bound < float(jnp.abs(part).max()) <= bound
        assert abs(float(part.mean())) < 0.1 * bound
    whole = _noisy(jnp.zeros((B, L, D)), None, keys, 5.0)
    assert float(jnp.abs(whole).max()) <= 5.0 / np.sqrt(L * D)
    np.testing.assert_array_equal(_noisy(jnp.ones((B, L, D)), segments, None, 5.0), 1.0)


def test_it_changes_training_alone():
    from llm_jax import models

    model, batch = tiny_model(embed_noise=5.0), random_batch(rows=2)
    family = models.family("decoder")
    from llm_jax.nn import params as nn_params

    params = nn_params.init(family.specs(model), jax.random.key(0))
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    quiet = family.scores(params, batch, model).log_probs
    np.testing.assert_array_equal(quiet, family.scores(params, batch, tiny_model()).log_probs)
    assert not np.allclose(quiet, family.scores(params, batch, model, rng=keys).log_probs)
