"""What a run depends on and is not in its config: devices, versions, revision, data, command."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from llm_jax import config as configs
from llm_jax.config import TrainConfig
from llm_jax.train.accelerators import accelerators, unused_accelerators

PACKAGES = (
    "llm_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "sentencepiece",
)
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_OPTIMIZATION_LEVEL")  # of the compiler


def check_accelerator() -> None:
    """Raises ValueError if an accelerator is present but unused and nobody asked for the CPU."""
    asked = os.environ.get("JAX_PLATFORMS", "") or jax.config.jax_platforms or ""
    if jax.default_backend() != "cpu" or "cpu" in asked:
        return
    if problems := unused_accelerators(accelerators(), "cpu"):
        raise ValueError(f"{problems[0]}; or set JAX_PLATFORMS=cpu to run on the CPU on purpose")


def use_compilation_cache(directory: str) -> None:
    """Compiled programs are kept there and found again by the next process; empty: not kept."""
    if directory and not jax.config.jax_compilation_cache_dir:
        path = os.path.expanduser(directory)
        os.makedirs(path, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", path)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def describe() -> dict[str, Any]:
    """Versions, devices and revision."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "device_kind": device.device_kind,
        "processes": jax.process_count(),
        "flags": {name: os.environ[name] for name in FLAGS if os.environ.get(name)},
        "revision": _revision(),
    }


def write(workdir: Path, cfg: TrainConfig, tokenizer_hash: str, data: dict) -> None:
    """config.json and env.json of a run."""
    if jax.process_index() != 0:
        return
    configs.save(cfg, str(workdir / "config.json"))
    env = describe() | {
        "command": " ".join(sys.argv),
        "tokenizer_hash": tokenizer_hash,
        "data": data,
    }
    (workdir / "env.json").write_text(json.dumps(env, indent=2) + "\n")


def config_changes(old: TrainConfig, new: TrainConfig, prefix: str = "") -> list[str]:
    """ "key=new (was old)" of each key that differs."""
    out = []
    for f in dataclasses.fields(old):
        a, b = getattr(old, f.name), getattr(new, f.name)
        if isinstance(a, configs.Config) and isinstance(b, configs.Config):
            out += config_changes(a, b, f"{prefix}{f.name}.")
        elif a != b:
            out.append(f"{prefix}{f.name}={b!r} (was {a!r})")
    return out


def _revision() -> str | None:
    """Revision of the code, with "+changes" if the tree differs from it; None outside git."""
    root = Path(__file__).resolve().parents[2]
    try:
        run = lambda *a: subprocess.run(  # noqa: E731
            ["git", "-C", str(root), *a], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return run("rev-parse", "HEAD") + (
            "+changes" if run("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None
