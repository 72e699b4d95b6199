"""Runs that go on from a model of another format."""

import jax
import numpy as np
import pytest
from interop import hf_tiny
from runs import run_config

import llm_jax
from llm_jax import tokenizers
from llm_jax.nn.params import flatten
from llm_jax.tokenizers.export import huggingface_files
from llm_jax.train import base_model, loop


@pytest.fixture
def folder(corpus, tmp_path):
    """Three layers, grouped heads, and a chat model's second end token."""
    path = hf_tiny.write(tmp_path / "base", hf_tiny.load("llama-2_gqa"))
    tokenizer = tokenizers.train("char", [corpus.read_text()])
    for name, content in huggingface_files(tokenizer, 64).items():
        (path / name).write_bytes(content)
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return path


def adopted(corpus, folder, **changes):
    cfg = run_config(
        corpus,
        **{"eval.sample_tokens": 0, "steps": 3, "eval.every": 0, "data.add_eos": False, **changes},
    )
    base_model.adopt(cfg, folder)
    return cfg


def test_a_run_starts_from_its_weights_and_tokenizer(corpus, folder, tmp_path):
    """Without a step's effect it ends where it started."""
    still = {"optimizer.learning_rate": 0.0, "optimizer.ema_decay": 0.0}
    cfg = adopted(corpus, folder, **still)
    assert cfg.model.n_layers != 2 and not cfg.model.scan  # theirs, and the recipe's own
    loop.train(cfg, tmp_path / "run", devices=jax.devices()[:1])
    base, run = llm_jax.load(folder), llm_jax.load(tmp_path / "run")
    after = flatten(run.params)
    for path, leaf in flatten(base.params).items():
        assert np.array_equal(np.asarray(leaf), np.asarray(after[path])), path
    assert run.tokenizer.encode("the text") == base.tokenizer.encode("the text")
    assert run.config.tokenizer.end_tokens == (1, 2)


def test_and_leaves_as_what_it_was(corpus, folder, tmp_path):
    cfg = adopted(corpus, folder)
    before = llm_jax.load(folder)
    summary = loop.train(cfg, tmp_path / "run", devices=jax.devices()[:1])
    assert np.isfinite(summary["train_loss"])
    model = llm_jax.load(tmp_path / "run")
    model.export(tmp_path / "out")
    again = llm_jax.load(tmp_path / "out")
    assert again.config.model.d_ff == before.config.model.d_ff
    moved = [
        not np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(before.params), strict=True)
    ]
    assert all(moved)


def test_what_the_model_decides_is_not_asked_for(corpus, folder, tmp_path):
    for key in ("model.n_layers", "model.rope_scaling", "tokenizer.path"):
        with pytest.raises(ValueError, match=f"--config.{key} is decided by --init_from"):
            base_model.adopt(run_config(corpus), folder, ["steps", key])
    base_model.adopt(run_config(corpus), folder, ["steps", "model.dtype", "model.moe.chunk"])
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is an adapter; merge it first: .*--from=peft"):
        base_model.adopt(run_config(corpus), tmp_path)


def test_a_kept_tokenizer_takes_the_place_of_another(tmp_path):
    tokenizer = tokenizers.train("byte", [])
    tokenizer.chat_template = "{{ messages }}"
    base_model.keep_tokenizer(tokenizer, tmp_path)
    tokenizer.chat_template = None
    kept = base_model.keep_tokenizer(tokenizer, tmp_path)
    assert tokenizers.load(kept).chat_template is None


def test_another_architecture_is_an_error(corpus, folder, tmp_path):
    cfg = adopted(corpus, folder)
    cfg.model.d_ff += 8
    with pytest.raises(ValueError, match=r"base: .* has shape .* but --config.model makes it"):
        loop.train(cfg, tmp_path / "run", devices=jax.devices()[:1])
