"""A few steps of a tiny model: does everything work here?

Reproduces nothing; float32 and under a minute on 2 cores. Batch, length, heads, layers and widths
are divisible by 8, so that it runs on any mesh of 8 devices:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
    python -m experiments.pretrain --config=configs/smoke.py --workdir=runs/smoke \
        --config.mesh.fsdp=2 --config.mesh.tensor=2
"""

from llm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        name="smoke",
        steps=30,
        batch_size=16,
        length=64,
        model=ModelConfig(d_model=64, n_layers=8, n_heads=8, vocab_multiple=64, dtype="float32"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5),
        tokenizer=TokenizerConfig(kind="byte"),
        data=DataConfig(inputs=("embedded:topics",)),
        eval=EvalConfig(every=10, rows=64, sample_tokens=32),
        checkpoint=CheckpointConfig(every=10),
        log=LogConfig(every=1),
    )
