"""Routing and its penalties by their formulas; any mesh, chunk and dispatch equal one device's
plain sum over experts, in value and gradient; tokens do not see each other, padding is nowhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.config import MeshConfig, MoEConfig
from llm_jax.nn import moe, params
from tests.tiny import tiny_model

B, L, E = 8, 12, 8
LENGTHS = (12, 12, 7, 12, 3, 12, 12, 0)  # the last row is padding alone


def model(**changes):
    """8 experts of 16, everything that has a penalty switched on."""
    d_model = changes.pop("d_model", 32)
    values = {"n_experts": E, "top_k": 2, "d_ff": 16, "bias_rate": 0.001, **changes}
    return tiny_model(d_model=d_model, moe=MoEConfig(**values))


def parameters(cfg, seed=0):
    """Ten times as large as at the start of training, with a bias that moves choices."""
    p = jax.tree.map(lambda a: 10 * a, params.init(moe.specs(cfg, 0.02), jax.random.key(seed)))
    if "bias" in p["router"]:
        p["router"]["bias"] = 0.1 * jax.random.normal(jax.random.key(5), (E,))
    return p


def inputs(cfg):
    x = jax.random.normal(jax.random.key(1), (B, L, cfg.d_model))
    return x, jnp.arange(L)[None, :] < jnp.array(LENGTHS)[:, None]


def loss(p, x, valid, cfg):
    """Reads every output, and each row's penalties with a weight of its own."""
    y, extras = moe.layer(p, x, valid, cfg)
    total = jnp.sum(jnp.sin(1.0 + jnp.arange(L))[None, :, None] * jnp.sin(y))
    for n, name in enumerate(moe.PENALTIES):
        if name in extras:
            total += jnp.sum(jnp.cos(n + jnp.arange(x.shape[0])) * extras[name])
    return total, (y, extras)


@functools.cache
def results(mesh=(), **changes):
    """((loss, (y, extras)), gradients) on a mesh, given as pairs; () is one device."""
    cfg = model(**changes)
    p, (x, valid) = parameters(cfg), inputs(cfg)
    run = jax.jit(
        jax.value_and_grad(functools.partial(loss, cfg=cfg), argnums=(0, 1), has_aux=True)
    )
    if not mesh:
        return run(p, x, valid)
    mesh = sharding.make_mesh(MeshConfig(**{"data": 1, **dict(mesh)}))
    with jax.set_mesh(mesh):
        placed = jax.device_put(p, params.shardings(moe.specs(cfg, 0.02), mesh))
        rows = sharding.named(("batch", "length", None), mesh)
        return run(placed, jax.device_put(x, rows), valid)


def assert_equal(got, want, atol=3e-5):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, atol=atol, rtol=2e-5, err_msg=where)


def route(p, x, valid, cfg):
    return jax.jit(functools.partial(moe.route, cfg=cfg))(p, x, valid)


VARIANTS = {
    "softmax": {},
    "top-1 of raw probabilities": {"top_k": 1, "normalize": False},
    "sigmoid, shared": {"scores": "sigmoid", "n_shared": 2, "top_k": 3, "scale": 2.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_default_equals_every_expert_on_every_token(variant):
    changes = VARIANTS[variant]
    assert_equal(results(**changes), results(implementation="dense", **changes))


MESHES = {
    "data x expert": (("data", 2), ("expert", 4)),
    "fsdp x expert x tensor": (("fsdp", 2), ("expert", 2), ("tensor", 2)),
    # A balance loss of each half of a row's length would differ: f and P are of the whole row.
    "context x expert x tensor": (("context", 2), ("expert", 2), ("tensor", 2)),
    "stage (no pipeline) x expert": (("stage", 2), ("expert", 4)),
    "context x tensor, which 12 tokens do not divide": (("context", 2), ("tensor", 4)),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_any_mesh_equals_one_device(mesh):
    want = results(implementation="dense", scores="sigmoid", n_shared=1)
    assert_equal(results(MESHES[mesh], scores="sigmoid", n_shared=1), want)


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk": 5},  # 24 tokens a device: five chunks, the last one padded
        {"implementation": "ragged"},
        {"dispatch": "all_to_all", "capacity_factor": 8.0},
        {"dispatch": "all_to_all", "capacity_factor": 8.0, "chunk": 5},
    ],
    ids=str,
)
def test_every_dispatch_equals_one_device(changes):
    want = results(implementation="dense", scores="sigmoid", n_shared=1)
    mesh = MESHES["fsdp x expert x tensor"]
    assert_equal(results(mesh, scores="sigmoid", n_shared=1, **changes), want)


def test_stages_under_vmap_equal_one_layer_each():
    """What the pipeline does: the layer vmapped over stages that the mesh cuts."""
    cfg, (x, valid) = model(n_shared=1), inputs(model())
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *(parameters(cfg, seed) for seed in (0, 1)))
    x = jnp.stack([x, x[::-1]])

    def one(p, x):
        return loss(p, x, valid, cfg)

    def total(over):
        def f(p, x):
            values, aux = over(p, x)
            return jnp.sum(values), aux

        return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))

    def in_turn(p, x):
        first, second = (jax.tree.map(lambda a, s=s: a[s], (p, x)) for s in (0, 1))
        return jax.tree.map(lambda *a: jnp.stack(a), one(*first), one(*second))

    want = total(in_turn)(stacked, x)
    mesh = sharding.make_mesh(MeshConfig(data=1, stage=2, expert=2, tensor=2))
    with jax.set_mesh(mesh):
        specs = params.stacked(moe.specs(cfg, 0.02), 2)
        placed = jax.device_put(stacked, params.shardings(specs, mesh))
        assert_equal(total(jax.vmap(one, spmd_axis_name="stage"))(placed, x), want)


