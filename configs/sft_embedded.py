"""Answers to questions about Python, on the model of configs/quickstart.py: offline, from nothing.

    python -m experiments.sft --config=configs/sft_embedded.py --init_from=runs/quickstart \\
        --workdir=runs/sft

The conversations are the standard library's objects and the first paragraphs of their docstrings
(embedded:questions), in the Alpaca format, which needs no special tokens.
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
        name="sft_embedded",
        epochs=1,
        batch_size=8,
        length=256,
        model=ModelConfig(scan=False),
        optimizer=OptimizerConfig(
            learning_rate=5e-4, warmup_steps=20, schedule="cosine", b2=0.98, weight_decay=0.0
        ),
        data=DataConfig(
            format="dialogue",
            inputs=("embedded:questions",),
            packing="first_fit",
            dialogue=DialogueConfig(template="alpaca"),
        ),
        eval=EvalConfig(
            every=200,
            at_start=True,
            prompts=("What is os.path.join?", "What does json.loads do?"),
            sample_tokens=64,
        ),
        checkpoint=CheckpointConfig(every=200),
        log=LogConfig(every=5),
    )
