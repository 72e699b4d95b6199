"""Fused kernels give what the reference gives, run once under remat, and say why they cannot."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from tiny import tiny_train

from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.nn import attention as A
from llm_jax.nn import fused
from llm_jax.train.program import lower

B, L, DH = 2, 384, 16  # three blocks of queries and of keys
RUN = {"pallas": fused.run_pallas, "splash": fused.run_splash}


def inputs(H=4, K=2, rows=B):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, L, H, DH), (rows, L, K, DH), (rows, L, K, DH), (rows, L, H, DH)]
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def packed():
    """Documents that end within blocks and at their edges, and padding at the end of a row."""
    segments = np.ones((B, L), np.int32)
    segments[0, 100:256], segments[0, 256:] = 2, 0
    segments[1, 17:300], segments[1, 300:] = 2, 3
    return A.Mask((segments, segments))


def pull_back(f, mask, shape):
    """Jitted (q, k, v, do) -> (o, dq, dk, dv)."""

    def value_and_gradient(q, k, v, do):
        o, back = jax.vjp(lambda q, k, v: f(q, k, v, mask, shape), q, k, v)
        return o, *back(do)

    return jax.jit(value_and_gradient)


def assert_equal_to_reference(run, mask, shape, arrays):
    want = pull_back(A.reference, mask, shape)(*arrays)
    got = pull_back(run, mask, shape)(*arrays)
    for name, a, b in zip(("o", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)
    return got


@pytest.mark.parametrize(
    ("name", "documents", "shape"),
    [
        ("pallas", True, {}),
        ("pallas", False, {"causal": False}),
        ("splash", True, {"softcap": 2.0}),
        ("splash", False, {"window": 150}),
    ],
)
def test_equals_reference_in_value_and_gradient(name, documents, shape):
    mask, shape = packed() if documents else A.Mask(), A.Shape(**{"scale": 0.3, **shape})
    run = partial(RUN[name], interpret=True)
    o, dq, dk, dv = assert_equal_to_reference(run, mask, shape, inputs())
    if documents:  # padding sees nobody, itself neither
        for x in (o, dq, dk, dv):
            assert (np.asarray(x)[0, 256:] == 0).all() and np.isfinite(x).all()


def test_keys_of_other_rows():
    """Cross-attention: the documents of the keys end elsewhere than those of the queries."""
    q, k, v, _ = inputs()
    other = np.ones((B, L), np.int32)
    other[:, 50:], other[:, 350:] = 2, 0
    mask, shape = A.Mask((packed().segments[0], other)), A.Shape(causal=False, scale=0.3)
    got = jax.jit(lambda *a: fused.run_splash(*a, mask, shape, interpret=True))(q, k, v)
    np.testing.assert_allclose(got, A.reference(q, k, v, mask, shape), atol=1e-5)
    assert (got[1, 300:] == 0).all()  # document 3 has no keys


@pytest.mark.parametrize("name", ["pallas", "splash"])
def test_on_a_mesh_each_device_does_its_rows_and_heads(name):
    mesh = sharding.make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    run, shape = partial(RUN[name], interpret=True), A.Shape(scale=0.3)
    q, k, v, _ = inputs()
    with jax.set_mesh(mesh):
        if name == "splash":  # both go over the mesh in the same function
            assert_equal_to_reference(run, packed(), shape, inputs())
        inside = str(jax.make_jaxpr(lambda *a: run(*a, packed(), shape))(q, k, v))
        made = "f32[1,384,2,16]" if name == "pallas" else "f32[2,384,16]"
        assert re.search(rf"{re.escape(made)} = pallas_call|:{re.escape(made)}", inside)
        one = [x[:1] for x in (q, k, v)]  # a row that two devices cannot share
        o = jax.jit(lambda *a: run(*a, A.Mask(), shape))(*one)
    np.testing.assert_allclose(o, A.reference(*one, A.Mask(), shape), atol=1e-5)


@pytest.mark.parametrize("name", ["pallas", "splash"])
def test_remat_runs_the_forward_kernel_once(name):
    """Naming the output alone, as for other implementations, would run it again."""
    q, k, v, _ = inputs()

    def f(q, k, v):
        return jnp.sum(jnp.sin(RUN[name](2 * q, 2 * k, 2 * v, packed(), A.Shape(), interpret=True)))

    def kernels(policy):
        kept = jax.checkpoint(f, policy=policy)
        return re.findall(
            r"name=(mha_\w+|splash_\w+)", str(jax.make_jaxpr(jax.grad(kept))(q, k, v))
        )

    policies = jax.checkpoint_policies
    forward = [x for x in kernels(policies.save_only_these_names("attention")) if "_f" in x]
    assert len(forward) == 1
    assert len([x for x in kernels(policies.nothing_saveable) if "_f" in x]) == 2


def arguments(dtype=jnp.bfloat16, length=L, keys=None, heads=4, dh=DH):
    return jnp.zeros((B, length, heads, dh), dtype), jnp.zeros((B, keys or length, 2, dh), dtype)


DOCUMENTS = A.Mask((np.ones((B, L), np.int32),) * 2)


@pytest.mark.parametrize(
    ("name", "platform", "call", "mask", "shape", "reason"),
    [
        ("cudnn", "tpu", {}, A.Mask(), {}, "the backend is tpu"),
        ("pallas", "cpu", {}, A.Mask(), {}, "the backend is cpu"),
        ("splash", "gpu", {}, A.Mask(), {}, "the backend is gpu"),
        ("cudnn", "gpu", {}, DOCUMENTS, {}, "rows hold several documents (data.isolate_documents)"),
        ("cudnn", "gpu", {"dtype": jnp.float32}, A.Mask(), {}, "the compute type is float32"),
        ("cudnn", "gpu", {}, A.Mask(), {"softcap": 2.0}, "attention_softcap is set"),
        ("pallas", "gpu", {}, DOCUMENTS, {"softcap": 2.0}, "attention_softcap is set"),
        ("pallas", "gpu", {}, DOCUMENTS, {"window": 9}, "model.window=9 is set"),
        ("pallas", "gpu", {}, DOCUMENTS, {"causal": False}, "queries and keys may be of different"),
        ("pallas", "gpu", {"dh": 24}, DOCUMENTS, {}, "head_dim=24 is not a multiple of 16"),
        ("pallas", "gpu", {"length": 200}, A.Mask(), {}, "length=200 is not a multiple of 128"),
        ("splash", "tpu", {"length": 200}, A.Mask(), {}, "length=200 is not a multiple of 128"),
        ("splash", "tpu", {"keys": 128}, A.Mask(), {}, "384 queries meet 128 keys"),
        ("splash", "tpu", {}, A.Mask(start=jnp.int32(3)), {}, "it is a cached call"),
    ],
)
def test_says_why_it_cannot(monkeypatch, name, platform, call, mask, shape, reason):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    q, k = arguments(**call)
    message = re.escape(f"model.attention={name} is not available: {reason}")
    with pytest.raises(ValueError, match=message):
        A.attention(q, k, k, mask, A.Shape(**shape), name)


def test_heads_that_devices_cannot_share(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    q, k = arguments()
    with jax.set_mesh(sharding.make_mesh(MeshConfig(tensor=4), jax.devices()[:4])):
        with pytest.raises(ValueError, match=r"mesh.tensor=4 does not divide 4 heads and 2 key"):
            A.attention(q, k, k, A.Mask(), A.Shape(), "splash")


@pytest.mark.parametrize(
    ("platform", "call", "mask", "shape", "chosen"),
    [
        ("gpu", {}, A.Mask(), {}, "cudnn"),
        ("gpu", {}, DOCUMENTS, {}, "pallas"),  # cuDNN's mask would join the documents
        ("gpu", {}, DOCUMENTS, {"window": 9}, "xla"),
        ("gpu", {"dtype": jnp.float32}, A.Mask(), {}, "xla"),
        ("tpu", {}, DOCUMENTS, {"window": 9, "softcap": 2.0}, "splash"),
        ("tpu", {"length": 200}, A.Mask(), {}, "xla"),
        ("tpu", {}, A.Mask(start=jnp.int32(3)), {}, "xla"),
        ("cpu", {}, A.Mask(), {}, "xla"),
    ],
)
def test_auto_chooses(monkeypatch, platform, call, mask, shape, chosen):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    q, k = arguments(**call)
    assert A._choose(q, k, mask, A.Shape(**shape)) == chosen


def test_auto_says_once_that_long_rows_are_not_fused(monkeypatch, caplog):
    A._warn.cache_clear()
    q, k = arguments(dtype=jnp.float32, length=4096)
    for platform in ("cpu", "gpu", "gpu"):
        monkeypatch.setattr(sharding, "platform", lambda platform=platform: platform)
        assert A._choose(q, k, A.Mask(), A.Shape()) == "xla"
        A._choose(q, k, A.Mask(start=jnp.int32(3)), A.Shape())
        A._choose(q[:, :2048], k[:, :2048], A.Mask(), A.Shape())
    (record,) = caplog.records
    said = record.getMessage()
    assert "rows of 4096 tokens" in said and "cudnn: the compute type is float32" in said


@pytest.mark.parametrize("dh", [64, 128])
def test_the_pallas_kernels_lower_for_nvidia_gpus(dh):
    """Forward, its sums for the backward pass, and the backward pass."""

    def both(q, k, segments):
        mask = A.Mask((segments, segments))
        o, back = jax.vjp(lambda q, k, v: fused.run_pallas(q, k, v, mask, A.Shape()), q, k, k)
        return back(o)

    q, k = arguments(dh=dh)
    lowered = jax.jit(both).trace(q, k, DOCUMENTS.segments[0]).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("triton") >= 3


def test_a_train_step_for_tpus_has_the_kernel_three_times():
    """Forward, dq, and dk with dv: with the kernel's forward recomputed there would be four."""
    cfg = tiny_train(
        **{
            "length": 128,
            "model.scan": True,
            "model.remat": "attention",
            "model.dtype": "bfloat16",
            "mesh.data": 2,
            "mesh.tensor": 4,
        }
    )
    mesh = AbstractMesh(
        sharding.mesh_shape(cfg.mesh, 8),
        sharding.MESH_AXES,
        axis_types=(AxisType.Auto,) * 6,
        abstract_device=AbstractDevice(device_kind="TPU v5p", num_cores=1, platform="tpu"),
    )
    assert lower(cfg, mesh).as_text().count("@tpu_custom_call") == 3
