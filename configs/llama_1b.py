"""The shape of Llama 3.2 1B: 16 layers, 32 heads on 8 key heads, 2048 wide.

    python -m experiments.pretrain --config=configs/llama_1b.py --workdir=runs/llama_1b \
        --input='data/*.parquet' --config.tokenizer.path=tokenizer.json

2M tokens a step, 25 tokens a parameter; sharded with fsdp over all devices. For 8 or more fast
accelerators. The tokenizer decides the size of the vocabulary (128,256 entries at most).
"""

from llm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)
from llm_jax.models.presets import preset


def get_config(name: str = "llama_1b", architecture: str = "llama3.2-1b") -> TrainConfig:
    model = preset(architecture)
    model.remat = "attention"
    return TrainConfig(
        name=name,
        steps=15_000,
        batch_size=1024,
        length=2048,
        z_loss=1e-5,
        model=model,
        mesh=MeshConfig(data=1, fsdp=-1),
        optimizer=OptimizerConfig(
            learning_rate=4e-4,
            warmup_steps=1000,
            final_learning_rate=4e-5,
            b2=0.95,
            weight_decay=0.1,
        ),
        tokenizer=TokenizerConfig(kind="hf_bpe", vocab_size=128_256),
        data=DataConfig(inputs=("hf:HuggingFaceFW/fineweb-edu",), eval_fraction=0.001),
        eval=EvalConfig(every=1000, rows=2048),
        checkpoint=CheckpointConfig(every=1000),
    )
