"""Layers that are not all alike, and what published architectures add: on meshes as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_batch, tiny_model, tiny_train

from llm_jax import config as configs
from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.decode import generate
from llm_jax.decode.sampling import make_sampling
from llm_jax.models import decoder
from llm_jax.nn import moe
from llm_jax.nn import params as P
from llm_jax.objectives import likelihood
from llm_jax.types import Batch

KINDS = {
    # Gemma 3: windows and a base of their own in all layers but one, two norms around each part.
    "windows": {
        "n_layers": 4,
        "norm_position": "sandwich",
        "norm_unit_offset": True,
        "qk_norm": True,
        "window": 4,
        "global_layers": (2,),
        "rope_theta": 100.0,
        "rope_local_theta": 10.0,
        "embed_scale": 5.0,
    },
    # OLMo 2: one norm over all heads, which a tensor axis cuts.
    "whole_norm": {"norm_position": "reordered", "qk_norm": True, "qk_norm_over": "all"},
    # GLM-4-MoE: a dense layer at the bottom, experts chosen among groups of them.
    "groups": {
        "n_layers": 3,
        "moe": {
            "n_experts": 8,
            "d_ff": 32,
            "n_shared": 1,
            "scores": "sigmoid",
            "bias_rate": 0.001,
            "groups": 4,
            "top_groups": 2,
            "first_dense": 1,
            "balance_loss": 0.0,
            "z_loss": 0.0,
        },
    },
}


def kind(name, **changes):
    values = {**KINDS[name], **changes}
    return tiny_model(**{**values, "moe": configs.MoEConfig(**values.get("moe", {}))})


def value_and_grads(cfg, mesh, batch):
    params = P.init(decoder.specs(cfg), jax.random.key(0))

    def loss(params, batch):
        return likelihood.cross_entropy(
            decoder.scores(params, batch, cfg), batch, penalties={"router_bias": 1.0}
        ).value()

    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, batch))


def mesh_of(**axes):
    n = int(np.prod(list(axes.values())))
    return sharding.make_mesh(MeshConfig(**{"data": 1, **axes}), jax.devices()[:n])


@pytest.fixture(scope="module")
def on_one_device():
    batch, mesh = random_batch(packed=True), mesh_of(data=1)
    return {name: value_and_grads(kind(name), mesh, batch) for name in KINDS}


@pytest.mark.parametrize(
    ("name", "mesh", "changes"),
    [
        ("windows", {}, {"scan": True}),
        ("windows", {"fsdp": 2, "tensor": 2}, {"scan": True, "remat": "full"}),
        pytest.param("windows", {"context": 2}, {"remat": "attention"}, marks=pytest.mark.slow),
        ("windows", {"stage": 2}, {}),
        ("whole_norm", {"data": 2, "fsdp": 2, "tensor": 2}, {}),
        ("groups", {"fsdp": 2, "expert": 2, "tensor": 2}, {"scan": True, "remat": "full"}),
    ],
    ids=str,
)
def test_equals_a_loop_on_one_device(on_one_device, name, mesh, changes):
    want = on_one_device[name]
    cfg = kind(name, **changes)
    got = value_and_grads(cfg, mesh_of(**mesh), random_batch(packed=True))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    for (path, a), b in zip(P.flatten(got[1]).items(), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", ["windows", "groups"])
def test_generation_equals_the_whole_forward(name):
    """Its loop holds layers one by one, and tells which have a window while it is traced."""
    cfg = kind(name, scan=True, init_std=0.2)
    params = P.init(decoder.specs(cfg), jax.random.key(3))
    prompt = random_batch(rows=2, length=7).tokens
    out = generate.generate_tokens(
        params,
        prompt,
        np.array([7, 5], np.int32),
        np.int32(8),
        jax.random.split(jax.random.key(0), 2),
        make_sampling(temperature=0.0),
        np.array([-1], np.int32),
        None,
        cfg=cfg,
        n_slots=8,
    )
    whole = jnp.concatenate([jnp.asarray(prompt), out.tokens], axis=1)
    for row, skip in enumerate((0, 2)):  # a shorter prompt is padded on the left
        tokens = whole[row : row + 1, skip:]
        x = decoder.hidden(params, Batch(tokens=tokens), cfg).x
        best = jnp.argmax(decoder.logits(params, x, cfg)[0], axis=-1)
        assert best[-9:-1].tolist() == out.tokens[row].tolist()


def test_a_pipeline_takes_layers_that_are_alike():
    experts = {f"model.moe.{k}": v for k, v in KINDS["groups"]["moe"].items()}
    cfg = tiny_train(**experts, **{"model.n_layers": 4})
    with pytest.raises(ValueError, match=r"model\.moe\.first_dense=1: a pipeline .* mesh\.stage=2"):
        sharding.check_divisible(cfg, dict(mesh_of(stage=2).shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 3}, "n_experts=8 does not fall into model.moe.groups=3"),
        ({"groups": 8}, "does not fall into model.moe.groups=8 of two or more"),
        ({"groups": 4, "top_groups": 5}, "top_groups=5 has to be at most model.moe.groups=4"),
        ({"groups": 4, "top_groups": 1, "top_k": 3}, "to hold model.moe.top_k=3 experts"),
        ({"first_dense": 2}, "first_dense=2 has to leave some of model.n_layers=2"),
    ],
)
def test_groups_that_cannot_be(changes, message):
    changes = {f"model.moe.{k}": v for k, v in {"n_experts": 8, **changes}.items()}
    with pytest.raises(ValueError, match=message):
        tiny_train(**changes)


def test_layers_without_the_window_have_to_exist():
    with pytest.raises(
        ValueError, match=r"model\.global_layers has layer 2, but model\.n_layers=2"
    ):
        tiny_train(**{"model.window": 4, "model.global_layers": (2,)})


def test_experts_are_chosen_among_the_best_groups():
    """By hand: a group is as good as its best two together, not as its best one."""
    cfg = kind("groups")
    # Groups (0,1) (2,3) (4,5) (6,7); sums .9 + .1, .6 + .5, .7 + .6, .2 + .2: groups 1 and 2.
    wanted = np.array([0.9, 0.1, 0.6, 0.5, 0.7, 0.6, 0.2, 0.2])
    p = {
        "w": jnp.asarray(np.log(wanted / (1 - wanted)), jnp.float32)[None, :],
        "bias": jnp.zeros(8),
    }
    ids, weights, _ = moe.route(p, jnp.ones((1, 1, 1)), None, cfg)
    assert sorted(ids[0, 0].tolist()) == [2, 4]  # the best expert of all, 0, is not among them
    np.testing.assert_allclose(sorted(weights[0, 0]), [0.6 / 1.3, 0.7 / 1.3], rtol=1e-6)
    alone = kind("groups", moe={"n_experts": 8, "scores": "sigmoid"})
    ids, _, _ = moe.route(p, jnp.ones((1, 1, 1)), None, alone)
    assert sorted(ids[0, 0].tolist()) == [0, 4]
