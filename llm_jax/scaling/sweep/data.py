"""The text of a sweep is tokenised once, and all of its runs read the same tokens."""

import os
from pathlib import Path

from llm_jax import config as configs
from llm_jax.config import TrainConfig
from llm_jax.data.prepare import TRAIN, prepare_corpus, prepare_in
from llm_jax.data.tokens import MANIFEST


def prepare(run: TrainConfig, output: Path) -> int:
    """Makes `output`/data, or finds it; returns the size of the vocabulary.

    Many processes may call this at the same time: one of them works, the others wait.
    """
    data = configs.thaw(run.data)
    if data.sources:
        data.cache_dir = str(output / "data")
        corpus = prepare_corpus(data, run.tokenizer, str(output))
    else:
        corpus = prepare_in(str(output / "data"), data, run.tokenizer)
    return corpus.tokenizer.vocab_size


def read_shared(run: TrainConfig, output: Path) -> None:
    """Points a run's config, in place, at the tokens that `prepare` made."""
    data = run.data
    if data.sources:  # a folder for each, which no single input stands for
        data.cache_dir = str(output / "data")
    elif not any(os.path.isfile(os.path.join(i, TRAIN, MANIFEST)) for i in data.inputs):
        data.inputs, data.eval_inputs, data.cache_dir = (str(output / "data"),), (), ""
        run.tokenizer.path = ""
