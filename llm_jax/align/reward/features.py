"""Features of answers: the trunk's output at the last token of each, computed once and kept on disk."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import models
from llm_jax.config import ModelConfig, TrainConfig
from llm_jax.data.loader import eval_batches
from llm_jax.data.packing import answer_ids
from llm_jax.data.progress import bar
from llm_jax.data.tokens import Tokens
from llm_jax.nn.params import fingerprint
from llm_jax.train.program import put
from llm_jax.types import Array, Batch, PyTree


class Answers(NamedTuple):
    """Features and what is known of the answers, in the order of the data."""

    features_NxD: np.ndarray  # float32
    labels_N: np.ndarray
    tokens_N: np.ndarray  # that a model is to write
    groups_N: np.ndarray  # int, ascending; those that are compared share it
    prompts_N: np.ndarray  # int, ascending

    def pick(self, here_N: np.ndarray) -> "Answers":
        """Some of them."""
        return Answers(*(x[here_N] for x in self))


def answers_of(tokens: Tokens, features_NxD: np.ndarray) -> Answers:
    """What the data knows of the answers, beside their features."""
    b = tokens.branches
    prompt_N = np.repeat(np.arange(len(b.answers_D)), b.answers_D)
    before_D = np.cumsum(b.groups_D) - b.groups_D
    group_N = before_D[prompt_N] + b.group_A - 1
    return Answers(features_NxD, b.label_A.astype(np.float64), b.tokens_A, group_N, prompt_N)


def features(
    tokens: Tokens, params: PyTree, model: ModelConfig, cfg: TrainConfig, mesh: Any
) -> np.ndarray:
    """float32 [N, D]: the trunk's output at the last token of each answer."""
    batches = eval_batches(
        tokens,
        length=cfg.length,
        batch_size=cfg.eval.batch_size or cfg.batch_size // cfg.accumulation,
        packing=cfg.data.packing,
        token_lengths=np.zeros(tokens.vocab_size, np.int32),
    )
    out = np.zeros((len(tokens.branches.label_A), model.d_model), np.float32)
    progress = bar("features", len(batches), "batch")
    for i, batch in enumerate(batches):
        rows = batches.chosen[i * batches.batch_size : (i + 1) * batches.batch_size]
        ids_BxA = answer_ids(tokens, batches.plan, rows)
        x_BxAxD = np.asarray(_ends(params, put(batch, mesh), model))[: len(rows)]
        out[ids_BxA[ids_BxA >= 0]] = x_BxAxD[ids_BxA >= 0]
        progress.update(1)
    progress.close()
    return out


@partial(jax.jit, static_argnames="cfg")
def _ends(params: PyTree, batch: Batch, cfg: ModelConfig) -> Array:
    x_BxLxD = models.family(cfg.family).hidden(params, batch, cfg).x.astype(jnp.float32)
    A = batch.groups.shape[1]
    here = batch.answers[:, :, None] == jnp.arange(1, A + 1)[None, None, :]
    return jnp.einsum("bld,bla->bad", x_BxLxD, here * batch.weights[:, :, None])


def kept_features(
    tokens: Tokens, params: PyTree, model: ModelConfig, cfg: TrainConfig, mesh: Any, folder: Path
) -> np.ndarray:
    """`features`, from `folder` where they have been computed already."""
    about = json.dumps([fingerprint(params), tokens.fingerprint(), cfg.length, model.dtype])
    path = folder / f"features-{hashlib.sha256(about.encode()).hexdigest()[:16]}.npy"
    if path.is_file():
        return np.load(path)
    found = features(tokens, params, model, cfg, mesh)
    partial_ = path.with_suffix(".partial.npy")
    np.save(partial_, found)
    os.replace(partial_, path)
    return found


def joined(parts: Sequence[Answers]) -> Answers:
    """Those of several sources, groups and prompts numbered through."""
    out, groups, prompts = [], 0, 0
    for p in parts:
        out.append(p._replace(groups_N=p.groups_N + groups, prompts_N=p.prompts_N + prompts))
        groups, prompts = out[-1].groups_N[-1] + 1, out[-1].prompts_N[-1] + 1
    return Answers(*(np.concatenate(x) for x in zip(*out, strict=True)))
