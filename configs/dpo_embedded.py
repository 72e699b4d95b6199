"""DPO on answers about Python, after configs/sft_embedded.py: offline.

    python -m experiments.dpo --config=configs/dpo_embedded.py --init_from=runs/sft \\
        --workdir=runs/dpo
"""

from llm_jax.config import (
    CheckpointConfig,
    DataConfig,
    DialogueConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        name="dpo_embedded",
        epochs=1,
        batch_size=8,
        length=384,
        model=ModelConfig(scan=False),
        optimizer=OptimizerConfig(
            learning_rate=5e-5, warmup_steps=10, schedule="linear", b2=0.98, weight_decay=0.0
        ),
        data=DataConfig(
            format="preference",
            inputs=("embedded:preferences",),
            packing="first_fit",
            dialogue=DialogueConfig(template="alpaca"),
        ),
        eval=EvalConfig(
            every=0, at_start=True, prompts=("What is os.path.join?",), sample_tokens=64
        ),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(every=5),
    )
