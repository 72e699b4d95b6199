"""The doctor: what it finds, what it calls a problem, and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import doctor

ROOT = Path(__file__).parents[1]


def install(folder, name, version, *requires, extras=()):
    """A fake installed distribution under `folder`."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Provides-Extra: {extra}" for extra in extras]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires)]))


def fake_nvidia_smi(folder, output, code=0):
    """A folder for PATH whose nvidia-smi prints `output`."""
    folder.mkdir()
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\necho '{output}'\nexit {code}\n")
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def no_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def test_unmet_names_what_is_missing_or_too_old_for_the_package_and_for_each_extra(
    tmp_path, monkeypatch
):
    requires = [
        "fake_old>=2.0",
        "fake_absent>=1.0",
        'fake_elsewhere; sys_platform == "no such system"',
        'fake_old>=1.0; extra == "fine"',
        'fake_none[x]>=3; extra == "gone"',
        'fake_nested[gpu]>=1; extra == "accelerator"',
    ]
    install(tmp_path, "fake_main", "1.0", *requires, extras=("fine", "gone", "accelerator"))
    install(tmp_path, "fake_old", "1.5")
    install(tmp_path, "fake_nested", "1.0", 'fake_plugin==1.0; extra == "gpu"', extras=("gpu",))
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.unmet("fake_main") == ["fake_old>=2.0 (has 1.5)", "fake_absent>=1.0"]
    assert doctor.unmet("fake_main", "fine") == []
    assert doctor.unmet("fake_main", "gone") == ["fake_none[x]>=3"]
    # Looking only at the name would call this extra installed: fake_nested is there, bare.
    assert doctor.unmet("fake_main", "accelerator") == ["fake_plugin==1.0"]


def test_accelerators_are_found_by_their_device_nodes(tmp_path, no_nvidia_smi):
    (tmp_path / "dev" / "accel").mkdir(parents=True)  # a folder of that name holds laptop NPUs
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    root = str(tmp_path)
    nodes = [f"NVIDIA GPU {tmp_path}/dev/nvidia{i}" for i in range(2)]
    assert doctor.accelerators(root) == [("cuda", nodes[0]), ("cuda", nodes[1])]
    (tmp_path / "dev" / "accel0").touch()
    assert doctor.accelerators(root)[2:] == [("tpu", f"TPU {tmp_path}/dev/accel0")]
    assert doctor.accelerators(str(tmp_path / "nothing here")) == []


def test_a_tpu_without_device_node_is_found_on_the_bus_and_a_network_card_is_none(
    tmp_path, no_nvidia_smi
):
    for slot, identity in {"0000:00:04.0": "0x0042", "0000:00:05.0": "0x0063"}.items():
        folder = tmp_path / "sys/bus/pci/devices" / slot
        folder.mkdir(parents=True)
        (folder / "vendor").write_text("0x1ae0\n")
        (folder / "device").write_text(identity + "\n")
    assert doctor.accelerators(str(tmp_path)) == [("tpu", "TPU 0000:00:05.0")]


def test_nvidia_smi_gives_the_names_and_its_failure_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path / "a", "NVIDIA H100, 81559 MiB"))
    assert doctor.accelerators(str(tmp_path)) == [("cuda", "NVIDIA H100, 81559 MiB")]
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path / "b", "has failed", code=9))
    assert doctor.accelerators(str(tmp_path)) == []


def test_an_unused_accelerator_is_a_problem_that_names_its_cure(tmp_path, monkeypatch):
    present = [("cuda", "NVIDIA H100"), ("cuda", "NVIDIA H100"), ("tpu", "TPU 0")]
    monkeypatch.setattr(doctor.metadata, "distributions", list)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert doctor.unused_accelerators(present, "gpu") == []
    assert doctor.unused_accelerators([], "cpu") == []
    gpu, tpu = doctor.unused_accelerators(present, "cpu")
    assert gpu.startswith("2 accelerator(s) present (NVIDIA H100), but jax runs on the CPU")
    assert gpu.endswith("pip install 'llm_jax[cuda]'")
    assert tpu.endswith("pip install 'llm_jax[tpu]'")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert doctor.unused_accelerators(present, "cpu")[0].endswith(
        "JAX_PLATFORMS=cpu hides them, unset it"
    )
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert doctor.unused_accelerators(present, "cpu")[0].endswith("pip install 'llm_jax[cuda]'")
    monkeypatch.undo()
    install(tmp_path, "jax-cuda12-plugin", "0.10.2")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert (
        "the CUDA plugin is installed and does not start"
        in doctor.unused_accelerators(present, "cpu")[0]
    )


def test_the_command_checks_everything_and_fails_on_an_unused_accelerator(tmp_path):
    path = fake_nvidia_smi(tmp_path / "bin", "NVIDIA H100, 81559 MiB")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.doctor", "--json"],
        env=os.environ | {"PATH": path, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout)
    unused = "1 accelerator(s) present (NVIDIA H100, 81559 MiB), but jax runs on the CPU"
    assert [p.partition(":")[0] for p in found["problems"]] == [unused]
    assert done.returncode == 1
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["backend"] == "cpu" and found["machine"]["cores"] >= 1
    assert all(speed > 1 for speed in found["gflops"].values())
    assert found["training"]["last_loss"] < 0.7 * found["training"]["first_loss"]
    text = doctor.render(found)
    assert text.splitlines()[-1].startswith(f"PROBLEM: {unused}")
    found["problems"] = []
    assert doctor.render(found).splitlines()[-1] == "ok"


@pytest.mark.parametrize(("first", "last"), [(5.5, 5.4), (5.5, float("nan")), (0.0, -1.0)])
def test_training_that_does_not_learn_is_a_problem(first, last):
    training = {"steps": 20, "first_loss": first, "last_loss": last, "seconds": 1.0}
    assert "wrong numbers" in doctor.wrong_numbers(training)[0]
    assert doctor.wrong_numbers(training | {"first_loss": 5.5, "last_loss": 3.4}) == []


def test_a_jax_that_does_not_start_is_a_problem_not_a_traceback(monkeypatch):
    def broken():
        raise RuntimeError("driver too old\nsecond line")

    monkeypatch.setattr(doctor, "devices", broken)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    found = doctor.diagnose()
    wanted = "jax does not start: RuntimeError driver too old second line (JAX_PLATFORMS=cuda)"
    assert wanted in found["problems"]
    assert "training" not in found and "PROBLEM: jax does not start" in doctor.render(found)
