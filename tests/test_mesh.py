"""Which mesh is chosen, and that the reasons are true."""

import math

import jax
import pytest
from tiny import tiny_train

from llm_jax import config as configs
from llm_jax import mesh, sharding
from llm_jax.models import decoder, presets
from llm_jax.nn.params import count

GB, GIB = 1e9, 2**30
NAMES = ("vocab_size", "n_layers", "n_heads", "kv_heads", "d_model", "d_ff")
TINY = dict(zip(NAMES, (512, 4, 4, 4, 128, 512), strict=True))
LLAMA2_7B = dict(zip(NAMES, (32_000, 32, 32, 32, 4096, 11_008), strict=True))
LLAMA2_70B = dict(zip(NAMES, (32_000, 80, 64, 8, 8192, 28_672), strict=True))
LLAMA3_8B = dict(zip(NAMES, (128_256, 32, 32, 8, 4096, 14_336), strict=True))
LLAMA3_405B = dict(zip(NAMES, (128_256, 126, 128, 8, 16_384, 53_248), strict=True))
MIXTRAL = dict(zip(NAMES, (32_000, 32, 32, 8, 4096, 14_336), strict=True))


def recipe(sizes, batch_size, length, **changes):
    """A resolved config of a bfloat16 model that keeps only layer inputs for the backward pass."""
    cfg = configs.TrainConfig(
        batch_size=batch_size, length=length, model=presets.llama(**sizes, remat="full")
    )
    configs.override(cfg, changes)
    configs.resolve_model(cfg.model, vocab_size=0, length=length, backend="gpu")
    configs.validate(cfg)
    return cfg


def h100(n, memory=80 * GB, slow=12_000.0):
    return mesh.Machine(n, memory, min(n, 8), slow=slow)


def v5p(n):
    return mesh.Machine(n, 95 * GIB, n, fast=612.0, slow=58_752.0)


def choose(cfg, machine):
    n_params = count(decoder.specs(cfg.model))
    chosen, reasons = mesh.choose(cfg, n_params, machine)
    shape = {a: getattr(chosen, a) for a in sharding.MESH_AXES}
    assert math.prod(shape.values()) == machine.devices
    sharding.check_divisible(cfg, shape)
    sharding.crossing(shape, machine.groups)
    assert mesh.estimate(cfg, shape, n_params, machine).memory <= mesh.TIGHT * machine.memory
    for axis, n in shape.items():  # each axis is explained, and no other
        assert (f"mesh.{axis}={n}:" in "\n".join(reasons)) == (n > 1)
    return {a: n for a, n in shape.items() if n > 1}, "\n".join(reasons)


MOE = {"model.moe.n_experts": 8}


@pytest.mark.parametrize(
    ("cfg", "machine", "shape", "because"),
    [
        (recipe(TINY, 32, 256), h100(1), {}, "1 device of 80.0 GB"),
        (recipe(TINY, 32, 256), h100(8), {"data": 8}, "gradients"),
        (recipe(TINY, 28, 256), h100(7), {"data": 7}, "gradients"),
        # Rows run out: what is left of the devices shares the work on each.
        (recipe(LLAMA3_8B, 4, 2048), h100(8, 400 * GB), {"data": 4, "tensor": 2}, "batch_size=4"),
        # Three heads and three layers: only the length is left to cut, short as it is.
        (
            recipe(TINY | {"n_heads": 3, "kv_heads": 3, "n_layers": 3, "d_model": 96}, 4, 256),
            h100(8),
            {"data": 4, "context": 2},
            "as mesh.fsdp=2 instead, batch_size=4",
        ),
        # 121 GB of state do not fit once. fsdp=2 or 4 would do; 8 costs no more inside a node.
        (recipe(LLAMA2_7B, 64, 4096), h100(8), {"fsdp": 8}, "a device would hold 140"),
        # Between nodes copies, so that gathered weights stay on the fast links.
        (recipe(LLAMA2_7B, 512, 4096), h100(64), {"data": 8, "fsdp": 8}, "mesh.data (8 pieces)"),
        (recipe(LLAMA2_70B, 1024, 4096), v5p(512), {"fsdp": 512}, "a device would hold 1,2"),
        # Two slices of a TPU: copies across, fsdp inside.
        (
            recipe(LLAMA2_70B, 1024, 4096),
            v5p(512)._replace(group=256),
            {"data": 2, "fsdp": 256},
            "mesh.data (2 pieces)",
        ),
        (
            recipe(LLAMA3_405B, 256, 8192),
            h100(1024),
            {"data": 4, "fsdp": 64, "tensor": 4},
            "batch_size=256 is not divisible by",
        ),
        # Few tokens a device: sending them to the experts is less than fetching all experts.
        (
            recipe(MIXTRAL, 64, 2048, **MOE),
            v5p(64),
            {"fsdp": 8, "expert": 8},
            "as mesh.fsdp=64 instead, a step would take 1.",
        ),
        # Many tokens a device: the other way round.
        (recipe(MIXTRAL, 512, 4096, **MOE), v5p(64), {"fsdp": 64}, "a device would hold 8"),
        (
            recipe(LLAMA3_8B, 64, 131_072, accumulation=8),
            h100(64),
            {"fsdp": 8, "context": 8},
            "8 rows a micro-batch, is not divisible by mesh.fsdp=64",
        ),
        # 10 Gbit/s between the nodes: stages send least over them.
        (
            recipe(LLAMA2_70B, 256, 4096, accumulation=2),
            h100(64, memory=141 * GB, slow=490_000.0),
            {"fsdp": 8, "stage": 8},
            "mesh.stage (8 pieces)",
        ),
    ],
    ids=lambda x: None if isinstance(x, configs.Config | mesh.Machine | str) else str(x),
)
def test_choice(cfg, machine, shape, because):
    chosen, reasons = choose(cfg, machine)
    assert chosen == shape, reasons
    assert because in reasons


