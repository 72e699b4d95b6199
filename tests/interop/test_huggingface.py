"""Weights of Hugging Face's architectures: the numbers that transformers computes, in and out."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from interop import hf_tiny
from safetensors.numpy import save_file
from tiny import random_batch, tiny_model

from llm_jax import config as configs
from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.interop import huggingface, safetensors
from llm_jax.interop.translate import write_config
from llm_jax.models import decoder
from llm_jax.nn.params import flatten, init
from llm_jax.types import Batch

TOLERANCE = 1e-4  # absolute, on logits with a standard deviation of 2 to 3


def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def read(folder, mesh=None):
    cfg, params = huggingface.load(folder, mesh or one_device())
    configs.resolve_model(cfg, vocab_size=0, length=0, backend="cpu")
    return configs.freeze(cfg), params


@partial(jax.jit, static_argnames="cfg")
def run(params, batch, cache, cfg):
    out = decoder.hidden(params, batch, cfg, cache=cache)
    return decoder.logits(params, out.x, cfg), out.cache


def worst(ours, theirs):
    return float(np.abs(np.asarray(ours) - theirs).max())


@pytest.mark.parametrize("name", hf_tiny.names())
def test_logits_are_those_of_transformers(name, tmp_path):
    """Padded on the left, and one token at a time with a cache."""
    golden = hf_tiny.load(name)
    cfg, params = read(hf_tiny.write(tmp_path, golden))
    tokens, mask, positions = golden.padded()
    batch = Batch(tokens=tokens, segments=mask, positions=positions)
    cache = decoder.init_cache(params, batch, cfg, tokens.shape[1] + 4)
    logits, cache = run(params, batch, cache, cfg)
    for row, expected in enumerate(golden.logits):
        assert worst(logits[row, -len(expected) :], expected) < TOLERANCE
    for i in range(golden.next_tokens.shape[1]):
        step = Batch(
            tokens=golden.next_tokens[:, i : i + 1],
            segments=np.ones((2, 1), np.int32),
            positions=positions[:, -1:] + 1 + i,
        )
        logits, cache = run(params, step, cache, cfg)
        assert worst(logits[:, 0], golden.next_logits[:, i]) < TOLERANCE


@pytest.mark.parametrize("architecture", hf_tiny.architectures())
def test_logits_without_a_cache(architecture, tmp_path):
    """The path that training takes: a row without padding, and a padded batch."""
    golden = hf_tiny.load(hf_tiny.names(architecture)[-1])
    cfg, params = read(hf_tiny.write(tmp_path, golden))
    logits, _ = run(params, Batch(tokens=golden.prompts[0][None]), None, cfg)
    assert worst(logits[0], golden.logits[0]) < TOLERANCE
    tokens, mask, positions = golden.padded()
    batch = Batch(tokens=tokens, segments=mask, positions=positions)
    logits, _ = run(params, batch, None, cfg)
    for row, expected in enumerate(golden.logits):
        assert worst(logits[row, -len(expected) :], expected) < TOLERANCE


@pytest.mark.parametrize("name", hf_tiny.names())
def test_import_export_import_is_bit_equal(name, tmp_path):
    golden = hf_tiny.load(name)
    cfg, params = read(hf_tiny.write(tmp_path / "in", golden))
    (tmp_path / "out").mkdir()
    huggingface.save(tmp_path / "out", cfg, params, shard_bytes=20_000)
    again_cfg, again = read(tmp_path / "out")
    assert write_config(again_cfg) == write_config(cfg)
    again = flatten(again)
    for path, leaf in flatten(params).items():
        assert np.array_equal(np.asarray(leaf), np.asarray(again[path])), path
    # And what was written is the original, tensor by tensor (but for what no model reads).
    written = safetensors.Source(tmp_path / "out")
    original = hf_tiny.weights(golden)
    prefix = (
        ""
        if "transformer.wte.weight" in original or "wte.weight" not in original
        else "transformer."
    )
    kept = {prefix + n: x for n, x in original.items() if n not in golden.unused}
    assert set(written.shapes) == set(kept)
    for tensor, values in kept.items():
        assert np.array_equal(written.read(tensor), values), tensor


@pytest.mark.parametrize(
    "name", ["qwen3_moe-mqa", "gpt2-tied", "gemma2-softcaps", "glm4_moe-groups"]
)
def test_sharded_import_equals_a_whole_one(name, tmp_path):
    name = name if name in hf_tiny.names() else hf_tiny.names(name.split("-")[0])[0]
    golden = hf_tiny.load(name)
    folder = hf_tiny.write(tmp_path, golden, shards=2, dtype="bfloat16")
    _, whole = read(folder)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    _, cut = read(folder, mesh)
    whole, n_cut = flatten(whole), 0
    for path, leaf in flatten(cut).items():
        n_cut += leaf.addressable_shards[0].data.shape != leaf.shape
        assert np.array_equal(np.asarray(leaf), np.asarray(whole[path])), path
    assert n_cut > 3


def test_weights_kept_in_bfloat16(tmp_path):
    """Half the memory, but for what is computed in float32: norms, and routers with their bias."""
    golden = hf_tiny.load("glm4_moe-groups")
    folder, mesh = hf_tiny.write(tmp_path, golden), one_device()
    whole = flatten(huggingface.load(folder, mesh)[1])
    kept = flatten(huggingface.load(folder, mesh, dtype="bfloat16")[1])
    exact = {path for path, leaf in kept.items() if leaf.dtype == np.float32}
    assert exact == {p for p in whole if p.endswith("/scale") or "/router/" in p}
    for path, leaf in kept.items():
        assert np.array_equal(np.asarray(leaf), np.asarray(whole[path].astype(leaf.dtype)))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_gemma_3_that_also_sees(prefix, tmp_path):
    golden = hf_tiny.load("gemma3_text-4b_linear")
    config = {"model_type": "gemma3", "text_config": golden.config, "vision_config": {}}
    tensors = {n.replace("model.", prefix, 1): x for n, x in hf_tiny.weights(golden).items()}
    tensors["vision_tower.vision_model.embeddings.patch_embedding.bias"] = np.ones(3, np.float32)
    tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = np.ones(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg, params = read(tmp_path)
    logits, _ = run(params, Batch(tokens=golden.prompts[0][None]), None, cfg)
    assert worst(logits[0], golden.logits[0]) < TOLERANCE
    tensors["something_else.weight"] = np.ones(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'something_else\.weight'"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "unit_offset"])
def test_muP_models_leave_with_their_logits(kind, tmp_path):
    """The factor on the logits goes into the final norm: no config.json of theirs has it."""
    changes = {
        "llama": {},
        "gpt2": {"norm": "layernorm", "norm_bias": True, "activation": "gelu", "qkv_bias": True,
                 "out_bias": True, "mlp_bias": True, "positions": "learned"},
        "unit_offset": {"norm_unit_offset": True},
    }[kind]  # fmt: skip
    cfg = tiny_model(mup_base_width=8, vocab_multiple=1, **changes)
    assert cfg.logit_scale == 0.25
    params = init(decoder.specs(cfg), jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * np.cos(np.arange(x.size)).reshape(x.shape), params)
    batch = Batch(tokens=random_batch().tokens)
    before = decoder.logits(params, decoder.hidden(params, batch, cfg).x, cfg)
    if kind == "unit_offset":  # Gemma's only, with much else: the folding alone
        cfg, params = huggingface._without_logit_scale(cfg, params)
    else:
        huggingface.save(tmp_path, cfg, params)
        cfg, params = read(tmp_path)
    assert cfg.logit_scale in (0.0, 1.0)
    after = decoder.logits(params, decoder.hidden(params, batch, cfg).x, cfg)
    assert worst(after, before) < 1e-5 < float(np.abs(before).max())
