"""Adapters as Hugging Face's peft keeps them: adapter_config.json and adapter_model.safetensors.

LoRA (peft_lora.py), soft prompts and prefixes go both ways; bottleneck adapters have no layout
there. Names and shapes of modules follow from the architecture that the model is exported as.
"""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax import config as configs
from llm_jax import models, sharding
from llm_jax.config import ModelConfig, PeftConfig
from llm_jax.interop import peft_lora, safetensors, weights
from llm_jax.interop.huggingface import load_json, new_folder
from llm_jax.interop.names import Part, parts
from llm_jax.interop.safetensors import Tensor
from llm_jax.interop.translate import write_config
from llm_jax.nn.params import flatten, unflatten
from llm_jax.types import Array, PyTree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PROMPT = "prompt_embeddings"
# Settings that change what a LoRA computes, and that ours does not have.
REFUSED = (
    "use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices",
    "use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config", "megatron_config", "ensure_weight_tying",
)  # fmt: skip
# Starts that leave the base as it is; the others (PiSSA, OLoRA, ...) train beside a changed one.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def is_folder(path: str | Path) -> bool:
    """Whether there is an `adapter_config.json`."""
    return (Path(path) / CONFIG).is_file()


def base_of(folder: str | Path) -> Path:
    """The base that an adapter's config names.

    Raises:
      FileNotFoundError: it is not on this machine.
    """
    name = load_json(Path(folder) / CONFIG).get("base_model_name_or_path") or ""
    if not name or not Path(name).expanduser().exists():
        raise FileNotFoundError(
            f"{folder} is an adapter of {name or 'a base without a name'}, which is not there; say "
            "where it is with --base (base=)"
        )
    return Path(name).expanduser()


