"""Models, configs and batches that compile in a moment and divide by any mesh of 8 devices."""

import numpy as np

from llm_jax import config as configs
from llm_jax.types import Batch


def tiny_model(**changes) -> configs.ModelConfig:
    """A frozen model config that compiles in a moment and divides by any mesh of 8."""
    values = {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 8,
        "kv_heads": 8,
        "vocab_multiple": 8,
        "d_ff": 64,
        "dtype": "float32",
        "scan": False,
    }
    cfg = configs.ModelConfig(**{**values, **changes})
    configs.resolve_model(cfg, vocab_size=53, length=16, backend="cpu")
    return configs.freeze(cfg)


def tiny_train(**changes) -> configs.TrainConfig:
    """A frozen TrainConfig around `tiny_model`; changes are dotted paths."""
    cfg = configs.TrainConfig(batch_size=16, length=16, steps=30, model=configs.thaw(tiny_model()))
    cfg.optimizer.warmup_steps = 3
    configs.override(cfg, changes)
    configs.resolve_model(cfg.model, vocab_size=53, length=cfg.length, backend="cpu")
    configs.validate(cfg)
    return configs.freeze(cfg)


def random_batch(rows=16, length=16, vocab=53, seed=0, packed=False) -> Batch:
    """Random tokens; packed: two or three documents and some padding in each row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    batch = Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=np.ones((rows, length), np.float32),
        bytes=rng.integers(1, 4, (rows, length)).astype(np.int32),
    )
    if not packed:
        return batch
    segments, positions = np.zeros((2, rows, length), np.int32)
    weights = np.zeros((rows, length), np.float32)
    for r in range(rows):
        cuts = np.sort(rng.choice(np.arange(2, length), rng.integers(1, 4), replace=False))
        start = 0
        for number, end in enumerate(cuts):
            segments[r, start:end] = number + 1
            positions[r, start:end] = np.arange(end - start)
            weights[r, start : end - 1] = 1
            start = end
    return batch.replace(segments=segments, positions=positions, weights=weights)
