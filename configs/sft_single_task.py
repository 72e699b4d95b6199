"""Instruction tuning on one task in several phrasings, beside configs/sft_multi_task.py.

    python -m experiments.prepare_instructions --output=instructions
    python -m experiments.sft --config=configs/sft_single_task.py:instructions/python_question \
        --init_from=runs/quickstart --workdir=runs/single_task

`:FOLDER/TASK` names the prepared task; `python_question` needs no data of one's own. As many steps
of as many rows as the multi-task recipe. Expect a better held-out loss on this one task and a worse
one on all others (`--eval_input`); docs and figures: docs/finetuning.md.
"""

import os

from llm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)


def get_config(task: str = "instructions/python_question") -> TrainConfig:
    folder, name = os.path.split(task)
    return TrainConfig(
        name="sft_single_task",
        steps=500,
        batch_size=16,
        length=256,
        optimizer=OptimizerConfig(
            learning_rate=2e-4, schedule="linear", warmup_steps=20, weight_decay=0.0
        ),
        data=DataConfig(
            format="dialogue",
            sources=(
                SourceConfig(name=name, inputs=(os.path.join(folder, "train", f"{name}.jsonl"),)),
            ),
            eval_inputs=(os.path.join(folder, "held_out", f"{name}.jsonl"),),
            packing="bucket",
        ),
        eval=EvalConfig(every=100, rows=512, sample_tokens=0),
        checkpoint=CheckpointConfig(every=250),
    )