def save(
    folder: str | Path, trained: PyTree, peft: PeftConfig, model: ModelConfig, *, base: str = ""
) -> None:
    """Writes what a run with `peft` trained, in float32, into a new folder.

    Args:
      trained: the trained arrays alone, as checkpoints hold them.
      model: the base's config; an architecture of transformers has to compute it.
      base: name or path of the base as a Hugging Face model, for people; it may be empty.

    Raises:
      FileExistsError: the folder is there and not empty.
      ValueError: something trained that peft's layout has no place for; the message names it.
    """
    kind, wanted, _ = _architecture(model)
    flat = {path: np.asarray(jax.device_get(x)) for path, x in flatten(trained).items()}
    match peft.method:
        case "lora":
            values, tensors = _lora_out(flat, peft, model, kind, wanted)
        case "prompt" | "prefix":
            values, tensors = _prefix_out(flat, peft, model)
        case _:
            raise ValueError(
                f"peft.method={peft.method} has no layout in Hugging Face's peft; lora, prompt and "
                "prefix have"
            )
    values |= {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True}
    with new_folder(folder) as new:
        made = [Tensor(name, x.shape, lambda x=x: x) for name, x in sorted(tensors.items())]
        safetensors.write(new, made, dtype=np.float32, shard_bytes=1 << 62)
        (new / safetensors.SINGLE).rename(new / WEIGHTS)
        (new / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def load(
    folder: str | Path, model: ModelConfig, mesh: jax.sharding.Mesh
) -> tuple[PeftConfig, PyTree]:
    """(config, trained arrays) of an adapter for a base of the given config, for `peft.*.attach`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: an adapter of another kind or with a setting that ours do not have, or a tensor
        that is missing, unknown or of another shape.
    """
    folder = Path(folder)
    values = load_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        hint = ""
        if (folder / "adapter_model.bin").is_file():
            hint = "; its adapter_model.bin is a pickle, save it as safetensors"
        raise FileNotFoundError(f"{folder / WEIGHTS}: no such file{hint}")
    kind, wanted, specs = _architecture(model)
    with contextlib.closing(safetensors.Source(folder / WEIGHTS)) as source:
        match values.get("peft_type"):
            case "LORA":
                return _lora_in(values, source, model, kind, wanted, specs, mesh)
            case "PROMPT_TUNING" | "PREFIX_TUNING":
                return _prefix_in(values, source, model, mesh)
            case other:
                raise ValueError(
                    f"{folder / CONFIG}: peft_type={other!r} is not supported; LORA, PROMPT_TUNING "
                    "and PREFIX_TUNING are"
                )


def _architecture(model: ModelConfig) -> tuple[str, list[Part], PyTree]:
    """The model_type that the base is exported as, its tensors, and our parameters."""
    plain = configs.override(configs.thaw(model), {"logit_scale": 1.0})  # a final norm takes it
    kind = write_config(plain)["model_type"]
    specs = models.family(model.family).specs(model)
    return kind, parts(kind, specs, model), specs


# LoRA -----------------------------------------------------------------------------------------


def _lora_out(
    flat: dict[str, np.ndarray], peft: PeftConfig, model: ModelConfig, kind: str, wanted: list[Part]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    pairs = {path: x for path, x in flat.items() if path.endswith(("/a", "/b"))}
    whole = {path: x for path, x in flat.items() if path not in pairs}
    tensors, fused = peft_lora.written(pairs, wanted, model)
    every = [p.name.removesuffix(".weight") for p in wanted if p.name.endswith(".weight")]
    targeted = [name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A" in name]
    alpha = peft.alpha * (math.sqrt(peft_lora.THIRDS) if peft.rank_stabilized else peft_lora.THIRDS)
    blocks = peft_lora.suffixes(fused, every)
    values = {
        "peft_type": "LORA",
        "r": peft.rank,
        "lora_alpha": _number(peft.alpha),
        "lora_dropout": peft.dropout,
        "use_rslora": peft.rank_stabilized,
        "bias": "none",
        "fan_in_fan_out": kind == "gpt2",
        "target_modules": peft_lora.suffixes(targeted, every),
        "rank_pattern": dict.fromkeys(blocks, peft_lora.THIRDS * peft.rank),
        "alpha_pattern": {name: _number(alpha) for name in blocks},
        "modules_to_save": None,
    }
    if whole:
        saved = _whole_modules(whole, wanted, model)
        values["modules_to_save"] = sorted({_kind(part) for part in saved})
        for tensor in weights.tensors(
            unflatten({p: jax.numpy.asarray(x) for p, x in whole.items()}), saved, model
        ):
            tensors[tensor.name] = np.asarray(tensor.content(), np.float32)
    return values, {f"{PREFIX}{name}": np.ascontiguousarray(x) for name, x in tensors.items()}


def _whole_modules(paths: Mapping[str, Any], wanted: list[Part], model: ModelConfig) -> list[Part]:
    """The parts of parameters that are trained whole.

    Raises:
      ValueError: an unknown one, or one that peft would not give back as it is.
    """
    known = {part.path for part in wanted}
    for path in paths:
        if path not in known:
            raise ValueError(f"the trained parameter {path!r} is none of the model's")
        if path == "embed/tokens" and model.tied:
            raise ValueError(
                "peft.also trains 'embed/tokens', which is the output head too (model.tied); peft "
                "would change one of the two alone: merge the adapter and export the model"
            )
        if path.startswith("final_norm/") and (model.logit_scale or 1.0) != 1.0:
            raise ValueError(
                f"peft.also trains {path!r}, which an export multiplies by model.logit_scale="
                f"{model.logit_scale}: merge the adapter and export the model"
            )
    saved = {_kind(part) for part in wanted if part.path in paths}
    for part in wanted:
        if _kind(part) in saved and part.path not in paths:
            raise ValueError(
                f"peft.also trains a part of {_kind(part)!r}, which peft saves whole, of all layers; "
                f"add '^{part.path}$' to it"
            )
    return [part for part in wanted if part.path in paths]


def _kind(part: Part) -> str:
    """What selects a tensor's module and those of the other layers: a name behind the layer's."""
    return re.sub(r"^.*\.\d+\.", "", part.name.rpartition(".")[0])


def _number(x: float) -> int | float:
    return int(x) if float(x).is_integer() else x


def _lora_in(
    values: Mapping[str, Any],
    source: safetensors.Source,
    model: ModelConfig,
    kind: str,
    wanted: list[Part],
    specs: PyTree,
    mesh: jax.sharding.Mesh,
) -> tuple[PeftConfig, PyTree]:
    where = source.where
    for key in REFUSED:
        if values.get(key):
            raise ValueError(f"{where}: {key}={values[key]!r} of {CONFIG} is not supported")
    if values.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias={values['bias']!r} of {CONFIG} is not supported")
    if values.get("init_lora_weights", True) not in STARTS:
        raise ValueError(
            f"{where}: init_lora_weights={values['init_lora_weights']!r} changes the base as well; "
            "convert the adapter to a plain LoRA with peft first"
        )
    names = {_inner(name, where): name for name in source.shapes}
    known = peft_lora.modules(wanted)
    expected = {
        f"{module}.lora_{x}.weight": module
        for module in known
        for x in "AB"
        if peft_lora.targets(values, module)
    }
    if absent := [name for name in expected if name not in names]:
        raise ValueError(
            f"{where} has no tensor {PREFIX + absent[0]!r}, which target_modules of {CONFIG} asks for"
        )
    if not expected:
        raise ValueError(
            f"{where}: target_modules={values.get('target_modules')!r} of {CONFIG} finds no matrix "
            f"of this model, which is a {kind}"
        )
    rest = {own: name for own, name in names.items() if own not in expected}
    if loras := [name for name in rest if ".lora_" in name]:
        raise ValueError(
            f"{where} has a tensor {rest[loras[0]]!r}, which belongs to no matrix of a layer that "
            f"target_modules of {CONFIG} finds in this model, which is a {kind}"
        )
    r, alpha = int(values.get("r", 8)), float(values.get("lora_alpha", 8))
    stabilized = bool(values.get("use_rslora", False))
    found: dict[str, dict[int, peft_lora.Update]] = {}
    for module in dict.fromkeys(expected.values()):
        pieces = known[module]
        A, B = (source.read(names[f"{module}.lora_{x}.weight"]) for x in "AB")
        own = int(peft_lora.of_module(values.get("rank_pattern"), module, r))
        d_out, d_in = pieces[0].shape if pieces[0].transposed else pieces[0].shape[::-1]
        for x, array, shape in (("A", A, (own, d_in)), ("B", B, (d_out, own))):
            if array.shape != shape:
                raise ValueError(
                    f"{where}: {names[f'{module}.lora_{x}.weight']!r} has shape {array.shape}, but "
                    f"the model and {CONFIG} make it {shape}"
                )
        factor = peft_lora.scale(
            own, float(peft_lora.of_module(values.get("alpha_pattern"), module, alpha)), stabilized
        )
        for path, update in peft_lora.updates(A, B, factor, pieces, r).items():
            layer = next(part.index[0] for part in pieces if part.path == path)
            found.setdefault(path, {})[layer] = update
    rank = max(u.a.shape[1] for by_layer in found.values() for u in by_layer.values())
    common = peft_lora.scale(r, alpha, stabilized)
    if rank != r:
        alpha = common * (math.sqrt(rank) if stabilized else rank)
    whole = _whole_in(rest, source, wanted, model, specs, mesh)
    peft = PeftConfig(
        method="lora",
        targets=_exactly(found),
        rank=rank,
        alpha=alpha,
        rank_stabilized=stabilized,
        dropout=float(values.get("lora_dropout", 0.0)),
        also=tuple(_exactly([path]) for path in whole),
    )
    flat = flatten(specs)
    arrays = peft_lora.stacked(found, {p: flat[p].shape for p in found}, model, peft)
    for path in found:
        *lead, rows, columns = flat[path].axes
        for x, axes in (("a", (*lead, rows, None)), ("b", (*lead, None, columns))):
            arrays[f"{path}/{x}"] = jax.device_put(
                arrays[f"{path}/{x}"], sharding.named(axes, mesh)
            )
    return peft, unflatten(arrays | whole)


def _inner(name: str, where: str) -> str:
    if not name.startswith(PREFIX):
        raise ValueError(f"{where} has a tensor {name!r}, whose name does not begin with {PREFIX}")
    # A text model within one that also sees.
    return re.sub(r"^model\.language_model\.", "model.", name.removeprefix(PREFIX))


def _exactly(paths: Any) -> str:
    return f"^({'|'.join(re.escape(path) for path in paths)})$"


def _whole_in(
    names: Mapping[str, str],
    source: safetensors.Source,
    wanted: list[Part],
    model: ModelConfig,
    specs: PyTree,
    mesh: jax.sharding.Mesh,
) -> dict[str, Array]:
    """{path: parameter} of modules_to_save."""
    if not names:
        return {}
    by_name = {part.name: part for part in wanted}
    for own, name in names.items():
        if own not in by_name:
            raise ValueError(f"{source.where} has a tensor {name!r}, which the model does not have")
    paths = {part.path for part in wanted if part.name in names}
    if model.rope_interleaved and (turned := [p for p in paths if re.search(r"attn/[qk]", p)]):
        raise ValueError(
            f"{source.where}: modules_to_save has {turned[0]!r}, which model.rope_interleaved keeps "
            "in another order"
        )
    needed = [part for part in wanted if part.path in paths]
    if absent := [part.name for part in needed if part.name not in names]:
        raise ValueError(
            f"{source.where} has modules_to_save of some layers alone: {absent[0]!r} is missing"
        )
    _whole_modules(dict.fromkeys(paths), wanted, model)
    flat = flatten(specs)
    loaded = weights.load(
        _Renamed(source, names), needed, unflatten({p: flat[p] for p in paths}), mesh
    )
    return flatten(loaded)


class _Renamed:
    """Some tensors of a source under other names."""

    def __init__(self, source: safetensors.Source, names: Mapping[str, str]):
        self.where, self._source, self._names = source.where, source, names
        self.shapes = {own: source.shapes[name] for own, name in names.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._source.read(self._names[name], start, stop)


# Prompts and prefixes -------------------------------------------------------------------------


def _prefix_out(
    flat: dict[str, np.ndarray], peft: PeftConfig, model: ModelConfig
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if other := [path for path in flat if not path.startswith("prefix/")]:
        raise ValueError(
            f"peft.also trains {other[0]!r} beside a {peft.method}, which peft's layout has no place "
            "for"
        )
    heads, values = model.n_heads, {"peft_type": "PROMPT_TUNING", "token_dim": model.d_model}
    if peft.method == "prompt":  # theirs come after the factor on embeddings
        x = flat["prefix/embeddings"] * np.float32(model.embed_scale)
        values["prompt_tuning_init"] = "RANDOM"
    else:
        k, v = (np.asarray(flat[f"prefix/{n}"], np.float32) for n in "kv")
        if model.rope_interleaved and model.positions == "rope":
            k = weights.halves(k, model)
        x = np.stack([k, v], axis=1).reshape(-1, *k.shape[1:]).swapaxes(0, 1)  # [n, 2 M, K Dh]
        x, heads = x.reshape(x.shape[0], -1), model.kv_heads
        values = {"peft_type": "PREFIX_TUNING", "token_dim": heads * model.head_dim}
        values |= {"prefix_projection": False, "encoder_hidden_size": values["token_dim"]}
    values |= {
        "num_virtual_tokens": x.shape[0],
        "num_attention_heads": heads,
        "num_layers": model.n_layers,
        "num_transformer_submodules": 1,
    }
    return values, {PROMPT: np.ascontiguousarray(x, np.float32)}


def _prefix_in(
    values: Mapping[str, Any],
    source: safetensors.Source,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
) -> tuple[PeftConfig, PyTree]:
    n, prompt = int(values["num_virtual_tokens"]), values["peft_type"] == "PROMPT_TUNING"
    width = model.kv_heads * model.head_dim
    shape = (n, model.d_model if prompt else 2 * model.n_layers * width)
    if set(source.shapes) != {PROMPT} or tuple(source.shapes[PROMPT]) != shape:
        raise ValueError(
            f"{source.where}: an adapter of num_virtual_tokens={n} for this model is one tensor "
            f"{PROMPT!r} of shape {shape}, but there are "
            + ", ".join(f"{name} {tuple(s)}" for name, s in sorted(source.shapes.items())[:3])
        )
    x = source.read(PROMPT).astype(np.float32)
    if prompt:
        arrays = {"embeddings": (x / np.float32(model.embed_scale), (None, "embed"))}
    else:
        x_Mx2xnxKDh = x.reshape(n, model.n_layers, 2, width).transpose(1, 2, 0, 3)
        k, v = x_Mx2xnxKDh[:, 0], x_Mx2xnxKDh[:, 1]
        if model.rope_interleaved and model.positions == "rope":
            k = peft_lora.pairs_of(k, model)
        axes = ("layer", None, "kv_heads")
        arrays = {"k": (k, axes), "v": (v, axes)}
    peft = PeftConfig(method="prompt" if prompt else "prefix", tokens=n)
    trained = {
        name: jax.device_put(np.ascontiguousarray(a), sharding.named(axes, mesh))
        for name, (a, axes) in arrays.items()
    }
    return peft, {"prefix": trained}
