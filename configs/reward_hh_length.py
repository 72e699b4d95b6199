"""configs/reward_hh.py with a reward that length has been taken out of.

    python -m experiments.reward --config=configs/reward_hh_length.py \\
        --init_from=SmolLM2-135M-Instruct.gguf --input=hh-harmless.jsonl.gz --workdir=runs/reward

A number is trained beside the head, what log(tokens) is worth; it is no part of the reward. On the HH
dialogues the correlation of reward and length falls from -0.53 to -0.30, at 0.6 points of accuracy.
"""

from configs import reward_hh
from llm_jax.config import TrainConfig


def get_config() -> TrainConfig:
    cfg = reward_hh.get_config()
    cfg.name = "reward_hh_length"
    cfg.reward.control_length = True
    return cfg
