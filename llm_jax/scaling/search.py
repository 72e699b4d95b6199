"""The fastest way to run a config on given devices: mesh, rematerialisation and micro-batches.

Every mesh that divides the config is judged roughly first (`llm_jax.mesh.estimate`); the best of
them go through the formulas of a plan.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from llm_jax import config as configs
from llm_jax import mesh as meshes
from llm_jax import sharding
from llm_jax.chips import GB
from llm_jax.config import MeshConfig, TrainConfig
from llm_jax.nn.params import count
from llm_jax.scaling import plan, printout
from llm_jax.scaling.assumptions import Assumptions
from llm_jax.scaling.layout import abstract_mesh, fast_group
from llm_jax.scaling.state import specs_of

REMATS = ("none", "attention", "dots", "full")
SHORTLIST = 96  # that fit, of those that are judged again in the order of their rough time
TRIALS, LAST_RESORT = 480, 16  # judged again at most, and those of the least memory after them
SLACK = 1.5  # how much more than a device's memory the rough estimate may say


class Candidate(NamedTuple):
    """One way to run the config."""

    cfg: TrainConfig  # frozen
    plan: plan.Plan  # by formulas

    def to_json(self) -> dict:
        """What was varied, and what it leads to."""
        kept = (
            "mesh", "remat", "accumulation", "step_seconds", "mfu", "total_bytes", "usable_bytes",
            "fits", "bound_by", "bubble",
        )  # fmt: skip
        return {key: self.plan[key] for key in kept}


def search(
    cfg: TrainConfig, a: Assumptions, n_devices: int, *, slices: int = 1, top: int = 8
) -> list[Candidate]:
    """The `top` fastest that fit, fastest first; of equally fast ones the least memory first.

    Raises:
      ValueError: none fits; it says what comes nearest.
    """
    n_params = count(specs_of(cfg.model))
    memory = a["hbm_gb"] * GB / a.chip.devices
    machine = meshes.Machine(n_devices, memory, fast_group(a, n_devices, slices))
    rough = []  # (time, memory, number, mesh sizes, changed config)
    for shape, changed in _ways(cfg, n_devices):
        judged = meshes.judge(changed, shape, n_params, machine)
        if not isinstance(judged, str):
            rough.append((judged.time, judged.memory, len(rough), shape, changed))
    fitting, others = [], []
    promising = sorted(r for r in rough if r[1] <= SLACK * memory)
    smallest = sorted(rough, key=lambda r: r[1:3])[:LAST_RESORT]
    for *_, shape, changed in promising[:TRIALS] + smallest:
        if len(fitting) == SHORTLIST:
            break
        found = _candidate(changed, shape, a, slices)
        (fitting if found.plan["fits"] else others).append(found)
    if not fitting:
        raise ValueError(_nothing(cfg, others, n_devices, a))
    unique = {str(c.to_json()): c for c in fitting}.values()
    key = lambda c: (round(c.plan["step_seconds"], 6), c.plan["total_bytes"])  # noqa: E731
    return sorted(unique, key=key)[:top]


def _ways(cfg: TrainConfig, n_devices: int) -> Iterator[tuple[dict[str, int], TrainConfig]]:
    """(mesh sizes, changed config) of everything that could be tried."""
    idle = {"expert"} if not cfg.model.moe.n_experts else set()
    every = (
        dict(zip(sharding.MESH_AXES, sizes, strict=True))
        for sizes in meshes.factorisations(n_devices, len(sharding.MESH_AXES))
    )
    shapes = [s for s in every if all(s[axis] == 1 for axis in idle) and _divides(cfg, s)]
    for k in (k for k in _divisors(cfg.batch_size) if k <= 64):
        for remat in REMATS:
            changed = configs.thaw(cfg)
            changed.accumulation, changed.model.remat = k, remat
            configs.freeze(changed)
            yield from ((shape, changed) for shape in shapes)


def _divides(cfg: TrainConfig, shape: dict[str, int]) -> bool:
    """Whether a mesh divides the config at all: in one micro-batch, which is the easiest."""
    whole = configs.thaw(cfg)
    whole.accumulation = 1
    try:
        sharding.check_divisible(whole, shape)
    except ValueError:
        return False
    return True


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _candidate(cfg: TrainConfig, shape: dict[str, int], a: Assumptions, slices: int) -> Candidate:
    own = configs.thaw(cfg)
    own.mesh = MeshConfig(**shape, slices=cfg.mesh.slices)
    configs.freeze(own)
    mesh = abstract_mesh(own, math.prod(shape.values()))
    return Candidate(
        own,
        plan.predict(own, a, mesh, slices=slices)
        | {
            "mesh": {axis: n for axis, n in shape.items() if n > 1},
            "remat": own.model.remat,
            "accumulation": own.accumulation,
        },
    )


def _nothing(cfg: TrainConfig, found: list[Candidate], n_devices: int, a: Assumptions) -> str:
    where = f"{n_devices} {a.chip.name}"
    if not found:
        return (
            f"--search: no mesh divides {cfg.name or 'this config'} among {where}; change --devices"
        )
    p = min(found, key=lambda c: c.plan["total_bytes"]).plan
    return (
        f"--search: nothing fits on {where}; nearest is {printout.mesh(p['mesh'])} with remat "
        f"{p['remat']} and accumulation={p['accumulation']}, {printout.size(p['total_bytes'])} of "
        f"{printout.size(p['usable_bytes'])} a device; use more devices or a smaller length"
    )


def table(found: list[Candidate]) -> list[str]:
    """One row for each, and why it is no faster."""
    rows = [("", "mesh", "remat", "micro-batches", "step", "MFU", "memory", "bound by")]
    for n, c in enumerate(found, 1):
        p = c.plan
        idle = f", pipeline idle {p['bubble']:.0%}" if p["bubble"] else ""
        rows.append(
            (
                str(n),
                printout.mesh(p["mesh"]),
                p["remat"],
                str(p["accumulation"]),
                printout.duration(p["step_seconds"]),
                f"{p['mfu']:.1%}",
                f"{p['total_bytes'] / p['usable_bytes']:.0%} of {printout.size(p['usable_bytes'])}",
                p["bound_by"] + idle,
            )
        )
    return printout.columns(rows)
