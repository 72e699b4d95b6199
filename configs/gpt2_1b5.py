"""GPT-2 1.5B (XL): 48 layers, 25 heads, 1600 wide.

    python -m experiments.pretrain --config=configs/gpt2_1b5.py --workdir=runs/gpt2_1b5 \
        --input='fineweb/*.parquet' --config.tokenizer.path=gpt2/tokenizer.json

llm.c's recipe: 1M tokens a step, 32,000 steps, which takes 24 hours on 8 H100 and ends near a
loss of 2.39 on FineWeb-Edu. 25 heads do not divide over a tensor axis of 2: use fsdp.
"""

from configs import gpt2_124m
from llm_jax.config import TrainConfig, override


def get_config() -> TrainConfig:
    return override(
        gpt2_124m.get_config("gpt2_1b5", "gpt2-xl"),
        {
            "steps": 32_000,
            "batch_size": 1024,
            "mesh.data": 1,
            "mesh.fsdp": -1,
            "model.scan": True,
            "optimizer.warmup_steps": 700,
            "optimizer.final_learning_rate": 0.0,
        },
    )
