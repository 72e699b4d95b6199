"""Moving weights: what does not fit is named, and no more memory is used than the result needs."""

import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop import hf_tiny
from safetensors.numpy import load_file, save_file
from tiny import tiny_model

from llm_jax import config as configs
from llm_jax import sharding
from llm_jax.config import MeshConfig, ModelConfig
from llm_jax.interop import huggingface, names, translate
from llm_jax.models import decoder, presets
from llm_jax.nn import params as P
from llm_jax.types import Batch

LLAMA = "llama-2_gqa"


@pytest.fixture
def folder(tmp_path):
    return hf_tiny.write(tmp_path / "model", hf_tiny.load(LLAMA))


def load(folder):
    return huggingface.load(folder, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    values = {n: v for n, v in values.items() if v != "ABSENT"}
    (folder / "config.json").write_text(json.dumps(values))


def change_weights(folder, change):
    values = load_file(folder / "model.safetensors")
    save_file(change(values), folder / "model.safetensors")


def test_a_tensor_is_missing(folder):
    change_weights(folder, lambda v: {n: x for n, x in v.items() if "1.mlp.up" not in n})
    with pytest.raises(ValueError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load(folder)


def test_a_tensor_too_many(folder):
    extra = {"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)}
    change_weights(folder, lambda v: v | extra)
    with pytest.raises(ValueError, match=r"a tensor 'model\.layers\.0\.self_attn\.q_norm\.weight'"):
        load(folder)


def test_a_tensor_of_another_shape(folder):
    def transpose(values):
        name = "model.layers.0.mlp.down_proj.weight"
        return values | {name: np.ascontiguousarray(values[name].T)}

    change_weights(folder, transpose)
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.down_proj.weight' has shape"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bloom"}, "model_type='bloom' is not supported; there are llama, gpt2"),
        ({"hidden_size": "ABSENT"}, "hidden_size is None, not a number"),
        ({"hidden_size": 36.5}, "hidden_size=36.5 has to be a positive integer"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1 has to be a positive integer"),
        ({"num_key_value_heads": 4}, "is not divisible by num_key_value_heads=4"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported; there are silu"),
        ({"num_hidden_layers": 5}, r"no tensor 'model\.layers\.\d\."),
        ({"num_hidden_layers": 1}, r"a tensor 'model\.layers\.1\.\S+' and \d+ more that the arch"),
        ({"vocab_size": 4096}, r"'model.embed_tokens.weight' has shape .* makes it \(4096,"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "the rope scaling has no factor"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
    ],
)
def test_a_wrong_config(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_config_that_is_no_json(folder):
    (folder / "config.json").write_text('{"model_type": "llama", ')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load(folder)


def test_an_output_head_that_should_be_the_embedding(tmp_path):
    """Files may hold the tied matrix twice; a head of its own under a tied config is an error."""
    name = next(
        n for n in hf_tiny.names("llama") if hf_tiny.load(n).config.get("tie_word_embeddings")
    )
    folder = hf_tiny.write(tmp_path, hf_tiny.load(name))
    change_weights(folder, lambda v: v | {"lm_head.weight": v["model.embed_tokens.weight"].copy()})
    load(folder)
    change_weights(folder, lambda v: v | {"lm_head.weight": v["lm_head.weight"] + 1})
    with pytest.raises(ValueError, match="tie_word_embeddings is true, but lm_head"):
        load(folder)


def test_every_preset_has_an_architecture():
    """What is trained from a preset can be given away."""
    found = {}
    for name in presets.PRESETS:
        cfg = presets.preset(name)
        configs.resolve_model(cfg, vocab_size=1, length=2048, backend="cpu")
        found[name] = translate.write_config(cfg)["model_type"]
        kind, specs = found[name], decoder.specs(cfg)
        assert len({p.path for p in names.parts(kind, specs, cfg)}) == len(P.flatten(specs))
    assert found["gpt2"] == "gpt2" and found["llama3-405b"] == "llama"
    assert found["mixtral-8x7b"] == "mixtral"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"positions": "sinusoidal"}, "model.positions"),
        ({"activation": "relu2"}, "model.activation"),
        ({"rope_scaling": "ntk", "rope_factor": 2.0, "rope_original_length": 9}, "rope_scaling"),
        ({"logit_softcap": 3.0}, "model.logit_softcap"),
    ],
)
def test_no_architecture_computes_it(changes, key):
    """The wrong answer would be a folder that loads and computes something else."""
    cfg = tiny_model(**changes)
    with pytest.raises(ValueError, match=f"no architecture .* differs in .*{key}"):
        translate.write_config(cfg)


@partial(jax.jit, static_argnames="cfg")
def logits(params, tokens, cfg):
    return decoder.logits(params, decoder.hidden(params, Batch(tokens=tokens), cfg).x, cfg)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_interleaved_rotary_pairs_leave_as_halves(tmp_path, fraction):
    """What theirs computes is what ours does, although pairs lie elsewhere."""
    cfg = ModelConfig(
        d_model=32, n_heads=4, kv_heads=2, n_layers=2, d_ff=48, tied=False, qkv_bias=True,
        rope_interleaved=True, rope_fraction=fraction, vocab_multiple=8, norm_eps=1e-6, max_length=64,
    )  # fmt: skip
    if fraction < 1:  # what has partial rotation and biases: GLM-4-MoE
        cfg.moe = configs.MoEConfig(n_experts=4, scores="sigmoid", bias_rate=0.001, n_shared=1)
    configs.resolve_model(cfg, vocab_size=53, length=64, backend="cpu")
    cfg = configs.freeze(cfg)
    params = jax.tree.map(
        lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)),
        P.init(decoder.specs(cfg), jax.random.key(0)),
    )
    if fraction == 1:
        cfg, params = _without_bias(cfg, params)
    huggingface.save(tmp_path, cfg, params)
    theirs, read = load(tmp_path)
    assert not theirs.rope_interleaved and theirs.vocab_multiple == 1
    configs.resolve_model(theirs, vocab_size=0, length=0, backend="cpu")
    tokens = np.random.default_rng(0).integers(0, 53, (2, 17))
    ours = logits(params, tokens, cfg)
    again = logits(read, tokens, configs.freeze(theirs))
    np.testing.assert_allclose(again, ours, atol=2e-5)
    apart = dict(P.flatten(params))
    assert not np.array_equal(P.flatten(read)["layers/attn/q/w"], apart["layers/attn/q/w"])


