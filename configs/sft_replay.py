"""Questions about Python, with a quarter of the rows from the text that the base was trained on.

    python -m experiments.sft --config=configs/sft_replay.py --init_from=runs/quickstart \\
        --workdir=runs/replay

Replay is one remedy against forgetting; the others are flags (optimizer.l2_to_start,
optimizer.gradient_penalty, peft.method=lora) and a mixture of tasks (configs/sft_multi_task.py).
docs/finetuning.md compares them.
"""

from configs import sft_embedded
from llm_jax.config import SourceConfig, TrainConfig


def get_config() -> TrainConfig:
    cfg = sft_embedded.get_config()
    cfg.name, cfg.epochs, cfg.steps = "sft_replay", 0.0, 400
    cfg.data.inputs = ()
    cfg.data.sources = (
        SourceConfig(name="questions", inputs=("embedded:questions",), weights=((0.0, 0.75),)),
        SourceConfig(name="text", inputs=("embedded:docs",), text=True, weights=((0.0, 0.25),)),
    )
    return cfg