def test_weights_are_those_of_the_papers():
    """Mixtral: softmax over the chosen logits. DeepSeek-V3: chosen by score + bias, weighted by
    score alone."""
    x = inputs(model())[0]
    for scores, scale in (("softmax", 1.0), ("sigmoid", 2.5)):
        cfg = model(scores=scores, scale=scale, top_k=3)
        p = parameters(cfg)["router"]
        ids, weights, _ = route(p, x, None, cfg)
        logits = np.asarray(x, np.float64) @ np.asarray(p["w"], np.float64)
        score = 1 / (1 + np.exp(-logits))
        if scores == "softmax":
            score = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        want = np.argsort(-(score + np.asarray(p["bias"])), axis=-1)[..., :3]
        np.testing.assert_array_equal(ids, want)
        assert (np.asarray(ids) != np.argsort(-score, axis=-1)[..., :3]).any()
        chosen = np.take_along_axis(score, want, axis=-1)
        np.testing.assert_allclose(
            weights, scale * chosen / chosen.sum(-1, keepdims=True), rtol=1e-5
        )
        if scores == "softmax":
            logit = np.exp(np.take_along_axis(logits, want, axis=-1))
            np.testing.assert_allclose(weights, logit / logit.sum(-1, keepdims=True), rtol=1e-5)


def test_balance_loss_is_1_a_token_when_balanced_and_up_to_E_over_k_when_collapsed():
    """A router that reads the token's number off a one-hot x; L = 12, of which 8 count."""
    cfg = model(d_model=E, bias_rate=0.0, top_k=1)
    valid = (jnp.arange(L) < 8)[None, :]
    wheel = jax.nn.one_hot(jnp.arange(L) % E, E)[None]
    p = {"w": 50.0 * jnp.eye(E)}
    balanced = route(p, wheel, valid, cfg)[2]
    collapsed = route(p, jnp.broadcast_to(wheel[:, 2:3], wheel.shape), valid, cfg)[2]
    np.testing.assert_allclose(balanced["router_balance"], [8.0], rtol=1e-5)
    np.testing.assert_allclose(collapsed["router_balance"], [8.0 * E], rtol=1e-5)
    np.testing.assert_array_equal(balanced["expert_load"], np.ones((1, E)))
    np.testing.assert_array_equal(collapsed["expert_load"][0], 8 * np.eye(E)[2])
    np.testing.assert_allclose(balanced["router_z"], [8 * 50.0**2], rtol=1e-5)
    undecided = route({"w": jnp.zeros((E, E))}, wheel, valid, cfg)[2]
    np.testing.assert_allclose(undecided["router_entropy"], [8 * np.log(E)], rtol=1e-5)
    np.testing.assert_allclose(undecided["router_z"], [8 * np.log(E) ** 2], rtol=1e-5)


