"""Remedies against forgetting: equal to their formulas, on any mesh, and nothing when off."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_step import run
from tiny import random_batch, tiny_train

from llm_jax import config as configs
from llm_jax import sharding, tokenizers
from llm_jax.nn.params import flatten
from llm_jax.train import checkpoint, in_memory
from llm_jax.train import step as steps
from llm_jax.train.program import abstract_state, build, put
from llm_jax.train.regularization import penalise_norm, toward_start
from llm_jax.types import Loss, Mean, TrainState

ONE = {"model.n_layers": 1, "model.d_ff": 32}
BOTH = {**ONE, "optimizer.gradient_penalty": 0.03, "optimizer.l2_to_start": 0.2}


def gradient_of(cfg, loss_fn, moved=0.0):
    """(start, gradient that reaches the optimizer) of one step; the optimizer is plain SGD."""
    sgd = optax.sgd(1.0)
    if cfg.optimizer.l2_to_start:
        sgd = optax.chain(toward_start(cfg.optimizer.l2_to_start), sgd)
    start = {"x": jnp.float32([1.0, -2.0, 0.5]), "y": jnp.float32([[3.0]])}
    state = TrainState(
        step=jnp.int32(0),
        key=jax.random.key(0),
        params=jax.tree.map(lambda p: p + moved, start),
        frozen=None,
        opt_state=sgd.init(start),
        ema=None,
        carry=None,
        bad_steps=jnp.int32(0),
    )
    new, metrics = steps.make_train_step(loss_fn, sgd, cfg)(
        state, put(random_batch(), sharding.make_mesh(configs.MeshConfig(), jax.devices()[:1]), 1)
    )
    grads = jax.tree.map(lambda old, now: np.asarray(old - now), state.params, new.params)
    return jax.device_get(state.params), grads, metrics


HESSIAN = np.float32([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 4.0]])


def quadratic(params, batch, carry, keys):
    """1/2 x'Hx + 3 y^2, whose gradients are linear."""
    del batch, keys
    x, y = params["x"], params["y"][0, 0]
    total = 0.5 * x @ jnp.array(HESSIAN) @ x + 3 * y * y
    return Loss(terms={"l": Mean(total, jnp.float32(1))}), carry


def test_gradient_penalty_is_the_formula():
    strength = 0.3
    cfg = tiny_train(
        **{
            "optimizer.gradient_penalty": strength,
            "optimizer.gradient_penalty_radius": 0.1,
            "optimizer.clip_norm": 0.0,
        }
    )
    params, grads, metrics = gradient_of(cfg, quadratic)
    g = {"x": HESSIAN @ params["x"], "y": 6 * params["y"]}
    norm = np.sqrt(sum(np.sum(v**2) for v in g.values()))
    # grad of L + s ||grad L|| = g + s H g / ||g||; a norm for each leaf would give other numbers.
    np.testing.assert_allclose(grads["x"], g["x"] + strength * HESSIAN @ g["x"] / norm, rtol=2e-5)
    np.testing.assert_allclose(grads["y"], g["y"] + strength * 6 * g["y"] / norm, rtol=2e-5)
    value = 0.5 * params["x"] @ HESSIAN @ params["x"] + 3 * params["y"][0, 0] ** 2
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)  # of the loss, at theta itself


def test_l2_to_start_is_the_formula_and_comes_after_the_clipping():
    cfg = tiny_train(**{"optimizer.l2_to_start": 0.25, "optimizer.clip_norm": 1.0})
    moved = 2.0
    params, grads, _ = gradient_of(cfg, quadratic, moved)
    g = {"x": HESSIAN @ params["x"], "y": 6 * params["y"]}
    norm = np.sqrt(sum(np.sum(v**2) for v in g.values()))
    assert norm > 1
    for name, value in g.items():
        # Pulled to 0 it would be 0.25 * theta; clipped together its norm would be 1.
        np.testing.assert_allclose(grads[name], value / norm + 0.25 * moved, rtol=2e-5)


def test_biases_that_balance_experts_are_left_alone():
    grads = {"w": jnp.float32([3.0, 4.0]), "bias": jnp.float32([100.0])}
    params = {"w": jnp.zeros(2), "bias": jnp.zeros(1)}
    asked = []
    learned = {"w": True, "bias": False}

    def gradient(at):
        asked.append(at)
        return {"w": jnp.float32([10.0, 10.0]), "bias": jnp.float32([-1.0])}

    out = penalise_norm(gradient, params, grads, learned, strength=0.05, radius=0.1)
    np.testing.assert_allclose(asked[0]["w"], [0.06, 0.08], rtol=1e-6)
    np.testing.assert_allclose(asked[0]["bias"], [0.0])
    np.testing.assert_allclose(out["w"], [6.5, 7.0], rtol=1e-6)
    np.testing.assert_allclose(out["bias"], [100.0])  # -1 would turn its sign


