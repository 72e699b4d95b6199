"""Checks this machine: versions, extras, devices, speed, and a few steps of training.

    python -m experiments.doctor [--json]

Ends with "ok", or with the list of problems and exit code 1.
"""

import importlib.metadata as metadata
import json
import os
import platform
import shutil
import time
from typing import Any

from absl import flags

from experiments.cli import run_main
from llm_jax.train.accelerators import accelerators, unused_accelerators

CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")
LITTLE_DISK = 2e9  # bytes; a checkpoint has to fit


def unmet(distribution: str, extra: str = "") -> list[str]:
    """The requirements of an installed package, or of one extra of it, that are missing or too old.

    Raises:
      importlib.metadata.PackageNotFoundError: `distribution` is not installed.
    """
    from packaging.requirements import Requirement

    wrong = []
    for requirement in map(Requirement, metadata.requires(distribution) or ()):
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        asked = not always and marker.evaluate({"extra": extra}) if extra else always
        if asked:
            try:
                version = metadata.version(requirement.name)
                nested = [u for e in requirement.extras for u in unmet(requirement.name, e)]
            except metadata.PackageNotFoundError:
                wrong.append(str(requirement).partition(";")[0].strip())
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{requirement.name}{requirement.specifier} (has {version})")
            wrong += nested
    return wrong


def packages() -> dict[str, Any]:
    """Versions, and what each extra of llm_jax lacks (None where llm_jax is not installed)."""
    import llm_jax

    versions = {"python": platform.python_version(), "llm_jax": llm_jax.__version__}
    for name in CORE:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    try:
        extras = metadata.metadata("llm_jax").get_all("Provides-Extra") or []
        return {
            "versions": versions,
            "core_unmet": unmet("llm_jax"),
            "extras_unmet": {extra: unmet("llm_jax", extra) for extra in extras},
        }
    except metadata.PackageNotFoundError:
        return {"versions": versions, "core_unmet": [], "extras_unmet": None}


def machine() -> dict[str, Any]:
    """Cores that this process may use, bytes of memory, free bytes of disk in this folder."""
    allowed = getattr(os, "sched_getaffinity", None)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "platform": platform.platform(),
        "cores": len(allowed(0)) if allowed else os.cpu_count(),
        "memory": memory,
        "free_disk": shutil.disk_usage(".").free,
    }


def devices() -> dict[str, Any]:
    """What jax computes on, and where it keeps compiled programs."""
    import jax

    from llm_jax.config import LogConfig

    def memory(device: Any) -> int | None:
        return (device.memory_stats() or {}).get("bytes_limit")

    cache = jax.config.jax_compilation_cache_dir or LogConfig().compilation_cache
    cache = os.path.expanduser(cache)
    files = [entry.stat() for entry in os.scandir(cache)] if os.path.isdir(cache) else []
    return {
        "backend": jax.default_backend(),
        "devices": [{"kind": d.device_kind, "memory": memory(d)} for d in jax.local_devices()],
        "processes": jax.process_count(),
        "compilation_cache": {
            "path": cache,
            "files": len(files),
            "bytes": sum(file.st_size for file in files),
        },
    }


def matmul_speed(dtype: str, n: int) -> float:
    """GFLOP/s of a jitted [n, n] by [n, n] product on the first device: the best of a few."""
    import jax
    import jax.numpy as jnp

    a_NxN = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
    product = jax.jit(jnp.matmul)
    product(a_NxN, a_NxN).block_until_ready()
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        product(a_NxN, a_NxN).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds) / 1e9


def train_a_little(steps: int = 20) -> dict[str, float]:
    """Trains a tiny byte model on one batch, on all devices, through the library's own step.

    Returns the first and the last loss, in nats a byte, and the seconds with compilation.
    """
    import jax
    import numpy as np

    from llm_jax import config, sharding
    from llm_jax.train import program
    from llm_jax.types import Batch

    rows, length = 4 * jax.device_count(), 64
    cfg = config.TrainConfig(steps=steps, batch_size=rows, length=length)
    cfg.model = config.ModelConfig(d_model=64, n_layers=2, n_heads=2, vocab_size=256)
    cfg.optimizer.learning_rate = 1e-2
    config.resolve_model(cfg.model, vocab_size=256, length=length, backend=jax.default_backend())
    config.validate(cfg)
    config.freeze(cfg)
    text = np.frombuffer(json.__doc__.encode() * rows, np.uint8).astype(np.int32)
    text_BxL1 = text[: rows * (length + 1)].reshape(rows, length + 1)
    batch = Batch(
        tokens=text_BxL1[:, :-1],
        targets=text_BxL1[:, 1:],
        weights=np.ones((rows, length), np.float32),
    )
    start = time.perf_counter()
    mesh = sharding.make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        run = program.build(cfg, mesh)
        state, losses = run.init(jax.random.key(0)), []
        for _ in range(steps):
            state, values = run.step(state, program.put(batch, mesh, 1))
            losses.append(float(values["loss"]))
    seconds = time.perf_counter() - start
    return {"steps": steps, "first_loss": losses[0], "last_loss": losses[-1], "seconds": seconds}


