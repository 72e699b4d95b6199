"""The pipeline equals the plain stack of layers, and its schedule is what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_batch, tiny_model, tiny_train
from train.test_step import run

from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.models import decoder
from llm_jax.nn import params as P
from llm_jax.nn import pipeline
from llm_jax.objectives import likelihood


def mesh_of(**axes):
    return sharding.make_mesh(
        MeshConfig(**{"data": 1, **axes}), jax.devices()[: np.prod(list(axes.values()))]
    )


def value_and_grads(cfg, batch, mesh):
    params = P.init(decoder.specs(cfg), jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), batch.tokens.shape[0]) if cfg.dropout else None

    def loss(params, batch):
        scores = decoder.scores(params, batch, cfg, rng=keys)
        return likelihood.cross_entropy(scores, batch, penalties={"router_balance": 0.1}).value()

    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, batch))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pipeline_turns": 2},
        {"pipeline_turns": 2, "pipeline_microbatches": 8, "scan": True, "remat": "full"},
        {"dropout": 0.2, "pipeline_microbatches": 4},
        {"moe.n_experts": 8, "moe.d_ff": 32, "moe.z_loss": 0.0, "pipeline_microbatches": 2},
    ],
    ids=str,
)
def test_equals_one_device_in_value_and_gradient(changes):
    """Packed rows, so that segments, positions and row keys have to travel with their rows."""
    changes = {"n_layers": 4, **changes}
    moe = {k: v for k, v in changes.items() if k.startswith("moe.")}
    cfg = tiny_train(**{f"model.{k}": v for k, v in changes.items()}).model
    assert bool(moe) == bool(cfg.moe.n_experts)
    batch = random_batch(packed=True)
    want = value_and_grads(cfg, batch, mesh_of(data=1))
    got = value_and_grads(cfg, batch, mesh_of(data=2, stage=2))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    for (path, a), b in zip(P.flatten(got[1]).items(), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-7, err_msg=path)


@pytest.mark.parametrize(("stages", "turns"), [(4, 1), (4, 2)])
def test_losses_of_a_run_on_many_stages(stages, turns):
    changes = {"model.n_layers": 8, "model.d_model": 16, "model.head_dim": 2, "model.scan": True}
    one = run(tiny_train(**changes), steps=20)
    many = run(
        tiny_train(**changes, **{"model.pipeline_turns": turns}),
        {"data": 1, "stage": stages, "tensor": 2},
        devices=8,
        steps=20,
    )
    np.testing.assert_allclose(many[0], one[0], rtol=2e-6)
    np.testing.assert_allclose(many[1][0], one[1][0], rtol=2e-6)
    assert one[0][-1] < one[0][0] - 0.01


def test_a_stage_holds_its_layers_and_activations_move_by_permutes():
    cfg = tiny_model(n_layers=4, scan=True)
    mesh = mesh_of(stage=4)
    specs = decoder.specs(cfg)
    params = P.init_sharded(specs, jax.random.key(0), mesh)
    assert params["layers"]["mlp"]["up"]["w"].addressable_shards[0].data.shape[0] == 1
    with jax.set_mesh(mesh):
        f = jax.jit(
            lambda p, b: decoder.hidden(p, b, cfg).x, in_shardings=(P.shardings(specs, mesh), None)
        )
        text = f.lower(params, random_batch()).compile().as_text()
    assert "collective-permute" in text
    # A layer's matrix [4, 32, 64] never leaves its stage.
    assert not [line for line in text.splitlines() if "all-gather(" in line and "32,64]" in line]


def test_schedule_by_hand():
    """Micro-batches by default, their limits, and the share of time that is bubble."""
    cfg = tiny_model(n_layers=4)
    assert pipeline.microbatches(cfg, rows=64, shards=2, stages=4) == 16  # 4 a stage
    assert pipeline.microbatches(cfg, rows=12, shards=2, stages=4) == 6
    assert pipeline.bubble(16, 4) == 3 / 19 and pipeline.bubble(16, 4, turns=2) == 3 / 35
    turns = tiny_model(n_layers=4, pipeline_turns=2)
    assert pipeline.microbatches(turns, rows=24, shards=1, stages=4) == 12
    with pytest.raises(ValueError, match=r"pipeline_turns=2 .*mesh.stage=4.*6 rows"):
        pipeline.microbatches(turns, rows=6, shards=1, stages=4)
    with pytest.raises(ValueError, match=r"pipeline_microbatches=3 .*8 rows"):
        pipeline.microbatches(tiny_model(pipeline_microbatches=3), rows=8, shards=1, stages=2)


def test_a_bubble_poisons_nothing():
    """A block that divides by its input's norm would be NaN on rows of zeros."""
    cfg = tiny_model(n_layers=2, scan=True)
    x = jax.random.normal(jax.random.key(0), (4, 16, 32))

    def loss(w, x):
        def block(p, x, side, cache, i):
            return (
                x + p["w"][None, None, :] * x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)),
                None,
                {},
            )

        from llm_jax.nn.stack import stack

        return jnp.sum(stack(block, {"w": w}, x, {}, None, cfg=cfg)[0] ** 2)

    with jax.set_mesh(mesh_of(stage=2)):
        got = jax.jit(jax.grad(loss))(jnp.ones((2, 32)), x)
    want = jax.jit(jax.grad(loss))(jnp.ones((2, 32)), x)
    assert np.isfinite(np.asarray(got)).all()
    np.testing.assert_allclose(got, want, rtol=1e-5)
