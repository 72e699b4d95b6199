"""GPT-2 124M on OpenWebText, nanoGPT's and llm.c's recipe.

    python -m experiments.pretrain --config=configs/gpt2_124m.py --workdir=runs/gpt2_124m \
        --input='openwebtext/*.parquet' --config.tokenizer.path=gpt2/tokenizer.json

480 rows of 1,024 tokens a step, 600,000 steps: nanoGPT reports a validation loss of 2.85 after 4
days on 8 A100 (GPT-2's own weights: 3.11 before finetuning on this text). Without tokenizer.path a byte-level BPE
of the same size is trained on the data. For a fast accelerator; on one GPU raise
`--config.accumulation`.
"""

from llm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)
from llm_jax.models.presets import preset


def get_config(name: str = "gpt2_124m", architecture: str = "gpt2") -> TrainConfig:
    model: ModelConfig = preset(architecture)
    model.scan, model.remat = False, "attention"
    return TrainConfig(
        name=name,
        steps=600_000,
        batch_size=480,
        length=1024,
        accumulation=1,
        model=model,
        optimizer=OptimizerConfig(
            learning_rate=6e-4,
            warmup_steps=2000,
            final_learning_rate=6e-5,
            b2=0.95,
            weight_decay=0.1,
        ),
        tokenizer=TokenizerConfig(kind="hf_bpe", vocab_size=50_257),
        data=DataConfig(
            inputs=("hf:Skylion007/openwebtext",), isolate_documents=False, eval_fraction=0.001
        ),
        eval=EvalConfig(every=1000, rows=4800),
        checkpoint=CheckpointConfig(every=1000),
    )
