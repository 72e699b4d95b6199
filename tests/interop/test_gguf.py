"""GGUF files, written here the way llama.cpp writes them, read back as what they were made of."""

import itertools
import sys
import tracemalloc

import jax
import numpy as np
import pytest
from interop.gguf_files import (
    BPE,
    BYTE_TOKENS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    SIZES,
    VOCAB,
    WIDTH,
    random,
    write,
)

from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.interop import gguf as gguf_import
from llm_jax.interop import huggingface

gguf = pytest.importorskip("gguf")


def interleaved(w, heads):
    """What llama.cpp's converter does to rows of queries and keys."""
    return w.reshape(heads, 2, HEAD_DIM // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def decoder(extra=(), without=()):
    """(tensors of a file, tensors of Hugging Face) of a Llama-like model, no q and k permuted."""
    theirs = {"token_embd.weight": random(VOCAB, WIDTH), "output_norm.weight": random(WIDTH)}
    ours = {
        "model.embed_tokens.weight": theirs["token_embd.weight"],
        "model.norm.weight": theirs["output_norm.weight"],
    }
    shapes = {
        "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, WIDTH)),
        "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, WIDTH)),
        "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, WIDTH)),
        "attn_output": ("self_attn.o_proj", (WIDTH, HEADS * HEAD_DIM)),
        "attn_norm": ("input_layernorm", (WIDTH,)),
        "ffn_norm": ("post_attention_layernorm", (WIDTH,)),
        "ffn_gate": ("mlp.gate_proj", (HIDDEN, WIDTH)),
        "ffn_up": ("mlp.up_proj", (HIDDEN, WIDTH)),
        "ffn_down": ("mlp.down_proj", (WIDTH, HIDDEN)),
        **dict(extra),
    }
    for i in range(LAYERS):
        for name, (target, shape) in shapes.items():
            if name in without:
                continue
            w = random(*shape, seed=sum(map(ord, name)) + i)
            theirs[f"blk.{i}.{name}.weight"] = w
            if "{}" in target:
                for expert, part in enumerate(w):
                    ours[f"model.layers.{i}.{target.format(expert)}.weight"] = part
            else:
                ours[f"model.layers.{i}.{target}.weight"] = w
    return theirs, ours


def check(source, ours, config=None):
    """Every tensor whole, and in rows that start and end anywhere. With the config: they are those
    that the import of a Hugging Face model wants."""
    if config is not None:
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        _, params = huggingface.load_tensors(config, source, mesh)
        n = sum(w.size for w in ours.values())
        assert sum(w.size for w in jax.tree.leaves(params)) >= n  # ours may be padded
    assert source.shapes == {name: w.shape for name, w in ours.items()}
    for name, w in ours.items():
        found = source.read(name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, w, err_msg=name)
        for start, stop in ((1, len(w)), (1, len(w) // 2 + 1), (len(w) - 1, len(w)), (2, 2)):
            np.testing.assert_array_equal(source.read(name, start, stop), w[start:stop], name)


def llama(theirs):
    """The tensors with queries and keys as llama.cpp keeps them for this architecture."""
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}
    return {
        name: interleaved(w, heads[part]) if (part := name.split(".")[-2]) in heads else w
        for name, w in theirs.items()
    }


def test_llama(tmp_path):
    theirs, ours = decoder()
    path = write(tmp_path / "m.gguf", "llama", llama(theirs), SIZES, template="{{ 1 }}")
    config, source, tokenizer, generation = gguf_import.read(path)
    check(source, ours, config)
    assert not np.array_equal(  # what a file read as it lies would give
        llama(theirs)["blk.0.attn_q.weight"], ours["model.layers.0.self_attn.q_proj.weight"]
    )
    assert config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,  # and not 9.999999747378752e-06, its float32
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": 257,
    }
    assert generation == {"eos_token_id": 257}
    assert tokenizer.chat_template == "{{ 1 }}"
    source.close()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_0", "F16", "BF16"])
def test_quantised_rows_are_dequantised_alone(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    theirs, ours = decoder()
    stored, expected = {}, dict(ours)
    for (name, w), target in zip(llama(theirs).items(), ours, strict=True):
        if w.ndim == 2:
            blocks = gguf.quants.quantize(w, kind)
            # The type itself is the gguf package's business; the layout is ours.
            w = gguf.quants.dequantize(blocks, kind)
            expected[target] = w
            heads = HEADS if "attn_q" in name else KV_HEADS
            if "attn_q" in name or "attn_k" in name:
                halves = w.reshape(heads, HEAD_DIM // 2, 2, WIDTH).swapaxes(1, 2)
                expected[target] = halves.reshape(w.shape)
            assert np.abs(expected[target] - ours[target]).max() < 0.3
            stored[name] = (blocks, kind)
        else:
            stored[name] = w
    _, source, _, _ = gguf_import.read(write(tmp_path / "m.gguf", "llama", stored, SIZES))
    check(source, expected)


def test_memory_is_that_of_the_rows_asked_for(tmp_path):
    rows, width = 16384, 256
    theirs, _ = decoder()
    theirs["token_embd.weight"] = np.zeros((rows, width), np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    theirs["token_embd.weight"] = (gguf.quants.quantize(theirs["token_embd.weight"], kind), kind)
    many = {**BPE, "tokens": ["t", "h", "th", *map(str, range(3, rows))], "token_type": [1] * rows}
    path = write(tmp_path / "m.gguf", "qwen2", theirs, SIZES, many)
    _, source, _, _ = gguf_import.read(path)
    source.read("model.embed_tokens.weight", 0, 8)
    tracemalloc.start()
    source.read("model.embed_tokens.weight", 8192, 8208)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # the whole tensor has 17 MB


MOE = {
    "ffn_gate_inp": ("mlp.gate", (3, WIDTH)),
    "ffn_gate_exps": ("mlp.experts.{}.gate_proj", (3, 16, WIDTH)),
    "ffn_up_exps": ("mlp.experts.{}.up_proj", (3, 16, WIDTH)),
    "ffn_down_exps": ("mlp.experts.{}.down_proj", (3, WIDTH, 16)),
}
QK_NORM = {
    "attn_q_norm": ("self_attn.q_norm", (HEAD_DIM,)),
    "attn_k_norm": ("self_attn.k_norm", (HEAD_DIM,)),
}
QK_NORM_OVER_ALL = {
    "attn_q_norm": ("self_attn.q_norm", (HEADS * HEAD_DIM,)),
    "attn_k_norm": ("self_attn.k_norm", (KV_HEADS * HEAD_DIM,)),
}
DENSE_MLP = ("ffn_gate", "ffn_up", "ffn_down")
ROUTED = {
    "expert_count": 3,
    "expert_used_count": 2,
    "expert_feed_forward_length": 16,
    "feed_forward_length": 16,  # what Mixtral and OLMoE say instead
}


def test_mixtral(tmp_path):
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    moe = {"ffn_gate_inp": ("block_sparse_moe.gate", (3, WIDTH))}
    for key, (target, shape) in list(MOE.items())[1:]:
        last = names[target.split(".")[-1]]
        moe[key] = (f"block_sparse_moe.experts.{{}}.{last}", shape)
    theirs, ours = decoder(moe, DENSE_MLP)
    path = write(tmp_path / "m.gguf", "llama", llama(theirs), {**SIZES, **ROUTED})
    config, source, _, _ = gguf_import.read(path)
    check(source, ours, config)
    assert (config["model_type"], config["architectures"]) == ("mixtral", ["MixtralForCausalLM"])
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 2)


@pytest.mark.parametrize("architecture", ["qwen3moe", "olmoe"])
def test_experts(architecture, tmp_path):
    norms = QK_NORM_OVER_ALL if architecture == "olmoe" else QK_NORM
    theirs, ours = decoder(MOE | norms, DENSE_MLP)
    path = write(tmp_path / "m.gguf", architecture, theirs, {**SIZES, **ROUTED})
    config, source, _, _ = gguf_import.read(path)
    check(source, ours, config)
    assert (config["num_experts"], config["num_experts_per_tok"]) == (3, 2)
    # llama.cpp renormalises the chosen experts' weights for Qwen and not for OLMoE.
    assert config["norm_topk_prob"] is (architecture == "qwen3moe")


def test_glm4moe_without_its_prediction_layer(tmp_path):
    shared = {
        f"ffn_{n}_shexp": (f"mlp.shared_experts.{n}_proj", shape)
        for n, shape in {"gate": (16, WIDTH), "up": (16, WIDTH), "down": (WIDTH, 16)}.items()
    }
    after = {"post_attention_norm": ("post_attention_layernorm", (WIDTH,))}
    theirs, ours = decoder(MOE | QK_NORM | shared | after, (*DENSE_MLP, "ffn_norm"))
    for i in range(LAYERS):
        theirs[f"blk.{i}.exp_probs_b.bias"] = random(3, seed=i)
        ours[f"model.layers.{i}.mlp.gate.e_score_correction_bias"] = random(3, seed=i)
    theirs[f"blk.{LAYERS}.nextn.enorm.weight"] = random(WIDTH)
    theirs[f"blk.{LAYERS}.attn_q.weight"] = random(WIDTH, WIDTH)
    settings = {
        **SIZES,
        **ROUTED,
        "block_count": LAYERS + 1,
        "nextn_predict_layers": 1,
        "rope.dimension_count": 4,
        "expert_shared_count": 1,
        "leading_dense_block_count": 0,
        "expert_weights_scale": 2.5,
    }
    path = write(tmp_path / "m.gguf", "glm4moe", theirs, settings)
    config, source, _, _ = gguf_import.read(path)
    check(source, ours, config)
    assert config["num_hidden_layers"] == LAYERS
    assert config["partial_rotary_factor"] == 0.5
    assert (config["n_routed_experts"], config["n_shared_experts"]) == (3, 1)
    assert (config["routed_scaling_factor"], config["use_qk_norm"]) == (2.5, True)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_gemma(architecture, tmp_path):
    """Norms count from 1 there and from 0 here; every second or sixth layer sees everything."""
    norms = {
        "post_attention_norm": ("post_attention_layernorm", (WIDTH,)),
        "ffn_norm": ("pre_feedforward_layernorm", (WIDTH,)),
        "post_ffw_norm": ("post_feedforward_layernorm", (WIDTH,)),
    }
    theirs, ours = decoder(norms | (QK_NORM if architecture == "gemma3" else {}))
    theirs = {n: w + 1 if n.endswith("norm.weight") else w for n, w in theirs.items()}
    ours = {n: (w + 1) - 1 if w.ndim == 1 else w for n, w in ours.items()}  # rounded as theirs
    own = {"attention.key_length": HEAD_DIM, "attention.sliding_window": 16}
    if architecture == "gemma2":
        own |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    path = write(tmp_path / "m.gguf", architecture, theirs, {**SIZES, **own})
    config, source, _, _ = gguf_import.read(path)
    check(source, ours, config)
    assert config["query_pre_attn_scalar"] == HEAD_DIM
    assert config["sliding_window"] == 16
    if architecture == "gemma2":
        assert config["layer_types"] == ["sliding_attention", "full_attention"]
        assert config["attn_logit_softcapping"] == 50.0
        assert config["final_logit_softcapping"] == 30.0
    else:
        assert config["model_type"] == "gemma3_text"
        assert config["layer_types"] == ["sliding_attention"] * 2
        assert (config["rope_theta"], config["rope_local_base_freq"]) == (50000.0, 10000.0)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "olmo2"])
def test_architectures_whose_queries_are_in_order(architecture, tmp_path):
    extra = QK_NORM if architecture == "qwen3" else {}
    if architecture == "olmo2":
        extra = QK_NORM_OVER_ALL | {
            "post_attention_norm": ("post_attention_layernorm", (WIDTH,)),
            "post_ffw_norm": ("post_feedforward_layernorm", (WIDTH,)),
        }
    theirs, ours = decoder(extra, ("attn_norm", "ffn_norm") if architecture == "olmo2" else ())
    if architecture == "qwen2":
        for i, name in itertools.product(range(LAYERS), "qkv"):
            bias = random((HEADS if name == "q" else KV_HEADS) * HEAD_DIM, seed=i)
            theirs[f"blk.{i}.attn_{name}.bias"] = bias
            ours[f"model.layers.{i}.self_attn.{name}_proj.bias"] = bias
    theirs["output.weight"] = ours["lm_head.weight"] = random(VOCAB, WIDTH, seed=9)
    config, source, _, _ = gguf_import.read(write(tmp_path / "m.gguf", architecture, theirs, SIZES))
    check(source, ours, config)
    assert config["tie_word_embeddings"] is False


def test_gpt2(tmp_path):
    """Conv1D keeps its matrices [in, out], llama.cpp all of them [out, in]."""
    shapes = {
        "attn_norm": ("ln_1", (WIDTH,)),
        "attn_qkv": ("attn.c_attn", (WIDTH, 3 * WIDTH)),
        "attn_output": ("attn.c_proj", (WIDTH, WIDTH)),
        "ffn_norm": ("ln_2", (WIDTH,)),
        "ffn_up": ("mlp.c_fc", (WIDTH, HIDDEN)),
        "ffn_down": ("mlp.c_proj", (HIDDEN, WIDTH)),
    }
    tops = {"token_embd": ("wte", VOCAB), "position_embd": ("wpe", 128)}
    theirs, ours = {}, {}
    for name, (target, rows) in tops.items():
        theirs[f"{name}.weight"] = ours[f"transformer.{target}.weight"] = random(rows, WIDTH)
    for suffix in ("weight", "bias"):
        theirs[f"output_norm.{suffix}"] = ours[f"transformer.ln_f.{suffix}"] = random(WIDTH)
        for name, (target, shape) in shapes.items():
            w = random(*(shape if suffix == "weight" else shape[-1:]), seed=sum(map(ord, name)))
            theirs[f"blk.0.{name}.{suffix}"] = np.ascontiguousarray(w.T)
            ours[f"transformer.h.0.{target}.{suffix}"] = w
    settings = {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": WIDTH,
        "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.layer_norm_epsilon": 1e-5,
    }
    config, source, _, _ = gguf_import.read(write(tmp_path / "m.gguf", "gpt2", theirs, settings))
    check(source, ours, config)
    assert (config["n_embd"], config["n_layer"], config["n_positions"]) == (WIDTH, 1, 128)


THETA = 500_000.0


def llama3_divisors(factor, length=8192):
    """Divisors of the frequencies, wavelength by wavelength as the Llama 3.1 code has them."""
    divisors = []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * np.pi * THETA ** (2 * i / HEAD_DIM)
        if wavelength < length / 4:
            divisors.append(1.0)
        elif wavelength > length:
            divisors.append(factor)
        else:
            smooth = (length / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling(factor, tmp_path):
    theirs, ours = decoder()
    theirs["rope_freqs.weight"] = llama3_divisors(factor)
    assert len(set(theirs["rope_freqs.weight"])) > 2  # one of them is in between
    settings = {**SIZES, "rope.freq_base": THETA}
    path = write(tmp_path / "m.gguf", "llama", llama(theirs), settings)
    config, source, _, _ = gguf_import.read(path)
    check(source, ours, config)
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs["rope_freqs.weight"] = llama3_divisors(factor, length=2048)
    with pytest.raises(ValueError, match=r"rope_freqs.weight is not Llama 3's scaling by"):
        gguf_import.read(write(tmp_path / "n.gguf", "llama", llama(theirs), settings))


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"rope.scaling.type": "none"}, None),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
            {"rope_type": "linear", "factor": 8.0},
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rope_scaling(settings, scaling, tmp_path):
    path = write(tmp_path / "m.gguf", "qwen2", decoder()[0], {**SIZES, **settings})
    assert gguf_import.read(path)[0]["rope_scaling"] == scaling


