"""The model that a student learns from: compared with the student's vocabulary, and its most probable
tokens written to disk."""

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax import models
from llm_jax.config import ModelConfig, TrainConfig
from llm_jax.data.progress import bar
from llm_jax.eval.output import write_json
from llm_jax.nn import distill_head
from llm_jax.nn.params import fingerprint
from llm_jax.train.companion import Companion, same_vocabulary
from llm_jax.train.program import put
from llm_jax.types import Array, Batch, PyTree

IDS, LOG_PROBS, MANIFEST = "ids.npy", "log_probs.npy", "manifest.json"


def check_teacher(teacher: ModelConfig, cfg: TrainConfig) -> None:
    """Raises ValueError if the two have different vocabularies, or the run longer rows than the
    teacher has positions."""
    if teacher.vocab_size != cfg.model.vocab_size:
        raise ValueError(
            f"the teacher has a vocabulary of {teacher.vocab_size} tokens and the student "
            f"(model.vocab_size) one of {cfg.model.vocab_size}; distillation compares them token by "
            "token, so give the student the teacher's tokenizer (tokenizer.path)"
        )
    if teacher.positions == "learned" and cfg.length > teacher.max_length:
        raise ValueError(
            f"length={cfg.length} is longer than the {teacher.max_length} positions that the teacher "
            "has learned; lower it"
        )


def check_tokenizer(teacher: Any, student: Any) -> None:
    """Raises ValueError if an id stands for different tokens. Chat templates may differ."""
    if not same_vocabulary(teacher, student):
        raise ValueError(
            "the teacher's tokenizer and the student's have other tokens; distillation compares them "
            "token by token, so start from a student with the teacher's, or leave tokenizer.path and "
            "--init_from empty to take it"
        )


class TopK:
    """A teacher's n most probable tokens at every place of every batch, on disk.

    Attributes:
      folder: ids.npy, int32, and log_probs.npy, float32, both [steps, B, T, n] (8 n bytes a token),
        and manifest.json, which names what they depend on.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._ids = np.load(folder / IDS, mmap_mode="r")
        self._log_probs = np.load(folder / LOG_PROBS, mmap_mode="r")

    def add(self, batch: Batch, step: int) -> Batch:
        """The batch of a step with its candidates."""
        return batch.replace(
            candidates=np.asarray(self._ids[step]),
            candidate_log_probs=np.asarray(self._log_probs[step]),
        )


def prepare_top_k(
    teacher: Companion, loader: Any, cfg: TrainConfig, mesh: jax.sharding.Mesh, k: int, root: Path
) -> TopK:
    """One pass of the teacher over all batches of a run, or the one that `root` holds already.

    Batches are a function of the seed and the step (`loader.batch`), and so is what is kept: the
    context of a token differs from epoch to epoch.

    Raises:
      ValueError: k outside 1 .. the vocabulary.
    """
    V = teacher.cfg.vocab_size
    if not 1 <= k <= V:
        raise ValueError(f"--top_k={k} has to be from 1 to the vocabulary's {V}")
    manifest = {
        "teacher": fingerprint(teacher.params),
        "data": loader.identity,
        "steps": cfg.steps,
        "top_k": k,
    }
    text = json.dumps(manifest, sort_keys=True)
    folder = root / f"top{k}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if (folder / MANIFEST).exists():
        return TopK(folder)
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    first = loader.batch(0)
    shape = (cfg.steps, *first.targets.shape, k)
    make = partial(np.lib.format.open_memmap, mode="w+", shape=shape)
    ids = make(str(unfinished / IDS), dtype=np.int32)
    log_probs = make(str(unfinished / LOG_PROBS), dtype=np.float32)
    progress = bar("teacher", cfg.steps, "step")
    for step in range(cfg.steps):
        batch = put(loader.batch(step), mesh)
        ids[step], log_probs[step] = jax.device_get(
            _top_k(teacher.params, batch, cfg=teacher.cfg, k=k)
        )
        progress.update(1)
    progress.close()
    ids.flush()
    log_probs.flush()
    write_json(str(unfinished / MANIFEST), manifest)
    unfinished.rename(folder)
    return TopK(folder)


@partial(jax.jit, static_argnames=("cfg", "k"))
def _top_k(params: PyTree, batch: Batch, *, cfg: ModelConfig, k: int) -> tuple[Array, Array]:
    model = models.family(cfg.family)
    side = model.head_side(params, model.hidden(params, batch, cfg).x, cfg)
    return distill_head.top_k(side, k, vocab_size=cfg.vocab_size)
