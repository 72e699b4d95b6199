"""The architectures that weights come in and go out as: how each says what a ModelConfig says.

An architecture here is a `model_type` of a Hugging Face `config.json`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llm_jax.config import ModelConfig
from llm_jax.interop.config_json import (
    PLAIN,
    Keys,
    read_biases,
    read_experts,
    read_shared,
    read_windows,
    write_biases,
    write_experts,
    write_shared,
    write_windows,
)

REWARD = "ForSequenceClassification"


class Architecture(NamedTuple):
    """One `model_type`."""

    class_name: str  # of the language model
    defaults: dict[str, Any]
    read: Callable[[Keys], dict[str, Any]]  # -> keys of ModelConfig
    write: Callable[[ModelConfig], dict[str, Any]]  # -> keys of config.json

    @property
    def reward_class(self) -> str:
        """The class of a reward model, which is one with a single label; "" if there is none."""
        if self.class_name in ("OlmoeForCausalLM", "Glm4MoeForCausalLM"):
            return ""
        kind = self.class_name.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        return f"{'Gemma3Text' if kind == 'Gemma3' else kind}{REWARD}"


def _read_gpt2(c: Keys) -> dict[str, Any]:
    c.refuse("scale_attn_by_inverse_layer_idx")
    c.refuse("add_cross_attention")
    if c.get("scale_attn_weights", True) is not True:
        raise ValueError(f"{c.where}: scale_attn_weights=false is not supported")
    heads, width = c.size("n_head"), c.size("n_embd")
    return {
        "vocab_size": c.size("vocab_size"),
        "d_model": width,
        "n_layers": c.size("n_layer"),
        "n_heads": heads,
        "kv_heads": heads,
        "head_dim": max(width // heads, 1),
        "d_ff": c.size("n_inner", 4 * width),
        "max_length": c.size("n_positions"),
        "positions": "learned",
        "norm": "layernorm",
        "norm_bias": True,
        "norm_eps": float(c.number("layer_norm_epsilon")),
        "activation": c.choice("activation_function", PLAIN),
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "tied": bool(c.get("tie_word_embeddings", True)),
    }


def _write_gpt2(m: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": m.vocab_size,
        "n_embd": m.d_model,
        "n_layer": m.n_layers,
        "n_head": m.n_heads,
        "n_inner": m.d_ff,
        "n_positions": m.max_length,
        "layer_norm_epsilon": m.norm_eps,
        "activation_function": {"gelu_erf": "gelu"}.get(m.activation, "gelu_new"),
        "tie_word_embeddings": m.tied,
        "attn_pdrop": m.dropout,
        "embd_pdrop": m.dropout,
        "resid_pdrop": m.dropout,
    }


def _read_llama(c: Keys) -> dict[str, Any]:
    return read_shared(c) | read_biases(c) | {"mlp_bias": bool(c.get("mlp_bias", False))}


def _read_mistral(c: Keys) -> dict[str, Any]:
    shared = read_shared(c)
    return shared | read_windows(c, shared["n_layers"])


def _write_mistral(m: ModelConfig) -> dict[str, Any]:
    return write_shared(m) | {"sliding_window": m.window or None}


def _read_qwen(c: Keys) -> dict[str, Any]:
    shared = read_shared(c)
    windows = {}
    if c.get("use_sliding_window"):
        windows = read_windows(c, shared["n_layers"], first=int(c.number("max_window_layers")))
    return shared | windows


def _read_qwen2(c: Keys) -> dict[str, Any]:
    return _read_qwen(c) | {"qkv_bias": True}


def _read_qwen3(c: Keys) -> dict[str, Any]:
    return _read_qwen(c) | read_biases(c) | {"qk_norm": True}


def _write_qwen(m: ModelConfig) -> dict[str, Any]:
    # Without windows no key may hint at one: older versions of transformers read some alone.
    windows = {"use_sliding_window": False, "sliding_window": None}
    if m.window:
        windows = {"use_sliding_window": True, "max_window_layers": 0, **write_windows(m)}
    return write_shared(m) | windows


def _read_gemma(c: Keys, *, every: int) -> dict[str, Any]:
    if c.get("hidden_activation") is None and c.values.get("hidden_act"):
        c.values = {**c.values, "hidden_activation": c.values["hidden_act"]}
    c.values = {**c.values, "hidden_act": c.get("hidden_activation")}
    c.refuse("use_bidirectional_attention")
    shared = read_shared(c)
    return {
        **shared,
        **read_biases(c),
        **read_windows(c, shared["n_layers"], every=int(c.get("sliding_window_pattern", every))),
        "norm_position": "sandwich",
        "norm_unit_offset": True,
        "embed_scale": shared["d_model"] ** 0.5,
        "attention_scale": float(c.number("query_pre_attn_scalar")) ** -0.5,
        "attention_softcap": float(c.get("attn_logit_softcapping") or 0.0),
        "logit_softcap": float(c.get("final_logit_softcapping") or 0.0),
    }


def _read_gemma2(c: Keys) -> dict[str, Any]:
    return _read_gemma(c, every=2)


def _read_gemma3(c: Keys) -> dict[str, Any]:
    return _read_gemma(c, every=6) | {"qk_norm": True}


def _write_gemma(m: ModelConfig) -> dict[str, Any]:
    shared = write_shared(m)
    return {
        **shared,
        **write_biases(m),
        **write_windows(m),
        "hidden_activation": shared["hidden_act"],
        "query_pre_attn_scalar": _whole((m.attention_scale or m.head_dim**-0.5) ** -2),
        # 0 is off here, null there; a key left out would be transformers' own default.
        "attn_logit_softcapping": m.attention_softcap or None,
        "final_logit_softcapping": m.logit_softcap or None,
    }


def _write_gemma3(m: ModelConfig) -> dict[str, Any]:
    return _write_gemma(m) | {"rope_local_base_freq": m.rope_local_theta or m.rope_theta}


def _whole(x: float) -> int | float:
    """x, as an integer where rounding of a square root hid that it is one."""
    return round(x) if abs(x - round(x)) < 1e-6 * x else x


def _read_olmo2(c: Keys) -> dict[str, Any]:
    reordered = {"norm_position": "reordered", "qk_norm": True, "qk_norm_over": "all"}
    return read_shared(c) | read_biases(c) | reordered


def _read_olmoe(c: Keys) -> dict[str, Any]:
    c.refuse("clip_qkv")
    moe = read_experts(c, width=c.size("intermediate_size"))
    return read_shared(c) | read_biases(c) | {"qk_norm": True, "qk_norm_over": "all", "moe": moe}


def _read_mixtral(c: Keys) -> dict[str, Any]:
    shared = read_shared(c)
    moe = read_experts(c, width=shared["d_ff"], normalize=True)
    return shared | read_windows(c, shared["n_layers"]) | {"moe": moe}


def _write_mixtral(m: ModelConfig) -> dict[str, Any]:
    experts = write_experts(m, "num_local_experts")
    return _write_mistral(m) | experts | {"intermediate_size": m.moe.d_ff}


def _read_qwen3_moe(c: Keys) -> dict[str, Any]:
    shared = read_shared(c)
    layers, step = shared["n_layers"], int(c.number("decoder_sparse_step"))
    only = set(c.get("mlp_only_layers") or ())
    dense = [i for i in range(layers) if i in only or (i + 1) % step]
    if dense != list(range(len(dense))):
        raise ValueError(
            f"{c.where}: layers {dense} have a dense MLP; only the bottom ones may "
            "(mlp_only_layers, decoder_sparse_step)"
        )
    if len(dense) == layers:
        raise ValueError(f"{c.where}: no layer has experts; use model_type qwen3")
    windows = read_windows(c, layers) if c.get("use_sliding_window") else {}
    moe = read_experts(c, width=c.size("moe_intermediate_size"), first_dense=len(dense))
    return shared | read_biases(c) | windows | {"qk_norm": True, "moe": moe}


def _write_qwen3_moe(m: ModelConfig) -> dict[str, Any]:
    return {
        **write_shared(m),
        **write_biases(m),
        **write_experts(m, "num_experts"),
        "use_sliding_window": bool(m.window),
        "sliding_window": m.window or None,
        "moe_intermediate_size": m.moe.d_ff,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(m.moe.first_dense)),
    }


def _read_glm4_moe(c: Keys) -> dict[str, Any]:
    groups = c.size("n_group")
    moe = read_experts(
        c,
        width=c.size("moe_intermediate_size"),
        scores="sigmoid",
        n_shared=int(c.number("n_shared_experts")),
        scale=float(c.number("routed_scaling_factor")),
        first_dense=int(c.number("first_k_dense_replace")),
        groups=groups if groups > 1 else 0,
        top_groups=c.size("topk_group") if groups > 1 else 0,
        bias_rate=0.001,  # DeepSeek-V3's; also what gives a router its bias
        balance_loss=0.0,
    )
    return (
        read_shared(c)
        | read_biases(c, out=False)
        | {"qk_norm": bool(c.get("use_qk_norm")), "moe": moe}
    )


def _write_glm4_moe(m: ModelConfig) -> dict[str, Any]:
    experts = write_experts(m, "n_routed_experts")
    del experts["router_aux_loss_coef"]
    return {
        **write_shared(m),
        **write_biases(m),
        **experts,
        "partial_rotary_factor": m.rope_fraction,
        "use_qk_norm": m.qk_norm,
        "moe_intermediate_size": m.moe.d_ff,
        "n_shared_experts": m.moe.n_shared,
        "routed_scaling_factor": m.moe.scale,
        "first_k_dense_replace": m.moe.first_dense,
        "n_group": m.moe.groups or 1,
        "topk_group": m.moe.top_groups or 1,
        "num_nextn_predict_layers": 0,
    }


_BASE = {"hidden_act": "silu", "tie_word_embeddings": False}
_QWEN = {**_BASE, "max_window_layers": 28, "sliding_window": 4096, "max_position_embeddings": 32768}
_GEMMA = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "head_dim": 256,
    "sliding_window": 4096,
}

# The first that says the same as one of our configs is what an export is written as.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "LlamaForCausalLM",
        _BASE,
        _read_llama,
        lambda m: write_shared(m) | write_biases(m) | {"mlp_bias": m.mlp_bias},
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        {
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
        },
        _read_gpt2,
        _write_gpt2,
    ),
    "mistral": Architecture(
        "MistralForCausalLM", {**_BASE, "sliding_window": 4096}, _read_mistral, _write_mistral
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", _QWEN, _read_qwen2, _write_qwen),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        {**_QWEN, "head_dim": 128},
        _read_qwen3,
        lambda m: _write_qwen(m) | write_biases(m),
    ),
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _read_gemma2,
        _write_gemma,
    ),
    "gemma3_text": Architecture(
        "Gemma3ForCausalLM",
        {**_GEMMA, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
        _read_gemma3,
        _write_gemma3,
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        {**_BASE, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5},
        _read_mixtral,
        _write_mixtral,
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        {**_QWEN, "decoder_sparse_step": 1, "norm_topk_prob": False, "router_aux_loss_coef": 0.001},
        _read_qwen3_moe,
        _write_qwen3_moe,
    ),
    "glm4_moe": Architecture(
        "Glm4MoeForCausalLM",
        {
            **_BASE,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
        },
        _read_glm4_moe,
        _write_glm4_moe,
    ),
    "olmo2": Architecture(
        "Olmo2ForCausalLM",
        {**_BASE, "rms_norm_eps": 1e-5},
        _read_olmo2,
        lambda m: write_shared(m) | write_biases(m),
    ),
    "olmoe": Architecture(
        "OlmoeForCausalLM",
        {**_BASE, "rms_norm_eps": 1e-5, "norm_topk_prob": False, "router_aux_loss_coef": 0.01},
        _read_olmoe,
        lambda m: {
            **write_shared(m),
            **write_biases(m),
            **write_experts(m, "num_experts"),
            "intermediate_size": m.moe.d_ff,
        },
    ),
}
