"""Published architectures by name."""

from collections.abc import Callable

from llm_jax.config import ModelConfig, MoEConfig


def gpt2(**sizes) -> ModelConfig:
    """GPT-2 (Radford et al. 2019): learned positions, pre-LayerNorm, tanh GELU, biases, tied head."""
    return ModelConfig(
        **{
            "vocab_size": 50_257,
            "vocab_multiple": 128,
            "max_length": 1024,
            "positions": "learned",
            "norm": "layernorm",
            "norm_bias": True,
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
            "activation": "gelu",
            "tied": True,
            **sizes,
        }
    )


def llama(**sizes) -> ModelConfig:
    """Llama (Touvron et al. 2023): rotary positions, pre-RMSNorm, SwiGLU, no biases, own head."""
    return ModelConfig(
        **{
            "positions": "rope",
            "norm": "rmsnorm",
            "norm_eps": 1e-5,
            "activation": "swiglu",
            "tied": False,
            **sizes,
        }
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "gpt2": lambda: gpt2(n_layers=12, n_heads=12, d_model=768),
    "gpt2-medium": lambda: gpt2(n_layers=24, n_heads=16, d_model=1024),
    "gpt2-large": lambda: gpt2(n_layers=36, n_heads=20, d_model=1280),
    "gpt2-xl": lambda: gpt2(n_layers=48, n_heads=25, d_model=1600),
    "llama2-7b": lambda: llama(
        vocab_size=32_000, n_layers=32, n_heads=32, d_model=4096, d_ff=11_008
    ),
    "llama2-13b": lambda: llama(
        vocab_size=32_000, n_layers=40, n_heads=40, d_model=5120, d_ff=13_824
    ),
    "llama2-70b": lambda: llama(
        vocab_size=32_000, n_layers=80, n_heads=64, kv_heads=8, d_model=8192, d_ff=28_672
    ),
    # Jiang et al. 2024: eight experts a layer, a token goes through two of them.
    "mixtral-8x7b": lambda: llama(
        vocab_size=32_000,
        n_layers=32,
        n_heads=32,
        kv_heads=8,
        d_model=4096,
        d_ff=14_336,
        rope_theta=1_000_000.0,
        moe=MoEConfig(n_experts=8, top_k=2, balance_loss=0.02, z_loss=0.0),
    ),
    "llama3-405b": lambda: llama(
        vocab_size=128_256,
        n_layers=126,
        n_heads=128,
        kv_heads=8,
        d_model=16_384,
        d_ff=53_248,
        rope_theta=500_000.0,
    ),
    # The shape of Llama 3.2 1B at its pretraining context (no rope scaling).
    "llama3.2-1b": lambda: llama(
        vocab_size=128_256,
        n_layers=16,
        n_heads=32,
        kv_heads=8,
        d_model=2048,
        d_ff=8192,
        rope_theta=500_000.0,
        tied=True,
    ),
}


def preset(name: str) -> ModelConfig:
    """A fresh, mutable config of a published architecture."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()
