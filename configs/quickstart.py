"""A small Llama on the documentation that comes with Python, from nothing to samples.

make demo      (or: python -m experiments.pretrain --config=configs/quickstart.py --workdir=runs/quickstart)
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
        name="quickstart",
        steps=600,
        batch_size=8,
        length=256,
        model=ModelConfig(d_model=256, n_layers=4, n_heads=4, scan=False),
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            warmup_steps=50,
            schedule="cosine",
            final_learning_rate=1e-4,
            b2=0.98,
        ),
        tokenizer=TokenizerConfig(kind="sentencepiece_bpe", vocab_size=4096),
        data=DataConfig(inputs=("embedded:docs",)),
        eval=EvalConfig(every=150, prompts=("", "Return the "), sample_tokens=96),
        checkpoint=CheckpointConfig(every=300),
        log=LogConfig(every=5),
    )
