"""Llama 2 7B: 32 layers, 32 heads, 4096 wide, context 4096.

    python -m experiments.plan --config=configs/llama2_7b.py --topology=v5e:16x16
    python -m experiments.pretrain --config=configs/llama2_7b.py --workdir=runs/llama2_7b \
        --input='data/*.parquet' --config.tokenizer.path=tokenizer.model

4M tokens a step as in the paper (Touvron et al. 2023), over as many steps as Chinchilla's 20
tokens a parameter take. By plan about two days on 256 v5e, 14,000 chip hours.
"""

from configs import llama_1b
from llm_jax.config import TrainConfig, override


def get_config(name: str = "llama2_7b", architecture: str = "llama2-7b") -> TrainConfig:
    return override(
        llama_1b.get_config(name, architecture),
        {
            "steps": 32_000,
            "batch_size": 1024,
            "length": 4096,
            "model.remat": "full",
            "model.attention_block": 512,
            "optimizer.learning_rate": 3e-4,
            "optimizer.warmup_steps": 2000,
            "optimizer.final_learning_rate": 3e-5,
            "tokenizer.kind": "sentencepiece_bpe",
            "tokenizer.vocab_size": 32_000,
        },
    )
