"""Chooses a mesh: every way to divide the devices is estimated, and the best is explained.

An estimate says what one device holds, computes and sends in a step (the formulas are those of
docs/choose_your_mesh.md). Communication of data, fsdp and context runs beside the computation; that
of tensor, expert and stage waits for it. Of meshes that are equally fast the simplest is taken.
"""

import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from llm_jax import chips, sharding
from llm_jax.config import GATED, MeshConfig, TrainConfig
from llm_jax.nn import pipeline
from llm_jax.sharding import MESH_AXES

ROOM, TIGHT = 0.6, 0.9  # shares of the memory that an estimate may fill; the second if need be
EQUAL = 1.05  # meshes whose steps take no longer than this times the best count as equally fast
SPILL = 0.25  # share of the communication beside the computation that costs time all the same
# Tokens a row from which context is taken, and before tensor. Shorter ones are left whole if they
# can be: attention round a ring has no fused kernel.
LONG = 32_768
# Bytes of float32 optimizer state a parameter; muon's is for matrices, nearly all of a model.
MOMENTS = {"adamw": 8, "muon": 4, "adafactor": 0}

Shape = dict[str, int]  # size of each of MESH_AXES
CONTEXT = MESH_AXES.index("context")


class Machine(NamedTuple):
    """Devices, and what a byte on their links costs."""

    devices: int
    memory: float  # bytes of one device
    group: int  # devices that fast links join: a TPU slice, a GPU node
    fast: float = 1400.0  # FLOPs that a device does while it sends a byte inside its group (H100)
    slow: float = 12_000.0  # and out of it

    @property
    def groups(self) -> int:
        """Groups with slow links in between."""
        return max(self.devices // self.group, 1)


class Estimate(NamedTuple):
    """One device's share of a step. Times are FLOPs that it could do meanwhile."""

    state: float  # bytes: master parameters, gradients, moments, average, compute copy
    activations: float  # bytes: what the backward pass keeps, and the layer in work
    gathered: float  # bytes: whole weights of two layers, and of the embedding table
    compute: float  # with recomputation
    bubble: float  # share of the pipeline's time that is idle
    sent: dict[str, float]  # bytes by mesh axis; those of data stand for context's copies too
    hidden: float  # communication that computation can hide
    exposed: float  # communication that it waits for

    @property
    def memory(self) -> float:
        """Bytes in all."""
        return self.state + self.activations + self.gathered

    @property
    def time(self) -> float:
        """Of the step."""
        busy = self.compute / (1 - self.bubble)
        beside = max(busy, self.hidden) + SPILL * min(busy, self.hidden)
        return beside + self.exposed


def estimate(cfg: TrainConfig, shape: Shape, n_params: int, machine: Machine) -> Estimate:
    """What a step of a resolved config costs a device on a mesh that divides it."""
    m, moe = cfg.model, cfg.model.moe
    data, fsdp, stage, expert, context, tensor = (shape[a] for a in MESH_AXES)
    outer = sharding.crossing(shape, machine.groups)
    e = jnp.dtype(m.dtype).itemsize
    k, D, Dh = cfg.accumulation, m.d_model, m.head_dim
    shards = data * fsdp * expert
    tokens = cfg.batch_size / k * cfg.length / (shards * context)  # a micro-batch's, here
    layers = m.n_layers / stage
    n, bubble, passes = 1, 0.0, k  # passes through a layer's weights: each gathers, reduces them
    if stage > 1:
        n = pipeline.microbatches(m, cfg.batch_size // k, shards, stage)
        bubble = pipeline.bubble(n, stage, m.pipeline_turns)
        passes = k * n / (1 - bubble)
    through = k * layers / (1 - bubble)  # layers that a micro-batch's tokens go through, idly too

    # Parameters: routed experts, the tables, and the rest of the layers.
    matrices = 3 if m.activation in GATED else 2
    routed = (m.n_layers - moe.first_dense) * moe.n_experts * matrices * D * (moe.d_ff or m.d_ff)
    table = m.vocab_size * D * (1 if m.tied else 2)
    dense = max(n_params - routed - table, 0)
    held = ((dense + routed) / stage + table) / (fsdp * expert * tensor)

    # Activations a token and layer, in elements: what model.remat keeps (with "none" that is norms
    # in float32, and gates before and after), and twice the layer in work.
    width = (moe.top_k + moe.n_shared) * moe.d_ff if moe.n_experts else m.d_ff
    heads, keys = m.n_heads * Dh, m.kv_heads * Dh
    scores = m.n_heads * cfg.length if cfg.length <= m.attention_block and context == 1 else 0
    layer = 4 * D + 2 * heads + 2 * keys + matrices * width + scores
    kept = {
        "none": 6 * D * 4 / e + 3 * heads + 2 * keys + (2 * matrices - 1) * width + scores,
        "dots": 3 * D + heads + 2 * keys + (matrices - 1) * width,
        "attention": D + heads,
        "full": D,
    }[m.remat]
    per_token = kept * through / k + 2 * layer / n + 8 * D

    # Communication, bytes a device receives in a step.
    others = lambda size: (size - 1) / size  # noqa: E731
    stream = e * tokens * D
    again = 3 if m.remat in ("full", "attention") else 0
    sent = {
        "data": 2 * e * others(data * context)
        * ((dense + routed) / stage * passes + table * k) / (fsdp * expert * tensor),
        "fsdp": (4 if again else 3) * e * others(fsdp * expert) * (dense / stage * passes + table * k) / tensor
        + 3 * e * others(fsdp) * routed / (stage * expert * tensor) * passes,
        "stage": 2 * stream * m.pipeline_turns * k / (1 - bubble) * (stage > 1),
        "expert": 4 * (expert - 1) * stream * through,
        "context": (context - 1) * (2 * e + 4) * 2 * keys / tensor * tokens * through,
        "tensor": (8 + again) * others(tensor) * stream * through,
    }  # fmt: skip
    if moe.dispatch == "all_to_all":
        sent["expert"] *= moe.top_k * moe.capacity_factor / expert

    def seconds(axis: str) -> float:  # in FLOPs
        inside = shape[axis] / outer[axis]
        # Every device of a group fetches its share over its own slow link.
        return sent[axis] * (
            machine.fast if outer[axis] == 1 else max(machine.fast, machine.slow / inside)
        )

    active = dense + m.vocab_size * D + (routed * moe.top_k / moe.n_experts if routed else 0)
    flops = (6 * active + 12 * m.n_layers * heads * cfg.length) * cfg.batch_size * cfg.length
    return Estimate(
        state=held * bytes_a_parameter(cfg),
        activations=per_token * tokens / tensor * e,
        gathered=0
        if fsdp * expert == 1
        else e / tensor * (2 * dense / m.n_layers + 2 * routed / (m.n_layers * expert) + table),
        compute=flops / machine.devices * (4 / 3 if m.remat == "full" else 1),
        bubble=bubble,
        sent=sent,
        hidden=seconds("data") + seconds("fsdp") + seconds("context"),
        exposed=seconds("tensor") + seconds("expert") + seconds("stage"),
    )


def bytes_a_parameter(cfg: TrainConfig) -> int:
    """Of training state: float32 master and gradient (two while micro-batches add up), the
    optimizer's moments, the moving average, and the copy in the compute type."""
    copy = jnp.dtype(cfg.model.dtype).itemsize % 4
    adding, average = 4 * (cfg.accumulation > 1), 4 * (cfg.optimizer.ema_decay > 0)
    moments = MOMENTS[cfg.optimizer.name] * jnp.dtype(cfg.optimizer.moment_dtype).itemsize // 4
    return 8 + moments + copy + adding + average


def choose(cfg: TrainConfig, n_params: int, machine: Machine) -> tuple[MeshConfig, list[str]]:
    """The best mesh for a resolved config with `n_params` parameters, and why, in printable lines.

    Sizes that the config sets by hand (other than data=-1 and the rest 1) stay as they are.

    Raises:
      ValueError: no mesh divides the model, or none fits in the memory; it says what to change.
    """
    fixed = {a: getattr(cfg.mesh, a) for a in MESH_AXES}
    fixed = {a: n for a, n in fixed.items() if n not in ((-1,) if a == "data" else (-1, 1))}
    tried = {}  # sizes -> Estimate, or why not
    for sizes in factorisations(machine.devices, len(MESH_AXES)):
        shape = dict(zip(MESH_AXES, sizes, strict=True))
        if all(shape[a] == n for a, n in fixed.items()):
            tried[sizes] = judge(cfg, shape, n_params, machine)
    estimates = {sizes: e for sizes, e in tried.items() if isinstance(e, Estimate)}
    least = min((e.memory for e in estimates.values()), default=math.inf)
    room = machine.memory * (ROOM if least <= ROOM * machine.memory else TIGHT)
    fitting = {sizes: e for sizes, e in estimates.items() if e.memory <= room}
    if not fitting:
        raise ValueError(_nothing_fits(cfg, tried, fixed, machine))
    if cfg.length < LONG:
        fitting = {s: e for s, e in fitting.items() if s[CONTEXT] == 1} or fitting
    best = min(e.time for e in fitting.values())
    equal = [sizes for sizes, e in fitting.items() if e.time <= EQUAL * best]
    chosen = min(equal, key=lambda sizes: _simplicity(sizes, machine, cfg.length))
    shape = dict(zip(MESH_AXES, chosen, strict=True))
    reasons = _reasons(cfg, shape, fixed, n_params, machine, room)
    return MeshConfig(**shape, slices=cfg.mesh.slices), reasons


def judge(cfg: TrainConfig, shape: Shape, n_params: int, machine: Machine) -> Estimate | str:
    """The estimate of a mesh, or why the config cannot run on it."""
    try:
        sharding.check_divisible(cfg, shape)
        return estimate(cfg, shape, n_params, machine)
    except ValueError as e:
        return str(e)


def factorisations(n: int, axes: int) -> Iterator[tuple[int, ...]]:
    """All ways to write n as an ordered product of so many positive numbers."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]

    def ways(rest: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (rest,)
            return
        for first in divisors:
            if rest % first == 0:
                yield from ((first, *others) for others in ways(rest // first, axes - 1))

    return ways(n, axes)


def _simplicity(sizes: tuple[int, ...], machine: Machine, length: int) -> tuple:
    """Small is simple: few axes that cut the model's work, then gathers that stay inside a group.
    What is cut at all is cut as finely as that leaves open."""
    shape = dict(zip(MESH_AXES, sizes, strict=True))
    cuts = [shape[a] for a in ("stage", "context", "tensor")]
    last = shape["tensor"] if length >= LONG else 1
    across = sharding.crossing(shape, machine.groups)["fsdp"]
    fine = [(shape[a] > 1, -shape[a]) for a in ("expert", "fsdp")]
    return sum(n > 1 for n in cuts), math.prod(cuts), last, across, *fine, sizes


# The explanation -------------------------------------------------------------------------------

WHAT = {
    "data": "copies of the model",
    "fsdp": "parameters, gradients and optimizer state in pieces",
    "stage": "layers in a pipeline",
    "expert": "experts in groups",
    "context": "rows in stretches, ring attention",
    "tensor": "heads, MLP and vocabulary in pieces",
}


def _gb(n: float) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e8 else f"{n / 1e6:,.1f} MB"


def text(shape: Shape) -> str:
    """mesh.data=2 mesh.tensor=4"""
    return " ".join(f"mesh.{a}={n}" for a, n in shape.items() if n > 1) or "one device"


def _reasons(
    cfg: TrainConfig, shape: Shape, fixed: Shape, n_params: int, machine: Machine, room: float
) -> list[str]:
    own = estimate(cfg, shape, n_params, machine)
    each = bytes_a_parameter(cfg)
    lines = [
        f"{n_params:,} parameters take {_gb(n_params * each)} in training ({each} bytes each); "
        f"{machine.devices} device{'s' * (machine.devices > 1)} of {_gb(machine.memory)}"
    ]
    for axis in (a for a in MESH_AXES if shape[a] > 1):
        why = _why(cfg, shape, axis, own, n_params, machine, room)
        if axis in fixed:
            why = "set by hand"
        lines.append(f"mesh.{axis}={shape[axis]}: {WHAT[axis]}; {why}")
    if machine.groups > 1:
        outer = sharding.crossing(shape, machine.groups)
        who = " and ".join(f"mesh.{a} ({n} pieces)" for a, n in outer.items() if n > 1)
        lines.append(f"across the slow links between {machine.groups} groups of devices: {who}")
    lines.append(
        f"a device holds about {_gb(own.memory)}: {_gb(own.state)} state, {_gb(own.activations)} "
        f"activations, {_gb(own.gathered)} gathered weights"
    )
    if machine.devices > 1:
        idle = f", and {own.bubble:.0%} of the pipeline idle" if own.bubble else ""
        lines.append(
            f"communication takes {own.hidden / own.compute:.0%} of the computation's time beside it "
            f"and {own.exposed / own.compute:.0%} that it waits for{idle}"
        )
    return lines


def _why(
    cfg: TrainConfig,
    shape: Shape,
    axis: str,
    own: Estimate,
    n_params: int,
    machine: Machine,
    room: float,
) -> str:
    """What would be wrong with these devices on a simpler axis."""
    if axis == "data":
        return f"the gradients that they sum up are {_gb(own.sent['data'])} a device and step"
    to = "data" if axis == "fsdp" else "fsdp"
    other = {**shape, axis: 1, to: shape[to] * shape[axis]}
    verdict = judge(cfg, other, n_params, machine)
    instead = f"as mesh.{to}={other[to]} instead"
    if isinstance(verdict, str):
        return f"{instead}, {verdict}"
    if verdict.memory > room:
        limit = f"{room / machine.memory:.0%} of {_gb(machine.memory)}"
        return f"{instead}, a device would hold {_gb(verdict.memory)}, above {limit}"
    return f"{instead}, a step would take {verdict.time / own.time:.2f} times as long"


def _nothing_fits(cfg: TrainConfig, tried: dict, fixed: Shape, machine: Machine) -> str:
    where = f"{machine.devices} device{'s' * (machine.devices > 1)}"
    if not tried:
        return f"mesh.auto: {text(fixed)} set by hand does not divide up {where}"
    fits = {sizes: e for sizes, e in tried.items() if isinstance(e, Estimate)}
    if not fits:
        copies = max(tried)  # as much as possible on mesh.data
        shape = text(dict(zip(MESH_AXES, copies, strict=True)))
        return f"mesh.auto: no mesh divides this model among {where}; with {shape}, {tried[copies]}"
    best = min(fits, key=lambda sizes: fits[sizes].memory)
    e = fits[best]
    less = [f"accumulation > {cfg.accumulation}"]
    less += [] if cfg.model.remat == "full" else ["model.remat=full"]
    return (
        f"mesh.auto: this model does not fit on {where}: with {text(dict(zip(MESH_AXES, best, strict=True)))} "
        f"a device holds about {_gb(e.memory)} ({_gb(e.state)} state, {_gb(e.activations)} activations) of "
        f"{TIGHT:.0%} of {_gb(machine.memory)}; use more devices, {', '.join(less)}, or a smaller length"
    )


# The machine -----------------------------------------------------------------------------------


def machine_of(devices: Sequence[jax.Device], slices: int = 0) -> Machine:
    """The numbers of a machine; of its smallest memory where there are several processes.

    Raises:
      ValueError: the memory of a device is not known.
    """
    first, chip = devices[0], chips.by_kind(devices[0].device_kind)
    group = len(sharding.fast_groups(devices, slices)[0])
    machine = Machine(len(devices), _memory(first, chip), group)
    if jax.process_count() > 1:
        every = multihost_utils.process_allgather(np.float32(machine.memory))
        machine = machine._replace(memory=float(np.min(every)))
    if chip is not None:
        flops = chip.peak_flops * chip.efficiency
        machine = machine._replace(
            fast=flops / chip.link_bandwidth, slow=flops / chip.slow_bandwidth
        )
    return machine


def _memory(device: jax.Device, chip: chips.Chip | None) -> float:
    if device.platform == "cpu":
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return whole / jax.local_device_count()
    local = [d for d in jax.local_devices() if d.device_kind == device.device_kind]
    stats = (local[0].memory_stats() if local else None) or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    if chip is None:
        raise ValueError(
            f"mesh.auto: the memory of a {device.device_kind!r} is not known; set the mesh by hand"
        )
    return chip.hbm_bytes / chip.devices
