"""Adapters of Hugging Face's peft: the logits that peft computes, in and out."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from interop import hf_tiny, peft_tiny
from safetensors.numpy import load_file, save_file

from llm_jax import config as configs
from llm_jax import sharding
from llm_jax.config import MeshConfig, PeftConfig
from llm_jax.interop import huggingface, peft_format
from llm_jax.models import decoder
from llm_jax.nn.params import flatten, init, map_specs, unflatten
from llm_jax.peft import lora, prompts
from llm_jax.types import Batch

TOLERANCE = 1e-4  # absolute, on logits with a standard deviation of 2 and more
METHODS = {"lora": lora, "prompt": prompts, "prefix": prompts}
# The rest come back in a form of ours: other ranks and scales, or a c_attn of three blocks.
CANONICAL = ["lora-llama", "lora-gpt2_blocks", "prompt-gpt2", "prefix-llama"]


def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def read_base(golden, folder):
    cfg, params = huggingface.load(hf_tiny.write(folder, golden.base), one_device())
    configs.resolve_model(cfg, vocab_size=0, length=0, backend="cpu")
    return configs.freeze(cfg), params


def attached(base, trained, peft):
    """The whole tree, parameters that are trained whole in place of the base's."""
    flat, own = flatten(base), flatten(trained)
    whole = {path: own.pop(path) for path in list(own) if path in flat}
    return METHODS[peft.method].attach(unflatten(flat | whole), unflatten(own), peft)


@partial(jax.jit, static_argnames="cfg")
def run(params, tokens, cfg):
    return decoder.logits(params, decoder.hidden(params, Batch(tokens=tokens), cfg).x, cfg)


@pytest.mark.parametrize("name", peft_tiny.names())
def test_logits_are_those_of_peft(name, tmp_path):
    """Also after we wrote the adapter anew."""
    golden = peft_tiny.load(name)
    cfg, base = read_base(golden, tmp_path / "base")
    peft, trained = peft_format.load(peft_tiny.write(tmp_path / "in", golden), cfg, one_device())
    logits = run(attached(base, trained, peft), golden.prompt[None], cfg)[0]
    assert float(np.abs(np.asarray(logits) - golden.logits).max()) < TOLERANCE

    peft_format.save(tmp_path / "out", trained, peft, cfg)
    again_peft, again = peft_format.load(tmp_path / "out", cfg, one_device())
    assert again_peft == peft
    again = flatten(again)
    for path, leaf in flatten(trained).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(again[path]), path)
    assert len(again) == len(flatten(trained))


@pytest.mark.parametrize("name", CANONICAL)
def test_what_we_write_is_what_peft_loaded(name, tmp_path):
    """The same tensors bit for bit and the same settings: peft computed its logits from them."""
    golden = peft_tiny.load(name)
    cfg, _ = read_base(golden, tmp_path / "base")
    peft, trained = peft_format.load(peft_tiny.write(tmp_path / "in", golden), cfg, one_device())
    peft_format.save(tmp_path / "out", trained, peft, cfg)
    ours, theirs = (
        load_file(tmp_path / "out" / "adapter_model.safetensors"),
        peft_tiny.weights(golden),
    )
    assert set(ours) == set(theirs)
    for tensor, values in theirs.items():
        np.testing.assert_array_equal(ours[tensor], values, tensor)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    for key in set(written) - {"inference_mode", "encoder_hidden_size"}:
        ours, theirs = written[key], golden.config[key]
        assert sorted(ours) == sorted(theirs) if isinstance(ours, list) else ours == theirs, key
    for key in ("r", "target_modules", "num_virtual_tokens", "peft_type"):
        assert (key in written) == (key in golden.config)


def small(kind, tmp_path):
    """A golden's base, and an adapter folder for it that can be damaged: (config, folder)."""
    golden = peft_tiny.load(f"lora-{kind}")
    cfg, _ = read_base(golden, tmp_path / "base")
    return cfg, peft_tiny.write(tmp_path / "adapter", golden)


