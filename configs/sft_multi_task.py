"""Instruction tuning on many tasks, each in several phrasings (FLAN, Wei et al. 2022).

    python -m experiments.prepare_instructions --output=instructions
    python -m experiments.sft --config=configs/sft_multi_task.py:instructions \
        --init_from=runs/quickstart --workdir=runs/multi_task

`:FOLDER` is what prepare_instructions wrote: the tasks and their rates (examples-proportional with
a cap and a temperature, Raffel et al. 2020) come from FOLDER/mixture.json. For the public data sets
give prepare_instructions `--input=DATA --tasks=all`. Docs and figures: docs/finetuning.md.
"""

import json
import os

from llm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)

# Without a folder: the tasks that need no data, at the sizes that Python 3.11 gives them.
EMBEDDED = {"python_question": 0.532, "python_module": 0.468}


def get_config(folder: str = "") -> TrainConfig:
    rates = EMBEDDED
    if folder:
        with open(os.path.join(folder, "mixture.json")) as file:
            rates = {row["task"]: row["rate"] for row in json.load(file)["tasks"]}
    folder = folder or "instructions"
    return TrainConfig(
        name="sft_multi_task",
        steps=500,
        batch_size=16,
        length=256,
        optimizer=OptimizerConfig(
            learning_rate=2e-4, schedule="linear", warmup_steps=20, weight_decay=0.0
        ),
        data=DataConfig(
            format="dialogue",
            sources=tuple(
                SourceConfig(
                    name=name,
                    inputs=(os.path.join(folder, "train", f"{name}.jsonl"),),
                    weights=((0.0, rate),),
                )
                for name, rate in rates.items()
            ),
            eval_inputs=tuple(os.path.join(folder, "held_out", f"{name}.jsonl") for name in rates),
            packing="bucket",
        ),
        eval=EvalConfig(every=100, rows=512, sample_tokens=0),
        checkpoint=CheckpointConfig(every=250),
    )
