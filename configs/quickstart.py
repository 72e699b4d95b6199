"""A small Llama on the documentation that comes with Python, from nothing to samples.

    make demo
    python -m experiments.pretrain --config=configs/quickstart.py --workdir=runs/quickstart

2.4 million parameters, 0.8 million tokens of the language's topics and the standard library's
docstrings: about 2.5 minutes on 2 cores. The number to expect is in the README; it differs between
Python versions, whose documentation differs.
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
        steps=800,
        batch_size=4,
        length=256,
        model=ModelConfig(d_model=192, n_layers=4, n_heads=6, scan=False),
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            warmup_steps=50,
            schedule="cosine",
            final_learning_rate=1e-4,
            b2=0.98,
        ),
        tokenizer=TokenizerConfig(kind="sentencepiece_bpe", vocab_size=2048),
        data=DataConfig(inputs=("embedded:docs",)),
        eval=EvalConfig(every=200, batch_size=8, prompts=("", "Return the "), sample_tokens=96),
        checkpoint=CheckpointConfig(every=400),
        log=LogConfig(every=5),
    )