def test_a_truncated_file_is_an_error_wherever_it_ends(tmp_path):
    theirs, _ = decoder()
    content = write(tmp_path / "m.gguf", "llama", theirs, SIZES).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 20, *range(100, len(content), len(content) // 23), len(content) - 33]:
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf.*is not a whole GGUF file") as caught:
            gguf_import.read(cut)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "change", "settings", "tokenizer", "message"),
    [
        ("mamba", {}, {}, {}, "architecture 'mamba' is not supported; supported are llama, "),
        ("qwen2", {"blk.0.ssm_a": random(4)}, {}, {}, "unknown tensor 'blk.0.ssm_a' in a qwen2"),
        (
            "qwen2",
            {"blk.0.attn_v.weight": np.zeros((16, WIDTH), np.int32)},
            {},
            {},
            "blk.0.attn_v.weight has the type I32, which the gguf package cannot dequantise",
        ),
        ("qwen2", {}, {"rope.dimension_count": 4}, {}, "rotary positions on 4 of 8 dimensions"),
        ("qwen2", {}, {"rope.scaling.type": "longrope"}, {}, "type 'longrope' is not supported"),
        ("olmo2", {}, {"attention.sliding_window": 8}, {}, "OLMo 3"),
        ("qwen2", {}, {}, {"pre": "poro"}, "tokenizer.ggml.pre is 'poro', and how it cuts text"),
        ("qwen2", {}, {}, {"model": "rwkv"}, "a tokenizer of type 'rwkv'"),
        (
            "qwen2",
            {},
            {},
            {"tokens": [*BYTE_TOKENS, "th"], "token_type": [1] * 257, "eos_token_id": 0},
            "the tokenizer has 257 tokens, token_embd.weight 258 rows",
        ),
        ("qwen2", {}, {}, {"eos_token_id": 999}, "has 258 tokens, but {'eos': 999} for special"),
    ],
)
def test_errors(architecture, change, settings, tokenizer, message, tmp_path):
    theirs = {**decoder()[0], **change}
    path = write(
        tmp_path / "m.gguf", architecture, theirs, {**SIZES, **settings}, {**BPE, **tokenizer}
    )
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as caught:
        gguf_import.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_package_the_error_names_the_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", "qwen2", decoder()[0], SIZES)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'llm_jax\[gguf\]'"):
        gguf_import.read(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf: no such file"):
        gguf_import.read(tmp_path / "absent.gguf")
