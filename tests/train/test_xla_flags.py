"""Compiler flags are tried in a process of their own before they can end this one."""

import json
import os
import subprocess
import sys

import pytest

from llm_jax.train import xla_flags

KNOWN, BOGUS = "--xla_force_host_platform_device_count=3", "--xla_no_such_flag=true"


@pytest.fixture
def flags(monkeypatch):
    """Sets the CPU's flags, as if JAX had not started; none of the user's own."""

    def put(*values):
        monkeypatch.setitem(xla_flags.FLAGS, "cpu", values)

    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(xla_flags, "_started", lambda: False)
    return put


@pytest.fixture
def never_spawn(monkeypatch):
    def spawn(*_):
        raise AssertionError("a process was started")

    monkeypatch.setattr(xla_flags, "_starts", spawn)


def test_an_unknown_flag_is_left_out_and_named(flags, tmp_path, capsys):
    """For real: XLA ends a process that has it."""
    flags(KNOWN, BOGUS)
    cache = tmp_path / "new" / "flags.json"
    assert xla_flags.choose("cpu", cache) == [KNOWN]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and BOGUS in said and KNOWN not in said
    ((key, known),) = json.loads(cache.read_text()).items()
    assert known == [KNOWN] and "jaxlib==" in key and BOGUS in key


def test_a_known_set_takes_one_trial_and_the_next_time_none(flags, tmp_path, monkeypatch, capsys):
    flags(KNOWN, "--xla_cpu_enable_fast_math=false")
    trials = []
    monkeypatch.setattr(xla_flags, "_starts", lambda _, f: trials.append(f) or True)
    first = xla_flags.choose("cpu", tmp_path / "flags.json")
    assert first == xla_flags.choose("cpu", tmp_path / "flags.json") and len(first) == 2
    assert len(trials) == 1 and capsys.readouterr().out == ""
    flags(KNOWN)  # another set has to be tried again
    xla_flags.choose("cpu", tmp_path / "flags.json")
    assert len(trials) == 2


def test_what_was_left_out_is_named_from_the_cache_too(flags, tmp_path, never_spawn, capsys):
    flags(KNOWN, BOGUS)
    cache = tmp_path / "flags.json"
    cache.write_text(json.dumps({xla_flags._key("cpu", (KNOWN, BOGUS)): [KNOWN]}))
    assert xla_flags.choose("cpu", cache) == [KNOWN]
    assert BOGUS in capsys.readouterr().out


def test_a_backend_that_does_not_start_is_not_the_flags_fault(flags, tmp_path, monkeypatch, capsys):
    flags(KNOWN)
    monkeypatch.setattr(xla_flags, "_starts", lambda *_: False)
    assert xla_flags.choose("cpu", tmp_path / "flags.json") == []
    assert "does not start" in capsys.readouterr().out
    assert not (tmp_path / "flags.json").exists()  # it may start next time


def test_the_users_own_flag_wins(flags, tmp_path, monkeypatch):
    flags(KNOWN, "--xla_cpu_enable_fast_math=true")
    monkeypatch.setattr(xla_flags, "_starts", lambda *_: True)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false --xla_x=1")
    assert xla_flags.apply("cpu", tmp_path / "flags.json") == [KNOWN]
    assert os.environ["XLA_FLAGS"] == f"--xla_cpu_enable_fast_math=false --xla_x=1 {KNOWN}"


def test_applied_flags_take_effect_and_too_late_is_an_error(tmp_path):
    """After `import jax`, before the first device; in a process of its own."""
    program = f"""
import jax
from llm_jax.train import xla_flags
xla_flags.FLAGS["cpu"] = ({KNOWN!r},)
xla_flags.apply("cpu", {str(tmp_path / "flags.json")!r})
assert jax.device_count() == 3, jax.devices()
try:
    xla_flags.apply("cpu")
except RuntimeError as e:
    print(e)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": ""}
    environment.pop("JAX_NUM_CPU_DEVICES")
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "read when JAX first uses a device" in done.stdout


@pytest.mark.parametrize(
    ("asked", "present", "platform"),
    [
        ("", [], "cpu"),
        ("", [("cuda", "NVIDIA H100")], "gpu"),
        ("", [("tpu", "TPU accel0")], "tpu"),
        ("cpu", [("cuda", "NVIDIA H100")], "cpu"),
        ("cuda,cpu", [], "gpu"),
    ],
)
def test_platform_to_come(monkeypatch, asked, present, platform):
    monkeypatch.setenv("JAX_PLATFORMS", asked)
    monkeypatch.setattr(xla_flags, "accelerators", lambda: present)
    assert xla_flags.platform_to_come() == platform


def test_gpus_get_their_optimization_level_unless_the_user_chose(monkeypatch, flags):
    monkeypatch.setattr(xla_flags, "choose", lambda *_: [])
    import jax

    before = jax.config.jax_optimization_level
    monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O0")
    xla_flags.apply("gpu")
    assert jax.config.jax_optimization_level == before
    monkeypatch.delenv("JAX_OPTIMIZATION_LEVEL")
    try:
        xla_flags.apply("gpu")
        assert jax.config.jax_optimization_level == os.environ["JAX_OPTIMIZATION_LEVEL"] == "O1"
    finally:
        jax.config.update("jax_optimization_level", before)
