"""Reward models as judges of conversations."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import models, sharding
from llm_jax.align import judges
from llm_jax.align.judges import Judge
from llm_jax.config import MeshConfig, ModelConfig
from llm_jax.data.chat_corpus import with_system
from llm_jax.data.packing import bucket
from llm_jax.data.rendering import Renderer
from llm_jax.interop import huggingface, pretrained
from llm_jax.models import heads
from llm_jax.train import checkpoint, companion
from llm_jax.types import Array, Batch, PyTree


def judge(spec: str) -> Judge:
    """`rule:NAME[:ARGUMENT]` (`align.judges`), or the folder of a reward run or of a Hugging Face
    classifier with one label.

    Raises:
      ValueError: an unknown rule, or a run that is no reward model.
      FileNotFoundError: no run there.
    """
    return judges.rule(spec) if judges.is_rule(spec) else load(spec)


class RewardModel:
    """A reward model: conversations, each ending in the assistant's answer, to float64 [n].

    A conversation is rendered as in training and read at the token that ends the answer, or at the
    last of all that the template writes (`at_end`). One that is longer than the model's context is
    cut from the left.
    """

    def __init__(
        self,
        params: PyTree,
        cfg: ModelConfig,
        renderer: Renderer,
        mesh: Any,
        *,
        system: str = "",
        at_end: bool = False,
    ):
        self.params, self.config, self.mesh = params, cfg, mesh
        self._renderer, self._system, self._at_end = renderer, system, at_end

    def __call__(
        self, conversations: Sequence[Sequence[dict[str, Any]]], *, batch_size: int = 8
    ) -> np.ndarray:
        if not len(conversations):
            return np.zeros(0)
        told = [with_system(c, self._system) for c in conversations]
        texts = [self._renderer.spans(c, after=len(c) - 1) for c in told]
        rows = []
        for ids, trained in self._renderer.encode(texts):
            read = trained.any() and not self._at_end
            end = len(ids) - int(np.argmax(trained[::-1])) if read else len(ids)
            rows.append(ids[:end][-self.config.max_length :])
        order = np.argsort([len(row) for row in rows], kind="stable")[::-1]
        out = np.zeros(len(rows))
        for at in range(0, len(rows), batch_size):
            own = order[at : at + batch_size]
            L = bucket(len(rows[own[0]]))
            tokens, segments = np.zeros((2, batch_size, L), np.int32)
            last = np.zeros(batch_size, np.int32)
            for b, n in enumerate(own):
                tokens[b, : len(rows[n])], segments[b, : len(rows[n])] = rows[n], 1
                last[b] = len(rows[n]) - 1
            batch = Batch(tokens=tokens, segments=segments)
            with jax.set_mesh(self.mesh):
                out[own] = np.asarray(_last(self.params, batch, last, self.config))[: len(own)]
        return out


@partial(jax.jit, static_argnames="cfg")
def _last(params: PyTree, batch: Batch, last_B: Array, cfg: ModelConfig) -> Array:
    model = models.family(cfg.family)
    positions = (batch.segments > 0) * jnp.arange(batch.tokens.shape[1])[None, :]
    batch = batch.replace(positions=positions)
    values_BxL = heads.reward_scores(model, params, batch, cfg).values
    return jnp.take_along_axis(values_BxL, last_B[:, None], axis=1)[:, 0]


def load(path: str | Path) -> RewardModel:
    """The reward model of a run, on one device, with what PEFT learned merged; or of a Hugging Face
    folder, which transformers reads at the last token, unless its config.json says that it is ours.

    Raises:
      FileNotFoundError: no model there.
      ValueError: it is a language model, or damaged.
    """
    if theirs := pretrained.kind(path):
        head, how = pretrained.load(path, None).model.head, {}
        if theirs == "hf":
            config = huggingface.load_json(Path(path).expanduser() / huggingface.CONFIG)
            how = {"at_end": config.get(huggingface.READ_AT) != huggingface.ANSWER}
    else:
        run = checkpoint.load_config(path)
        head, how = run.model.head, {"system": run.data.dialogue.system}
    if head != heads.REWARD:
        raise ValueError(
            f"{path} is no reward model but a language model; train one with experiments.reward, or "
            "give a rule such as rule:shorter"
        )
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    found = companion.load(path, mesh, heads.REWARD)
    return RewardModel(found.params, found.cfg, Renderer(found.tokenizer), mesh, **how)
