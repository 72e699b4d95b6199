"""Names of devices that need not be there."""

import importlib.util

import pytest

from llm_jax import chips
from llm_jax.scaling import topology


def test_parse():
    v5p = topology.parse("v5p:8x8x8,slices=2")
    assert (v5p.chip, v5p.shape, v5p.slices, v5p.n_devices) == ("v5p", (8, 8, 8), 2, 1024)
    assert topology.parse("cpu:8").n_devices == 8
    # JAX sees two devices on a chip of this generation.
    assert topology.parse("ironwood:2x2x1").n_devices == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5e", "is not CHIP:AxB"),
        ("v5e:16*16", "is not CHIP:AxB"),
        ("v5f:4x4", "did you mean 'v5"),
        ("h100:8", "--chip=h100 --devices"),
    ],
)
def test_one_line_errors(text, words):
    with pytest.raises(ValueError, match=words) as e:
        topology.parse(text)
    assert "\n" not in str(e.value)


def test_libtpu_missing_names_the_extra(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else real(name)
    )
    with pytest.raises(ImportError, match=r"pip install 'llm_jax\[plan\]'"):
        topology.devices(topology.parse("v5e:2x2"))


def test_more_virtual_devices_than_jax_has_started_with():
    import jax

    have = len(jax.devices("cpu"))
    assert len(topology.devices(topology.parse(f"cpu:{have}"))) == have
    with pytest.raises(ValueError, match=f"--topology=cpu:{have + 1}: JAX runs with {have} CPU"):
        topology.devices(topology.parse(f"cpu:{have + 1}"))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("TPU v5 lite", "v5e"),  # the shorter "TPU v5" is v5p's
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "ironwood"),
        ("cpu", "cpu"),
    ],
)
def test_chips_by_device_kind(kind, name):
    assert chips.by_kind(kind).name == name


def test_unknown_kinds_and_names():
    assert chips.by_kind("Some Accelerator 9000") is None
    with pytest.raises(ValueError, match="'h10' is known; did you mean 'h100'"):
        chips.find("h10")


def test_table_is_complete():
    wanted = {"h100", "a100-40", "a100-80", "b200", "l40s", "rtx4090", "v4", "v5e", "v5p", "v6e"}
    assert wanted | {"ironwood", "cpu", "h200"} <= set(chips.CHIPS)
    for chip in chips.CHIPS.values():
        assert 0 < chip.efficiency <= 1 and chip.slow_bandwidth <= chip.link_bandwidth, chip.name
        assert chip.link_bandwidth < chip.hbm_bandwidth and chip.price > 0, chip.name
