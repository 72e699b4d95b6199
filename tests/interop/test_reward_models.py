"""Reward models of transformers: classifiers with one label, in and out."""

import json

import jax
import numpy as np
import pytest
from interop import hf_tiny, reward_tiny

from llm_jax import config as configs
from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.interop import huggingface, safetensors
from llm_jax.models import decoder, heads
from llm_jax.nn.params import flatten
from llm_jax.types import Batch


def read(folder, devices=1):
    mesh = MeshConfig(data=1, fsdp=devices)
    cfg, params = huggingface.load(folder, sharding.make_mesh(mesh, jax.devices()[:devices]))
    configs.resolve_model(cfg, vocab_size=0, length=0, backend="cpu")
    return configs.freeze(cfg), params


def reward_of(params, prompt, cfg):
    batch = Batch(tokens=prompt[None])
    return float(heads.reward_scores(decoder, params, batch, cfg).values[0, -1])


@pytest.mark.parametrize("name", list(reward_tiny.NAMES))
def test_rewards_are_those_of_transformers(name, tmp_path):
    golden = reward_tiny.load(name)
    cfg, params = read(hf_tiny.write(tmp_path / "in", golden))
    assert cfg.head == "reward" and "head" not in params
    found = [reward_of(params, prompt, cfg) for prompt in golden.prompts]
    np.testing.assert_allclose(found, reward_tiny.expected()[name], atol=1e-4)
    # And out again: the same tensors, and a config that transformers takes for the same class.
    (tmp_path / "out").mkdir()
    huggingface.save(tmp_path / "out", cfg, params)
    written = safetensors.Source(tmp_path / "out")
    original = {n: x for n, x in hf_tiny.weights(golden).items() if n not in golden.unused}
    assert set(written.shapes) == set(original)
    for tensor, values in original.items():
        assert np.array_equal(written.read(tensor), values), tensor
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == [reward_tiny.NAMES[name]] and len(config["id2label"]) == 1
    assert not (tmp_path / "out/generation_config.json").exists()


def test_a_cut_head_is_a_whole_one(tmp_path):
    folder = hf_tiny.write(tmp_path, reward_tiny.load("llama-2_gqa"))
    (_, whole), (_, cut) = read(folder), read(folder, devices=2)
    assert cut["reward"]["w"].addressable_shards[0].data.shape == (24,)
    for path, leaf in flatten(cut).items():
        assert np.array_equal(np.asarray(leaf), np.asarray(flatten(whole)[path])), path


@pytest.mark.parametrize("labels", [{"id2label": {"0": "a", "1": "b", "2": "c"}}, {}])
def test_other_classifiers_are_named(labels, tmp_path):
    folder = hf_tiny.write(tmp_path, reward_tiny.load("llama-2_gqa"))
    config = json.loads((folder / "config.json").read_text())
    del config["id2label"]
    (folder / "config.json").write_text(json.dumps(config | labels))
    with pytest.raises(ValueError, match=r"a classifier with [23] labels is not supported"):
        read(folder)


def test_a_missing_head_is_named(tmp_path):
    golden = hf_tiny.load("llama-2_gqa")
    config = reward_tiny.load("llama-2_gqa").config
    folder = hf_tiny.write(tmp_path, golden)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has no tensor 'score\.weight'"):
        read(folder)


def test_an_architecture_without_such_a_class_is_named(tmp_path):
    cfg, params = read(hf_tiny.write(tmp_path, hf_tiny.load("olmoe-norm_gqa")))
    cfg = configs.freeze(configs.override(configs.thaw(cfg), {"head": "reward"}))
    with pytest.raises(ValueError, match="no architecture of transformers computes this model"):
        huggingface.save(tmp_path, cfg, params)
