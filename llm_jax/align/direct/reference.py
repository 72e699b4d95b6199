"""Log-probabilities under the reference model, computed once and kept beside the data.

They are per token of the corpus, not per batch: each answer that a run meets is scored once, whatever
the order of training and the number of epochs are.
"""

import hashlib
import json
import os
from functools import partial
from pathlib import Path

import jax
import numpy as np

from llm_jax import models, sharding
from llm_jax.config import ModelConfig, TrainConfig
from llm_jax.data.comparisons import Comparisons
from llm_jax.data.loader import Loader, eval_batches
from llm_jax.data.packing import make_plan, target_places
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
    reference: Companion,
    corpus: Comparisons,
    loader: Loader,
    cfg: TrainConfig,
    mesh: jax.sharding.Mesh,
) -> None:
    """Fills in `ref_log_probs` of all that a run meets, from disk where they have been computed
    already. They are not a number where a run does not come."""
    known = fingerprint(reference.params)
    met = loader.packed_rows()
    parts = [(c.tokens, met[c.name]) for c in corpus.train]
    if corpus.evaluation is not None:
        parts.append((corpus.evaluation, corpus.eval_batches(cfg).chosen))
    for tokens, rows in parts:
        about = json.dumps([known, tokens.fingerprint(), cfg.length])
        name = hashlib.sha256(about.encode()).hexdigest()[:16]
        path = Path(corpus.directory) / f"reference-{name}.npy"
        # Process 0 says whether it is there: then all read it, or none does.
        found = distributed.from_main("reference", lambda path=path: str(path.is_file())) == "True"
        tokens.ref_log_probs = np.load(path) if found else np.full(tokens.total, np.nan, np.float32)
        if log_probs(tokens, rows, reference, cfg, mesh) and distributed.is_main():
            partial_ = path.with_suffix(".partial.npy")
            np.save(partial_, tokens.ref_log_probs)
            os.replace(partial_, path)


def log_probs(
    tokens: Tokens,
    rows: np.ndarray,
    reference: Companion,
    cfg: TrainConfig,
    mesh: jax.sharding.Mesh,
) -> int:
    """Fills in, in nats, what `tokens.ref_log_probs` lacks of the given packed rows: of each token that
    is trained given what stands before it. Returns how many rows it was."""
    plan = make_plan(tokens, cfg.data.packing, cfg.length)
    lacks = [
        bool(np.isnan(tokens.ref_log_probs[places[places >= 0]]).any())
        for places in (target_places(tokens, plan, rows[i : i + 1]) for i in range(len(rows)))
    ]
    rows = rows[np.array(lacks, bool)]
    if not len(rows):
        return 0
    kept, tokens.ref_log_probs = tokens.ref_log_probs, None  # no part of these batches
    batches = eval_batches(
        tokens,
        length=cfg.length,
        batch_size=cfg.eval.batch_size or cfg.batch_size // cfg.accumulation,
        packing=cfg.data.packing,
        token_lengths=np.zeros(tokens.vocab_size, np.int32),
        chosen=rows,
        **dict(zip(("blocks", "block_count"), distributed.row_blocks(mesh), strict=True)),
    )
    progress = bar("reference", len(batches), "batch")
    for i, batch in enumerate(batches):
        own = batches.chosen[i * batches.batch_size : (i + 1) * batches.batch_size]
        places_BxL = target_places(tokens, batches.plan, own)[:, : batch.tokens.shape[1]]
        scored_BxL = np.asarray(_scores(reference.params, put(batch, mesh), reference.cfg))
        here = places_BxL >= 0
        kept[places_BxL[here]] = scored_BxL[: len(own)][here]
        progress.update(1)
    progress.close()
    tokens.ref_log_probs = kept
    return len(rows)


@partial(jax.jit, static_argnames="cfg")
def _scores(params: PyTree, batch: Batch, cfg: ModelConfig) -> Array:
    scores = models.family(cfg.family).scores(params, batch, cfg, want=("log_probs",))
    return sharding.constrain(scores.log_probs, None, None)
