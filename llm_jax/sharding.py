"""The mesh, and the one table that says along which mesh axes an array is cut.

Parameters and activations name their axes logically ("batch", "embed", "heads", ...). `RULES`
maps those names to mesh axes; nothing else in the codebase does. Axis types are Auto: XLA's SPMD
partitioner places the collectives, and `constrain` pins the layouts that matter.
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llm_jax.config import MeshConfig, TrainConfig
from llm_jax.types import Array, PyTree

MESH_AXES = ("data", "fsdp", "stage", "expert", "context", "tensor")
CROSSING = ("data", "stage", "fsdp")  # those that may cross slow links, least traffic first

# logical axis -> mesh axes. None on either side of an array's axes means "not cut".
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "stream_length": ("context", "tensor"),  # of the residual stream, between the layers' parts
    "layer": ("stage",),
    "embed": ("fsdp", "expert"),  # d_model of a parameter; activations keep theirs whole
    "expert_embed": ("fsdp",),  # the same of an expert's matrices
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
}


def mesh_shape(cfg: MeshConfig, n_devices: int) -> tuple[int, ...]:
    """Sizes of MESH_AXES, with -1 filled in.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(cfg, axis) for axis in MESH_AXES}
    asked = " ".join(f"mesh.{a}={n}" for a, n in sizes.items() if n != 1) or "mesh.data=1"
    rest = [axis for axis, n in sizes.items() if n == -1]
    if len(rest) > 1:
        raise ValueError(f"only one mesh axis may be -1, not {' and '.join(rest)} ({asked})")
    if bad := [axis for axis, n in sizes.items() if n < 1 and n != -1]:
        raise ValueError(f"mesh.{bad[0]}={sizes[bad[0]]} has to be a positive number or -1")
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if rest and n_devices % fixed == 0:
        sizes[rest[0]] = n_devices // fixed
    elif rest or fixed != n_devices:
        raise ValueError(
            f"{asked} does not divide up {n_devices} device{'s' * (n_devices != 1)}; "
            f"the other axes take {fixed}: set one axis to -1, or sizes whose product is {n_devices}"
        )
    return tuple(sizes.values())


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh with all six axes, over `devices` (default: all of them).

    Where slow links lie between groups of devices (`fast_groups`), the axes that `crossing` says
    are laid across them and everything else stays inside a group. Inside one, `mesh_utils` follows
    the physical links; it splits a link axis of a torus only where the sizes fit no other way.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(cfg, len(devices))
    groups = fast_groups(devices, cfg.slices)
    outer = crossing(dict(zip(MESH_AXES, shape, strict=True)), len(groups)).values()
    inner = tuple(n // o for n, o in zip(shape, outer, strict=True))
    types = (AxisType.Auto,) * len(shape)

    def arrange(group: list[jax.Device]) -> np.ndarray:
        if len({_slice_of(d) for d in group}) > 1:  # no physical order spans several slices
            return np.array(group).reshape(inner)
        return mesh_utils.create_device_mesh(inner, group, allow_split_physical_axes=True)

    # [groups, *inner] -> [outer, inner] of each axis in turn
    grid = np.stack([arrange(group) for group in groups]).reshape(*outer, *inner)
    order = [i for axis in range(len(shape)) for i in (axis, axis + len(shape))]
    return Mesh(grid.transpose(order).reshape(shape), MESH_AXES, axis_types=types)


def fast_groups(devices: Sequence[jax.Device], slices: int = 0) -> list[list[jax.Device]]:
    """Groups of devices with fast links inside and slow ones in between.

    `slices` > 0 makes so many equal groups, in order of slice, process and number. 0 takes what the
    devices say: TPU slices and GPU nodes have an index, GPUs without one are grouped by process.

    Raises:
      ValueError: the groups would not be equal.
    """

    def place(d: jax.Device) -> tuple[int, int, int]:
        return _slice_of(d), d.process_index, d.id

    if slices:
        if slices < 1 or len(devices) % slices:
            raise ValueError(
                f"mesh.slices={slices} does not divide {len(devices)} devices into equal groups"
            )
        order, share = sorted(devices, key=place), len(devices) // slices
        return [order[i : i + share] for i in range(0, len(order), share)]
    by = [_slice_of(d) for d in devices]
    if (
        len(set(by)) == 1
        and devices[0].platform == "gpu"
        and not hasattr(devices[0], "slice_index")
    ):
        by = [d.process_index for d in devices]
        if len(set(by)) == len(devices):  # a process for each GPU says nothing of the nodes
            by = [0] * len(devices)
    if len(set(by)) == 1:
        return [list(devices)]
    groups = {}
    for key, device in sorted(zip(by, devices, strict=True), key=lambda x: (x[0], place(x[1]))):
        groups.setdefault(key, []).append(device)
    if len(sizes := {len(g) for g in groups.values()}) > 1:
        raise ValueError(
            f"slices of {min(sizes)} and of {max(sizes)} devices make no mesh; use equal slices, or "
            "say with mesh.slices into how many groups to divide the devices"
        )
    return list(groups.values())


def _slice_of(device: jax.Device) -> int:
    return getattr(device, "slice_index", 0) or 0


def crossing(shape: dict[str, int], groups: int) -> dict[str, int]:
    """How many pieces of each mesh axis lie in different groups of devices.

    Copies of the model exchange gradients once a step, stages pass activations of one layer, and
    fsdp moves every parameter: so "data" goes across first, then "stage", then "fsdp".

    Raises:
      ValueError: these axes together do not divide by the number of groups.
    """
    outer, rest = dict.fromkeys(MESH_AXES, 1), groups
    for axis in CROSSING:
        outer[axis] = math.gcd(rest, shape[axis])
        rest //= outer[axis]
    if rest > 1:
        sizes = " * ".join(f"mesh.{a}={shape[a]}" for a in CROSSING)
        raise ValueError(
            f"{groups} groups of devices have slow links in between, and {sizes} is not divisible by "
            f"{groups}: change one of them, or set mesh.slices=1 to let other axes go across"
        )
    return outer


def partition_spec(
    axes: Sequence[str | None], mesh: Mesh | jax.sharding.AbstractMesh
) -> PartitionSpec:
    """Logical axes -> PartitionSpec. Mesh axes of size 1 are left out.

    Raises:
      ValueError: an axis without a rule, or two axes that claim one mesh axis.
    """
    entries, used = [], {}
    for axis in axes:
        if axis is None:
            entries.append(None)
            continue
        if axis not in RULES:
            raise ValueError(f"no sharding rule for the axis {axis!r}; known: {', '.join(RULES)}")
        cut = tuple(a for a in RULES[axis] if mesh.shape[a] > 1)
        for a in cut:
            if a in used:
                raise ValueError(
                    f"axes {used[a]!r} and {axis!r} of one array both want mesh axis {a!r}"
                )
            used[a] = axis
        entries.append(cut if len(cut) > 1 else cut[0] if cut else None)
    return PartitionSpec(*entries)


def named(axes: Sequence[str | None], mesh: Mesh) -> NamedSharding:
    """Logical axes -> NamedSharding."""
    return NamedSharding(mesh, partition_spec(axes, mesh))


def ambient_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh entered with `jax.set_mesh` in this thread; None where it does not cut anything."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x: Array, *axes: str | None) -> Array:
    """Pins the layout of an activation or a gathered weight: `constrain(x, "batch", "length", None)`."""
    mesh = ambient_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, mesh))


