"""Keys and values held as int8 while decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_batch, tiny_model

from llm_jax import models
from llm_jax.decode.generate import generate_tokens
from llm_jax.decode.sampling import make_sampling
from llm_jax.nn import cached
from llm_jax.nn import params as nn_params
from llm_jax.peft.quantization import nbytes

M, B, K, S, DH = 2, 3, 2, 6, 8


@pytest.mark.parametrize("queued", [False, True], ids=["stacked", "queue"])
def test_what_127_steps_can_say_comes_back_exactly(queued):
    """Several slots, then one more, into layer 1; a scale for a whole call would spoil the second."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (2, B, 4, K, DH)).astype(np.float32)
    codes[..., 0] = 127
    # Powers of two, a different one for each row, slot and head, lose nothing.
    scale = 2.0 ** rng.integers(-9, 9, (2, B, 4, K, 1))
    k, v = jnp.asarray(codes * scale * 127, jnp.float32) / 127
    k = k.at[0, 0, 0].set(0.0)  # nothing but zeros
    layers = cached.empty({"k": (M, B, K, S, DH), "v": (M, B, K, S, DH)}, "int8")

    @jax.jit
    def run(k, v, layers):
        if queued:
            layers = cached.queue(layers, M)
            layers = (*layers[1:], layers[0])  # layer 0 has had its turn
        *_, layers = cached.append(k[:, :3], v[:, :3], layers, jnp.int32(0), 1)
        if queued:
            layers = (*layers[1:], layers[0])
        return cached.append(k[:, 3:], v[:, 3:], layers, jnp.int32(3), 1)

    got_k, got_v, layers = run(k, v, layers)
    own = layers[-1] if queued else jax.tree.map(lambda x: x[1], layers)
    assert own["k"].dtype == own["v"].dtype == jnp.int8
    for got, x in ((got_k, k), (got_v, v)):
        x = x.transpose(0, 2, 1, 3)
        got = np.asarray(got).reshape(B, K, S, DH)
        np.testing.assert_allclose(got[:, :, :4], x, rtol=1e-6)
        np.testing.assert_array_equal(got[:, :, 4:], 0.0)


def made(**changes):
    cfg = tiny_model(n_heads=4, kv_heads=2, d_model=128, **changes)  # heads of 32
    specs = models.family(cfg.family).specs(cfg)
    return cfg, jax.jit(lambda key: nn_params.init(specs, key))(jax.random.key(0))


def decoded(params, cfg, prompts):
    n = prompts.shape[1]
    return generate_tokens(
        params,
        prompts,
        np.full(len(prompts), n, np.int32),
        np.int32(16),
        jax.random.split(jax.random.key(0), len(prompts)),
        make_sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0),
        np.array([-1], np.int32),
        None,
        cfg=cfg,
        n_slots=16,
    )


def test_greedy_tokens_are_mostly_the_same():
    """Through prefill and decoding, layers in a queue. 64 tokens of a random model, of whose logits
    many are close to one another."""
    prompts = np.asarray(random_batch(rows=4, length=12).tokens)
    cfg, params = made()
    small, _ = made(cache_dtype="int8")
    plain, ours = decoded(params, cfg, prompts), decoded(params, small, prompts)
    same = np.asarray(plain.tokens) == np.asarray(ours.tokens)
    assert same.mean() > 0.9
    apart = np.abs(plain.log_probs - ours.log_probs)[same]
    assert 0 < apart.max() < 0.02  # and not 0: the cache is used


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_scores_through_the_cache_are_close(scan):
    cfg, params = made(scan=scan)
    small, _ = made(scan=scan, cache_dtype="int8")
    model, batch = models.family(cfg.family), random_batch(rows=2)

    @jax.jit
    def run(params):
        out = []
        for c in (cfg, small):
            cache = model.init_cache(params, batch, c, 16)
            out.append((model.scores(params, batch, c, cache=cache).log_probs, cache.layers))
        return out

    (plain, layers), (ours, small_layers) = run(params)
    assert 0 < np.abs(plain - ours).max() < 0.02
    assert nbytes(small_layers) == nbytes(layers) * (1 / 4 + 1 / 32)  # and a float32 for 32 codes


def test_a_prefix_is_written_as_int8_too():
    cfg, params = made(cache_dtype="int8")
    params["prefix"] = {"embeddings": jnp.ones((3, 128)) * 0.02}
    init_cache, batch = models.family(cfg.family).init_cache, random_batch(rows=2)
    cache = jax.jit(lambda params: init_cache(params, batch, cfg, 4))(params)
    assert cache.layers["k"].dtype == jnp.int8 and cache.length == 7
    assert bool((cache.layers["k_scale"][:, :, :, :3] > 0).all())
    assert bool((cache.layers["k_scale"][:, :, :, 3:] == 0).all())
