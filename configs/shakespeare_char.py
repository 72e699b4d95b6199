"""nanoGPT's CPU recipe: a character model of Shakespeare.

    python -m experiments.pretrain --config=configs/shakespeare_char.py --workdir=runs/shakespeare \
        --input=tinyshakespeare.txt

Reproduces the CPU run of nanoGPT's README (4 layers, 4 heads, 128 wide, context 64, batch 12,
2,000 steps; loss 1.88 there over 20 random batches): 2 minutes on 2 cores, and 1.906 to 1.924
over the whole validation text with seeds 0 to 2, where nanoGPT itself has 1.892 to 1.908.
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
        name="shakespeare_char",
        steps=2000,
        batch_size=12,
        length=64,
        model=ModelConfig(
            d_model=128,
            n_layers=4,
            n_heads=4,
            positions="learned",
            norm="layernorm",
            activation="gelu_erf",
            scan=False,
            dtype="float32",
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            warmup_steps=100,
            final_learning_rate=1e-4,
            b2=0.99,
            weight_decay=0.1,
        ),
        tokenizer=TokenizerConfig(kind="char", unk=False),
        data=DataConfig(packing="random", isolate_documents=False, add_eos=False),
        eval=EvalConfig(every=500, batch_size=128, prompts=("\n",), sample_tokens=63),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(every=10),
    )
