"""QLoRA (Dettmers et al. 2023): a 7 or 8 billion parameter model tuned on one GPU.

    python -m experiments.sft --config=configs/qlora_gpu.py --init_from=Llama-3.1-8B \\
        --input=conversations.jsonl --config.data.dialogue.template=llama3 --workdir=runs/qlora

The frozen matrices are held in NF4 with double quantisation, 0.52 bytes a weight, which they become
one by one as they are read. With recomputed layers an 8B model needs about 5 GB for its matrices, 2
for its embeddings, and the activations of 4 rows of 2,048 tokens. Not run yet.
"""

from llm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    PeftConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        name="qlora_gpu",
        epochs=1,
        batch_size=16,
        length=2048,
        accumulation=2,
        model=ModelConfig(remat="full"),
        peft=PeftConfig(method="lora", base="nf4", rank=64, alpha=16.0, dropout=0.05),
        optimizer=OptimizerConfig(
            learning_rate=2e-4,
            warmup_steps=30,
            schedule="constant",
            b2=0.999,
            clip_norm=0.3,
            weight_decay=0.0,
        ),
        data=DataConfig(format="dialogue", packing="first_fit"),
        eval=EvalConfig(
            every=200, at_start=True, rows=256, prompts=("Explain what a hash table is.",)
        ),
        checkpoint=CheckpointConfig(every=200),
        log=LogConfig(every=5),
    )
