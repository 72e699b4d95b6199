"""The model that a run starts from (`checkpoint.init_from`): a run of ours, or one of another format."""

from pathlib import Path
from typing import Any

import jax

from llm_jax import config as configs
from llm_jax import models
from llm_jax.config import MoEConfig, TrainConfig
from llm_jax.interop import pretrained
from llm_jax.peft import lora
from llm_jax.train import checkpoint
from llm_jax.train.tuning import make_tuning
from llm_jax.types import PyTree

# How a model is computed and trained is the recipe's; everything else comes with the weights.
RECIPES = (
    "dtype",
    "attention",
    "attention_block",
    "scan",
    "scan_unroll",
    "remat",
    "head_chunk",
    "pipeline_microbatches",
    "pipeline_turns",
    "dropout",
)
RECIPES_EXPERTS = ("implementation", "dispatch", "capacity_factor", "chunk")


def adopt(cfg: TrainConfig, path: str | Path) -> None:
    """Makes a recipe go on from the model at `path`, in place: its architecture, its weights, its
    tokenizer, and how its texts start and end.

    Raises:
      FileNotFoundError, ValueError: as `llm_jax.load` does.
    """
    if pretrained.kind(path):
        found = pretrained.load(path, None)
        model, adds_bos, ends = found.model, found.adds_bos, found.end_tokens
    else:
        base = checkpoint.load_config(path)
        model, adds_bos = configs.thaw(base.model), base.data.add_bos
        ends = base.tokenizer.end_tokens
    for name in RECIPES:
        setattr(model, name, getattr(cfg.model, name))
    experts: MoEConfig = model.moe
    for name in RECIPES_EXPERTS:
        setattr(experts, name, getattr(cfg.model.moe, name))
    cfg.model = model
    cfg.data.add_bos, cfg.tokenizer.end_tokens = adds_bos, ends
    cfg.checkpoint.init_from, cfg.tokenizer.path = str(Path(path).expanduser().absolute()), ""


def load_tokenizer(path: str | Path) -> Any:
    """Its tokenizer."""
    if pretrained.kind(path):
        return pretrained.load(path, None).tokenizer
    return checkpoint.load_tokenizer(path)


def load_params(path: str | Path, specs: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """Its parameters as plain arrays in float32, cut for `mesh`: of a run with PEFT its base's with
    what it learned added.

    Raises:
      ValueError: they are not those of `specs`; the message names the first.
    """
    if pretrained.kind(path):
        params = pretrained.load(path, mesh).params
    else:
        cfg = checkpoint.load_config(path)
        if cfg.peft.method == "none":
            return checkpoint.load_params(path, specs, mesh)
        params = lora.merge(load_tuned(path, cfg, mesh))
    checkpoint.check_shapes(specs, params, str(path))
    return params


def load_tuned(
    path: str | Path, cfg: TrainConfig, mesh: jax.sharding.Mesh, base: str | Path | None = None
) -> PyTree:
    """The whole tree of a run with PEFT, whose config is `cfg`: the leaves that it was trained
    with, on its base (`base`: where that is now).

    Raises:
      FileNotFoundError: the base is gone.
      ValueError: the base is another model.
    """
    base = base or cfg.checkpoint.init_from
    if not Path(base).expanduser().exists():
        raise FileNotFoundError(
            f"{path} holds what peft.method={cfg.peft.method} trained on {base}, which is not there; "
            "say where it is with base= (--base)"
        )
    specs = models.family(cfg.model.family).specs(cfg.model)
    tuning = make_tuning(cfg, specs)
    trained = checkpoint.load_params(path, tuning.trained, mesh)
    _, frozen = tuning.split(load_params(base, specs, mesh), jax.random.key(0))
    return tuning.join(trained, frozen)
