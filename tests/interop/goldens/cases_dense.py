"""The configs of the goldens without experts: (suffix, config.json, layout); see styles.py."""

from styles import gpt2, llama3, new, old, sizes, yarn

LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
MISTRAL = {"model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-5}
QWEN2 = {"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6}
QWEN3 = {"model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6}
GEMMA2 = {
    "model_type": "gemma2",
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
}
OLMO2 = {"model_type": "olmo2", "hidden_act": "silu", "rms_norm_eps": 1e-6}
LLAMA_LM = "LlamaForCausalLM"

DENSE = {
    "gpt2": [
        ("tied", gpt2(32, 2, 4, 83), ""),
        ("own_files", gpt2(36, 3, 3, 77), "no_prefix"),
        ("untied", gpt2(32, 2, 1, 64, tie_word_embeddings=False, layer_norm_epsilon=1e-3), ""),
        ("inner_erf", gpt2(48, 2, 6, 97, n_inner=80, activation_function="gelu"), ""),
    ],
    "llama": [
        # Llama 1: no key for kv heads, none for the base.
        (
            "1_mha",
            old(LLAMA_LM, **LLAMA, **sizes(32, 2, 4, 0, 88, 79), tie_word_embeddings=False)
            | {"rms_norm_eps": 1e-6},
            "",
        ),
        (
            "2_gqa",
            old(
                LLAMA_LM,
                **LLAMA,
                **sizes(48, 3, 6, 2, 64, 96),
                pretraining_tp=1,
                rope_theta=10000.0,
                rope_scaling=None,
                tie_word_embeddings=False,
            ),
            "inv_freq",
        ),
        (
            "3_llama3",
            old(
                LLAMA_LM,
                **LLAMA,
                **sizes(32, 3, 8, 2, 56, 67, head_dim=16),
                attention_bias=False,
                mlp_bias=False,
                rope_theta=500.0,
                rope_scaling=llama3(8.0, 32),
                tie_word_embeddings=True,
            ),
            "",
        ),
        (
            "llama3_mqa",
            new(
                LLAMA_LM,
                llama3(32.0, 16, low=1.0, high=2.0),
                **LLAMA,
                **sizes(32, 2, 4, 1, 72, 64, head_dim=12),
                tie_word_embeddings=False,
            ),
            "",
        ),
        (
            "linear_bias",
            old(
                LLAMA_LM,
                **LLAMA,
                **sizes(32, 2, 4, 2, 72, 71),
                attention_bias=True,
                mlp_bias=True,
                rope_theta=1000.0,
                rope_scaling={"type": "linear", "factor": 4.0},
                tie_word_embeddings=False,
            ),
            "",
        ),
        (
            "yarn",
            new(
                LLAMA_LM,
                yarn(4.0, 16, rope_type="yarn", rope_theta=100.0, beta_fast=4.0, beta_slow=1.0),
                **LLAMA,
                **sizes(32, 2, 4, 4, 64, 73, head_dim=16),
                tie_word_embeddings=True,
            ),
            "",
        ),
    ],
    "smollm2": [
        (
            "135m",
            old(
                LLAMA_LM,
                **LLAMA,
                **sizes(36, 3, 9, 3, 96, 97),
                attention_bias=False,
                mlp_bias=False,
                rope_theta=100000,
                rope_scaling=None,
                rope_interleaved=False,
                is_llama_config=True,
                pad_token_id=2,
                tie_word_embeddings=True,
            ),
            "",
        ),
        (
            "new",
            new(
                LLAMA_LM,
                {"rope_theta": 130000.0},
                **LLAMA,
                **sizes(48, 4, 6, 2, 80, 65, head_dim=8),
                tie_word_embeddings=True,
            ),
            "",
        ),
        (
            "mqa",
            old(
                LLAMA_LM,
                **LLAMA,
                **sizes(48, 2, 3, 1, 64, 83),
                rope_theta=273768.0,
                tie_word_embeddings=True,
            ),
            "",
        ),
    ],
    "mistral": [
        (
            "window",
            old(
                "MistralForCausalLM",
                **MISTRAL,
                **sizes(32, 3, 8, 2, 56, 79),
                sliding_window=7,
                rope_theta=10000.0,
                tie_word_embeddings=False,
            ),
            "",
        ),
        (
            "nemo",
            old(
                "MistralForCausalLM",
                **MISTRAL,
                **sizes(40, 2, 4, 1, 64, 96, head_dim=16),
                sliding_window=None,
                rope_theta=1000000.0,
                tie_word_embeddings=False,
            ),
            "",
        ),
        (
            "mha_tied",
            new(
                "MistralForCausalLM",
                {"rope_theta": 1000.0},
                **MISTRAL | {"rms_norm_eps": 1e-3},
                **sizes(32, 2, 4, 4, 72, 69, head_dim=8),
                sliding_window=4,
                tie_word_embeddings=True,
            ),
            "",
        ),
    ],
    "qwen2": [
        # use_sliding_window false: the window is a trap.
        (
            "no_window",
            old(
                "Qwen2ForCausalLM",
                **QWEN2,
                **sizes(32, 2, 8, 2, 72, 81),
                rope_theta=1000000.0,
                sliding_window=5,
                use_sliding_window=False,
                max_window_layers=1,
                tie_word_embeddings=True,
            ),
            "",
        ),
        (
            "window",
            old(
                "Qwen2ForCausalLM",
                **QWEN2,
                **sizes(32, 3, 4, 4, 56, 96),
                rope_theta=10000.0,
                sliding_window=6,
                use_sliding_window=True,
                max_window_layers=1,
                tie_word_embeddings=False,
            ),
            "",
        ),
        (
            "yarn_mqa",
            old(
                "Qwen2ForCausalLM",
                **QWEN2,
                **sizes(32, 2, 4, 1, 64, 75),
                rope_theta=1000.0,
                rope_scaling=yarn(4.0, 16, type="yarn"),
                use_sliding_window=False,
                tie_word_embeddings=False,
            ),
            "",
        ),
        (
            "layer_types",
            new(
                "Qwen2ForCausalLM",
                {"rope_theta": 5000.0},
                **QWEN2 | {"rms_norm_eps": 1e-4},
                **sizes(48, 3, 6, 2, 64, 67),
                layer_types=["full_attention", "sliding_attention", "full_attention"],
                sliding_window=5,
                use_sliding_window=True,
                max_window_layers=1,
                tie_word_embeddings=True,
            ),
            "",
        ),
    ],
    "qwen3": [
        (
            "tied",
            old(
                "Qwen3ForCausalLM",
                **QWEN3,
                **sizes(32, 2, 4, 2, 80, 89, head_dim=16),
                attention_bias=False,
                rope_theta=1000000,
                rope_scaling=None,
                sliding_window=None,
                use_sliding_window=False,
                max_window_layers=2,
                tie_word_embeddings=True,
            ),
            "",
        ),
        (
            "bias_yarn",
            old(
                "Qwen3ForCausalLM",
                **QWEN3,
                **sizes(32, 3, 8, 1, 56, 64, head_dim=8),
                attention_bias=True,
                rope_theta=10000,
                rope_scaling=yarn(2.0, 32, rope_type="yarn"),
                use_sliding_window=False,
                tie_word_embeddings=False,
            ),
            "",
        ),
        (
            "window",
            new(
                "Qwen3ForCausalLM",
                {"rope_theta": 20000.0},
                **QWEN3 | {"rms_norm_eps": 1e-3},
                **sizes(48, 3, 4, 4, 64, 71, head_dim=10),
                layer_types=["full_attention", "full_attention", "sliding_attention"],
                sliding_window=6,
                use_sliding_window=True,
                max_window_layers=2,
                tie_word_embeddings=False,
            ),
            "",
        ),
    ],
    "gemma2": [
        # The last of three layers is local again.
        (
            "softcaps",
            old(
                "Gemma2ForCausalLM",
                **GEMMA2,
                **sizes(32, 3, 4, 2, 64, 83, head_dim=16),
                attention_bias=False,
                query_pre_attn_scalar=9,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=5.0,
                sliding_window=5,
                sliding_window_size=5,
                rope_theta=10000.0,
                cache_implementation="hybrid",
            ),
            "",
        ),
        (
            "no_caps",
            old(
                "Gemma2ForCausalLM",
                **GEMMA2,
                **sizes(32, 2, 4, 4, 72, 96, head_dim=8),
                query_pre_attn_scalar=8,
                attn_logit_softcapping=None,
                final_logit_softcapping=None,
                sliding_window=64,
                rope_theta=500.0,
                tie_word_embeddings=False,
            ),
            "",
        ),
        (
            "mqa_bias",
            new(
                "Gemma2ForCausalLM",
                {"rope_theta": 10000.0},
                **GEMMA2 | {"rms_norm_eps": 1e-3},
                **sizes(36, 4, 6, 1, 64, 69, head_dim=12),
                attention_bias=True,
                query_pre_attn_scalar=6,
                attn_logit_softcapping=1.5,
                final_logit_softcapping=8.0,
                sliding_window=4,
                layer_types=["sliding_attention", "full_attention"] * 2,
                tie_word_embeddings=True,
            ),
            "",
        ),
    ],
    "gemma3_text": [
        # Five local layers, a global one, a local one.
        (
            "1b",
            old(
                "Gemma3ForCausalLM",
                **GEMMA3,
                **sizes(32, 7, 4, 1, 48, 65, head_dim=16),
                attention_bias=False,
                attn_logit_softcapping=None,
                final_logit_softcapping=None,
                query_pre_attn_scalar=16,
                rope_theta=1000000,
                rope_local_base_freq=10000,
                rope_scaling=None,
                sliding_window=6,
                sliding_window_pattern=6,
                cache_implementation="hybrid",
            ),
            "",
        ),
        (
            "4b_linear",
            old(
                "Gemma3ForCausalLM",
                **GEMMA3,
                **sizes(32, 4, 4, 2, 64, 71, head_dim=12),
                query_pre_attn_scalar=10,
                rope_theta=5000.0,
                rope_local_base_freq=100.0,
                rope_scaling={"factor": 8.0, "rope_type": "linear"},
                sliding_window=5,
                sliding_window_pattern=2,
                tie_word_embeddings=True,
            ),
            "",
        ),
        (
            "new",
            new(
                "Gemma3ForCausalLM",
                {
                    "full_attention": {
                        "rope_type": "linear",
                        "rope_theta": 20000.0,
                        "factor": 4.0,
                    },
                    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
                },
                **GEMMA3 | {"rms_norm_eps": 1e-4},
                **sizes(48, 3, 4, 4, 64, 96, head_dim=8),
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                final_logit_softcapping=6.0,
                attn_logit_softcapping=None,
                attention_bias=True,
                query_pre_attn_scalar=8,
                sliding_window=4,
                tie_word_embeddings=False,
            ),
            "",
        ),
    ],
    "olmo2": [
        (
            "7b_mha",
            old(
                "Olmo2ForCausalLM",
                **OLMO2,
                **sizes(32, 2, 4, 4, 72, 81),
                attention_bias=False,
                rope_theta=500000,
                rope_scaling=None,
                tie_word_embeddings=False,
            ),
            "",
        ),
        (
            "32b_gqa",
            old(
                "Olmo2ForCausalLM",
                **OLMO2,
                **sizes(40, 3, 10, 2, 64, 64),
                attention_bias=False,
                rope_theta=500000,
                rope_scaling={"type": "linear", "factor": 2.0},
                tie_word_embeddings=True,
            ),
            "",
        ),
        (
            "mqa_bias",
            new(
                "Olmo2ForCausalLM",
                {"rope_theta": 1000.0},
                **OLMO2 | {"rms_norm_eps": 1e-3},
                **sizes(48, 2, 3, 1, 56, 95),
                attention_bias=True,
                tie_word_embeddings=False,
            ),
            "",
        ),
    ],
}
