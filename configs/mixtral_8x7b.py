"""Mixtral 8x7B: 32 layers of 8 experts each, of which a token goes through 2; 13B of 47B active.

    python -m experiments.plan --config=configs/mixtral_8x7b.py --topology=v5p:4x4x8
    python -m experiments.pretrain --config=configs/mixtral_8x7b.py --workdir=runs/mixtral_8x7b \
        --input='data/*.parquet' --config.tokenizer.path=tokenizer.model

The published architecture (Jiang et al. 2024) and its balancing loss; data and schedule were not
published: here 4M tokens a step, 20 for each active parameter. One expert a device in groups of
eight, the rest fsdp. By plan about a week on 128 v5p.
"""

from configs import llama2_7b
from llm_jax.config import TrainConfig, override


def get_config() -> TrainConfig:
    return override(
        llama2_7b.get_config("mixtral_8x7b", "mixtral-8x7b"),
        {"steps": 62_000, "mesh.expert": 8},
    )
