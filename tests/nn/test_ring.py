"""Rows cut over devices give what whole rows give, with balanced work and no gathered keys."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_batch, tiny_train
from train.test_step import run

from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.nn import attention as A
from llm_jax.nn.ring import ring

B, L, DH = 2, 48, 8


def on(**axes):
    mesh = sharding.make_mesh(MeshConfig(**axes), jax.devices()[: math.prod(axes.values())])
    return jax.set_mesh(mesh)


def inputs(H=4, K=2, S=L, dtype=jnp.float32, length=L):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, length, H, DH), (B, S, K, DH), (B, S, K, DH), (B, length, H, DH)]
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def packed():
    """Documents that end within and at the cuts between devices; padding over a whole one."""
    segments, positions = np.zeros((2, B, L), np.int32)
    for row, ends in enumerate(([5, 12, 31, 45], [33])):
        for n, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            segments[row, start:end] = n + 1
            positions[row, start:end] = np.arange(end - start)
    return A.Mask((segments, segments), (positions, positions))


def pull_back(f, mask, shape):
    """Jitted (q, k, v, do) -> (o, (dq, dk, dv))."""

    def value_and_gradient(q, k, v, do):
        o, back = jax.vjp(lambda q, k, v: f(q, k, v, mask, shape), q, k, v)
        return o, back(do)

    return jax.jit(value_and_gradient)


@pytest.mark.parametrize(
    ("mesh", "sizes", "documents", "shape"),
    [
        ({"context": 2}, {"K": 4}, False, {"block": 7}),
        ({"context": 3}, {}, True, {"softcap": 2.0}),
        ({"context": 8}, {}, False, {"window": 30}),
        ({"data": 1, "fsdp": 2, "context": 4}, {"K": 1}, True, {"window": 30, "block": 4}),
        ({"data": 2, "context": 2, "tensor": 2}, {}, True, {"block": 5}),
        ({"context": 4}, {}, True, {"window": 24, "block": 5}),  # keys from two devices back
        ({"context": 3}, {}, True, {"causal": False, "window": 5}),
        ({"context": 4}, {"S": 24}, False, {"causal": False}),
    ],
    ids=str,
)
def test_ring_equals_reference_in_value_and_gradient(mesh, sizes, documents, shape):
    mask, shape = packed() if documents else A.Mask(), A.Shape(**{"scale": 0.3, **shape})
    arrays = inputs(**sizes)
    want = pull_back(A.reference, mask, shape)(*arrays)
    with on(**mesh):
        got = pull_back(ring, mask, shape)(*arrays)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)
    for name, a, b in zip("qkv", got[1], want[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6, err_msg=f"d{name}")
    if documents:
        assert (np.asarray(got[0])[1, 33:] == 0).all()  # padding


def test_no_gradient_from_later_tokens():
    q, k, v, do = inputs()
    with on(context=4):
        ringed = pull_back(ring, A.Mask(), A.Shape())
        for cut in (17, 24, 33):  # within a low stretch, where two meet, within a high one
            _, (_, *grads) = ringed(q, k, v, do.at[:, cut:].set(0))
            for d in map(np.asarray, grads):
                assert (d[:, cut:] == 0).all() and (d[:, :cut] != 0).any(axis=(2, 3)).all()


def test_bfloat16_loses_no_more_than_on_one_device():
    q, k, v, do = inputs(dtype=jnp.bfloat16)
    shape = A.Shape(scale=0.3, block=6)
    exact = pull_back(A.reference, A.Mask(), shape)(*(x.astype(jnp.float32) for x in (q, k, v, do)))

    def errors(f):
        out = jax.tree.leaves(pull_back(f, A.Mask(), shape)(q, k, v, do))
        assert {x.dtype for x in out} == {q.dtype}
        return [
            float(jnp.sqrt(jnp.mean(jnp.square(a.astype(jnp.float32) - b))))
            for a, b in zip(out, jax.tree.leaves(exact), strict=True)
        ]

    whole = errors(A.xla)
    with on(context=8):
        cut = errors(ring)
    # Merging rounded outputs adds 10 % to the error, adding up rounded gradients half of it.
    assert (np.array(cut) < 1.02 * np.array(whole)).all(), (cut, whole)


def test_under_the_pipelines_vmap():
    mask, shape = packed(), A.Shape(scale=0.3)
    segments = jnp.stack([mask.segments[0], mask.segments[0][::-1]])
    arrays = [jnp.stack([x, 0.5 * x + 1]) for x in inputs()]

    def staged(f):
        def one(q, k, v, do, s):
            o, back = jax.vjp(lambda *x: f(*x, A.Mask((s, s)), shape), q, k, v)
            return o, back(do)

        return jax.jit(jax.vmap(one, spmd_axis_name="stage"))

    with on(data=1, stage=2, context=2):
        got = staged(ring)(*arrays, segments)
        assert got[0].sharding.spec[0] == "stage"  # each stage does its own
        want = staged(A.reference)(*arrays, segments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6)


# What it costs -------------------------------------------------------------------------------


def runs(jaxpr, name, times=1):
    """How often a primitive is run, turns of scans counted."""
    total = 0
    for eqn in jaxpr.eqns:
        total += times * (eqn.primitive.name == name)
        turns = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += runs(inner, name, turns)
    return total


@pytest.mark.parametrize("c", [2, 3, 8])
def test_work_and_travel_are_those_of_the_design(c):
    q, k, v, do = inputs()

    def count(name, f, *args):
        return runs(jax.make_jaxpr(f)(*args).jaxpr, name)

    def forward(**shape):
        return lambda q, k, v: ring(q, k, v, A.Mask(), A.Shape(**shape))

    with on(context=c):
        back = pull_back(ring, A.Mask(), A.Shape())
        # Two products a block: three blocks at home, two in each later step. A ring of whole
        # rows would have four in each later step, half of them masked.
        stretches = forward(block=L // (2 * c))
        assert count("dot_general", stretches, q, k, v) == 2 * (3 + 2 * (c - 1))
        # q, k, v and o change places in two halves; k and v go c - 1 steps.
        there = 2 * 4 + 2 * (c - 1)
        assert count("ppermute", forward(), q, k, v) == there
        # The same for do and sum(do * o), and dq, dk, dv; dk and dv go one step more, home.
        assert count("ppermute", back, q, k, v, do) == there + 2 * 8 + 4 * (c - 1) + 2
        # A window of no more than one device's tokens needs the device before, and no zigzag.
        assert count("ppermute", forward(window=5), q, k, v) == 3  # positions travel too
        assert count("dot_general", forward(window=5), q, k, v) == 4
        assert count("ppermute", forward(causal=False), q, k, v) == 2 * (c - 1)


def test_remat_of_attention_keeps_what_the_ring_found():
    q, k, v, _ = inputs()

    def ppermutes(policy):
        f = lambda q: jnp.sum(A.attention(2 * q, k, v, A.Mask(), A.Shape(), "auto"))  # noqa: E731
        f = f if policy is None else jax.checkpoint(f, policy=policy)
        return runs(jax.make_jaxpr(jax.grad(f))(q).jaxpr, "ppermute")

    policies = jax.checkpoint_policies
    with on(context=4):
        plain = ppermutes(None)
        assert ppermutes(policies.save_only_these_names("attention")) == plain
        assert ppermutes(policies.nothing_saveable) > plain  # goes round once more


def test_only_neighbours_talk():
    mask = packed()
    with on(context=4):
        cut = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(None, "context"))
        arrays = [jax.device_put(x, cut) for x in inputs()]
        text = pull_back(ring, mask, A.Shape()).lower(*arrays).compile().as_text()
    kinds = r"(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    assert set(re.findall(kinds, text)) == {"collective-permute"}


def test_long_stretches_keep_no_square_array():
    def temporary(block):
        arrays = [jax.ShapeDtypeStruct((1, 4096, 1, DH), jnp.float32)] * 4
        f = pull_back(ring, A.Mask(), A.Shape(block=block))
        return f.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    square = 4 * 1024 * 1024  # of one of four stretches
    with on(context=2):
        assert temporary(128) < 0.6 * square < square < temporary(1024)


# Who takes it --------------------------------------------------------------------------------


def test_auto_takes_the_ring_where_rows_are_cut():
    q, k, v, _ = inputs()

    def rings(mask):
        f = lambda q: A.attention(q, k, v, mask, A.Shape(), "auto")  # noqa: E731
        return runs(jax.make_jaxpr(f)(q).jaxpr, "ppermute") > 0

    cached = packed()._replace(start=jnp.int32(0))
    assert not rings(A.Mask())
    with on(data=1, tensor=2):
        assert not rings(A.Mask())
    with on(context=2):
        assert rings(A.Mask()) and not rings(cached)


def test_errors_name_the_key(monkeypatch):
    def ask(name, start=0, length=L, **shape):
        q, k, v, _ = inputs(length=length, S=length)
        f = lambda q: A.attention(q, k, v, A.Mask(start=start), A.Shape(**shape), name)  # noqa: E731
        jax.eval_shape(f, q)

    with pytest.raises(ValueError, match=r"model.attention=ring needs mesh.context > 1"):
        ask("ring")
    with on(data=2), pytest.raises(ValueError, match=r"model.attention=ring needs mesh.context"):
        ask("ring")
    with on(context=4):
        with pytest.raises(ValueError, match=r"length=36 is not .* 2 \* mesh.context \(2 \* 4\)"):
            ask("auto", length=36)
        ask("auto", length=36, causal=False)
        with pytest.raises(ValueError, match=r"length=38 is not divisible by mesh.context \(4\)"):
            ask("auto", length=38, causal=False)
        with pytest.raises(ValueError, match="cannot do a cached call"):
            ask("ring", start=jnp.int32(0))
        monkeypatch.setattr(sharding, "platform", lambda: "gpu")
        with pytest.raises(ValueError, match=r"cudnn is not available: mesh.context=4 cuts rows"):
            ask("cudnn")


# The whole model -----------------------------------------------------------------------------


def packed_batch(seed):
    return random_batch(seed=seed, packed=True)


@pytest.fixture(scope="module")
def on_one_device():
    return run(DECODER, make_batch=packed_batch)


# Grouped heads, layers in a scan and rematerialised around the ring.
DECODER = tiny_train(**{"model.scan": True, "model.kv_heads": 2, "model.remat": "attention"})
BESIDE = {"data": 2, "context": 2, "tensor": 2}


@pytest.mark.parametrize(
    "mesh", [{"context": 4}, pytest.param(BESIDE, marks=pytest.mark.slow)], ids=str
)
def test_same_losses_as_on_one_device(on_one_device, mesh):
    want = on_one_device
    losses, norms, _ = run(DECODER, mesh, devices=math.prod(mesh.values()), make_batch=packed_batch)
    np.testing.assert_allclose(norms[0], want[1][0], rtol=2e-6)
    np.testing.assert_allclose(losses, want[0], rtol=2e-6)
    assert want[0][-1] < want[0][0] - 0.1  # it learns, so equality says something
