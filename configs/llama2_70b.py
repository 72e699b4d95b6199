"""Llama 2 70B: 80 layers, 64 heads on 8 key heads, 8192 wide, context 4096.

    python -m experiments.plan --config=configs/llama2_70b.py --topology=v5p:8x8x8
    python -m experiments.pretrain --config=configs/llama2_70b.py --workdir=runs/llama2_70b \
        --input='data/*.parquet' --config.tokenizer.path=tokenizer.model

Reproduces the published run (Touvron et al. 2023, section 2): 2T tokens, 4M of them a step. By plan
about 67 days on 512 v5p, 820,000 chip hours.
"""

from configs import llama2_7b
from llm_jax.config import TrainConfig, override


def get_config() -> TrainConfig:
    return override(
        llama2_7b.get_config("llama2_70b", "llama2-70b"),
        {
            "steps": 477_000,
            "optimizer.learning_rate": 1.5e-4,
            "optimizer.final_learning_rate": 1.5e-5,
        },
    )