def stream(x_BxLxD: Array) -> Array:
    """Pins the residual stream: between the parts of a layer its length is cut along "tensor" too
    (sequence parallelism, Korthikanti et al. 2022), so that norms and residual sums are not
    computed several times over. Lengths that do not divide (a decoded token) stay whole."""
    mesh = ambient_mesh()
    if mesh is None:
        return x_BxLxD
    cut = math.prod(mesh.shape[a] for a in RULES["stream_length"])
    return constrain(
        x_BxLxD, "batch", "length" if x_BxLxD.shape[1] % cut else "stream_length", None
    )


def over_mesh(f: Callable, in_specs: PyTree, out_specs: PyTree) -> Callable:
    """f as a fully manual shard_map over the ambient mesh, from and to PartitionSpecs.

    Axes of size 1 are written into every spec: those that a spec leaves out would each cost a sum
    over nobody in the backward pass.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ones = tuple(a for a, n in mesh.shape.items() if n == 1)

    def whole(spec: PartitionSpec) -> PartitionSpec:
        if not len(spec):
            return spec
        entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
        named = {a for entry in entries for a in entry}
        return PartitionSpec(entries[0] + tuple(a for a in ones if a not in named), *spec[1:])

    ins, outs = (
        jax.tree.map(whole, s, is_leaf=lambda x: isinstance(x, PartitionSpec))
        for s in (in_specs, out_specs)
    )
    return jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)


def gather_pieces(x: Array, over: Sequence[str], axis: int) -> Array:
    """Inside `over_mesh`: the pieces along `axis` of an array cut over mesh axes, put together."""
    for name, groups in reversed(_steps(over)):
        x = jax.lax.all_gather(x, name, axis=axis, tiled=True, axis_index_groups=groups)
    return x


def sum_pieces(x: Array, over: Sequence[str], axis: int) -> Array:
    """Inside `over_mesh`: the sum over mesh axes, of which each device keeps its piece along `axis`."""
    for name, groups in _steps(over):
        x = jax.lax.psum_scatter(
            x, name, scatter_dimension=axis, tiled=True, axis_index_groups=groups
        )
    return x


def _steps(over: Sequence[str]) -> list[tuple[str, list[list[int]] | None]]:
    """Mesh axes from major to minor with the groups of devices along them.

    The TPU compiler turns a gather or a scatter over *all* devices into an all-reduce of the whole
    array, which sends and holds twice as much: an axis that is the whole mesh goes in two steps.
    """
    mesh, steps = jax.sharding.get_abstract_mesh(), []
    for name in over:
        n = mesh.shape[name]
        inner = max((d for d in range(1, math.isqrt(n) + 1) if n % d == 0), default=1)
        if platform() != "tpu" or n < mesh.size or inner == 1:
            steps.append((name, None))
            continue
        steps.append((name, [[j * inner + i for j in range(n // inner)] for i in range(inner)]))
        steps.append((name, [[j * inner + i for i in range(inner)] for j in range(n // inner)]))
    return steps


def platform() -> str:
    """What the program is made for: "cpu", "gpu" or "tpu". It is the ambient mesh's platform, which
    need not be this machine's (compiling ahead of time), and without a mesh the default backend."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device is not None else jax.default_backend()


