"""configs/dpo_smollm2.py with a price on length: R-DPO (Park et al. 2024).

    python -m experiments.dpo --config=configs/dpo_smollm2_length.py \\
        --init_from=SmolLM2-135M-Instruct.gguf --input=hh-harmless.jsonl.gz --workdir=runs/rdpo

A token costs length_penalty in the reward that is maximised, so that what pairs say of length alone is
not learned from them.
"""

from configs import dpo_smollm2
from llm_jax.config import TrainConfig


def get_config() -> TrainConfig:
    cfg = dpo_smollm2.get_config()
    cfg.name = "dpo_smollm2_length"
    cfg.dpo.length_penalty = 0.02
    return cfg