def wrong_numbers(training: dict[str, float]) -> list[str]:
    """A problem if `train_a_little` did not learn as it does on a sound installation."""
    first, last = training["first_loss"], training["last_loss"]
    if 4.5 < first < 7 and last < 0.7 * first:
        return []
    return [
        f"{training['steps']} steps on one batch took the loss from {first:.3f} to {last:.3f}; it "
        "should start near ln 256 = 5.5 and fall by a third: jax computes wrong numbers here"
    ]


def one_line(error: Exception) -> str:
    """Kind and message: some errors of jax have no message."""
    platforms = os.environ.get("JAX_PLATFORMS")
    asked = f" (JAX_PLATFORMS={platforms})" if platforms else ""
    return " ".join(f"{type(error).__name__} {error}".split()) + asked


def diagnose() -> dict[str, Any]:
    """Everything the report shows; `problems` is empty on a machine that is fit to train on."""
    found = packages() | {"machine": machine(), "accelerators": accelerators()}
    problems = found["problems"] = []
    for requirement in found["core_unmet"]:
        problems.append(
            f"llm_jax needs {requirement}: pip install '{requirement.partition(' ')[0]}'"
        )
    if found["machine"]["free_disk"] < LITTLE_DISK:
        free = found["machine"]["free_disk"] / 1e9
        problems.append(f"{free:.1f} GB of disk are free in {os.getcwd()}: checkpoints need more")
    try:
        found |= devices()
    except Exception as e:  # a broken driver or plugin: whatever it raises is the finding
        problems.append(f"jax does not start: {one_line(e)}")
        return found
    problems += unused_accelerators(found["accelerators"], found["backend"])
    n = 2048 if found["backend"] == "cpu" else 8192
    found["gflops"] = {dtype: matmul_speed(dtype, n) for dtype in ("float32", "bfloat16")}
    try:
        found["training"] = train_a_little()
        problems += wrong_numbers(found["training"])
    except Exception as e:
        problems.append(f"training does not work: {one_line(e)}")
    return found


def render(found: dict[str, Any]) -> str:
    """The report for people."""
    lines: list[tuple[str, str]] = []

    def size(count: float | None) -> str:
        return f"{count / 1e9:,.1f} GB" if count is not None else "unknown"

    lines.append(
        ("versions", ", ".join(f"{k} {v or 'missing'}" for k, v in found["versions"].items()))
    )
    if found["extras_unmet"] is None:
        lines.append(("extras", "unknown, llm_jax is not installed here: pip install -e ."))
    else:
        there = [extra for extra, lack in found["extras_unmet"].items() if not lack]
        lines.append(("extras", ", ".join(there) or "none"))
        for extra, lack in found["extras_unmet"].items():
            if lack:
                lines.append(
                    ("  missing", f"{extra}: pip install 'llm_jax[{extra}]' ({', '.join(lack)})")
                )
    host = found["machine"]
    lines.append(
        ("machine", f"{host['platform']}, {host['cores']} cores, {size(host['memory'])} memory")
    )
    lines.append(("disk", f"{size(host['free_disk'])} free in {os.getcwd()}"))
    for _, name in found["accelerators"]:
        lines.append(("accelerator", name))
    if "backend" in found:
        kinds = [(d["kind"], d["memory"]) for d in found["devices"]]
        for kind, memory in dict.fromkeys(kinds):
            each = "" if memory is None else f", {size(memory)} each"
            lines.append(
                ("devices", f"{kinds.count((kind, memory))} x {kind} ({found['backend']}){each}")
            )
        cache = found["compilation_cache"]
        lines.append(("cache", f"{cache['path']}, {cache['files']} files, {size(cache['bytes'])}"))
    for dtype, speed in found.get("gflops", {}).items():
        lines.append(("matmul", f"{dtype} {speed:,.0f} GFLOP/s"))
    if "training" in found:
        run = found["training"]
        words = f"loss {run['first_loss']:.3f} -> {run['last_loss']:.3f} in {run['seconds']:.1f} s"
        lines.append(("training", words))
    text = [f"{name:12} {value}" for name, value in lines]
    text += [f"PROBLEM: {problem}" for problem in found["problems"]] or ["ok"]
    return "\n".join(text)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise ValueError(f"doctor takes no argument {argv[1]!r}; see --help")
    found = diagnose()
    print(json.dumps(found, indent=2) if flags.FLAGS.json else render(found))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    flags.DEFINE_boolean("json", False, "print JSON instead of text")
    run_main(main)
