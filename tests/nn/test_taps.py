"""Activations as they are inside the model."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from tiny import random_batch, tiny_model

from llm_jax.models import decoder
from llm_jax.nn import params, taps
from llm_jax.nn.layers import norm


def test_marks_are_the_values_that_were_marked():
    def f(tree, y):
        a = checkpoint_name(tree["x"] * 2, "a")
        b = checkpoint_name(a + y, "b")
        return {"out": checkpoint_name(b - 1, "a")}, b

    (out, b), found = taps.record(f)({"x": jnp.arange(3.0)}, 1.0)
    np.testing.assert_array_equal(out["out"], [0, 2, 4])
    assert {k: len(v) for k, v in found.items()} == {"a": 2, "b": 1}
    np.testing.assert_array_equal(found["a"][0], [0, 2, 4])
    np.testing.assert_array_equal(found["b"][0], b)


def test_the_residual_stream_is_the_sum_of_what_is_marked():
    cfg = tiny_model()
    p = params.init(decoder.specs(cfg), jax.random.key(0))
    batch = random_batch()

    @jax.jit
    def look(p, batch):
        return taps.record(lambda p, b: decoder.hidden(p, b, cfg).x)(p, batch)

    x, seen = look(p, batch)
    assert len(seen["attention_out"]) == len(seen["mlp_out"]) == cfg.n_layers
    total = sum(seen["attention_out"]) + sum(seen["mlp_out"]) + seen["embedded"][0]
    np.testing.assert_allclose(norm(p["final_norm"], total, cfg), x, atol=1e-5)
    np.testing.assert_array_equal(seen["trunk"][0], x)
    np.testing.assert_allclose(decoder.hidden(p, batch, cfg).x, x, atol=1e-6)
