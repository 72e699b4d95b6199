"""The mesh, and the one table that says along which mesh axes an array is cut.

Parameters and activations name their axes logically ("batch", "embed", "heads", ...). `RULES`
maps those names to mesh axes; nothing else in the codebase does. Axis types are Auto: XLA's SPMD
partitioner places the collectives, and `constrain` pins the layouts that matter.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llm_jax.config import MeshConfig, TrainConfig
from llm_jax.types import Array, PyTree

MESH_AXES = ("data", "fsdp", "stage", "expert", "context", "tensor")

# logical axis -> mesh axes. None on either side of an array's axes means "not cut".
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "layer": ("stage",),
    "embed": ("fsdp",),  # d_model of a parameter; activations keep theirs whole
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
    """The device mesh with all six axes, over `devices` (default: all of them)."""
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(cfg, len(devices))
    return jax.make_mesh(
        shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices
    )


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
    """Raises ValueError naming the config key where a mesh axis does not divide what it cuts."""
    m = cfg.model
    rows = cfg.batch_size // cfg.accumulation
    vocab = -(-m.vocab_size // m.vocab_multiple) * m.vocab_multiple
    over = f" rows a micro-batch (batch_size / accumulation={cfg.accumulation})"
    for key, value, axes, hint in (
        (
            "batch_size",
            rows,
            RULES["batch"],
            f"; it is {rows}{over}" if cfg.accumulation > 1 else "",
        ),
        ("length", cfg.length, RULES["length"], ""),
        ("model.n_layers", m.n_layers, RULES["layer"], ""),
        ("model.d_model", m.d_model, RULES["embed"], ""),
        ("model.n_heads", m.n_heads, RULES["heads"], ""),
        ("model.kv_heads", m.kv_heads, RULES["kv_heads"], ""),
        ("model.d_ff", m.d_ff, RULES["mlp"], ""),
        ("model.vocab_size", vocab, RULES["vocab"], "; model.vocab_multiple rounds it up"),
    ):
        n = math.prod(shape[a] for a in axes)
        if value % n:
            names = " * ".join(f"mesh.{a}={shape[a]}" for a in axes if shape[a] > 1)
            raise ValueError(f"{key}={value} is not divisible by {names}; change one of them{hint}")
