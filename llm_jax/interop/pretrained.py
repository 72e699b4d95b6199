"""Models of other formats, whole: architecture, parameters, tokenizer and how texts start and end."""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import jax

from llm_jax import tokenizers
from llm_jax.config import ModelConfig
from llm_jax.interop import gguf, huggingface, llama2c, safetensors
from llm_jax.interop.translate import read_config
from llm_jax.interop.weights import Hold
from llm_jax.tokenizers import Tokenizer
from llm_jax.types import PyTree

FORMATS = ("hf", "gguf", "llama2c")


class Pretrained(NamedTuple):
    """A model that was trained elsewhere."""

    name: str
    model: ModelConfig  # not resolved yet: dtype is "auto"
    params: PyTree  # None where they were not asked for
    tokenizer: Tokenizer
    adds_bos: bool  # a text starts with the begin token
    end_tokens: tuple[int, ...]  # what ends a generated text


def kind(path: str | Path) -> str | None:
    """Which of FORMATS a path is, by what it looks like; None: none of them."""
    path = Path(path).expanduser()
    if path.is_file():
        return {".gguf": "gguf", ".bin": "llama2c"}.get(path.suffix.lower())
    return "hf" if huggingface.is_folder(path) else None


def load(
    path: str | Path,
    mesh: jax.sharding.Mesh | None,
    *,
    source: str | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    hold: Hold | None = None,
) -> Pretrained:
    """A model in one of FORMATS (`source`; None: by its looks), its parameters cut for `mesh`;
    without a mesh all but the parameters. `hold`: as in `weights.load`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: what each format's reader raises, and a tokenizer with more tokens than the model.
    """
    path = Path(path).expanduser()
    own: Any = None
    match source or kind(path):
        case "hf":
            values = huggingface.load_json(path / huggingface.CONFIG)
            generation = path / huggingface.GENERATION
            generation = huggingface.load_json(generation) if generation.is_file() else {}
            own = None if tokenizer else tokenizers.load(path)
            tensors, where = safetensors.Source(path), str(path / huggingface.CONFIG)
        case "gguf":
            values, tensors, own, generation = gguf.read(path)
            where = str(path)
        case "llama2c":
            values, tensors, own = llama2c.read(path, tokenizer)
            generation, where, tokenizer = {}, str(path), None
        case _:
            raise ValueError(
                f"{path} is no Hugging Face folder (config.json), .gguf file or llama2.c .bin"
            )
    with contextlib.closing(tensors):
        used = tokenizers.load(tokenizer) if tokenizer else own
        _check_size(used, values, where)
        cfg, params = read_config(values, where), None
        if mesh is not None:
            cfg, params = huggingface.load_tensors(
                values, tensors, mesh, dtype=dtype, where=where, hold=hold
            )
    return Pretrained(
        name=path.stem,
        model=cfg,
        params=params,
        tokenizer=used,
        adds_bos=_adds_bos(used),
        end_tokens=_end_tokens({**values, **generation}, cfg.vocab_size),
    )


def _check_size(tokenizer: Tokenizer, values: dict[str, Any], where: str) -> None:
    """Before any tensor is read. Models may have more rows than tokens; fewer only where the rest are
    special tokens, which no text becomes (Gemma 3 1B keeps that of images)."""
    text = values.get("text_config") or values
    rows = text.get("vocab_size")
    if not isinstance(rows, int):
        return  # reading the config says so
    special = set(tokenizer.special_tokens.values())
    if any(i not in special for i in range(rows, tokenizer.vocab_size)):
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but {where} says vocab_size={rows}; "
            "they do not belong together"
        )


def _adds_bos(tokenizer: Tokenizer) -> bool:
    return tokenizer.bos_id is not None and bool(tokenizer.options.get("add_bos_token"))


def _end_tokens(values: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    ends = values.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return tuple(i for i in ends if isinstance(i, int) and 0 <= i < vocab_size)
