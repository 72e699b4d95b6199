"""Money, energy and published runs: the numbers their papers have."""

import pytest

from llm_jax import chips
from llm_jax.scaling import cost, known_runs
from llm_jax.scaling.assumptions import Assumptions

LLAMA = {"mfu": 0.41, "price": 2.0, "power_kw": 0.7, "pue": 1.0, "carbon": 0.22}


def llama(**changes) -> dict:
    return cost.from_totals(405e9, 15.6e12, "h100", 16_000, LLAMA | changes)


def test_llama_3_405b():
    r = llama()
    assert r["flops_6nd"] == pytest.approx(3.8e25, rel=0.01)
    assert r["device_hours"] == pytest.approx(26e6, rel=0.01)
    # 16,000 GPUs for 70 days would be 26.9 million hours.
    assert r["days"] == pytest.approx(68, abs=1) and r["device_hours"] < 70 * 24 * 16_000
    assert r["cost"] == pytest.approx(52e6, rel=0.01)
    assert r["co2e_kg"] == pytest.approx(4.0e6, rel=0.01)
    assert r["weights_fp32_bytes"] == pytest.approx(1.6e12, rel=0.02)
    assert r["checkpoint_bytes"] == pytest.approx(4.9e12, rel=0.01)
    assert not r["over_reporting_threshold"] and r["reporting_threshold"] == 1e26
    assert r["cost_with_staff"] == r["cost"]  # staff is left out unless asked for


def test_staff_is_a_line_of_its_own():
    r = llama(staff=50, staff_cost=500_000)
    assert r["staff_cost"] == 25e6 and r["cost_with_staff"] == pytest.approx(77e6, rel=0.01)


def test_bill_by_hand():
    """2 chips for 1800 s of training in an hour of which half is training: two chip hours."""
    a = Assumptions(chips.find("h100"), {**LLAMA, "goodput": 0.5, "pue": 1.5})
    r = cost.bill(1800, 2, a)
    assert r["device_hours"] == 2 and r["cost"] == 4 and r["days"] == 1 / 24
    assert r["kwh"] == pytest.approx(2 * 0.7 * 1.5) and r["co2e_kg"] == pytest.approx(
        r["kwh"] * 0.22
    )


@pytest.mark.parametrize(
    ("flops", "over", "rules"), [(1e24, False, 0), (1e25, False, 1), (1e26, True, 2)]
)
def test_reporting(flops, over, rules):
    r = cost.reporting(flops)
    assert r["over_reporting_threshold"] is over and len(r["reporting_rules"]) == rules


def test_known_runs():
    rows = known_runs.plans({})
    assert rows["GPT-3 175B"]["flops_6nd"] == pytest.approx(3.14e23, rel=0.01)
    assert rows["Chinchilla 67B"]["flops_6nd"] == pytest.approx(5.76e23, rel=0.05)
    assert rows["Chinchilla 67B"]["tokens_per_param"] == pytest.approx(22.4, abs=0.1)
    assert rows["Llama 3 405B"]["device_hours"] == llama()["device_hours"]
    assert all(r["source"] for r in rows.values())
    dearer = known_runs.plans({"price": 4.0})
    assert dearer["Llama 3 405B"]["cost"] == 2 * rows["Llama 3 405B"]["cost"]
    assert "| 15.60T | 3.79e+25 | 1.62 TB | 4.86 TB |" in "\n".join(known_runs.table(rows))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((1e9, None, "h100", 8), "--tokens"),
        ((1e9, 1e9, None, 8), "--chip"),
        ((1e9, 1e9, "h100", None), "--devices"),
        ((1e9, 1e9, "h1000", 8), "did you mean 'h100'"),
    ],
)
def test_what_is_missing_is_named(args, words):
    with pytest.raises(ValueError, match=words):
        cost.from_totals(*args, {})