def _without_bias(cfg, params):
    """Llama has no biases."""
    cfg = configs.thaw(cfg)
    cfg.qkv_bias = False
    flat = {n: x for n, x in P.flatten(params).items() if not n.endswith("bias")}
    return configs.freeze(cfg), P.unflatten(flat)


MEASURE = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.interop import huggingface

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
jax.block_until_ready(jax.device_put(1.0))
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again
_, params = huggingface.load(sys.argv[1], mesh)
print(status("VmHWM") - before, sum(x.nbytes for x in jax.tree.leaves(params)))
"""


def test_peak_memory_of_an_import(tmp_path):
    """The result and at most 1.3 of the largest tensor: no copy of the file, none of the model."""
    cfg = ModelConfig(
        vocab_size=8192, d_model=1024, n_layers=6, n_heads=8, d_ff=4096, tied=False, max_length=64
    )
    configs.resolve_model(cfg, vocab_size=0, length=64, backend="cpu")
    specs = decoder.specs(cfg)
    tensors = {}
    for part in names.parts("llama", specs, cfg):
        tensors[part.name] = np.full(part.shape, 0.5, np.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(translate.write_config(cfg)))
    largest = 4 * max(x.size for x in tensors.values())
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    peak, result = map(int, run.stdout.split())
    assert result == 4 * sum(x.size for x in tensors.values())
    assert peak < result + 1.3 * largest
