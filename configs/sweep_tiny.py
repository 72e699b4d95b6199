"""IsoFLOP sweep of 0.03 to 0.5 million parameters: a scaling law of your own text on two cores.

    python -m experiments.sweep --config=configs/sweep_tiny.py --output=runs/sweep_tiny --jobs=2 \
        --input=novels/
    python -m experiments.fit_scaling --input=runs/sweep_tiny --law=all --output=runs/sweep_tiny/law

Five budgets from 2.1e11 to 5e12 FLOPs (6 N D, N with the tied embeddings), five or six sizes each:
27 runs, 3.3e13 FLOPs, about 25 minutes on 2 cores that others use as well. Without --input it
trains on the documentation that comes with Python, of which the longest runs read the whole several
times: then the law is one of repeated data.

On 21 MB of English novels in 1k-BPE the best loss of each budget was 4.270, 4.054, 3.841, 3.632 and
3.462 nats a token, at 12 to 25 tokens a parameter; all parabolas have their minimum inside. The
learning rate falls with the root of N; it and init_std, which matters most at these widths, were
found in short runs at 38 to 320 thousand parameters.
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
        name="sweep_tiny",
        run=TrainConfig(
            batch_size=8,
            length=128,
            model=ModelConfig(activation="gelu", scan=False, init_std=0.08),
            optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50, b2=0.98),
            tokenizer=TokenizerConfig(kind="sentencepiece_bpe", vocab_size=1024),
            data=DataConfig(inputs=("embedded:docs",), eval_fraction=0.05),
            eval=EvalConfig(every=0, rows=1024, batch_size=32, sample_tokens=0),
            checkpoint=CheckpointConfig(every=0),
            log=LogConfig(every=5),
        ),
        # Of one depth: a ladder that changes depth between sizes has a step there.
        sizes=(
            (16, 4, 2),
            (20, 4, 2),
            (24, 4, 2),
            (32, 4, 2),
            (40, 4, 2),
            (48, 4, 3),
            (64, 4, 4),
            (80, 4, 4),
            (96, 4, 4),
        ),
        budgets=(2.1e11, 4.7e11, 1.03e12, 2.27e12, 5e12),
        flops="6nd",
        min_ratio=2.4,
        max_ratio=120.0,
        rate=RateConfig(rule="power", reference=1e6, exponent=0.5),
    )