def change(folder, tensors=lambda t: None, **values):
    """Changes an adapter's settings and tensors in place."""
    config = json.loads((folder / "adapter_config.json").read_text()) | values
    (folder / "adapter_config.json").write_text(json.dumps(config))
    file = folder / "adapter_model.safetensors"
    found = load_file(file)
    tensors(found)
    save_file(found, file)


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"tensors": lambda t: t.pop(Q)}, rf"no tensor '{Q}'"),
        (
            {"tensors": lambda t: t.update({Q: t[Q][:3]})},
            r"q_proj.lora_A.weight' has shape \(3, 32\)",
        ),
        ({"tensors": lambda t: t.update({Q.replace("q_", "x_"): t[Q]})}, "belongs to no matrix"),
        ({"tensors": lambda t: t.update(odd=t[Q])}, "does not begin with base_model.model."),
        ({"tensors": lambda t: t.update({"base_model.model.odd": t[Q]})}, "model does not have"),
        ({"r": 5}, r"make it \(5, 32\)"),
        ({"target_modules": ["c_attn"]}, "finds no matrix of this model, which is a llama"),
        ({"target_modules": ["v_proj"]}, "belongs to no matrix"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_it(damage, message, tmp_path):
    cfg, folder = small("llama", tmp_path)
    change(folder, **damage)
    with pytest.raises(ValueError, match=message) as error:
        peft_format.load(folder, cfg, one_device())
    assert "\n" not in str(error.value)


def test_pickles_and_missing_files_are_named(tmp_path):
    cfg, folder = small("llama", tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="is a pickle"):
        peft_format.load(folder, cfg, one_device())
    assert peft_format.is_folder(folder) and not peft_format.is_folder(tmp_path)


def learned(cfg, peft, seed=0):
    """Trained arrays that are zero nowhere."""
    specs = METHODS[peft.method].specs(decoder.specs(cfg), peft)
    rng = np.random.default_rng(seed)
    return map_specs(lambda spec: rng.normal(0, 0.3, spec.shape).astype(np.float32), specs)


@pytest.mark.parametrize("targets", [r"attn/(q|v)/w$", r"/(attn|mlp)/\w+/w$"])
@pytest.mark.parametrize("stabilized", [False, True])
def test_gpt2_updates_come_back_as_they_were(targets, stabilized, tmp_path):
    """c_attn as three blocks, of which k's may be empty; not as updates of three times the rank."""
    cfg, _ = read_base(peft_tiny.load("lora-gpt2"), tmp_path / "base")
    peft = PeftConfig(method="lora", targets=targets, rank=2, rank_stabilized=stabilized)
    trained = learned(cfg, peft)
    peft_format.save(tmp_path / "out", trained, peft, cfg)
    again_peft, again = peft_format.load(tmp_path / "out", cfg, one_device())
    assert (again_peft.rank, again_peft.alpha) == (peft.rank, peft.alpha)
    trained, again = flatten(trained), flatten(again)
    assert set(trained) == set(again)
    for path, leaf in trained.items():
        np.testing.assert_array_equal(leaf, again[path], path)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"c_attn": 6}
    # lora_alpha / r of the module is 32 / 2, and with the root 32 / sqrt(2).
    r, alpha = config["rank_pattern"]["c_attn"], config["alpha_pattern"]["c_attn"]
    assert np.isclose(alpha / (r**0.5 if stabilized else r), 32 / (2**0.5 if stabilized else 2))


def test_rotary_pairs_are_brought_into_halves(tmp_path):
    """A model with pairs beside each other is exported in halves; so are b of q and k, and a prefix."""
    from tiny import tiny_model

    cfg = tiny_model(rope_interleaved=True, kv_heads=2, activation="swiglu", n_layers=1)
    params = jax.jit(lambda: init(decoder.specs(cfg), jax.random.key(0)))()
    (tmp_path / "base").mkdir()
    huggingface.save(tmp_path / "base", cfg, params)
    halved, base = huggingface.load(tmp_path / "base", one_device())
    configs.resolve_model(halved, vocab_size=0, length=0, backend="cpu")
    halved = configs.freeze(halved)
    assert cfg.rope_interleaved and not halved.rope_interleaved
    tokens = np.arange(1, 12)[None]
    for method in ("lora", "prefix"):
        peft = PeftConfig(method=method, targets=r"attn/[qkv]/w$", rank=2, tokens=3)
        trained = learned(cfg, peft)
        want = run(METHODS[method].attach(params, trained, peft), tokens, cfg)
        peft_format.save(tmp_path / method, trained, peft, cfg)
        found, other = peft_format.load(tmp_path / method, halved, one_device())
        got = run(METHODS[method].attach(base, other, found), tokens, halved)
        np.testing.assert_allclose(got, want, atol=1e-4)
        again = flatten(peft_format.load(tmp_path / method, cfg, one_device())[1])
        other = flatten(other)
        for path, leaf in flatten(trained).items():
            np.testing.assert_array_equal(again[path], leaf, path)
            turned = path in ("layers/attn/q/w/b", "layers/attn/k/w/b", "prefix/k")
            assert np.array_equal(other[path], leaf) != turned, path


@pytest.mark.parametrize(
    ("changes", "method", "also", "message"),
    [
        ({}, "adapter", (), "peft.method=adapter has no layout"),
        ({}, "prompt", ("final_norm/scale",), "final_norm/scale' beside a prompt"),
        ({}, "lora", ("embed/tokens",), "model.tied"),
        (
            {"norm": "layernorm", "norm_bias": True},
            "lora",
            ("layers/attn_norm/scale",),
            "add '.layers/attn_norm/bias",
        ),
        ({"targets": r"embed/tokens$"}, "lora", (), "'embed/tokens' has no place in peft's layout"),
    ],
)
def test_what_has_no_layout_is_an_error(changes, method, also, message, tmp_path):
    from tiny import tiny_model

    targets = changes.pop("targets", "attn/q/w$")
    gpt2 = {"positions": "learned", "activation": "gelu", "qkv_bias": True, "out_bias": True}
    gpt2 |= {"mlp_bias": True, "max_length": 16}
    cfg = tiny_model(**changes, **gpt2 if "norm" in changes else {"activation": "swiglu"})
    peft = PeftConfig(method=method, targets=targets, rank=2)
    trained = {"prefix": {"embeddings": np.zeros((20, 32))}}
    if method != "prompt":
        trained = lora.specs(decoder.specs(cfg), peft)
        trained = jax.tree.map(lambda s: np.zeros(s.shape), trained)
    flat = flatten(decoder.specs(cfg))
    trained = unflatten(flatten(trained) | {p: np.ones(flat[p].shape) for p in also})
    with pytest.raises(ValueError, match=message):
        peft_format.save(tmp_path / "out", trained, peft, cfg)
    assert not (tmp_path / "out").exists()
