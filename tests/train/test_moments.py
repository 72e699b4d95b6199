"""Moments in bfloat16: half the bytes, rounding without bias, the same learning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_batch, tiny_train

from llm_jax import config as configs
from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.train.moments import round_stochastically
from llm_jax.train.program import build, put

STEP = jnp.int32(7)


def test_rounding_has_no_bias_and_keeps_what_is_exact():
    x = jax.random.uniform(jax.random.key(0), (200_000,), minval=1.0, maxval=2.0)
    rounded = round_stochastically(x, STEP).astype(jnp.float32)
    assert float(jnp.max(jnp.abs(rounded - x))) <= 2**-7  # a neighbour, never further
    # Spacing 2**-7: the error of a mean of 200,000 is about 2**-7 / sqrt(6 * 200,000) = 7e-6, and
    # cutting bits off would give -2**-8 = -4e-3.
    assert abs(float(jnp.mean(rounded - x))) < 4e-5
    exact = jnp.array([0.0, -0.0, 1.0, -2.5, 3e38, 1e-30, jnp.inf, -jnp.inf], jnp.float32)
    exact = exact.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(round_stochastically(exact, STEP).astype(jnp.float32), exact)
    assert jnp.isnan(round_stochastically(jnp.array([jnp.nan]), STEP))[0]


def test_a_slow_average_keeps_moving():
    """An average that decays by a thousandth a step stays where it is if the nearest is taken."""

    start = jax.random.uniform(jax.random.key(0), (2000,), minval=1.0, maxval=2.0)
    start = start.astype(jnp.bfloat16)

    def run(narrow):
        def one(x, step):
            return narrow(0.999 * x.astype(jnp.float32), step), None

        return jax.lax.scan(one, start, jnp.arange(1000))[0]

    stuck = run(lambda x, step: x.astype(jnp.bfloat16))
    np.testing.assert_array_equal(stuck.astype(jnp.float32), start.astype(jnp.float32))
    moved = run(round_stochastically).astype(jnp.float32)
    ratio = moved / start.astype(jnp.float32)
    assert float(jnp.mean(ratio)) == pytest.approx(0.999**1000, rel=0.01)
    # A coin that were the same at every step would leave some numbers where they are.
    assert float(jnp.max(ratio)) < 0.55


def run(mesh=None, devices=1, **changes):
    cfg = tiny_train(**{"optimizer.learning_rate": 3e-3} | changes)
    mesh = sharding.make_mesh(MeshConfig(**(mesh or {})), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        program = build(cfg, mesh)
        state = program.init(jax.random.key(0))
        for step in range(12):
            state, metrics = program.step(state, put(random_batch(seed=step % 2), mesh, 1))
    assert int(state.bad_steps) == 0
    return state, float(metrics["loss"])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_with_half_the_state(name):
    wide, loss = run(**{"optimizer.name": name})
    narrow, narrow_loss = run(**{"optimizer.name": name, "optimizer.moment_dtype": "bfloat16"})
    size = lambda state: sum(x.nbytes for x in jax.tree.leaves(state.opt_state))  # noqa: E731
    assert size(narrow) < 0.51 * size(wide)
    assert narrow_loss == pytest.approx(loss, rel=5e-3)
    assert {x.dtype for x in jax.tree.leaves(narrow.params)} == {jnp.dtype("float32")}


def test_moments_are_cut_on_a_mesh():
    narrow = {"optimizer.moment_dtype": "bfloat16"}
    _, whole = run(**narrow)
    state, cut = run({"data": 1, "fsdp": 4, "tensor": 2}, 8, **narrow)
    # Coins depend on the last bits of sums, which a mesh changes: not equal, but alike.
    assert cut == pytest.approx(whole, rel=2e-3)
    leaf = max(jax.tree.leaves(state.opt_state), key=lambda x: x.size)
    assert leaf.addressable_shards[0].data.size == leaf.size // 8


def test_adafactor_is_refused():
    cfg = configs.TrainConfig()
    configs.override(cfg, {"optimizer.name": "adafactor", "optimizer.moment_dtype": "bfloat16"})
    with pytest.raises(ValueError, match="moment_dtype=bfloat16 is for adamw and muon"):
        configs.validate(cfg)
