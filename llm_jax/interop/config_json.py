"""What a Hugging Face `config.json` says, key by key, and the parts that most architectures share."""

from collections.abc import Mapping
from typing import Any

from llm_jax.config import ModelConfig, MoEConfig

GATED = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
PLAIN = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_erf",
}

ROPE_SCALINGS = ("linear", "yarn", "llama3")


class Keys:
    """A config.json, asked key by key.

    Args:
      values: the JSON object.
      defaults: what transformers takes for a key that is absent.
      where: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str):
        self.values, self.defaults, self.where = values, defaults, where

    def get(self, name: str, default: Any = None) -> Any:
        """The value; `default` for null, and for an absent key what transformers takes there."""
        if name not in self.values:
            return self.defaults.get(name, default)
        return default if self.values[name] is None else self.values[name]

    def number(self, name: str, default: float | None = None) -> float:
        """A number, which has to be there."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.where}: {name} is {value!r}, not a number")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer, which has to be there."""
        value = self.number(name, default)
        if value != int(value) or value < 1:
            raise ValueError(f"{self.where}: {name}={value!r} has to be a positive integer")
        return int(value)

    def choice(self, name: str, table: Mapping[str, str]) -> str:
        """What the table has for the value."""
        value = self.get(name)
        if value not in table:
            raise ValueError(
                f"{self.where}: {name}={value!r} is not supported; there are {', '.join(table)}"
            )
        return table[value]

    def refuse(self, name: str, *accepted: Any) -> None:
        """Raises ValueError for a value that would change what the model computes."""
        value = self.get(name)
        if value not in (None, False, *accepted):
            raise ValueError(f"{self.where}: {name}={value!r} is not supported")


def read_shared(c: Keys) -> dict[str, Any]:
    heads, width = c.size("num_attention_heads"), c.size("hidden_size")
    return {
        "vocab_size": c.size("vocab_size"),
        "d_model": width,
        "n_layers": c.size("num_hidden_layers"),
        "n_heads": heads,
        "kv_heads": c.size("num_key_value_heads", heads),
        "head_dim": c.size("head_dim", max(width // heads, 1)),
        "d_ff": c.size("intermediate_size"),
        "max_length": c.size("max_position_embeddings", 2048),
        "positions": "rope",
        "norm": "rmsnorm",
        "norm_eps": float(c.number("rms_norm_eps", 1e-6)),
        "activation": c.choice("hidden_act", GATED),
        "tied": bool(c.get("tie_word_embeddings", False)),
        **read_rope(c),
    }


def read_rope(c: Keys) -> dict[str, Any]:
    """The rotary settings, in transformers 5's `rope_parameters` or as before it at the top."""
    values = c.get("rope_parameters") or {}
    local = 0.0
    if "full_attention" in values:  # Gemma 3: one set for each kind of layer
        local = float((values.get("sliding_attention") or {}).get("rope_theta", 10_000.0))
        values = values["full_attention"] or {}
    elif c.get("rope_local_base_freq"):
        local = float(c.number("rope_local_base_freq"))
    old = c.get("rope_scaling") or {}
    if old and not isinstance(old, Mapping):
        raise ValueError(f"{c.where}: rope_scaling={old!r} is not an object")
    values = {"rope_theta": c.get("rope_theta", 10_000.0), **old, **values}
    fraction = values.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0
    kind = values.get("rope_type") or values.get("type") or "default"
    out = {
        "rope_theta": float(values["rope_theta"]),
        "rope_fraction": float(fraction),
        "rope_local_theta": local,
    }
    if kind == "default":
        return out
    if kind not in ROPE_SCALINGS:
        raise ValueError(
            f"{c.where}: rope scaling of type {kind!r} is not supported; there are default, "
            f"{', '.join(ROPE_SCALINGS)}"
        )
    factor = values.get("factor")
    if not isinstance(factor, int | float):
        raise ValueError(f"{c.where}: the rope scaling has no factor")
    out |= {"rope_scaling": kind, "rope_factor": float(factor)}
    if kind == "linear":
        return out
    original = values.get("original_max_position_embeddings") or c.get(
        "original_max_position_embeddings"
    )
    out["rope_original_length"] = int(original or c.size("max_position_embeddings"))
    if kind == "llama3":
        low, high = values.get("low_freq_factor", 1.0), values.get("high_freq_factor", 4.0)
        return out | {"rope_low_turns": float(low), "rope_high_turns": float(high)}
    for name in ("mscale", "mscale_all_dim"):
        if values.get(name):
            raise ValueError(f"{c.where}: {name} of yarn rope scaling is not supported")
    if values.get("truncate") is False:
        raise ValueError(f"{c.where}: truncate=false of yarn rope scaling is not supported")
    return out | {
        "yarn_beta_fast": float(values.get("beta_fast") or 32.0),
        "yarn_beta_slow": float(values.get("beta_slow") or 1.0),
        "yarn_attention_factor": float(values.get("attention_factor") or 0.0),
    }