def test_bias_penalty_is_0_and_its_gradient_the_load_error():
    cfg = model()
    p, (x, valid) = parameters(cfg), inputs(cfg)

    def penalty(p):
        return jnp.sum(moe.layer(p, x, valid, cfg)[1]["router_bias"])

    value, grads = jax.jit(jax.value_and_grad(penalty))(p)
    load = np.asarray(results()[0][1][1]["expert_load"]).sum(0)
    assert value == 0 and load.sum() == 2 * sum(LENGTHS) and load.std() > 0
    np.testing.assert_allclose(grads["router"]["bias"], load - load.mean(), rtol=1e-6)
    rest = jax.tree.leaves((grads["experts"], grads["router"]["w"]))
    assert all((np.asarray(g) == 0).all() for g in rest)


def test_rows_do_not_depend_on_each_other_and_padding_on_nothing():
    """Half the batch gives half the rows of every output; garbage in padding changes nothing, and
    a penalty that is a mean over the batch, or that counts padding, would change."""
    cfg = model()
    p, (x, valid) = parameters(cfg), inputs(cfg)
    run = jax.jit(functools.partial(loss, cfg=cfg))
    y, extras = results()[0][1]
    for half in (slice(0, 4), slice(4, 8)):
        want = jax.tree.map(lambda a, half=half: a[half], (y, extras))
        assert_equal(run(p, x[half], valid[half])[1], want)
    garbage = jnp.where(valid[:, :, None], x, 100.0 * x[:, ::-1])
    assert_equal(run(p, garbage, valid)[1], (y, extras))
    assert (np.asarray(y)[~np.asarray(valid)] == 0).all()
    assert set(extras) == set(moe.extras_shapes(cfg, B))
    for name, shape in moe.extras_shapes(cfg, B).items():
        assert extras[name].shape == shape and (np.asarray(extras[name])[7] == 0).all(), name
    d_x = np.asarray(results()[1][1])
    assert (d_x[~np.asarray(valid)] == 0).all() and (d_x[np.asarray(valid)] != 0).any(-1).all()


def test_a_token_does_not_see_the_others():
    """Also under a load that nobody expects: all other tokens the same."""
    cfg = model()
    p, (x, _) = parameters(cfg), inputs(cfg)
    run = jax.jit(lambda x: moe.layer(p, x, None, cfg)[0])
    crowd = jnp.broadcast_to(x[3:4, 5:6], x.shape).at[0, 4].set(x[0, 4])
    np.testing.assert_allclose(run(crowd)[0, 4], run(x)[0, 4], atol=1e-6)


@pytest.mark.parametrize("mesh", [(), (("data", 2), ("expert", 4))], ids=str)
def test_capacity_serves_the_first_tokens_of_each_device(mesh):
    """All 96 tokens want expert 2. One device: 1.25 * 96 / 8 = 15 rows; on 8 devices with 12 tokens
    each, 2 rows (1.25 * 12 / 8, rounded up) for each device."""
    cfg = model(d_model=E, top_k=1, bias_rate=0.0, dispatch="all_to_all", capacity_factor=1.25)
    p = parameters(cfg)
    p["router"]["w"] = 50.0 * jnp.eye(E)
    x = jnp.broadcast_to(jax.nn.one_hot(2, E)[None, None, :], (B, L, E))
    run = jax.jit(lambda p, x: moe.layer(p, x, None, cfg))
    if mesh:
        with jax.set_mesh(sharding.make_mesh(MeshConfig(**dict(mesh)))):
            y, extras = run(p, x)
        served = np.broadcast_to(np.arange(L) < 2, (B, L))
    else:
        y, extras = run(p, x)
        served = np.arange(B * L).reshape(B, L) < 15
    np.testing.assert_array_equal((np.asarray(y) != 0).any(-1), served)
    np.testing.assert_array_equal(extras["dropped"], (~served).sum(1))
    np.testing.assert_array_equal(extras["expert_load"][:, 2], np.full(B, L))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dispatch": "all_to_all", "implementation": "blocks"}, "model.moe.implementation=blocks"),
        ({"mlp_bias": True}, "model.mlp_bias=True"),
    ],
    ids=str,
)
def test_keys_that_exclude_each_other_are_errors(changes, message):
    bias = changes.pop("mlp_bias", False)
    cfg = tiny_model(mlp_bias=bias, moe=MoEConfig(n_experts=E, **changes))
    with pytest.raises(ValueError, match=message):
        moe.specs(cfg, 0.02)
