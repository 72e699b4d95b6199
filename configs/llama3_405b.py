"""Llama 3 405B: 126 layers, 128 heads on 8 key heads, 16384 wide, context 8192.

    python -m experiments.plan --config=configs/llama3_405b.py --chip=h100 --devices=16384
    python -m experiments.pretrain --config=configs/llama3_405b.py --workdir=runs/llama3_405b \
        --input='data/*.parquet' --config.tokenizer.path=tokenizer.json

Reproduces the published run (Llama Team 2024, section 3.4.1) at its final batch of 16M tokens from
the start: 15.6T tokens, 3.8e25 FLOPs. Heads and the MLP are cut over the eight GPUs of a machine,
parameters over the machines. By plan about 80 days on 16,384 H100, 32 million GPU hours.
"""

from configs import llama2_7b
from llm_jax.config import TrainConfig, override


def get_config() -> TrainConfig:
    return override(
        llama2_7b.get_config("llama3_405b", "llama3-405b"),
        {
            "steps": 930_000,
            "batch_size": 2048,
            "length": 8192,
            "mesh.tensor": 8,
            "optimizer.learning_rate": 8e-5,
            "optimizer.warmup_steps": 8000,
            "optimizer.final_learning_rate": 8e-7,
            "tokenizer.kind": "hf_bpe",
            "tokenizer.vocab_size": 128_256,
        },
    )
