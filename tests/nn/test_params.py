"""What a tree of parameters is known by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.nn.params import digest, fingerprint


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (4, 6, 8))


def test_a_digest_is_of_values_and_places(x):
    bits = np.asarray(x.astype(jnp.bfloat16)).view(np.uint16).reshape(-1).astype(np.uint64)
    factors = np.arange(bits.size, dtype=np.uint64) * 2654435761 | 1
    assert int(digest(x)) == int((bits * factors).sum() % 2**32)
    assert int(digest(x.swapaxes(0, 1))) != int(digest(x))


def test_it_is_the_same_on_every_mesh_and_gathers_nothing(x):
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    cut = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")))
    assert int(digest(cut)) == int(digest(x)) == int(digest(x.astype(jnp.bfloat16)))
    assert "all-gather" not in digest.lower(cut).compile().as_text()


def test_a_fingerprint_is_of_paths_too_and_takes_digests(x):
    held = fingerprint({"a": {"w": x}, "b": x[0]})
    assert fingerprint({"a": {"w": digest(x)}, "b": digest(x[0])}) == held
    assert fingerprint({"a": {"v": x}, "b": x[0]}) != held
    assert fingerprint({"a": {"w": 1.01 * x}, "b": x[0]}) != held
