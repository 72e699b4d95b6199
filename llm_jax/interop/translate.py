"""A Hugging Face `config.json` to a ModelConfig, and back.

`read_config` refuses what our models do not compute. `write_config` finds the architecture that says
exactly what one of our configs says, by writing it down, reading it back and comparing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llm_jax import config as configs
from llm_jax.config import ModelConfig, MoEConfig
from llm_jax.interop.architectures import ARCHITECTURES, REWARD
from llm_jax.interop.config_json import Keys

# How a model is trained or computed, not what it computes: no config.json has these.
ELSEWHERE = {
    "vocab_multiple", "dropout", "init_std", "mup_base_width", "mup_base_head_dim",
    "dtype", "attention", "attention_block", "scan", "scan_unroll", "remat", "head_chunk",
    "pipeline_microbatches", "pipeline_turns",
    "rope_interleaved",  # theirs are halves; weights are brought into that order
    "moe.balance_loss", "moe.z_loss", "moe.implementation", "moe.dispatch",
    "moe.capacity_factor", "moe.chunk",
}  # fmt: skip


def read_config(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The ModelConfig of a config.json.

    Raises:
      ValueError: an architecture or a setting that our models do not have, or sizes that make no
        sense; the message names the key.
    """
    kind = values.get("model_type")
    if kind == "gemma3" and isinstance(values.get("text_config"), dict):
        values = {"model_type": "gemma3_text", **values["text_config"]}
        kind = values["model_type"]
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{where}: model_type={kind!r} is not supported; there are {', '.join(ARCHITECTURES)}"
        )
    keys = Keys(values, ARCHITECTURES[kind].defaults, where)
    if keys.get("quantization_config") is not None:
        raise ValueError(f"{where}: quantised weights are not supported; load the original ones")
    kwargs = ARCHITECTURES[kind].read(keys)
    std = float(keys.number("initializer_range", 0.02))
    model = ModelConfig(init_std=std, head=_head(keys), **kwargs)
    if model.n_heads % model.kv_heads:
        raise ValueError(
            f"{where}: num_attention_heads={model.n_heads} is not divisible by "
            f"num_key_value_heads={model.kv_heads}"
        )
    if model.moe.n_experts and not 1 <= model.moe.top_k <= model.moe.n_experts:
        raise ValueError(
            f"{where}: num_experts_per_tok={model.moe.top_k} of {model.moe.n_experts} experts"
        )
    return model


def _head(keys: Keys) -> str:
    """lm, or reward: a classifier with one label, read at the last token."""
    if not any(name.endswith(REWARD) for name in keys.get("architectures", ())):
        return "lm"
    labels = len(keys.get("id2label", ())) or keys.get("num_labels", 2)
    if labels != 1:
        raise ValueError(
            f"{keys.where}: a classifier with {labels} labels is not supported; a reward model has one"
        )
    return "reward"


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The config.json (model_type, architectures and sizes) of a resolved ModelConfig.

    Raises:
      ValueError: no architecture of theirs computes this model; the message names the keys in the
        way of the nearest one.
    """
    nearest: tuple[str, list[str]] = ("", [""] * 1000)
    one_label = {"id2label": {"0": "REWARD"}, "label2id": {"REWARD": 0}}
    for kind, architecture in ARCHITECTURES.items():
        reward = model.head == "reward"
        name = architecture.reward_class if reward else architecture.class_name
        values = {
            "architectures": [name],
            "model_type": kind,
            "initializer_range": model.init_std,
            **architecture.write(model),
            **(one_label if reward else {}),
        }
        try:
            back = read_config(values)
        except ValueError:
            continue
        differ = _differences(model, back)
        if not differ:
            return values
        if len(differ) < len(nearest[1]):
            nearest = kind, differ
    raise ValueError(
        f"no architecture of transformers computes this model; {nearest[0]} is the nearest and "
        f"differs in {', '.join(nearest[1])}"
    )


def _differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    def flat(model: ModelConfig) -> dict[str, Any]:
        values = configs.to_dict(model)
        values |= {f"moe.{n}": v for n, v in values.pop("moe").items()}
        return _canonical(values)

    a, b = flat(ours), flat(theirs)
    return [f"model.{n}={a[n]!r} ({b[n]!r})" for n in a if n not in ELSEWHERE and a[n] != b[n]]


def _canonical(values: dict[str, Any]) -> dict[str, Any]:
    """Keys that have no effect brought to their defaults, so that equal models compare equal."""
    default = configs.to_dict(ModelConfig()) | {
        f"moe.{f.name}": f.default for f in dataclasses.fields(MoEConfig)
    }
    off = []
    if values["positions"] != "rope":
        off += [n for n in values if n.startswith(("rope_", "yarn_"))]
    elif values["rope_scaling"] != "yarn":
        off += [n for n in values if n.startswith("yarn_")]
    if values["rope_scaling"] != "llama3":
        off += ["rope_low_turns", "rope_high_turns"]
    if values["rope_scaling"] == "none":
        off += ["rope_factor", "rope_original_length"]
    if values["rope_scaling"] == "linear":
        off += ["rope_original_length"]
    if values["positions"] != "learned":
        off += ["max_length"]
    if not values["qk_norm"]:
        off += ["qk_norm_over"]
    if not values["window"]:
        off += ["global_layers", "rope_local_theta"]
    if not values["moe.n_experts"]:
        off += [n for n in values if n.startswith("moe.")]
    elif not values["moe.groups"]:
        off += ["moe.top_groups"]
    if values["moe.n_experts"] and not values["moe.first_dense"]:
        off += ["d_ff"]
    values["moe.bias_rate"] = values["moe.bias_rate"] > 0  # whether routers have a bias
    out = values | {n: default[n] for n in off}
    out["attention_scale"] = out["attention_scale"] or values["head_dim"] ** -0.5
    out["logit_scale"] = out["logit_scale"] or 1.0
    out["global_layers"] = tuple(out["global_layers"])
    if len(out["global_layers"]) == values["n_layers"]:
        out |= {"window": 0, "global_layers": (), "rope_local_theta": 0.0}
    if out["rope_local_theta"] == out["rope_theta"] and out["rope_scaling"] == "none":
        out["rope_local_theta"] = 0.0
    return out