@pytest.mark.parametrize(
    ("cfg", "machine", "message"),
    [
        (recipe(TINY, 32, 256), h100(7), "mesh.data=7, batch_size=32 is not divisible by mesh.data=7"),
        (recipe(LLAMA2_7B, 8, 4096), h100(1), r"does not fit on 1 device: .* more devices"),
        (recipe(LLAMA2_7B, 8, 4096, **{"model.remat": "none"}), h100(1), "model.remat=full"),
        # One row of 131,072 tokens on each device: smaller micro-batches could share them out.
        (recipe(LLAMA2_7B, 8, 131_072), h100(8), "accumulation > 1"),
        (recipe(TINY, 32, 256, **{"mesh.tensor": 3}), h100(8), "mesh.tensor=3 set by hand"),
    ],
)  # fmt: skip
def test_what_cannot_work_says_what_to_change(cfg, machine, message):
    with pytest.raises(ValueError, match=message):
        choose(cfg, machine)


def test_sizes_set_by_hand_stay():
    chosen, reasons = choose(recipe(TINY, 32, 256, **{"mesh.tensor": 2}), h100(8))
    assert chosen == {"data": 4, "tensor": 2} and "in pieces; set by hand" in reasons


def test_every_division_of_the_devices_is_tried_once():
    found = list(mesh.factorisations(12, 3))
    assert len(found) == len(set(found)) == 18 and all(math.prod(f) == 12 for f in found)


def test_the_state_is_what_a_run_holds():
    """The estimate's bytes against those of a real state: float32, AdamW, an average."""
    from llm_jax.train.program import build

    cfg = tiny_train(**{"optimizer.ema_decay": 0.9, "model.d_model": 512, "model.d_ff": 2048})
    built = build(cfg, sharding.make_mesh(configs.MeshConfig(fsdp=4, tensor=2, data=1)))
    state = jax.eval_shape(built.init, jax.random.key(0))
    cut = jax.tree.map(lambda s, sh: math.prod(sh.shard_shape(s.shape)) * 4, state, built.shardings)
    held = sum(jax.tree.leaves((cut.params, cut.opt_state, cut.ema)))
    shape = {**dict.fromkeys(sharding.MESH_AXES, 1), "fsdp": 4, "tensor": 2}
    machine = mesh.Machine(8, 1e9, 8)
    guess = mesh.estimate(cfg, shape, count(built.specs), machine).state
    gradients = 4 / mesh.bytes_a_parameter(cfg)
    assert held == pytest.approx(guess * (1 - gradients), rel=0.02)


def test_this_machine():
    machine = mesh.machine_of(jax.devices(), slices=2)
    assert machine.devices == 8 and machine.group == 4 and machine.groups == 2
    assert 1e8 < machine.memory < 1e13
    chosen, _ = mesh.choose(tiny_train(), 20_000, machine)
    assert sharding.make_mesh(chosen).shape["data"] == 8
