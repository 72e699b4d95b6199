"""DPO with a LoRA on a small model such as SmolLM2-135M.

    python -m experiments.dpo --config=configs/dpo_smollm2.py --init_from=SmolLM2-135M-Instruct.gguf \\
        --input=hh-harmless.jsonl.gz --workdir=runs/dpo
    ... --config.dpo.length_penalty=0.01   # R-DPO: length costs
    ... --config.dpo.loss=simpo --config.dpo.beta=2

The reference is the model without its adapter. 400 dialogues take about 20 minutes on 2 cores.
"""

from llm_jax.config import (
    CheckpointConfig,
    DataConfig,
    DialogueConfig,
    DirectConfig,
    EvalConfig,
    LogConfig,
    OptimizerConfig,
    PeftConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        name="dpo_smollm2",
        steps=100,
        batch_size=4,
        length=512,
        peft=PeftConfig(method="lora", rank=16),
        dpo=DirectConfig(beta=0.1),
        optimizer=OptimizerConfig(
            learning_rate=2e-4, warmup_steps=10, schedule="linear", b2=0.98, weight_decay=0.0
        ),
        data=DataConfig(
            format="preference",
            packing="first_fit",
            eval_fraction=312 / 2297,
            dialogue=DialogueConfig(too_long="oldest"),
        ),
        eval=EvalConfig(
            every=0,
            at_start=True,
            prompts=("Can you help me write a letter to my landlord?",),
            sample_tokens=64,
        ),
        checkpoint=CheckpointConfig(every=50),
        log=LogConfig(every=2),
    )
