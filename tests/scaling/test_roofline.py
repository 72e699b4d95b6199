"""Step times by formula, against numbers computed by hand; every assumption counts."""

import dataclasses

import pytest
from jax.sharding import AbstractMesh, AxisType
from tiny import tiny_train

from llm_jax import chips, sharding
from llm_jax.config import MoEConfig
from llm_jax.scaling import roofline
from llm_jax.scaling.assumptions import FLAGS, Assumptions
from llm_jax.scaling.plan import make_plan

# 1 TFLOP/s at full efficiency, 1 TB/s of memory, 100 GB/s of links.
PLAIN = dataclasses.replace(
    chips.find("h100"),
    name="plain",
    peak_flops=1e12,
    efficiency=1.0,
    hbm_bandwidth=1e12,
    link_bandwidth=100e9,
    slow_bandwidth=1e9,
    domain=4,
)


def mesh_of(**sizes) -> AbstractMesh:
    shape = tuple(sizes.get(axis, 1) for axis in sharding.MESH_AXES)
    return AbstractMesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def test_computation_by_hand():
    """Rows of 16: scores are kept, so nothing but the head's logits is computed twice."""
    cfg = tiny_train()
    layers, head = 2 * 2 * (4 * 32 * 32 + 3 * 32 * 64), 2 * 56 * 32  # forward, a token
    scores = 2 * 4 * 32 * 8.5  # layers, two products of 2 FLOPs, heads, keys seen
    assert roofline.hardware_flops(cfg) == 3 * (layers + head + scores) + head
    full = tiny_train(**{"model.remat": "full"})
    assert roofline.hardware_flops(full) == 4 * (layers + head + scores)
    dots = tiny_train(**{"model.remat": "dots"})  # attention's products have a batch dimension
    assert roofline.hardware_flops(dots) == 3 * (layers + head + scores) + head + scores
    times = roofline.estimate(cfg, mesh_of(data=4), Assumptions(PLAIN))
    assert times.compute == pytest.approx(16 * 16 * roofline.hardware_flops(cfg) / 4 / 1e12)


def test_slow_links_between_groups():
    """8 chips in groups of 4: gradients of a group's copies leave it over 4 slow links at once."""
    cfg, a = tiny_train(), Assumptions(PLAIN)
    inside = roofline.estimate(cfg, mesh_of(data=4), a)
    across = roofline.estimate(cfg, mesh_of(data=8), a)
    assert inside.links["data"] == pytest.approx(inside.sent["data"] / 100e9)
    assert across.links["data"] == pytest.approx(across.sent["data"] / (4 * 1e9))
    slices = roofline.estimate(cfg, mesh_of(data=4), a, slices=2)
    assert slices.links["data"] == pytest.approx(slices.sent["data"] / (2 * 1e9))


def test_an_axis_of_a_torus_uses_the_links_of_its_dimensions():
    """fsdp=64 lies along all three dimensions of 4x4x4; fsdp=4 along one."""
    cfg = tiny_train(batch_size=64, **{"model.d_model": 64, "model.head_dim": 8})
    v5p = Assumptions(chips.find("v5p"))
    all_three = roofline.estimate(cfg, mesh_of(fsdp=64), v5p)
    one = roofline.estimate(cfg, mesh_of(data=16, fsdp=4), v5p)
    assert all_three.sent["fsdp"] / all_three.links["fsdp"] == pytest.approx(600e9)
    assert one.sent["fsdp"] / one.links["fsdp"] == pytest.approx(200e9)


def test_what_is_hidden_and_what_is_not():
    times = roofline.Times(
        compute=2.0, memory=1.0, sent={}, links={"fsdp": 2.5, "data": 1.0, "tensor": 0.5}, bubble=0
    )
    assert times.hidden == 3.5 and times.exposed == 0.5
    assert times.step == 3.5 + 0.5  # communication outlasts 3.0 of work
    assert times.bound == "mesh.fsdp"
    assert times._replace(links={"tensor": 0.5}).step == 3.5


def test_a_pipeline_stretches_the_work():
    cfg = tiny_train(**{"model.pipeline_microbatches": 4})
    whole = roofline.estimate(cfg, mesh_of(data=2), Assumptions(PLAIN))
    piped = roofline.estimate(cfg, mesh_of(stage=2), Assumptions(PLAIN))
    assert piped.bubble == pytest.approx(1 / 5)  # (P - 1) / (n + P - 1)
    assert piped.compute == pytest.approx(whole.compute / 0.8)


@pytest.mark.parametrize("name", FLAGS)
def test_changing_an_assumption_changes_the_plan(name):
    """On 8 chips in groups of 4, with experts: every number of the table is in use."""
    moe = MoEConfig(n_experts=4, top_k=2)
    cfg = tiny_train(**{"model.moe": moe, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    given = {"staff": 2.0}
    before = make_plan(cfg, Assumptions(PLAIN, given), 8)
    value = {"domain": 8, "mfu": 0.3, "goodput": 0.5, "efficiency": 0.5, "staff_years": 2.0}
    changed = {
        **given,
        name: value.get(name, 2 * before["assumptions"].get(name, {}).get("value", 0)),
    }
    after = make_plan(cfg, Assumptions(PLAIN, changed), 8)
    told = after["assumptions"][name]
    assert told["source"] == "flag" and told["value"] == changed[name]
    numbers = ("seconds", "step_seconds", "cost_with_staff", "kwh", "co2e_kg", "usable_bytes")
    assert any(before[key] != after[key] for key in numbers), name


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mfu": 1.2}, "--mfu=1.2 is a share"),
        ({"price": -1}, "--price=-1"),
        ({"prize": 1}, "prize"),
    ],
)
def test_assumptions_that_cannot_be(given, words):
    with pytest.raises(ValueError, match=words):
        Assumptions(PLAIN, given)
