"""Every recipe is instantiated, and its train step lowered on an abstract mesh of 8 devices."""

import importlib.util
from collections import Counter
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from llm_jax import config as configs
from llm_jax import sharding
from llm_jax.align.direct import training as direct
from llm_jax.align.reward import training as reward
from llm_jax.scaling.sweep.config import SweepConfig, validate_sweep
from llm_jax.scaling.sweep.grid import run_config, trunks
from llm_jax.train.program import lower

ROOT = Path(__file__).parents[1]
RECIPES = sorted(p for p in (ROOT / "configs").glob("*.py") if p.name != "__init__.py")


def load(path: Path) -> configs.TrainConfig:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__doc__ and "python -m experiments." in module.__doc__, (
        f"{path.name}: no command in its docstring"
    )
    return module.get_config()


def largest_run(sweep: SweepConfig) -> configs.TrainConfig:
    """Of a sweep whose budgets have five sizes each, enough for a parabola."""
    validate_sweep(sweep)
    found = trunks(sweep, sweep.run.tokenizer.vocab_size)
    sizes = Counter(p.budget for t in found for p in t.points)
    assert len(sizes) >= 4 and min(sizes.values()) >= 5, sizes
    trunk = max(found, key=lambda t: t.size.n)
    run = run_config(sweep, trunk.size, trunk.seed, trunk.size.rate)
    run.steps = trunk.points[-1].steps
    return run


def loss_of(cfg: configs.TrainConfig):
    """What the recipe's own binary trains on; None: the likelihood."""
    if cfg.data.format != "preference":
        return None
    if cfg.model.head == "reward":
        return reward.make_loss_fn(cfg)
    return direct.make_loss_fn(cfg, direct.resolve_reference(cfg))


def abstract_mesh(cfg: configs.MeshConfig) -> AbstractMesh:
    shape = sharding.mesh_shape(cfg, 8)
    return AbstractMesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_lowers_on_eight_devices(path):
    cfg = load(path)
    assert cfg.name == path.stem
    if isinstance(cfg, SweepConfig):
        cfg = largest_run(cfg)
    if cfg.batch_size % 8:  # nanoGPT's 12 rows are for one device
        cfg.mesh = configs.MeshConfig(data=4, fsdp=-1 if cfg.model.d_model % 2 == 0 else 1)
        cfg.batch_size = 16
    cfg.model.scan = True  # the same block; a loop of 48 layers takes a minute to trace
    configs.resolve_model(
        cfg.model, vocab_size=cfg.tokenizer.vocab_size, length=cfg.length, backend="tpu"
    )
    configs.validate(cfg)
    configs.freeze(cfg)
    lowered = lower(cfg, abstract_mesh(cfg.mesh), loss_fn=loss_of(cfg))
    assert "stablehlo.while" in lowered.as_text()
    shapes = jax.tree.leaves(lowered.out_info)
    m = cfg.model
    experts = (m.moe.n_experts,) if m.moe.n_experts else ()
    wide = m.moe.d_ff or m.d_ff
    if cfg.peft.method == "lora":  # the matrix itself is held quantised
        wide = cfg.peft.rank
    up = (m.n_layers, *experts, m.d_model, wide)
    assert any(s.shape == up for s in shapes)


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 8},
        {"fsdp": 8},
        {"tensor": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 4, "tensor": 2},
    ],
    ids=str,
)
def test_smoke_runs_on_any_mesh(mesh):
    cfg = load(ROOT / "configs/smoke.py")
    cfg.mesh = configs.MeshConfig(**{"data": 1, **mesh})
    configs.resolve_model(cfg.model, vocab_size=259, length=cfg.length, backend="cpu")
    for name in set(sharding.MESH_AXES) - {"expert"}:  # it has none
        sharding.check_divisible(cfg, {**dict.fromkeys(sharding.MESH_AXES, 1), name: 8})
    lower(configs.freeze(cfg), abstract_mesh(cfg.mesh))
