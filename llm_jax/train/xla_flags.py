"""Compiler flags for each kind of device, tried before they are used.

XLA ends the process at a flag that it does not know, and flags come and go with its versions. So a
set of flags is tried once in a process of its own, each flag alone if the set fails; what passed is
remembered on disk for that version of jaxlib. A flag that the user has set is left as it is.

    from llm_jax.train import xla_flags
    xla_flags.apply()  # before JAX uses a device

`experiments.pretrain` does so as log.xla_flags says.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llm_jax.config import LogConfig
from llm_jax.train.accelerators import accelerators

CACHE = "~/.cache/llm_jax/xla_flags.json"  # beside the compilation cache
FLAGS: dict[str, tuple[str, ...]] = {
    "cpu": (),
    "gpu": (
        # Collectives start early and end late, with matmuls in between.
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        # In a scan over layers, those of one layer run during the work on another.
        "--xla_gpu_enable_pipelined_all_gather=true",
        "--xla_gpu_enable_pipelined_reduce_scatter=true",
        "--xla_gpu_enable_pipelined_all_reduce=true",
    ),
    "tpu": (
        # Collectives run piecewise beside matmuls instead of between them, all-gathers included.
        "--xla_tpu_enable_async_collective_fusion=true",
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
        "--xla_tpu_overlap_compute_collective_tc=true",
        "--xla_enable_async_all_gather=true",
        # Gradient sums between slices overlap with the backward pass, whatever their sizes.
        "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
        "--xla_tpu_data_parallel_opt_different_sized_ops=true",
    ),
}
VARIABLE = {"cpu": "XLA_FLAGS", "gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}
# jax_optimization_level: O1 turns on passes that cost compile time (JAX_OPTIMIZATION_LEVEL).
OPTIMIZATION_LEVEL = {"gpu": "O1"}

# A TPU's library reads its flags when it is loaded; describing a topology loads it without taking
# the chips, or waiting for the other hosts of a pod.
PROBES = {
    "cpu": "import jax; jax.devices('cpu')",
    "gpu": "import jax; jax.devices('gpu')",
    "tpu": "from jax.experimental import topologies; "
    "topologies.get_topology_desc(platform='tpu', topology_name='v4:2x2x1')",
}
PROBE_SECONDS = 120


def platform_to_come() -> str:
    """The platform that JAX is about to choose, by JAX_PLATFORMS and by what the machine has."""
    asked = os.environ.get("JAX_PLATFORMS", "").split(",")[0].strip().lower()
    if asked:
        return {"cuda": "gpu", "rocm": "gpu"}.get(asked, asked)
    kinds = {extra for extra, _ in accelerators()}
    return "tpu" if "tpu" in kinds else "gpu" if "cuda" in kinds else "cpu"


def choose(platform: str, cache: str | os.PathLike = CACHE) -> list[str]:
    """The flags for "cpu", "gpu" or "tpu" that the installed compiler knows.

    Those that it does not know are left out and named in one printed line.
    """
    wanted = FLAGS.get(platform, ())
    if not wanted:
        return []
    file, key = Path(cache).expanduser(), _key(platform, wanted)
    known = _remembered(file).get(key)
    if known is None:
        known = _try(platform, wanted)
        if known is None:
            print(f"no compiler flags are set: the {platform} does not start in a trial process")
            return []
        _remember(file, key, known)
    if dropped := [flag for flag in wanted if flag not in known]:
        print(f"compiler flags that this version does not know are left out: {' '.join(dropped)}")
    return known


def configure(cfg: LogConfig) -> list[str]:
    """`apply` for the platform to come, unless the config says not to."""
    return apply() if cfg.xla_flags == "auto" else []


def apply(platform: str | None = None, cache: str | os.PathLike = CACHE) -> list[str]:
    """Adds the platform's flags to the environment; returns those that were added.

    To be called before JAX uses a device. A flag of the user's is not touched.

    Raises:
      RuntimeError: it is too late, the flags have been read.
    """
    if _started():
        raise RuntimeError(
            "compiler flags are read when JAX first uses a device, which has happened: call "
            "xla_flags.apply() before that"
        )
    platform = platform or platform_to_come()
    variable = VARIABLE.get(platform, "XLA_FLAGS")
    theirs = os.environ.get(variable, "").split()
    names = {_name(flag) for flag in theirs}
    added = [flag for flag in choose(platform, cache) if _name(flag) not in names]
    if added:
        os.environ[variable] = " ".join([*theirs, *added])
    level = OPTIMIZATION_LEVEL.get(platform)
    if level and "JAX_OPTIMIZATION_LEVEL" not in os.environ:
        os.environ["JAX_OPTIMIZATION_LEVEL"] = level  # for child processes
        if "jax" in sys.modules:  # it has read its environment
            import jax

            jax.config.update("jax_optimization_level", level)
    return added


def _name(flag: str) -> str:
    return flag.lstrip("-").partition("=")[0]


def _started() -> bool:
    if "jax" not in sys.modules:
        return False
    # jax has no public name for this question.
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def _key(platform: str, flags: Sequence[str]) -> str:
    compilers = sorted(
        f"{d.name}=={d.version}"
        for d in importlib.metadata.distributions()
        if d.name in ("jaxlib", "libtpu") or d.name.startswith("jax-cuda")
    )
    return " ".join([platform, *compilers, *flags])


def _try(platform: str, flags: Sequence[str]) -> list[str] | None:
    """Those of `flags` with which a process starts; None if it does not start without any."""
    if _starts(platform, flags):
        return list(flags)
    if not _starts(platform, ()):
        return None
    return [flag for flag in flags if _starts(platform, (flag,))]


def _starts(platform: str, flags: Sequence[str]) -> bool:
    """Whether a fresh process with these flags alone gets at the platform."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "LIBTPU_INIT_ARGS": "",
        VARIABLE[platform]: " ".join(flags),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TPU_SKIP_MDS_QUERY": "1",
    }
    if platform != "gpu":
        environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-c", PROBES[platform]]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _remembered(file: Path) -> dict[str, list[str]]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _remember(file: Path, key: str, known: list[str]) -> None:
    """Adds an entry; other processes may be doing the same, and a half-written file helps nobody."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as f:
            json.dump({**_remembered(file), key: known}, f, indent=1)
        os.replace(f.name, file)
    except OSError as e:
        print(f"{file} cannot be written ({e}): compiler flags will be tried again next time")
