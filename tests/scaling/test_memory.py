"""Memory by formula: the state to the byte, the rest against compiled programs."""

import contextlib

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from tiny import tiny_train

from llm_jax import sharding
from llm_jax.scaling import memory
from llm_jax.scaling.compiled import compile_step
from llm_jax.scaling.layout import abstract_mesh
from llm_jax.scaling.state import state_bytes


def mesh_of(**sizes) -> AbstractMesh:
    shape = tuple(sizes.get(axis, 1) for axis in sharding.MESH_AXES)
    return AbstractMesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


@contextlib.contextmanager
def optimised():
    """The compiler as users have it: the suite's compiles quickly and allocates more."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_disable_most_optimizations", True)  # as conftest.py has it


def test_state_by_hand():
    """Parameters once and twice more for AdamW's moments, cut by fsdp where an axis says "embed"."""
    cfg = tiny_train()
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 56 * 32
    norms = 5 * 32
    got = state_bytes(cfg, mesh_of())
    assert got["parameters"] == 4 * (matrices + norms)
    assert got["optimizer"] == 8 * (matrices + norms) + 2 * 4  # and two counters
    cut = state_bytes(cfg, mesh_of(fsdp=4, tensor=2))
    assert cut["parameters"] == 4 * (matrices / 8 + norms)
    # 16 rows of 16: tokens, targets, weights, bytes, segments, positions; 4 bytes each
    assert got["batch"] == 16 * 16 * 4 * 6 + 16 and cut["batch"] == 4 * 16 * 4 * 6 + 16


@pytest.mark.parametrize(
    ("changes", "mesh"),
    [
        ({}, {"data": 2, "fsdp": 2, "tensor": 2}),
        ({"optimizer.name": "adafactor"}, {"fsdp": 8}),
        ({"optimizer.name": "muon", "optimizer.ema_decay": 0.9}, {"data": 4, "tensor": 2}),
    ],
    ids=lambda v: " ".join(map(str, v.values())) if isinstance(v, dict) else "",
)
def test_arguments_are_the_compilers(changes, mesh):
    cfg = tiny_train(**{f"mesh.{a}": n for a, n in {"data": 1, **mesh}.items()} | changes)
    built = compile_step(cfg, jax.devices()[:8])
    predicted = sum(state_bytes(cfg, abstract_mesh(cfg, 8)).values())
    assert predicted == pytest.approx(built.argument_bytes, rel=0.02)


WIDE = {
    "model.d_model": 128,
    "model.d_ff": 512,
    "model.n_layers": 4,
    "model.vocab_size": 512,
    "model.scan": True,
    "length": 128,
    "batch_size": 64,
}


@pytest.mark.parametrize(
    ("changes", "mesh"),
    [
        ({}, {"data": 8}),
        ({"model.remat": "full"}, {"fsdp": 8}),
        ({"model.remat": "full"}, {"fsdp": 4, "tensor": 2}),
    ],
    ids=str,
)
def test_temporaries_are_near_the_compilers(changes, mesh):
    """XLA:CPU, whose buffers are float32 and hardly fused."""
    cfg = tiny_train(**{f"mesh.{a}": n for a, n in {"data": 1, **mesh}.items()} | WIDE | changes)
    with optimised():
        built = compile_step(cfg, jax.devices()[:8])
    predicted = memory.predict(cfg, abstract_mesh(cfg, 8), "cpu").temp_bytes
    assert predicted == pytest.approx(built.temp_bytes, rel=0.25)
