"""The mesh, the table, and its errors."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import tiny_train

from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.models import decoder
from llm_jax.nn import params as nn_params


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


@pytest.mark.parametrize(
    ("changes", "axis", "message"),
    [
        ({"batch_size": 12}, "data", "batch_size=12 is not divisible by mesh.data=8"),
        ({"batch_size": 16, "accumulation": 4}, "data", "rows a micro-batch"),
        ({"model.n_heads": 4, "model.kv_heads": 4}, "tensor", "model.n_heads=4"),
        ({"model.kv_heads": 2}, "tensor", "model.kv_heads=2"),
        (
            {"model.d_model": 40, "model.n_heads": 8, "model.head_dim": 4, "model.d_ff": 60},
            "tensor",
            "model.d_ff=60",
        ),
        ({"model.vocab_multiple": 1}, "tensor", "model.vocab_multiple"),
        ({"model.d_model": 36, "model.head_dim": 4}, "fsdp", "model.d_model=36"),
    ],
)
def test_divisibility_names_the_config_key(changes, axis, message):
    shape = {**dict.fromkeys(sharding.MESH_AXES, 1), axis: 8}
    with pytest.raises(ValueError, match=message):
        sharding.check_divisible(tiny_train(**changes), shape)


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
