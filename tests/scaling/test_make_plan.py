"""A plan as a whole, and a run's numbers beside it."""

import json

import jax
import pytest
from tiny import tiny_train

from llm_jax import chips, sharding
from llm_jax.config import MeshConfig
from llm_jax.scaling.assumptions import Assumptions
from llm_jax.scaling.plan import compare, make_plan, predict_run

KEYS = """params params_non_embedding flops_per_step argument_bytes temp_bytes predicted_argument_bytes
predicted_temp_bytes hbm_bytes fits compile_seconds step_seconds device_hours cost kwh co2e_kg
assumptions""".split()


@pytest.fixture(scope="module")
def plan():
    return make_plan(tiny_train(**{"mesh.fsdp": 2}), Assumptions(chips.find("h100")), 8)


def test_every_key_is_there_and_ready_for_json(plan):
    assert set(KEYS) <= set(json.loads(json.dumps(plan)))
    assert plan["argument_bytes"] is None and plan["fits"]
    assert plan["mesh"] == {"data": 4, "fsdp": 2}
    assert plan["tokens"] == 30 * 16 * 16 and plan["steps"] == 30
    assert plan["cost"] == pytest.approx(plan["step_seconds"] * 30 * 8 / 3600 * 2.0)


def test_mfu_fixes_the_step_time():
    """Half the peak of two chips; of 6ND FLOPs the same share takes less time."""
    cfg = tiny_train()
    a = Assumptions(chips.find("h100"), {"mfu": 0.5})
    p = make_plan(cfg, a, 2)
    assert p["mfu"] == pytest.approx(0.5)
    per_token = p["flops_per_token"]
    assert p["step_seconds"] == pytest.approx(256 * per_token["mfu"] / (989e12 * 2 * 0.5))
    six = make_plan(cfg, a, 2, convention="6nd", tokens=2560)
    assert six["step_seconds"] == pytest.approx(256 * per_token["6nd"] / (989e12 * 2 * 0.5))
    assert six["days"] == pytest.approx(10 * six["step_seconds"] / 86_400)
    with pytest.raises(ValueError, match="--convention=8nd is not one of 6nd, kaplan"):
        make_plan(cfg, a, 2, convention="8nd")


def test_two_devices_of_one_chip_share_its_peak_its_memory_and_its_price():
    a = Assumptions(chips.find("ironwood"), {"mfu": 0.5})
    p = make_plan(tiny_train(), a, 8)
    assert p["hbm_bytes"] == chips.find("ironwood").hbm_bytes / 2
    assert p["mfu"] == pytest.approx(0.5)
    assert p["device_hours"] == pytest.approx(p["days"] * 24 * 4)


def test_cache_of_decoding():
    """2 layers, keys and values, 4 rows of 100, 8 heads of 4 in float32: half on each of two."""
    p = make_plan(tiny_train(), Assumptions(chips.find("h100")), 2, decode=(4, 100))
    assert p["kv_cache_bytes"] == 2 * 2 * 4 * 100 * 32 * 4 / 2
    with pytest.raises(ValueError, match="--decode_rows=3"):
        make_plan(tiny_train(), Assumptions(chips.find("h100")), 2, decode=(3, 100))


def test_mesh_that_is_not_the_devices():
    cfg = tiny_train(**{"mesh.data": 1, "mesh.fsdp": 4})
    with pytest.raises(ValueError, match=r"mesh.fsdp=4.* 8 devices"):
        make_plan(cfg, Assumptions(chips.find("h100")), 8)


def test_a_run_beside_its_prediction():
    cfg = tiny_train()
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:2])
    predicted = predict_run(cfg, mesh, "cpu", peak_flops=1e11)
    assert predicted["fits"] and predicted["devices"] == 2
    summary = {
        "params": predicted["params"],
        "flops": 2 * predicted["flops"],
        "tokens": 30 * 256,
        "steps": 30,
        "tokens_per_second": predicted["tokens_per_second"] / 4,
        "mfu": None,
    }
    rows = {r["what"]: r for r in compare(predicted, summary, None)}
    assert rows["parameters"]["actual / predicted"] == 1
    assert rows["training FLOPs"]["actual / predicted"] == 2
    assert rows["tokens a second"]["actual / predicted"] == pytest.approx(0.25)
    assert rows["seconds a step"]["actual / predicted"] == pytest.approx(4)
    assert "MFU" not in rows and not any("memory" in what for what in rows)
    stats = {"peak_bytes_in_use": predicted["total_bytes"] * 2}
    memory = compare(predicted, summary, stats)[-1]
    assert memory["actual / predicted"] == 2
    # The measured peak is a device's: twice as fast ones take less time.
    faster = predict_run(cfg, mesh, "cpu", peak_flops=2e11)
    assert faster["seconds"]["computation"] == pytest.approx(
        predicted["seconds"]["computation"] / 2
    )
    # A kind that nobody knows counts as a CPU's core.
    assert predict_run(cfg, mesh, "Some Accelerator 9000")["chip"] == "cpu"
