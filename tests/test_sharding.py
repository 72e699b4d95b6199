"""The mesh, which devices form its axes, the table, and its errors."""

import itertools
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec as P
from tiny import random_batch, tiny_train

from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.models import decoder
from llm_jax.nn import params as nn_params
from llm_jax.train.program import build, put


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        ({}, (8, 1, 1, 1, 1, 1)),
        ({"tensor": 4}, (2, 1, 1, 1, 1, 4)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1, 1, 1, 1)),
    ],
)
def test_mesh_shape(mesh, shape):
    assert sharding.mesh_shape(MeshConfig(**mesh), 8) == shape
    assert sharding.make_mesh(MeshConfig(**mesh)).axis_names == sharding.MESH_AXES


@pytest.mark.parametrize(
    "mesh", [{"tensor": 3}, {"data": 4}, {"data": -1, "fsdp": -1}, {"data": 0}, {"fsdp": 16}]
)
def test_mesh_errors_name_the_axes(mesh):
    with pytest.raises(ValueError, match=r"mesh|axis"):
        sharding.mesh_shape(MeshConfig(**mesh), 8)


def test_table_collisions_and_unknown_axes():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert sharding.partition_spec(("batch", "length", None), mesh) == P(
        ("data", "fsdp"), None, None
    )
    assert sharding.partition_spec(("layer", "embed", "heads"), mesh) == P(None, "fsdp", "tensor")
    with pytest.raises(ValueError, match="both want mesh axis 'tensor'"):
        sharding.partition_spec(("heads", "mlp"), mesh)
    with pytest.raises(ValueError, match="no sharding rule for the axis 'head'"):
        sharding.partition_spec(("head",), mesh)


MOE = {"model.moe.n_experts": 8, "model.moe.d_ff": 64}


@pytest.mark.parametrize(
    ("changes", "axis", "message"),
    [
        ({"batch_size": 12}, "data", "batch_size=12 is not divisible by mesh.data=8"),
        (
            {"batch_size": 16, "accumulation": 4},
            "fsdp",
            "batch_size=16 / accumulation=4, 4 rows a micro-batch, is not divisible by mesh.fsdp=8",
        ),
        ({"eval.batch_size": 4}, "data", "eval.batch_size=4 is not divisible by mesh.data=8"),
        ({"length": 24}, "context", r"length=24 is not divisible by mesh.context=8 \* 2"),
        ({"model.n_heads": 4, "model.kv_heads": 4}, "tensor", "model.n_heads=4"),
        ({"model.kv_heads": 2}, "tensor", "model.kv_heads=2"),
        ({"model.d_ff": 60}, "tensor", "model.d_ff=60"),
        ({"model.vocab_multiple": 1}, "tensor", "model.vocab_multiple"),
        ({"model.d_model": 36, "model.head_dim": 4}, "fsdp", "model.d_model=36"),
        ({"model.n_layers": 4}, "stage", "model.n_layers=4 is not divisible by mesh.stage=8"),
        (
            {"model.n_layers": 8, "model.pipeline_turns": 2},
            "stage",
            r"model.n_layers=8 is not divisible by mesh.stage=8 \* model.pipeline_turns=2",
        ),
        (
            {"model.n_layers": 8, "model.pipeline_microbatches": 3},
            "stage",
            "16 rows, not divisible by model.pipeline_microbatches=3",
        ),
        (
            {"model.n_layers": 16, "model.pipeline_turns": 2, "model.pipeline_microbatches": 4},
            "stage",
            "multiples of mesh.stage=8; model.pipeline_microbatches=4",
        ),
        (
            {"model.n_layers": 16, "model.pipeline_turns": 2, "batch_size": 4},
            "stage",
            "multiples of mesh.stage=8; batch_size=4 gives each of 1 batch shards 4 rows",
        ),
        (
            {"model.n_layers": 16, "model.pipeline_turns": 2, "eval.batch_size": 4},
            "stage",
            "eval.batch_size=4 gives",
        ),
        ({}, "expert", "mesh.expert=8 has no experts to cut"),
        (MOE | {"model.moe.n_experts": 4}, "expert", "n_experts=4 is not divisible by mesh.expert=8"),
        (MOE | {"batch_size": 4}, "expert", "batch_size=4 is not divisible by mesh.expert=8"),
        (MOE | {"model.d_model": 36, "model.head_dim": 4}, "expert", "model.d_model=36"),
        (MOE | {"model.moe.d_ff": 60}, "tensor", "model.moe.d_ff=60 is not divisible by mesh.tensor=8"),
    ],
)  # fmt: skip
def test_divisibility_names_the_config_key(changes, axis, message):
    shape = {**dict.fromkeys(sharding.MESH_AXES, 1), axis: 8}
    with pytest.raises(ValueError, match=message):
        sharding.check_divisible(tiny_train(**changes), shape)


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, {"data": 2, "fsdp": 2, "tensor": 8, "context": 8}),
        ({"model.n_layers": 8, "model.pipeline_turns": 2}, {"stage": 4}),
        # What has no effect on this mesh is not checked: the same recipe runs on one device.
        ({"model.n_layers": 3, "model.pipeline_turns": 2, "model.pipeline_microbatches": 5}, {}),
        # Windows of half a row or less need no balancing, so a row is cut into 8 and not into 16.
        ({"length": 24, "model.window": 12}, {"context": 8}),
        (MOE | {"model.d_ff": 60}, {"expert": 4, "tensor": 4, "fsdp": 4}),  # no dense MLP
        (MOE | {"model.moe.d_ff": 4, "model.moe.n_shared": 2}, {"tensor": 4}),
    ],
)
def test_what_divides_passes(changes, shape):
    sharding.check_divisible(
        tiny_train(**changes), {**dict.fromkeys(sharding.MESH_AXES, 1), **shape}
    )


