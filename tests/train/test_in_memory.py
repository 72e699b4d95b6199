"""A run in memory is the same training as a run with a folder."""

import json

import numpy as np
from runs import run_config

from llm_jax import config as configs
from llm_jax.data.loader import make_loader
from llm_jax.data.prepare import prepare_corpus
from llm_jax.train import in_memory
from llm_jax.train.loop import train


def test_losses_are_those_of_a_run_with_a_folder(corpus, tmp_path):
    cfg = run_config(corpus)
    train(cfg, tmp_path)
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    found = prepare_corpus(cfg.data, cfg.tokenizer, str(tmp_path))
    loader = make_loader(
        found.train,
        length=cfg.length,
        batch_size=cfg.batch_size,
        steps=cfg.steps,
        packing=cfg.data.packing,
        isolate_documents=cfg.data.isolate_documents,
        seed=cfg.seed,
        token_lengths=found.tokenizer.token_lengths(),
    )
    seen = []
    cfg = configs.freeze(cfg)
    trained = in_memory.train(cfg, loader.batch, watch=lambda step, params: seen.append(step))
    np.testing.assert_array_equal(trained.losses, np.float32([line["loss"] for line in lines]))
    assert seen == list(range(cfg.steps + 1))
