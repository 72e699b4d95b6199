"""Log-probabilities under the reference model, computed once and kept beside the data.

They are per token of the corpus, not per batch: each answer is scored once, whatever the order of
training, the number of epochs and the packing are.
"""

import hashlib
import json
import os
from functools import partial
from pathlib import Path

import jax
import numpy as np

from llm_jax import models
from llm_jax.config import ModelConfig, TrainConfig
from llm_jax.data.comparisons import Comparisons
from llm_jax.data.loader import eval_batches
from llm_jax.data.packing import target_places
from llm_jax.data.progress import bar
from llm_jax.data.tokens import Tokens
from llm_jax.nn.params import fingerprint
from llm_jax.train import companion, distributed
from llm_jax.train.companion import Companion
from llm_jax.train.program import put
from llm_jax.types import Array, Batch, PyTree


def check(reference: Companion, path: str | Path, cfg: TrainConfig, corpus: Comparisons) -> None:
    """Raises ValueError if ids stand for other tokens there, or it has fewer positions than a row."""
    if reference.cfg.vocab_size != cfg.model.vocab_size or not companion.same_vocabulary(
        reference.tokenizer, corpus.tokenizer
    ):
        raise ValueError(
            f"the reference {path} has another vocabulary ({reference.cfg.vocab_size:,} tokens) than "
            f"the model ({cfg.model.vocab_size:,}); their log-probabilities are compared token by "
            "token, so name a reference with the model's tokenizer in dpo.reference_path"
        )
    if reference.cfg.positions == "learned" and cfg.length > reference.cfg.max_length:
        raise ValueError(
            f"length={cfg.length} is longer than the {reference.cfg.max_length} positions that the "
            f"reference {path} has learned; lower it"
        )


def keep(
    reference: Companion, corpus: Comparisons, cfg: TrainConfig, mesh: jax.sharding.Mesh
) -> str:
    """Fills in `ref_log_probs` of all of a corpus, from disk where they have been computed already;
    returns the reference's fingerprint."""
    known = fingerprint(reference.params)
    parts = [c.tokens for c in corpus.train]
    if corpus.evaluation is not None:
        parts.append(corpus.evaluation)
    for tokens in parts:
        about = json.dumps([known, tokens.fingerprint(), cfg.length])
        name = hashlib.sha256(about.encode()).hexdigest()[:16]
        path = Path(corpus.directory) / f"reference-{name}.npy"
        # Process 0 says whether it is there: then all compute it, or none does.
        found = distributed.from_main("reference", lambda path=path: str(path.is_file()))
        if found == "True":
            tokens.ref_log_probs = np.load(path)
            continue
        tokens.ref_log_probs = log_probs(tokens, reference.params, reference.cfg, cfg, mesh)
        if distributed.is_main():
            partial_ = path.with_suffix(".partial.npy")
            np.save(partial_, tokens.ref_log_probs)
            os.replace(partial_, path)
    return known


def log_probs(
    tokens: Tokens, params: PyTree, model: ModelConfig, cfg: TrainConfig, mesh: jax.sharding.Mesh
) -> np.ndarray:
    """float32 [total], nats: of each token that is trained given what stands before it; 0 elsewhere."""
    batches = eval_batches(
        tokens,
        length=cfg.length,
        batch_size=cfg.eval.batch_size or cfg.batch_size // cfg.accumulation,
        packing=cfg.data.packing,
        token_lengths=np.zeros(tokens.vocab_size, np.int32),
        **dict(zip(("blocks", "block_count"), distributed.row_blocks(mesh), strict=True)),
    )
    out = np.zeros(tokens.total, np.float32)
    progress = bar("reference", len(batches), "batch")
    for i, batch in enumerate(batches):
        rows = batches.chosen[i * batches.batch_size : (i + 1) * batches.batch_size]
        places_BxL = target_places(tokens, batches.plan, rows)
        width = batch.tokens.shape[1]
        scored_BxL = np.asarray(_scores(params, put(batch, mesh), model))[: len(rows)]
        here = places_BxL[:, :width] >= 0
        out[places_BxL[:, :width][here]] = scored_BxL[here]
        progress.update(1)
    progress.close()
    return out


@partial(jax.jit, static_argnames="cfg")
def _scores(params: PyTree, batch: Batch, cfg: ModelConfig) -> Array:
    from llm_jax import sharding

    scores = models.family(cfg.family).scores(params, batch, cfg, want=("log_probs",))
    return sharding.constrain(scores.log_probs, None, None)
