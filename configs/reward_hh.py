"""A reward model on dialogues of Anthropic's HH kind, on a small model such as SmolLM2-135M.

    python -m experiments.reward --config=configs/reward_hh.py --init_from=SmolLM2-135M-Instruct.gguf \\
        --input=hh-harmless.jsonl.gz --workdir=runs/reward --config.data.preference.split_seed=0
    ... --config.reward.backbone=tuned --config.peft.method=lora

As it stands the backbone is frozen and its features are computed once (reward.backbone=features).
The dialogue's oldest exchanges go where it is longer than a row.
"""

from llm_jax.config import (
    CheckpointConfig,
    DataConfig,
    DialogueConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        name="reward_hh",
        epochs=1,
        batch_size=8,
        length=512,
        model=ModelConfig(head="reward"),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup_steps=10, schedule="linear", b2=0.98, weight_decay=0.0
        ),
        reward=RewardConfig(backbone="features"),
        data=DataConfig(
            format="preference",
            packing="first_fit",
            eval_fraction=312 / 2297,  # 312 prompts of the published test set
            dialogue=DialogueConfig(too_long="oldest"),
        ),
        eval=EvalConfig(every=0, sample_tokens=0),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(every=5),
    )
