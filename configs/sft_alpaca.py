"""Instruction tuning of a small model, such as SmolLM2-135M, on an Alpaca file.

    python -m experiments.sft --config=configs/sft_alpaca.py --init_from=SmolLM2-135M-Instruct \\
        --input=alpaca_2000.json --workdir=runs/alpaca
    ... --config.peft.method=lora --config.optimizer.learning_rate=5e-4
    ... --config.peft.method=lora --config.peft.base=nf4 --config.optimizer.learning_rate=5e-4

The chat template is the tokenizer's own; a base model without one gets
--config.data.dialogue.template=chatml. An epoch of 1,800 examples cut at 256 tokens takes an hour on 2
cores.
"""

from llm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        name="sft_alpaca",
        epochs=1,
        batch_size=8,
        length=256,
        optimizer=OptimizerConfig(
            learning_rate=5e-5, warmup_steps=10, schedule="cosine", b2=0.98, weight_decay=0.0
        ),
        data=DataConfig(format="dialogue", packing="first_fit"),
        eval=EvalConfig(
            every=0,
            at_start=True,
            prompts=(
                "Give three tips for staying healthy.",
                "Rewrite the sentence in the past tense: She walks to school every day.",
            ),
            sample_tokens=96,
            temperature=0.0,
        ),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(every=5),
    )
