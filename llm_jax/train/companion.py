"""A second model beside the one that is trained: a teacher, a reference. It is not trained itself."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import jax

from llm_jax import config as configs
from llm_jax import models
from llm_jax.config import ModelConfig, TrainConfig
from llm_jax.train import base_model
from llm_jax.types import PyTree


class Companion(NamedTuple):
    """A model that is not trained."""

    cfg: ModelConfig
    params: PyTree
    specs: PyTree
    tokenizer: Any


def describe(
    path: str | Path, head: str = "lm", like: ModelConfig | None = None
) -> tuple[ModelConfig, Any]:
    """(frozen config, tokenizer) of the model at `path`, without its parameters.

    Args:
      like: the model that says in which type and by which kernels it is computed; None: the defaults.

    Raises:
      ValueError: it has another head than `head`.
    """
    recipe = TrainConfig()
    if like is not None:
        recipe.model = configs.thaw(like)
    recipe.model.head = head
    base_model.adopt(recipe, path)
    cfg, tokenizer = recipe.model, base_model.load_tokenizer(path)
    configs.resolve_model(
        cfg,
        vocab_size=tokenizer.vocab_size,
        length=cfg.max_length,
        backend=jax.default_backend(),
    )
    return configs.freeze(cfg), tokenizer


def load(
    path: str | Path,
    mesh: jax.sharding.Mesh,
    head: str = "lm",
    like: ModelConfig | None = None,
) -> Companion:
    """The model at `path` (whatever `llm_jax.load` takes), its parameters cut for `mesh`; `like` as
    in `describe`.

    Raises:
      FileNotFoundError, ValueError: as `llm_jax.load` does.
    """
    cfg, tokenizer = describe(path, head, like)
    model = models.family(cfg.family)
    specs = model.specs(cfg)
    params = model.cast(base_model.load_params(path, specs, mesh), cfg.dtype)
    return Companion(cfg, params, specs, tokenizer)


def same_vocabulary(one: Any, other: Any) -> bool:
    """Whether each id stands for the same token in two tokenizers. Chat templates may differ."""

    def vocabulary(tokenizer: Any) -> str:
        plain = copy.copy(tokenizer)
        plain.chat_template = None
        return plain.fingerprint()

    return vocabulary(one) == vocabulary(other)
