"""GGUF, the file format of llama.cpp: weights, tokenizer and settings in one file.

The `gguf` package parses the file. Here its metadata become what Hugging Face's `config.json` would
say, and its tensors what Hugging Face's would be (`gguf_tensors`), so that everything else is the
import of a Hugging Face model.
"""

from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.interop import gguf_tensors, gguf_tokenizer
from llm_jax.interop.row_source import Source
from llm_jax.tokenizers import Tokenizer

# llama.cpp's architecture -> Hugging Face's model_type and class.
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "gpt2": ("gpt2", "GPT2LMHeadModel"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "olmo2": ("olmo2", "Olmo2ForCausalLM"),
    "olmoe": ("olmoe", "OlmoeForCausalLM"),
    "glm4moe": ("glm4_moe", "Glm4MoeForCausalLM"),
}
_REQUIRED = object()


def read(path: str | Path) -> tuple[dict, Source, Tokenizer, dict]:
    """A model in a `.gguf` file.

    Returns:
      What its `config.json` would say, its tensors under Hugging Face's names (close them when
      done), its tokenizer with the chat template, and what its `generation_config.json` would say.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a whole GGUF file, or with an architecture, a tensor, a quantisation or a
        tokenizer that is not supported.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    metadata = _Metadata(path)
    try:
        config = _config(metadata)
        tensors = gguf_tensors.table(metadata.tensors, metadata.architecture, config)
        tokenizer = gguf_tokenizer.build(metadata.get)
        if tokenizer.vocab_size != config["vocab_size"]:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, token_embd.weight "
                f"{config['vocab_size']} rows"
            )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    generation = {
        f"{role}_token_id": getattr(tokenizer, f"{role}_id")
        for role in ("bos", "eos", "pad")
        if getattr(tokenizer, f"{role}_id") is not None
    }
    ends = [generation.get("eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id", None)]
    ends = list(dict.fromkeys(i for i in ends if i is not None))
    if len(ends) > 1:
        generation["eos_token_id"] = ends
    config.update(generation)
    return config, Source(path, tensors), tokenizer, generation


class _Metadata:
    """The keys and the tensor list of a file."""

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError:
            raise ImportError(
                "GGUF files need the gguf package: pip install 'llm_jax[gguf]'"
            ) from None
        try:
            reader = gguf.GGUFReader(path)
            self._fields, self.tensors = reader.fields, reader.tensors
            self.architecture = self.get("general.architecture", None)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is not a whole GGUF file ({reason}); copy it again") from None
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"{path}: the architecture {self.architecture!r} is not supported; supported are "
                f"{', '.join(ARCHITECTURES)}"
            )
        self.shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in self.tensors}

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of a key, floats as the shortest decimal that float32 keeps."""
        if key not in self._fields:
            if default is _REQUIRED:
                raise ValueError(f"the key {key} is missing")
            return default
        value = self._fields[key].contents()
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def __call__(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of a key of the architecture; one number, not one a layer."""
        value = self.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list) and key != "attention.sliding_window_pattern":
            if len(set(value)) != 1:
                raise ValueError(f"{key} differs from layer to layer: {value}")
            return value[0]
        return value

    def has(self, tensor: str) -> bool:
        """Whether any layer has the tensor."""
        return any(name.endswith(f".{tensor}") for name in self.shapes)

    def values(self, tensor: str) -> np.ndarray:
        return next(t.data for t in self.tensors if t.name == tensor)


def _config(meta: _Metadata) -> dict[str, Any]:
    if "token_embd.weight" not in meta.shapes:
        raise ValueError("the tensor token_embd.weight is missing")
    model_type, cls = ARCHITECTURES[meta.architecture]
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [cls],
        "vocab_size": meta.shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in meta.shapes,
    }
    if meta.architecture == "gpt2":
        return {
            **config,
            "n_embd": meta("embedding_length"),
            "n_layer": meta("block_count"),
            "n_head": meta("attention.head_count"),
            "n_inner": meta("feed_forward_length"),
            "n_positions": meta("context_length"),
            "layer_norm_epsilon": meta("attention.layer_norm_epsilon"),
            "activation_function": "gelu_new",
        }
    heads, width = meta("attention.head_count"), meta("embedding_length")
    head_dim = meta("attention.key_length", width // heads)
    if meta("attention.value_length", head_dim) != head_dim:
        raise ValueError("keys and values of different sizes are not supported")
    config |= {
        "hidden_size": width,
        "intermediate_size": meta("feed_forward_length"),
        "num_hidden_layers": meta("block_count") - meta("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": meta("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": meta("context_length"),
        "rms_norm_eps": meta("attention.layer_norm_rms_epsilon"),
        "rope_theta": meta("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(meta, head_dim),
        "attention_bias": meta.has("attn_q.bias"),
    }
    rotary = meta("rope.dimension_count", head_dim)
    if meta.architecture == "glm4moe":
        config["partial_rotary_factor"] = rotary / head_dim
    elif rotary != head_dim:
        raise ValueError(f"rotary positions on {rotary} of {head_dim} dimensions")
    config |= _OWN.get(meta.architecture, lambda meta, config: {})(meta, config)
    return config


def _rope_scaling(meta: _Metadata, head_dim: int) -> dict[str, Any] | None:
    if "rope_freqs.weight" in meta.shapes:
        return _llama3_scaling(meta, head_dim)
    kind = meta("rope.scaling.type", "none")
    factor = meta("rope.scaling.factor", None) or meta("rope.scale_linear", None)
    if kind == "none" and factor in (None, 1.0):
        return None
    if kind in ("none", "linear"):
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ValueError(f"rope scaling of type {kind!r} is not supported")
    scaling = {"rope_type": "yarn", "factor": factor}
    for key, name in {
        "original_context_length": "original_max_position_embeddings",
        "attn_factor": "attention_factor",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }.items():
        if (value := meta(f"rope.scaling.{key}", None)) is not None:
            scaling[name] = value
    return scaling


def _llama3_scaling(meta: _Metadata, head_dim: int) -> dict[str, Any] | None:
    """Llama 3.1's scaling, which llama.cpp keeps as one divisor per frequency.

    The largest divisor is the factor; the bounds are those of all published models.
    """
    divisors = meta.values("rope_freqs.weight").astype(np.float64)
    factor, low, high, length = float(divisors.max()), 1.0, 4.0, 8192
    if factor == 1.0:
        return None
    theta = meta("rope.freq_base", 10000.0)
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    if divisors.shape != smooth.shape or not np.allclose(
        divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4
    ):
        raise ValueError(
            f"rope_freqs.weight is not Llama 3's scaling by {factor:g} with bounds "
            f"{low:g} and {high:g} over {length} tokens, and no other is supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


def _llama(meta: _Metadata, config: dict) -> dict[str, Any]:
    window = meta("attention.sliding_window", None)
    if meta("expert_count", 0):
        return {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": meta("expert_count"),
            "num_experts_per_tok": meta("expert_used_count"),
            "sliding_window": window,
        }
    if window:
        return {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": window,
        }
    return {"mlp_bias": meta.has("ffn_gate.bias")}


def _experts(meta: _Metadata) -> dict[str, Any]:
    return {
        "num_experts": meta("expert_count"),
        "num_experts_per_tok": meta("expert_used_count"),
    }


def _qwen3moe(meta: _Metadata, config: dict) -> dict[str, Any]:
    return {
        **_experts(meta),
        "moe_intermediate_size": meta("expert_feed_forward_length"),
        "norm_topk_prob": meta("expert_weights_norm", True),  # what llama.cpp computes
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _olmoe(meta: _Metadata, config: dict) -> dict[str, Any]:
    return {
        **_experts(meta),
        "norm_topk_prob": meta("expert_weights_norm", False),
        "clip_qkv": meta("attention.clamp_kqv", None),
    }


def _olmo2(meta: _Metadata, config: dict) -> dict[str, Any]:
    if meta("attention.sliding_window", None):
        raise ValueError("OLMo 3 (olmo2 with a sliding window) is not supported")
    return {}


def _gemma(meta: _Metadata, config: dict) -> dict[str, Any]:
    gemma3 = meta.architecture == "gemma3"
    layers = config["num_hidden_layers"]
    pattern = meta("attention.sliding_window_pattern", 6 if gemma3 else 2)
    if not isinstance(pattern, list):
        pattern = [(i + 1) % pattern != 0 for i in range(layers)]
    # The 27B models scale attention by the mean width of a head, the others by its real one.
    largest = layers == (62 if gemma3 else 46)
    own = {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": meta("attention.sliding_window"),
        "layer_types": ["sliding_attention" if local else "full_attention" for local in pattern],
        "attn_logit_softcapping": meta("attn_logit_softcapping", None),
        "final_logit_softcapping": meta("final_logit_softcapping", None),
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if largest
        else config["head_dim"],
    }
    if gemma3:
        own["rope_theta"] = meta("rope.freq_base", 1000000.0)
        own["rope_local_base_freq"] = meta("rope.freq_base_swa", 10000.0)
    return own


def _glm4moe(meta: _Metadata, config: dict) -> dict[str, Any]:
    return {
        "n_routed_experts": meta("expert_count"),
        "n_shared_experts": meta("expert_shared_count", 0),
        "num_experts_per_tok": meta("expert_used_count"),
        "moe_intermediate_size": meta("expert_feed_forward_length"),
        "first_k_dense_replace": meta("leading_dense_block_count", 0),
        "routed_scaling_factor": meta("expert_weights_scale", 1.0),
        "norm_topk_prob": meta("expert_weights_norm", True),
        "n_group": meta("expert_group_count", 1),
        "topk_group": meta("expert_group_used_count", 1),
        "use_qk_norm": meta.has("attn_q_norm.weight"),
    }


_OWN = {
    "llama": _llama,
    "qwen3moe": _qwen3moe,
    "olmoe": _olmoe,
    "olmo2": _olmo2,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "glm4moe": _glm4moe,
}
