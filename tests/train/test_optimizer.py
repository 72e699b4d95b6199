"""Schedules, masks with full coverage, and optimizer states that are cut like their parameters."""

import jax
import numpy as np
import pytest
from tiny import random_batch, tiny_train

from llm_jax import sharding
from llm_jax.config import MeshConfig, OptimizerConfig
from llm_jax.models import decoder
from llm_jax.nn.params import flatten
from llm_jax.train import optimizer as opt
from llm_jax.train.program import build, put


def rates(steps=100, **changes):
    f = opt.make_schedule(OptimizerConfig(learning_rate=1.0, **changes), steps)
    return np.array([float(f(n)) for n in range(steps + 1)])


def test_schedules():
    cosine = rates(schedule="cosine", warmup_steps=10, final_learning_rate=0.1)
    np.testing.assert_allclose(cosine[:3], [1 / 11, 2 / 11, 3 / 11], rtol=1e-6)
    np.testing.assert_allclose(cosine[[10, 55, 100]], [1.0, 0.55, 0.1], rtol=1e-5)
    linear = rates(schedule="linear", final_learning_rate=0.0)
    np.testing.assert_allclose(linear[[0, 50, 100]], [1.0, 0.5, 0.0], atol=1e-6)
    wsd = rates(schedule="wsd", decay_steps=20)
    np.testing.assert_allclose(wsd[[0, 80, 90, 100]], [1.0, 1.0, 0.5, 0.0], atol=1e-6)
    assert (rates(schedule="constant") == 1).all()
    with pytest.raises(ValueError, match="warmup_steps"):
        rates(warmup_steps=100)
    with pytest.raises(ValueError, match="decay_steps"):
        rates(schedule="wsd", warmup_steps=50, decay_steps=60)


def test_decay_and_freeze_rules_cover_everything():
    cfg = tiny_train(**{"model.norm": "layernorm", "model.norm_bias": True, "model.qkv_bias": True})
    specs = decoder.specs(cfg.model)
    mask = flatten(opt.decay_mask(specs, cfg.optimizer))
    assert {k for k, v in mask.items() if not v} == {
        k for k in mask if k.endswith(("scale", "bias"))
    }
    assert mask["embed/tokens"] and mask["layers/attn/q/w"]
    with pytest.raises(ValueError, match=r"optimizer.decay_rules covers no rule for the parameter"):
        opt.decay_mask(specs, OptimizerConfig(decay_rules=((r"^embed", True),)))
    with pytest.raises(ValueError, match=r"'\^embd' matches no parameter"):
        opt.partition(specs, OptimizerConfig(freeze_rules=((r"^embd", True), (".*", False))))
    with pytest.raises(ValueError, match="freeze every parameter"):
        opt.partition(specs, OptimizerConfig(freeze_rules=((r".*", True),)))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_states_are_cut_like_their_parameters_and_learn_alike_on_a_mesh(name):
    # 128 wide, so that Adafactor factors its second moments.
    cfg = tiny_train(
        **{
            "optimizer.name": name,
            "optimizer.learning_rate": 3e-2 if name == "adafactor" else 3e-3,
            "model.d_model": 128,
            "model.d_ff": 256,
            "model.head_dim": 16,
            "model.n_layers": 1,
        }
    )

    def losses(mesh, devices):
        mesh = sharding.make_mesh(MeshConfig(**mesh), jax.devices()[:devices])
        with jax.set_mesh(mesh):
            program = build(cfg, mesh)
            state = program.init(jax.random.key(0))
            out = []
            for step in range(8):
                state, metrics = program.step(state, put(random_batch(seed=step % 2), mesh, 1))
                out.append(float(metrics["loss"]))
        return out, state

    whole, _ = losses({}, 1)
    cut, state = losses({"data": 1, "fsdp": 4, "tensor": 2}, 8)
    np.testing.assert_allclose(cut, whole, rtol=5e-6)
    assert whole[-1] < whole[0] - 0.05
    big = [x for x in jax.tree.leaves(state.opt_state) if x.size >= 128 * 128]
    if name == "adafactor":
        assert not big  # rows and columns only
        by_path = {
            jax.tree_util.keystr(p): x
            for p, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
        }
        rows, cols = (
            next(x for p, x in by_path.items() if f".{field}" in p and "'up'" in p)
            for field in ("v_row", "v_col")
        )
        assert rows.shape == (1, 128) and rows.addressable_shards[0].data.shape == (
            1,
            32,
        )  # embed: fsdp
        assert cols.shape == (1, 256) and cols.addressable_shards[0].data.shape == (
            1,
            128,
        )  # mlp: tensor
    else:
        assert big
    for x in big:
        assert x.addressable_shards[0].data.size == x.size // 8
