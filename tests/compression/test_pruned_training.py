"""Pruning while training: what is pruned stays pruned, and movement finds what is of no use."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import random_batch, tiny_train

from llm_jax import models
from llm_jax.compression.pruned_training import Pruning, _renewed, train
from llm_jax.nn import params as nn_params
from llm_jax.nn.masked import Scored
from llm_jax.nn.params import flatten
from llm_jax.peft import pruning


def run(cfg, plan, seed=0):
    specs = models.family(cfg.model.family).specs(cfg.model)
    params = jax.jit(lambda key: nn_params.init(specs, key))(jax.random.key(seed))
    batch = random_batch(rows=8)
    done = train(cfg, lambda step: batch, params, plan)
    assert not params["embed"]["tokens"].is_deleted()  # a step that donates must not take them
    return params, done


def test_gradually_pruned_weights_are_zero_in_the_end_and_the_rest_learns():
    """On a mesh that cuts the matrices, and so the masks."""
    cfg = tiny_train(
        **{"steps": 16, "batch_size": 8, "mesh.fsdp": 2, "mesh.data": 4}
        | {"optimizer.learning_rate": 1e-2, "optimizer.warmup_steps": 2}
    )
    params, done = run(cfg, Pruning(sparsity=0.75, begin=2, end=10, every=3))
    np.testing.assert_allclose(
        done.sparsities[[0, 1, 2, 4, 5, 8, 9, 10, 15]],
        [0, 0, 0, 0, *[0.75 * (1 - (5 / 8) ** 3)], *[0.75 * (1 - (2 / 8) ** 3)] * 2, 0.75, 0.75],
    )
    assert pruning.sparsity(done.masks) == 0.75 and len(done.masks) == 7
    for path, mask in done.masks.items():
        w = np.asarray(flatten(done.params)[path])
        assert (w[~np.asarray(mask)] == 0).all()
        assert (w[np.asarray(mask)] != np.asarray(flatten(params)[path])[np.asarray(mask)]).any()
    assert done.losses[-1] < done.losses[0] - 0.3


def test_a_model_pruned_at_once_is_trained_as_one_of_masked_leaves():
    """The masks of step 0 are those of the start, and the first loss is the pruned model's."""
    cfg = tiny_train(**{"steps": 2, "batch_size": 8, "mesh.data": 8, "optimizer.warmup_steps": 1})
    params, done = run(cfg, Pruning(sparsity=0.5))
    specs = models.family(cfg.model.family).specs(cfg.model)
    masks = pruning.magnitude_masks(params, specs, 0.5)
    for path, mask in masks.items():
        np.testing.assert_array_equal(mask, done.masks[path])
    batch = random_batch(rows=8)
    score = jax.jit(lambda p: models.family("decoder").scores(p, batch, cfg.model).log_probs)
    expected = -jnp.mean(score(pruning.pruned(params, masks)))
    np.testing.assert_allclose(done.losses[0], expected, rtol=1e-5)


def test_movement_prunes_by_scores_in_a_model():
    cfg = tiny_train(
        **{"steps": 8, "batch_size": 8, "mesh.data": 8}
        | {"optimizer.learning_rate": 1e-2, "optimizer.warmup_steps": 1}
    )
    params, done = run(cfg, Pruning(method="movement", sparsity=0.5, end=5, every=2))
    assert pruning.sparsity(done.masks) == pytest.approx(0.5, abs=1e-3)
    assert done.losses[-1] < done.losses[0]
    specs = models.family(cfg.model.family).specs(cfg.model)
    small = pruning.magnitude_masks(params, specs, 0.5)
    same = np.mean([np.mean(np.asarray(small[p]) == np.asarray(m)) for p, m in done.masks.items()])
    assert same < 0.9  # it is not the magnitudes that decide


def test_when_masks_are_renewed():
    gradual = Pruning(begin=2, end=7, every=3)
    assert [step for step in range(12) if gradual.renews(step)] == [2, 5, 7]
    # Scores go on moving, and the share of weights above a threshold with them.
    movement = Pruning(method="movement", begin=2, end=7, every=3)
    assert [step for step in range(12) if movement.renews(step)] == [2, 5, 7, 8, 11]


def test_what_is_pruned_stays_pruned_whatever_the_others_have_become():
    cfg = tiny_train()
    specs = models.family(cfg.model.family).specs(cfg.model)
    params = nn_params.init(specs, jax.random.key(0))
    small = pruning.magnitude_masks(params, specs, 0.5)
    large_pruned = nn_params.unflatten({path: ~mask for path, mask in small.items()})
    state = SimpleNamespace(params=params, frozen=large_pruned)
    again = _renewed(state, specs, Pruning(), 0.5)
    jax.tree.map(np.testing.assert_array_equal, again, large_pruned)


def test_movement_prunes_a_large_weight_of_no_use_and_magnitude_does_not():
    """y = x0 while the weight of x1 starts large. Training moves it to 0, where it still is the
    larger one when half is pruned: magnitude would take away the one that is needed."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 2), np.float32))
    y = x[:, :1]
    w, scores = jnp.array([[0.2], [3.0]]), jnp.zeros((2, 1))
    optimizer = optax.sgd(0.02)

    def loss(trained, threshold):
        w, scores = trained
        return jnp.mean((Scored(w, scores, threshold).matmul(x) - y) ** 2)

    @jax.jit
    def step(trained, state):
        grads = jax.grad(loss)(trained, jnp.float32(-jnp.inf))
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(trained, updates), state

    trained, state = (w, scores), optimizer.init((w, scores))
    for _ in range(10):
        trained, state = step(trained, state)
    w, scores = trained
    assert abs(w[1, 0]) > abs(w[0, 0])
    assert scores[0, 0] > 0 > scores[1, 0]


@pytest.mark.parametrize(
    ("changes", "plan", "words"),
    [
        ({}, Pruning(end=30), "does not fit a run of steps=30"),
        ({}, Pruning(sparsity=1.0), "sparsity of 1.0"),
        ({}, Pruning(method="random"), "'random' is not one of"),
        ({}, Pruning(method="movement", scope="global"), "scope='global' is for magnitudes"),
        ({"peft.method": "lora"}, Pruning(), "peft.method=lora"),
    ],
)
def test_plans_that_cannot_work(changes, plan, words):
    with pytest.raises(ValueError, match=words):
        train(tiny_train(**changes), lambda step: None, {}, plan)
