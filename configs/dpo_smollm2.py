"""DPO with a LoRA on a small model such as SmolLM2-135M.

    python -m experiments.dpo --config=configs/dpo_smollm2.py --init_from=SmolLM2-135M-Instruct.gguf \\
        --input=hh-harmless.jsonl.gz --workdir=runs/dpo
    ... --config.dpo.length_penalty=0.02   # R-DPO: length costs
    ... --config.dpo.loss=simpo --config.dpo.beta=2

The reference is the model without its adapter. As it stands, 1,400 pairs: 70 minutes on 2 cores, of which
the 312 held-out prompts, before and after, take 12.
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
    PreferenceDataConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        name="dpo_smollm2",
        steps=64,
        batch_size=16,
        length=256,
        peft=PeftConfig(method="lora", rank=16),
        dpo=DirectConfig(beta=0.1, sample_prompts=16, sample_tokens=48),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup_steps=6, schedule="linear", b2=0.98, weight_decay=0.0
        ),
        data=DataConfig(
            format="preference",
            packing="first_fit",
            eval_fraction=312 / 2297,
            preference=PreferenceDataConfig(split_seed=0),
            dialogue=DialogueConfig(too_long="oldest"),
        ),
        eval=EvalConfig(
            every=0,
            at_start=True,
            batch_size=8,
            prompts=("Can you help me write a letter to my landlord?",),
            sample_tokens=48,
        ),
        checkpoint=CheckpointConfig(every=8),
        log=LogConfig(every=2),
    )
