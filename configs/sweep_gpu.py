"""IsoFLOP sweep of 5 to 55 million parameters: a first law of your own data on one GPU.

    python -m experiments.sweep --config=configs/sweep_gpu.py --output=runs/sweep_gpu \
        --input='data/*.parquet'
    python -m experiments.fit_scaling --input=runs/sweep_gpu --law=all --output=runs/sweep_gpu/law

Five budgets from 1.5e15 to 2.4e16 FLOPs, five or six sizes each; 3e17 FLOPs in all, by estimate an
hour on an H100, of which the compiler takes a tenth. The longest run reads 0.7 billion tokens of
8k-BPE (3 GB of text); of less text it reads some several times, which a law for fresh data does not
know. Not run yet: no GPU was at hand.
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
from llm_jax.scaling.sweep.config import RateConfig, SweepConfig


def get_config() -> SweepConfig:
    return SweepConfig(
        name="sweep_gpu",
        run=TrainConfig(
            batch_size=64,
            length=512,
            model=ModelConfig(activation="gelu", vocab_multiple=128),
            optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100),
            tokenizer=TokenizerConfig(kind="sentencepiece_bpe", vocab_size=8192),
            data=DataConfig(inputs=("hf:HuggingFaceFW/fineweb-edu",), eval_fraction=0.005),
            eval=EvalConfig(every=0, rows=2048, sample_tokens=0),
            checkpoint=CheckpointConfig(every=2000),
            log=LogConfig(every=20),
        ),
        widths=(128, 160, 192, 224, 256, 320, 384, 448, 512, 576),
        aspect=64.0,
        head_dim=64,
        budgets=(1.5e15, 3e15, 6e15, 1.2e16, 2.4e16),
        min_ratio=2.4,
        max_ratio=120.0,
        rate=RateConfig(rule="power", reference=1e7, exponent=0.33),
    )
