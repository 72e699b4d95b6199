"""Hugging Face folders: `config.json`, safetensors and a tokenizer, in and out."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from llm_jax import config as configs
from llm_jax import models
from llm_jax.config import ModelConfig
from llm_jax.interop import safetensors, weights
from llm_jax.interop.names import parts
from llm_jax.interop.translate import read_config, write_config
from llm_jax.types import PyTree

CONFIG, GENERATION = "config.json", "generation_config.json"
# Where a reward is read, in a config.json of ours: at the token that ends the answer. transformers,
# which does not know the key, reads the last token of what it is given.
READ_AT, ANSWER = "reward_read_at", "answer_end"
# The text model's tensors within a model that also sees; the rest of Gemma 3 is not imported.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.")
OTHER_MODALITIES = r"^(model\.)?(vision_tower|multi_modal_projector)\."


def is_folder(path: str | Path) -> bool:
    """Whether there is a `config.json` that says which architecture it is."""
    try:
        return "model_type" in json.loads((Path(path) / CONFIG).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as e:
        raise ValueError(f"{path} is not JSON ({e})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values


def load(
    folder: str | Path, mesh: jax.sharding.Mesh, *, dtype: str = "float32"
) -> tuple[ModelConfig, PyTree]:
    """The model of a folder: its ModelConfig and its parameters, cut for `mesh`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: an unsupported architecture or setting, a damaged file, a tensor that is missing,
        unknown, twice there or of another shape.
    """
    folder = Path(folder)
    values = load_json(folder / CONFIG)
    with contextlib.closing(safetensors.Source(folder)) as source:
        return load_tensors(values, source, mesh, dtype=dtype, where=str(folder / CONFIG))


def load_tensors(
    values: dict[str, Any],
    source: weights.Source,
    mesh: jax.sharding.Mesh,
    *,
    dtype: str = "float32",
    where: str = CONFIG,
    hold: weights.Hold | None = None,
) -> tuple[ModelConfig, PyTree]:
    """The same from a config.json's values and any source of tensors under Hugging Face's names.

    What the model family computes in float32 (norms, routers) is kept in it whatever `dtype` says.
    `hold`: as in `weights.load`.
    """
    cfg = read_config(values, where)
    kind = "gemma3_text" if values["model_type"] == "gemma3" else values["model_type"]
    specs = models.family(cfg.family).specs(cfg)
    wanted = parts(kind, specs, cfg)
    ignored = OTHER_MODALITIES if values["model_type"] == "gemma3" else ""
    if values.get("num_nextn_predict_layers"):  # layers past the last, for speculative decoding
        ignored = rf"^model\.layers\.{cfg.n_layers}\."
    tied = cfg.tied and "lm_head.weight" in source.shapes
    if tied:  # some files write the shared matrix under both names
        ignored = "|".join(filter(None, [ignored, r"^lm_head\.weight$"]))
    wanted = _as_named(wanted, source)
    if tied:
        _check_tied(source, next(p.name for p in wanted if p.path == "embed/tokens"))
    exact = models.family(cfg.family).KEEPS
    params = weights.load(
        source, wanted, specs, mesh, dtype=dtype, exact=exact, ignored=ignored, hold=hold
    )
    return cfg, params


def _as_named(wanted: list, source: weights.Source) -> list:
    """The parts under the names that this file has: some are saved without the model's prefix."""
    names = source.shapes
    if any(part.name in names for part in wanted if part.path == "embed/tokens"):
        return wanted
    for ours in ("model.", "transformer."):
        for theirs in (*TEXT_PREFIXES, ""):
            renamed = [
                part._replace(name=re.sub(rf"^{re.escape(ours)}", theirs, part.name))
                for part in wanted
            ]
            if any(part.name in names for part in renamed if part.path == "embed/tokens"):
                return renamed
    return wanted


def _check_tied(source: weights.Source, embedding: str) -> None:
    """Raises ValueError if an output head that should be the embedding differs from it."""
    shape = source.shapes.get(embedding)
    if shape != source.shapes["lm_head.weight"]:
        return  # its own check names it
    for start in range(0, shape[0], 1024):
        stop = min(start + 1024, shape[0])
        if (
            source.read(embedding, start, stop) != source.read("lm_head.weight", start, stop)
        ).any():
            raise ValueError(
                f"{source.where}: tie_word_embeddings is true, but lm_head.weight differs from "
                f"{embedding}; set it to false in config.json"
            )


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into that becomes `path` when all is written, and nothing otherwise.

    Raises:
      FileExistsError: `path` is there and not empty.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"--output={path} exists; give another, or remove it")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def save(
    folder: Path,
    cfg: ModelConfig,
    params: PyTree,
    *,
    dtype: str = "float32",
    shard_bytes: int = 5_000_000_000,
    token_ids: dict[str, int | None] | None = None,
) -> dict[str, Any]:
    """Writes config.json, generation_config.json and the weights of a resolved config into an
    existing folder; returns config.json's values. `token_ids`: bos, eos and pad.

    Raises:
      ValueError: no architecture of transformers computes this model.
    """
    cfg, params = _without_logit_scale(cfg, params)
    values = write_config(cfg)
    ids = {f"{role}_token_id": i for role, i in (token_ids or {}).items()}
    values |= {**ids, "torch_dtype": dtype, "use_cache": True}
    if cfg.head == "reward":
        values[READ_AT] = ANSWER
    specs = models.family(cfg.family).specs(cfg)
    wanted = parts(values["model_type"], specs, cfg)
    written = weights.tensors(params, wanted, cfg)
    safetensors.write(folder, written, dtype=_numpy(dtype), shard_bytes=shard_bytes)
    _write_json(folder / CONFIG, values)
    if cfg.head == "lm":
        _write_json(folder / GENERATION, {n: i for n, i in ids.items() if i is not None})
    return values


def _without_logit_scale(cfg: ModelConfig, params: PyTree) -> tuple[ModelConfig, PyTree]:
    """The same logits without muP's factor on them, which few config.json have: the final norm's
    scale takes it."""
    factor = cfg.logit_scale or 1.0
    if factor == 1.0 or "final_norm" not in params:
        return cfg, params
    one = 1.0 if cfg.norm_unit_offset else 0.0  # such norms multiply by 1 + scale
    last = {n: v * factor for n, v in params["final_norm"].items()}
    last["scale"] = (params["final_norm"]["scale"] + one) * factor - one
    cfg = configs.freeze(configs.override(configs.thaw(cfg), {"logit_scale": 1.0}))
    return cfg, {**params, "final_norm": last}


def _numpy(dtype: str) -> Any:
    kinds = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    if dtype not in kinds:
        raise ValueError(f"--dtype={dtype} is not one of {', '.join(kinds)}")
    return safetensors.DTYPES[kinds[dtype]]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
