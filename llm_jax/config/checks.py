"""What cannot work, named by its key."""

import difflib
import re

from llm_jax.config.base import Config, get
from llm_jax.config.model import ModelConfig

CHOICES = {
    "model.positions": ("learned", "sinusoidal", "rope", "none"),
    "model.rope_scaling": ("none", "linear", "ntk", "yarn", "llama3"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.norm_position": ("pre", "post", "reordered", "sandwich"),
    "model.qk_norm_over": ("head", "all"),
    "model.activation": ("gelu", "gelu_erf", "swiglu", "geglu", "relu2"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.cache_dtype": ("auto", "int8"),
    "model.attention": ("auto", "xla", "cudnn", "pallas", "splash", "reference", "ring"),
    "model.moe.scores": ("softmax", "sigmoid"),
    "model.moe.implementation": ("auto", "ragged", "blocks", "dense"),
    "model.moe.dispatch": ("gather", "all_to_all"),
    "model.remat": ("none", "full", "dots", "attention"),
    "optimizer.name": ("adamw", "adafactor", "muon"),
    "optimizer.moment_dtype": ("float32", "bfloat16"),
    "optimizer.schedule": ("cosine", "linear", "wsd", "constant"),
    "log.xla_flags": ("auto", ""),
    "data.packing": ("split", "random", "first_fit", "pad", "bucket"),
    "model.head": ("lm", "reward"),
    "data.format": ("text", "dialogue", "preference"),
    "data.preference.layout": (
        "auto",
        "pairs",
        "dialogues",
        "sharegpt",
        "rankings",
        "ratings",
        "judged",
    ),
    "data.preference.ties": ("drop", "half"),
    "reward.loss": ("logistic", "hinge", "listwise", "regression"),
    "reward.backbone": ("tuned", "features"),
    "dpo.loss": ("dpo", "robust", "ipo", "hinge", "kto", "orpo", "simpo"),
    "dpo.reference": ("auto", "cached", "adapter", "model"),
    "data.dialogue.layout": ("auto", "alpaca", "completion", "messages", "sharegpt"),
    "data.dialogue.train_on": ("assistant", "last", "all"),
    "data.dialogue.too_long": ("cut", "oldest", "drop"),
    "data.dialogue.malformed": ("skip", "fail"),
    "peft.method": ("none", "lora", "adapter", "prompt", "prefix"),
    "peft.base": ("float", "int8", "nf4"),
}


def validate(config: Config) -> None:
    """Raises ValueError, naming the key to change, for what cannot work."""
    for path, choices in CHOICES.items():
        try:
            value = get(config, path)
        except AttributeError:
            continue
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{path}={value!r} is not one of {', '.join(choices)}{hint}")
    for path in ("steps", "batch_size", "length", "accumulation", "peft.rank", "peft.tokens"):
        if get(config, path) < 1:
            raise ValueError(f"{path}={get(config, path)} has to be at least 1")
    for path in ("epochs", "model.embed_noise"):
        if not get(config, path) >= 0:
            raise ValueError(f"{path}={get(config, path)} has to be at least 0")
    m = config.model
    for path in ("d_model", "n_layers", "n_heads"):
        if getattr(m, path) < 1:
            raise ValueError(f"model.{path}={getattr(m, path)} has to be at least 1")
    if m.kv_heads and m.n_heads % m.kv_heads:
        raise ValueError(
            f"model.n_heads={m.n_heads} is not divisible by model.kv_heads={m.kv_heads}"
        )
    if config.batch_size % config.accumulation:
        raise ValueError(
            f"batch_size={config.batch_size} is not divisible by accumulation={config.accumulation}"
        )
    if m.positions == "learned" and m.max_length and config.length > m.max_length:
        raise ValueError(
            f"length={config.length} is longer than the learned position table; raise "
            f"model.max_length={m.max_length}, or use model.positions=rope"
        )
    virtual = config.peft.tokens if config.peft.method in ("prompt", "prefix") else 0
    if m.positions == "learned" and m.max_length and config.length + virtual > m.max_length:
        raise ValueError(
            f"length={config.length} and peft.tokens={virtual} do not fit the {m.max_length} positions "
            "that the model has learned; lower one"
        )
    if m.rope_scaling in ("ntk", "yarn", "llama3") and not m.rope_original_length:
        raise ValueError(
            f"model.rope_scaling={m.rope_scaling} needs model.rope_original_length, the context the "
            "weights were trained at"
        )
    if bad := [i for i in m.global_layers if not 0 <= i < m.n_layers]:
        raise ValueError(
            f"model.global_layers has layer {bad[0]}, but model.n_layers={m.n_layers} has 0 to "
            f"{m.n_layers - 1}"
        )
    if m.moe.n_experts:
        _validate_experts(m)
    if m.mup_base_width and config.optimizer.name == "adafactor":
        raise ValueError(
            "optimizer.name=adafactor scales its steps by the parameters' size, to which muP's factors "
            "do not apply; set optimizer.name to adamw or muon, or model.mup_base_width=0"
        )
    if m.mup_base_head_dim and not m.mup_base_width:
        raise ValueError(
            f"model.mup_base_head_dim={m.mup_base_head_dim} is for muP: set model.mup_base_width too"
        )
    if config.optimizer.moment_dtype != "float32" and config.optimizer.name == "adafactor":
        raise ValueError(
            f"optimizer.moment_dtype={config.optimizer.moment_dtype} is for adamw and muon; "
            "adafactor's moments are small already"
        )
    _validate_penalties(config.optimizer)
    _validate_preferences(config)
    for path in ("model.dropout", "peft.dropout", "data.eval_fraction"):
        if not 0.0 <= get(config, path) < 1.0:
            raise ValueError(f"{path}={get(config, path)} has to be in [0, 1)")
    _validate_patterns(config)


def _validate_patterns(config: Config) -> None:
    for path in ("peft.targets", "peft.base_targets"):
        check_pattern(path, get(config, path))
    for pattern in config.peft.also:
        check_pattern("peft.also", pattern)
    for pattern, _ in config.optimizer.freeze_rules:
        check_pattern("optimizer.freeze_rules", pattern)


def check_pattern(name: str, pattern: str) -> None:
    """Raises ValueError, naming where it was given, for what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as e:
        raise ValueError(f"{name}: {pattern!r} is no regular expression: {e}") from None


def _validate_preferences(config: Config) -> None:
    for path in ("reward.label_smoothing", "dpo.label_smoothing"):
        if not 0 <= get(config, path) < 0.5:
            raise ValueError(f"{path}={get(config, path)} has to be in [0, 0.5)")
    if not 0 < config.dpo.beta < float("inf"):
        raise ValueError(f"dpo.beta={config.dpo.beta} has to be above 0")
    paths = ("reward.margin", "reward.centring", "reward.l2", "dpo.length_penalty", "dpo.sft")
    for path in (*paths, "dpo.gamma", "dpo.desirable", "dpo.undesirable"):
        if not 0 <= get(config, path) < float("inf"):
            raise ValueError(f"{path}={get(config, path)} has to be at least 0")


def _validate_penalties(o: Config) -> None:
    for name in ("l2_to_start", "gradient_penalty"):
        if not 0 <= getattr(o, name) < float("inf"):
            raise ValueError(f"optimizer.{name}={getattr(o, name)} has to be at least 0")
    if not 0 < o.gradient_penalty_radius < float("inf"):
        raise ValueError(
            f"optimizer.gradient_penalty_radius={o.gradient_penalty_radius} has to be above 0"
        )


def _validate_experts(m: ModelConfig) -> None:
    e = m.moe
    if not 1 <= e.top_k <= e.n_experts:
        raise ValueError(
            f"model.moe.top_k={e.top_k} has to be between 1 and model.moe.n_experts={e.n_experts}"
        )
    if not 0 <= e.first_dense < m.n_layers:
        raise ValueError(
            f"model.moe.first_dense={e.first_dense} has to leave some of model.n_layers={m.n_layers}"
        )
    if e.groups:
        size = e.n_experts // e.groups
        if e.n_experts % e.groups or size < 2:
            raise ValueError(
                f"model.moe.n_experts={e.n_experts} does not fall into model.moe.groups={e.groups} of "
                "two or more"
            )
        if not 1 <= e.top_groups <= e.groups or e.top_groups * size < e.top_k:
            raise ValueError(
                f"model.moe.top_groups={e.top_groups} has to be at most model.moe.groups={e.groups}, "
                f"and to hold model.moe.top_k={e.top_k} experts (groups have {size})"
            )