@pytest.fixture(scope="module")
def reference():
    return run(tiny_train(**BOTH), steps=5)


def test_off_is_bit_identical_and_on_differs(reference):
    plain = run(tiny_train(**ONE), steps=5)
    off = {"optimizer.gradient_penalty_radius": 0.7}  # read by nothing when the penalty is 0
    same = run(tiny_train(**ONE, **off), steps=5)
    jax.tree.map(np.testing.assert_array_equal, plain[2].params, same[2].params)
    np.testing.assert_array_equal(plain[0], same[0])
    assert abs(plain[0] - reference[0])[1:].max() > 1e-4
    np.testing.assert_array_equal(plain[0][0], reference[0][0])  # nothing has moved yet


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_states_hold_the_start_on_two_devices(name, reference):
    cfg = tiny_train(**BOTH, **{"optimizer.name": name})
    one = reference if name == "adamw" else run(cfg, steps=3)
    two = run(cfg, {"data": 1, "fsdp": 2}, 2, steps=len(one[0]))
    np.testing.assert_allclose(two[0], one[0], rtol=3e-6)


def test_start_is_sharded_like_the_parameters():
    cfg = tiny_train(**BOTH, **{"optimizer.moment_dtype": "bfloat16"})
    mesh = sharding.make_mesh(configs.MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        program = build(cfg, mesh)
        state = program.init(jax.random.key(0))
    start = state.opt_state[0].start
    cut = flatten(program.shardings.params)
    for path, leaf in flatten(start).items():
        assert leaf.sharding == cut[path], path
        assert leaf.dtype == jnp.float32  # in bfloat16 the start itself would pull
    jax.tree.map(np.testing.assert_array_equal, start, state.params)


def test_accumulation_is_one_big_batch(reference):
    parts = run(tiny_train(**BOTH, accumulation=4), steps=5, k=4)
    # One micro-batch's own direction for each of them would be off by 1e-3.
    np.testing.assert_allclose(parts[0], reference[0], rtol=3e-6)
    np.testing.assert_allclose(parts[1], reference[1], rtol=3e-5)


def test_a_strong_pull_stays_near_the_start_of_a_given_model():
    def distance(pull):
        cfg = tiny_train(
            steps=8, **ONE, **{"optimizer.l2_to_start": pull, "optimizer.weight_decay": 0.0}
        )
        given = run(tiny_train(**ONE, seed=3), steps=1)[2].params

        def batch(step):
            return random_batch(seed=step % 2)

        trained = in_memory.train(cfg, batch, start=given)
        return sum(
            float(np.sum(np.square(np.asarray(a) - b)))
            for a, b in zip(jax.tree.leaves(trained.params), jax.tree.leaves(given), strict=True)
        )

    assert distance(30.0) < 0.5 * distance(0.0)


def test_resume_keeps_the_start(tmp_path, one_device):
    cfg = tiny_train(**ONE, **{"optimizer.l2_to_start": 1.0})
    tokenizer = tokenizers.train("byte", [])

    def go(program, state, steps):
        for step in steps:
            state, _ = program.step(state, put(random_batch(seed=step), one_device, 1))
        return state

    with jax.set_mesh(one_device):
        program = build(cfg, one_device)
        whole = jax.device_get(go(program, program.init(jax.random.key(0)), range(6)))
        half = go(program, program.init(jax.random.key(0)), range(3))
        kept = checkpoint.Checkpoints(tmp_path, cfg, tokenizer, {})
        kept.save(half, 3, None, wait=True)
        back = kept.restore(abstract_state(program), 3)
        kept.close()
        resumed = jax.device_get(go(program, back, range(3, 6)))
    # A start taken anew at the resume would pull to another place.
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    moved = (
        flatten(resumed.params)["embed/tokens"] - flatten(half.opt_state[0].start)["embed/tokens"]
    )
    assert np.abs(moved).max() > 1e-4


@pytest.mark.parametrize(
    "key, value",
    [("l2_to_start", -1.0), ("gradient_penalty", -0.1), ("gradient_penalty_radius", 0.0)],
)
def test_wrong_numbers_are_named(key, value):
    with pytest.raises(ValueError, match=f"optimizer.{key}={value} has to be"):
        tiny_train(**{f"optimizer.{key}": value})
