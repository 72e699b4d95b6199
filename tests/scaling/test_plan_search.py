"""The search finds what the formulas call fastest, and says so when nothing fits."""

import math

import pytest
from tiny import tiny_train

from llm_jax import chips, sharding
from llm_jax.config import MoEConfig
from llm_jax.scaling import search
from llm_jax.scaling.assumptions import Assumptions
from llm_jax.scaling.layout import abstract_mesh
from llm_jax.scaling.plan import predict


def test_the_fastest_of_what_fits_comes_first():
    cfg = tiny_train()
    a = Assumptions(chips.find("h100"))
    found = search.search(cfg, a, 8, top=1000)
    times = [round(c.plan["step_seconds"], 6) for c in found]
    assert len(found) == search.SHORTLIST and times == sorted(times)
    assert all(c.plan["fits"] for c in found)
    for c in found:
        assert math.prod(c.plan["mesh"].values()) == 8
        # The config that comes with it is the one that was judged.
        again = predict(c.cfg, a, abstract_mesh(c.cfg, 8))
        assert again["step_seconds"] == c.plan["step_seconds"]
    assert len(
        {(str(c.plan["mesh"]), c.plan["remat"], c.plan["accumulation"]) for c in found}
    ) == len(found)
    text = search.table(found[:3])
    assert len(text) == 4 and found[0].plan["bound_by"] in text[1]


def test_less_memory_takes_rematerialisation_or_more_pieces():
    """What is fastest with much memory does not fit in little; what is found then does."""
    cfg = tiny_train(batch_size=64, length=128, **{"model.d_ff": 512})
    roomy = search.search(cfg, Assumptions(chips.find("h100")), 2, top=1)[0]
    most = roomy.plan["total_bytes"]
    tight = Assumptions(chips.find("h100"), {"hbm_gb": 0.5 * most / 1e9})
    found = search.search(cfg, tight, 2, top=1)[0]
    assert found.plan["total_bytes"] < 0.5 * most
    assert (found.plan["remat"], found.plan["accumulation"]) != ("none", 1)
    with pytest.raises(ValueError, match=r"nothing fits on 2 h100; nearest is .* with remat full"):
        search.search(cfg, Assumptions(chips.find("h100"), {"hbm_gb": 1e-5}), 2)


def test_experts_are_cut_only_where_there_are_some():
    plain = search.search(tiny_train(), Assumptions(chips.find("h100")), 4, top=1000)
    assert not any("expert" in c.plan["mesh"] for c in plain)
    moe = tiny_train(**{"model.moe": MoEConfig(n_experts=4)})
    some = search.search(moe, Assumptions(chips.find("h100")), 4, top=1000)
    assert any("expert" in c.plan["mesh"] for c in some)


def test_nothing_divides():
    cfg = tiny_train(batch_size=2, length=16)
    with pytest.raises(ValueError, match="no mesh divides this config among 7 h100"):
        search.search(cfg, Assumptions(chips.find("h100")), 7)


def test_meshes_agree_with_the_table_of_axes():
    shapes = {tuple(shape) for shape, _ in search._ways(tiny_train(), 4)}
    assert shapes == {sharding.MESH_AXES}
