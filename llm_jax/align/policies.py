"""A language model as what writes answers: the little that rollouts ask of it."""

from pathlib import Path
from typing import Any

import jax

from llm_jax import config as configs
from llm_jax.config import TrainConfig
from llm_jax.decode.generate import Completion, generate
from llm_jax.train import base_model, companion
from llm_jax.types import PyTree


class Policy:
    """A model, its tokenizer, and how its answers end.

    Attributes:
      config: of `config.model`, `config.tokenizer` and `config.data` the parts that generation needs.
      params, tokenizer, mesh: the others.
    """

    def __init__(self, config: TrainConfig, params: PyTree, tokenizer: Any, mesh: Any):
        self.config, self.params, self.tokenizer, self.mesh = config, params, tokenizer, mesh

    def complete(self, prompts: list[list[int]], **sampling: Any) -> list[Completion]:
        """Completions of prompts in ids; keywords as in `decode.generate.generate`."""
        sampling.setdefault("end_tokens", self.config.tokenizer.end_tokens)
        with jax.set_mesh(self.mesh):
            return generate(self.params, self.config.model, self.tokenizer, prompts, **sampling)


def load(path: str | Path, mesh: Any, *, like: TrainConfig) -> Policy:
    """The model at `path`, computed as the recipe `like` says.

    Raises:
      FileNotFoundError, ValueError: as `llm_jax.load` does; a reward model.
    """
    with jax.set_mesh(mesh):
        found = companion.load(path, mesh, like=like.model)
    config = configs.thaw(like)
    base_model.adopt(config, path)
    config.model = found.cfg
    # What ends an answer is known once a run has rendered its data; of other formats by the recipe.
    own = config.tokenizer
    own.end_tokens = tuple(dict.fromkeys([*own.end_tokens, *like.tokenizer.end_tokens]))
    own.stop = tuple(dict.fromkeys([*own.stop, *like.tokenizer.stop]))
    return Policy(config, found.params, found.tokenizer, mesh)
