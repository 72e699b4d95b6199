"""A reward model for answers about Python, on the model of configs/quickstart.py: offline.

    python -m experiments.reward --config=configs/reward_embedded.py --init_from=runs/quickstart \\
        --workdir=runs/reward

The pairs are the first paragraphs of docstrings against spoiled ones (embedded:preferences): words in
another order, or a loop. Under two minutes on 2 cores; 0.98 of 453 held-out pairs with Python 3.11's
docstrings (0.70 by length alone).
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
        name="reward_embedded",
        steps=110,
        batch_size=8,
        length=384,
        model=ModelConfig(scan=False, head="reward"),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=20, schedule="cosine", b2=0.98, weight_decay=0.0
        ),
        data=DataConfig(
            format="preference",
            inputs=("embedded:preferences",),
            packing="first_fit",
            dialogue=DialogueConfig(template="alpaca"),
        ),
        eval=EvalConfig(every=0, sample_tokens=0),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(every=5),
    )