# Which devices share an axis -------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """What the mesh looks at of a device."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


@dataclass(frozen=True)
class Sliced(Device):
    """A device that says which slice it is in."""

    slice_index: int = 0
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def tpus(slices, x, y, z, kind="TPU v5p"):
    """Slices of x * y * z chips, four a process."""
    places = [(s, c) for s in range(slices) for c in itertools.product(*map(range, (z, y, x)))]
    return [Sliced(i, i // 4, "tpu", kind, s, c[::-1]) for i, (s, c) in enumerate(places)]


def gpus(nodes, per_node=8, sliced=False):
    """Nodes with a process each."""
    if sliced:
        return [
            Sliced(i, i // per_node, slice_index=i // per_node) for i in range(nodes * per_node)
        ]
    return [Device(i, i // per_node) for i in range(nodes * per_node)]


def sharers(mesh, *axes):
    """The sets of devices that differ in `axes` alone: they talk to each other."""
    numbers = [sharding.MESH_AXES.index(a) for a in axes]
    grid = np.moveaxis(mesh.devices, numbers, range(-len(numbers), 0))
    size = int(np.prod([mesh.shape[a] for a in axes]))
    return [set(group) for group in grid.reshape(-1, size)]


def slices_of(devices):
    return {getattr(d, "slice_index", d.process_index) for d in devices}


@pytest.mark.parametrize(
    ("sizes", "crosses"),
    [
        ({"data": 2, "fsdp": 4, "tensor": 4}, "data"),
        ({"data": 4, "fsdp": 2, "tensor": 4}, "data"),  # both copies of a slice, and of the other
        ({"data": 1, "stage": 2, "fsdp": 4, "tensor": 4}, "stage"),
        ({"data": 1, "fsdp": 8, "tensor": 4}, "fsdp"),
        ({"data": 1, "fsdp": 2, "context": 4, "tensor": 4}, "fsdp"),
        ({"data": 1, "fsdp": 4, "expert": 2, "tensor": 4}, "fsdp"),
    ],
)
@pytest.mark.parametrize(
    "devices", [tpus(2, 4, 4, 1), gpus(2, 16), gpus(2, 16, sliced=True)], ids=["tpu", "gpu", "sliced"]
)  # fmt: skip
def test_one_axis_crosses_the_slow_links(devices, sizes, crosses):
    mesh = sharding.make_mesh(MeshConfig(**sizes), devices)
    assert len(set(mesh.devices.flat)) == 32
    for axis in sharding.MESH_AXES:
        spanned = {len(slices_of(group)) for group in sharers(mesh, axis)}
        assert spanned == {2 if axis == crosses else 1}, axis


def test_placement_is_that_of_jax():
    """For axes that lie across whole, `mesh_utils.create_hybrid_device_mesh` agrees."""
    devices = tpus(4, 4, 2, 1)
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=4, stage=2, tensor=1), devices)
    # Four slices: data takes them all. With data=2 they are data's and stage's.
    expected = mesh_utils.create_hybrid_device_mesh((1, 4, 2, 1, 1, 1), (4, 1, 1, 1, 1, 1), devices)
    np.testing.assert_array_equal(mesh.devices, expected)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4, stage=4), devices)
    expected = mesh_utils.create_hybrid_device_mesh((1, 4, 2, 1, 1, 1), (2, 1, 2, 1, 1, 1), devices)
    np.testing.assert_array_equal(mesh.devices, expected)


def test_neighbours_on_a_torus_share_the_busiest_axis():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=4), tpus(1, 4, 4, 1))
    for group in sharers(mesh, "tensor"):  # a line of the torus, so that a ring of links closes
        assert min(len({d.coords[i] for d in group}) for i in (0, 1)) == 1
    # 16 * 16 chips as 64 * 4: a line of the torus has to be split, which jax.make_mesh refuses.
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=64, tensor=4), tpus(1, 16, 16, 1, "TPU v6e"))
    assert len(set(mesh.devices.flat)) == 256