def read_biases(c: Keys, *, out: bool = True) -> dict[str, Any]:
    biased = bool(c.get("attention_bias", False))
    return {"qkv_bias": biased, "out_bias": biased and out}


def read_windows(c: Keys, n_layers: int, *, every: int = 0, first: int = 0) -> dict[str, Any]:
    """The window and the layers without one: as `layer_types` says, else every `every`-th layer
    sees everything, else those below `first` do."""
    window = c.get("sliding_window")
    if not window:
        return {}
    kinds = c.get("layer_types")
    if kinds is None:
        seen = [i for i in range(n_layers) if (every and not (i + 1) % every) or i < first]
    else:
        if len(kinds) != n_layers or set(kinds) - {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"{c.where}: layer_types has to name full_attention or sliding_attention for each of "
                f"num_hidden_layers={n_layers}"
            )
        seen = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    if len(seen) == n_layers:
        return {}
    return {"window": int(window), "global_layers": tuple(seen)}


def write_shared(m: ModelConfig) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if m.rope_scaling in ROPE_SCALINGS:
        scaling = {"rope_type": m.rope_scaling, "factor": m.rope_factor}
        if m.rope_scaling != "linear":
            scaling["original_max_position_embeddings"] = m.rope_original_length
        if m.rope_scaling == "llama3":
            scaling |= {"low_freq_factor": m.rope_low_turns, "high_freq_factor": m.rope_high_turns}
        if m.rope_scaling == "yarn":
            scaling |= {"beta_fast": m.yarn_beta_fast, "beta_slow": m.yarn_beta_slow}
            if m.yarn_attention_factor:
                scaling["attention_factor"] = m.yarn_attention_factor
    # What cannot be said is left out here; reading it back shows the difference.
    activation = {"geglu": "gelu_pytorch_tanh"}.get(m.activation, "silu")
    return {
        "vocab_size": m.vocab_size,
        "hidden_size": m.d_model,
        "num_hidden_layers": m.n_layers,
        "num_attention_heads": m.n_heads,
        "num_key_value_heads": m.kv_heads,
        "head_dim": m.head_dim,
        "intermediate_size": m.d_ff,
        "max_position_embeddings": m.max_length,
        "rms_norm_eps": m.norm_eps,
        "hidden_act": activation,
        "tie_word_embeddings": m.tied,
        "rope_theta": m.rope_theta,
        "rope_scaling": scaling,
        "attention_dropout": 0.0,
    }


def write_biases(m: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": m.qkv_bias}


def write_windows(m: ModelConfig) -> dict[str, Any]:
    kinds = [
        "full_attention" if i in m.global_layers or not m.window else "sliding_attention"
        for i in range(m.n_layers)
    ]
    return {"sliding_window": m.window or None, "layer_types": kinds}


def read_experts(c: Keys, *, width: int, **changes: Any) -> MoEConfig:
    count = c.get("num_local_experts") or c.get("num_experts") or c.get("n_routed_experts")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{c.where}: the number of experts is {count!r}")
    values = {
        "n_experts": count,
        "top_k": c.size("num_experts_per_tok"),
        "d_ff": width,
        "normalize": bool(c.get("norm_topk_prob", True)),
        "balance_loss": float(c.get("router_aux_loss_coef", 0.0)),
        "z_loss": 0.0,
    }
    return MoEConfig(**(values | changes))


def write_experts(m: ModelConfig, count: str) -> dict[str, Any]:
    return {
        count: m.moe.n_experts,
        "num_experts_per_tok": m.moe.top_k,
        "norm_topk_prob": m.moe.normalize,
        "router_aux_loss_coef": m.moe.balance_loss,
        "output_router_logits": False,
    }
