"""The base model of the forgetting experiment: 5.8 million parameters on one kind of text.

    python -m experiments.forgetting --base=runs/novels --input=DATA/text/novels --data=DATA \
        --workdir=runs/forgetting

or alone:

    python -m experiments.pretrain --config=configs/forgetting_base.py --workdir=runs/novels

2 million tokens, about 7 minutes on 2 cores. Docs and figures: docs/finetuning.md.
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
        name="forgetting_base",
        steps=1000,
        batch_size=8,
        length=256,
        model=ModelConfig(d_model=256, n_layers=6, n_heads=8),
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            warmup_steps=60,
            schedule="cosine",
            final_learning_rate=1e-4,
            b2=0.98,
        ),
        tokenizer=TokenizerConfig(kind="sentencepiece_bpe", vocab_size=4096),
        data=DataConfig(inputs=("embedded:docs",), packing="random", isolate_documents=False),
        eval=EvalConfig(every=0, rows=128, batch_size=16, sample_tokens=48),
        checkpoint=CheckpointConfig(every=250, keep_last=1),
        log=LogConfig(every=10),
    )
