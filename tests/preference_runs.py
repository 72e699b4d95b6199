"""Tiny models, and preferences that they can learn, for tests of reward models and DPO."""

import json
from pathlib import Path

import numpy as np

from llm_jax import config as configs
from llm_jax.train.loop import train

NOUNS = "cat dog sun tree road lamp door boat fish bird".split()


def base_config(**changes) -> configs.TrainConfig:
    values = {
        "name": "tiny",
        "steps": 3,
        "batch_size": 8,
        "length": 128,
        "model.d_model": 32,
        "model.n_layers": 1,
        "model.n_heads": 2,
        "model.d_ff": 64,
        "model.vocab_multiple": 8,
        "model.scan": False,
        "optimizer.learning_rate": 1e-2,
        "optimizer.weight_decay": 0.0,
        "optimizer.schedule": "constant",
        "tokenizer.kind": "byte",
        "eval.every": 0,
        "eval.sample_tokens": 0,
        "checkpoint.every": 0,
        "log.every": 1,
        "log.compilation_cache": "",
        "data.dialogue.template": "chatml",
        **changes,
    }
    return configs.override(configs.TrainConfig(), values)


def write_pairs(path: Path, count: int = 60, seed: int = 0) -> Path:
    """Answers that say "good" are preferred to those that say "poor"; both are of one length."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        noun = NOUNS[rng.integers(len(NOUNS))]
        row = {"prompt": f"The {noun} {i}?", "chosen": f"good {noun}", "rejected": f"poor {noun}"}
        rows.append(json.dumps(row))
    path.write_text("\n".join(rows) + "\n")
    return path


def write_dialogues(path: Path, count: int = 60) -> Path:
    rows = [
        {
            "prompt": f"The {NOUNS[i % 10]} {i}?",
            "completion": f"{'good' if i % 2 else 'poor'} {NOUNS[i % 10]}",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_base(folder: Path, **changes) -> Path:
    """A model tuned on a few steps of conversations, from nothing."""
    rows = write_dialogues(folder / "rows.jsonl")
    cfg = base_config(
        **{
            "data.format": "dialogue",
            "data.packing": "first_fit",
            "data.inputs": (str(rows),),
            **changes,
        }
    )
    train(cfg, folder / "base")
    return folder / "base"


def preference_config(base: Path, rows: Path, **changes) -> configs.TrainConfig:
    """A recipe that goes on from `base`, as --init_from makes it."""
    from llm_jax.train import base_model

    values = {
        "data.format": "preference",
        "data.packing": "first_fit",
        "data.inputs": (str(rows),),
        "data.eval_fraction": 0.2,
        "data.dialogue.template": "",
        "dpo.sample_prompts": 0,
        **changes,
    }
    cfg = base_config(**values)
    if cfg.checkpoint.init_from == "":
        base_model.adopt(cfg, base)
    return cfg
