"""Long and multi-turn answers (LIMA, Zhou et al. 2023) for a small model, with a LoRA.

    python -m experiments.sft --config=configs/sft_lima.py --init_from=SmolLM2-135M-Instruct \\
        --input=lima_1029.json,turns.jsonl --workdir=runs/lima

Rows of 1,024 tokens; of a longer conversation the oldest exchanges go. `turns.jsonl` may be what
`experiments.self_instruct --turns` makes. A pass over LIMA's 1,029 answers takes two
hours on 2 cores.
"""

from llm_jax.config import (
    CheckpointConfig,
    DataConfig,
    DialogueConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    PeftConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        name="sft_lima",
        epochs=3,
        batch_size=4,
        length=1024,
        accumulation=2,
        model=ModelConfig(embed_noise=5.0),
        peft=PeftConfig(method="lora", rank=16, alpha=32.0, dropout=0.05),
        optimizer=OptimizerConfig(
            learning_rate=3e-4, warmup_steps=10, schedule="cosine", b2=0.98, weight_decay=0.0
        ),
        data=DataConfig(
            format="dialogue", packing="first_fit", dialogue=DialogueConfig(too_long="oldest")
        ),
        eval=EvalConfig(
            every=100,
            at_start=True,
            prompts=("How can I get up early in the morning without feeling tired?",),
            sample_tokens=160,
        ),
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(every=5),
    )
