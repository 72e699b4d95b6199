"""Llama 2 7B: 32 layers, 32 heads, 4096 wide, context 4096.

    python -m experiments.pretrain --config=configs/llama_7b.py --workdir=runs/llama_7b \
        --input='data/*.parquet' --config.tokenizer.path=tokenizer.model --config.mesh.tensor=4

4M tokens a step as in the paper (Touvron et al. 2023), over as many steps as Chinchilla's 20
tokens a parameter take. For a pod.
"""

from configs import llama_1b
from llm_jax.config import TrainConfig, override


def get_config() -> TrainConfig:
    return override(
        llama_1b.get_config("llama_7b", "llama2-7b"),
        {
            "steps": 32_000,
            "batch_size": 1024,
            "length": 4096,
            "model.remat": "full",
            "optimizer.learning_rate": 3e-4,
            "optimizer.warmup_steps": 2000,
            "optimizer.final_learning_rate": 3e-5,
            "tokenizer.kind": "sentencepiece_bpe",
            "tokenizer.vocab_size": 32_000,
        },
    )