def batch_shardings(batch: PyTree, mesh: Mesh, leading: int = 0) -> PyTree:
    """Shardings of batch leaves [..., B, ...] after `leading` uncut axes (micro-batches)."""

    def one(leaf):
        axes = [None] * leaf.ndim
        axes[leading] = "batch"
        if leaf.ndim == leading + 2:
            axes[leading + 1] = "length"
        if leaf.ndim > leading + 1 and leaf.shape[leading + 1] % mesh.shape["context"]:
            axes[leading + 1] = None  # [B, 1] and [B, 2] targets
        return named(axes, mesh)

    return jax.tree.map(one, batch)


def check_divisible(cfg: TrainConfig, shape: dict[str, int]) -> None:
    """Checks a resolved config against the sizes of the mesh axes, before anything compiles.

    Raises:
      ValueError: naming the config key and both numbers, where a mesh axis does not divide what it
        cuts, or would cut nothing.
    """
    m, moe = cfg.model, cfg.model.moe
    if shape["expert"] > 1 and not moe.n_experts:
        raise ValueError(
            f"mesh.expert={shape['expert']} has no experts to cut (model.moe.n_experts=0); use "
            "mesh.fsdp for a dense model"
        )
    rows = cfg.batch_size // cfg.accumulation
    batch = f"batch_size={rows}"
    if cfg.accumulation > 1:
        batch = f"batch_size={cfg.batch_size} / accumulation={cfg.accumulation}, {rows} rows a micro-batch,"
    vocab = -(-m.vocab_size // m.vocab_multiple) * m.vocab_multiple
    turns = m.pipeline_turns if shape["stage"] > 1 else 1
    # Ring attention pairs early and late pieces of a row, unless a short window balances them.
    short = 0 < 2 * m.window <= cfg.length and not m.global_layers
    pairs = 2 if shape["context"] > 1 and not short else 1
    width = moe.d_ff or m.d_ff
    shared = f"model.moe.n_shared={moe.n_shared} * model.moe.d_ff={width}"
    checks = [
        (batch, rows, "batch", 1),
        (f"length={cfg.length}", cfg.length, "length", pairs),
        (f"model.n_layers={m.n_layers}", m.n_layers, "layer", turns),
        (f"model.d_model={m.d_model}", m.d_model, "embed", 1),
        (f"model.n_heads={m.n_heads}", m.n_heads, "heads", 1),
        (f"model.kv_heads={m.kv_heads}", m.kv_heads, "kv_heads", 1),
        (f"model.vocab_size={vocab} (a multiple of model.vocab_multiple)", vocab, "vocab", 1),
    ]
    if moe.n_experts:
        checks += [
            (f"model.moe.n_experts={moe.n_experts}", moe.n_experts, "expert", 1),
            (f"model.moe.d_ff={width}", width, "mlp", 1),
            (shared, moe.n_shared * width, "mlp", 1),
        ]
    if moe.n_experts and moe.first_dense and shape["stage"] > 1:
        raise ValueError(
            f"model.moe.first_dense={moe.first_dense}: a pipeline takes layers that are all alike; "
            f"set mesh.stage={shape['stage']} to 1"
        )
    if not moe.n_experts or moe.first_dense:
        checks.append((f"model.d_ff={m.d_ff}", m.d_ff, "mlp", 1))
    if cfg.eval.batch_size:
        checks.append((f"eval.batch_size={cfg.eval.batch_size}", cfg.eval.batch_size, "batch", 1))
    for what, value, axis, factor in checks:
        if value % (factor * math.prod(shape[a] for a in RULES[axis])):
            names = [f"mesh.{a}={shape[a]}" for a in RULES[axis] if shape[a] > 1]
            if factor > 1:
                names.append("2" if axis == "length" else f"model.pipeline_turns={factor}")
            raise ValueError(f"{what} is not divisible by {' * '.join(names)}; change one of them")
    if shape["stage"] > 1:
        _check_pipeline(cfg, shape, batch, rows)
        if cfg.eval.batch_size:
            _check_pipeline(
                cfg, shape, f"eval.batch_size={cfg.eval.batch_size}", cfg.eval.batch_size
            )


def _check_pipeline(cfg: TrainConfig, shape: dict[str, int], what: str, rows: int) -> None:
    """The rows that each device has go through the pipeline in equal micro-batches."""
    n, turns, stages = cfg.model.pipeline_microbatches, cfg.model.pipeline_turns, shape["stage"]
    shards = math.prod(shape[a] for a in RULES["batch"])
    mine = f"{what} gives each of {shards} batch shards {rows // shards} rows"
    if n and rows // shards % n:
        raise ValueError(f"{mine}, not divisible by model.pipeline_microbatches={n}")
    if turns > 1 and (n or rows // shards) % stages:
        counted = f"model.pipeline_microbatches={n}" if n else mine
        raise ValueError(
            f"model.pipeline_turns={turns} needs micro-batches in multiples of mesh.stage={stages}; "
            f"{counted}"
        )