def test_tensor_stays_inside_a_node():
    for devices in (gpus(4), gpus(4)[::-1]):
        mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=8), devices)
        assert all(len(slices_of(group)) == 1 for group in sharers(mesh, "tensor"))
    # One process for each GPU does not say where a node ends: the order of processes does.
    mesh = sharding.make_mesh(MeshConfig(data=4, tensor=8), gpus(32, 1))
    assert [d.id for d in mesh.devices.flat] == list(range(32))


def test_slices_by_hand_and_what_cannot_be():
    devices = gpus(1, 8)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2, slices=4), devices)
    assert sharers(mesh, "tensor") == [set(devices[i : i + 2]) for i in (0, 2, 4, 6)]
    with pytest.raises(ValueError, match=r"mesh.slices=3 does not divide 8 devices"):
        sharding.make_mesh(MeshConfig(slices=3), devices)
    no_axis = r"mesh.data=1 \* mesh.stage=1 \* mesh.fsdp=1 is not divisible by 2"
    for devices in (tpus(2, 4, 2, 1), gpus(2)):
        with pytest.raises(ValueError, match=no_axis):
            sharding.make_mesh(MeshConfig(data=1, tensor=16), devices)
        mesh = sharding.make_mesh(MeshConfig(data=1, tensor=16, slices=1), devices)
        assert list(mesh.devices.flat) == devices  # slow, but asked for
    with pytest.raises(ValueError, match="slices of 4 and of 8 devices"):
        sharding.make_mesh(MeshConfig(), [*gpus(1), *[Device(8 + i, 1) for i in range(4)]])


def test_two_slices_train_the_same(one_device):
    """A stage on each slice: devices in another order than the list's, the same losses."""

    def losses(mesh):
        with jax.set_mesh(mesh):
            program = build(tiny_train(), mesh)
            state, out = program.init(jax.random.key(0)), []
            for seed in range(4):
                state, metrics = program.step(state, put(random_batch(seed=seed), mesh, 1))
                out.append(float(metrics["loss"]))
            assert int(state.bad_steps) == 0
        return out

    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, stage=2, slices=2))
    assert sharers(mesh, "fsdp") == [set(jax.devices()[:4]), set(jax.devices()[4:])]
    np.testing.assert_allclose(losses(mesh), losses(one_device), rtol=2e-6)


# Parameters on a mesh --------------------------------------------------------------------------


def test_initial_values_do_not_depend_on_the_mesh():
    specs = decoder.specs(tiny_train().model)
    key = jax.random.key(3)
    hashes = []
    for n, mesh in [
        (1, {}),
        (2, {"fsdp": 2}),
        (4, {"data": 1, "fsdp": 2, "tensor": 2}),
        (8, {"fsdp": 2, "tensor": 4}),
    ]:
        mesh = sharding.make_mesh(MeshConfig(**mesh), jax.devices()[:n])
        params = nn_params.init_sharded(specs, key, mesh)
        hashes.append(
            {k: hash(np.asarray(v).tobytes()) for k, v in nn_params.flatten(params).items()}
        )
    assert hashes[0] == hashes[1] == hashes[2] == hashes[3]


def test_parameters_are_born_cut():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    params = nn_params.init_sharded(decoder.specs(tiny_train().model), jax.random.key(0), mesh)
    q = params["layers"]["attn"]["q"]["w"]
    assert q.shape == (2, 32, 32) and q.addressable_shards[0].data.shape == (2, 8, 16)
    table = params["embed"]["tokens"]
    assert table.shape == (56, 32) and table.addressable_shards[0].data.shape == (28, 8)
