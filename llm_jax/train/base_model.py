"""The model that a run starts from (`checkpoint.init_from`): a run of ours, or one of another format."""

from pathlib import Path
from typing import Any

import jax

from llm_jax import config as configs
from llm_jax.config import MoEConfig, TrainConfig
from llm_jax.interop import pretrained
from llm_jax.train import checkpoint
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
    cfg.checkpoint.init_from, cfg.tokenizer.path = str(path), ""


def load_tokenizer(path: str | Path) -> Any:
    """Its tokenizer."""
    if pretrained.kind(path):
        return pretrained.load(path, None).tokenizer
    return checkpoint.load_tokenizer(path)


def load_params(path: str | Path, specs: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """Its parameters in float32, cut for `mesh`.

    Raises:
      ValueError: they are not those of `specs`; the message names the first.
    """
    if not pretrained.kind(path):
        return checkpoint.load_params(path, specs, mesh)
    params = pretrained.load(path, mesh).params
    checkpoint.check_shapes(specs, params, str(path))
    return params
