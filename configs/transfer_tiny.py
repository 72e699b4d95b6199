"""Learning rates that stay right when a model grows wider (muP), on two cores.

    python -m experiments.transfer --config=configs/transfer_tiny.py --workdir=runs/transfer \
        --widths=64,128,256,512

Bytes, 2 layers, 64 wide at the base; the learning rate below is about the best there. Docs and
figures: docs/scaling_laws.md.
"""

from llm_jax.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        name="transfer_tiny",
        steps=200,
        batch_size=16,
        length=64,
        model=ModelConfig(
            d_model=64,
            n_layers=2,
            n_heads=2,
            d_ff=128,
            activation="gelu",
            init_std=0.125,  # 1 / sqrt(d_model)
            scan=False,
        ),
        optimizer=OptimizerConfig(
            learning_rate=8e-3, schedule="linear", warmup_steps=20, weight_decay=0.0
        ),
        tokenizer=TokenizerConfig(kind="byte"),
        data=DataConfig(packing="random", isolate_documents=False, add_eos=False),
        eval=EvalConfig(rows=1024, batch_size=64),
    )
