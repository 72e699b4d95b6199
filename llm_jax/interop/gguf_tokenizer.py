"""The tokenizer that a GGUF file describes."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from llm_jax.tokenizers import Tokenizer, export, sentencepiece_model
from llm_jax.tokenizers.base import ROLES
from llm_jax.tokenizers.subword import SPACE, HuggingFace, SentencePiece

_ROLE_KEYS = {"pad": "padding", "unk": "unknown", "bos": "bos", "eos": "eos"}
_CONTROL, _USER_DEFINED = sentencepiece_model.CONTROL, sentencepiece_model.USER_DEFINED

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _sequence(first: Mapping[str, Any], use_regex: bool) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [first, _byte_level(use_regex)]}


def _split(pattern: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _sequence(step, use_regex=False)


_GPT2 = _byte_level(use_regex=True)
_DIGITS = _sequence({"type": "Digits", "individual_digits": True}, use_regex=True)
# `tokenizer.ggml.pre` -> how the text is cut before the merges.
PRE_TOKENIZERS = {
    **dict.fromkeys(("default", "gpt-2", "olmo", "mpt", "jais", "phi-2"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _split(_LLAMA3)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _split(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _split(_QWEN2)),
    "tekken": _split(_TEKKEN),
}
# A word that is a token stays whole, whatever the merges say.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")


def build(get: Callable[..., Any]) -> Tokenizer:
    """The tokenizer, with its chat template.

    Args:
      get: (key, default) -> the value in the file.

    Raises ValueError for a sort of tokenizer, or a way to cut text, that is not known here.
    """
    tokens = get("tokenizer.ggml.tokens", None)
    if not tokens:
        raise ValueError("the file holds no tokenizer")
    types = get("tokenizer.ggml.token_type", None) or [sentencepiece_model.NORMAL] * len(tokens)
    roles = {role: get(f"tokenizer.ggml.{_ROLE_KEYS[role]}_token_id", None) for role in ROLES}
    wrong = {role: i for role, i in roles.items() if i is not None and i >= len(tokens)}
    if wrong:
        raise ValueError(f"the tokenizer has {len(tokens)} tokens, but {wrong} for special ones")
    options: dict[str, Any] = {"imported": True}
    kind = get("tokenizer.ggml.model", None)
    for role in ("bos", "eos"):
        value = get(f"tokenizer.ggml.add_{role}_token", None)
        if value is None and kind == "llama" and role == "bos":
            value = True  # what llama.cpp does without the key
        if value is not None and roles[role] is not None:
            options[f"add_{role}_token"] = bool(value)
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(get, tokens, types, roles, options)
    elif kind == "llama":
        tokenizer = _sentencepiece(get, tokens, types, roles, options)
    else:
        raise ValueError(f"a tokenizer of type {kind!r}; supported are 'gpt2' and 'llama'")
    tokenizer.chat_template = get("tokenizer.chat_template", None)
    if names := get("tokenizer.chat_templates", None):
        named = {name: get(f"tokenizer.chat_template.{name}") for name in names}
        default = tokenizer.chat_template
        tokenizer.chat_template = {**({"default": default} if default else {}), **named}
    return tokenizer


def _byte_level_bpe(get, tokens, types, roles, options) -> HuggingFace:
    pre = get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre is {pre!r}, and how it cuts text is not known here; known are "
            f"{', '.join(sorted(PRE_TOKENIZERS))}"
        )
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": export.post_processor(
            *(
                (tokens[roles[role]], roles[role]) if options.get(f"add_{role}_token") else None
                for role in ("bos", "eos")
            )
        ),
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _WHOLE_WORDS,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in get("tokenizer.ggml.merges")],
        },
    }
    if len(content["model"]["vocab"]) != len(tokens):
        raise ValueError("the tokenizer has the same token twice")
    return HuggingFace(json.dumps(content, ensure_ascii=False).encode(), roles, options)


def _sentencepiece(get, tokens, types, roles, options) -> SentencePiece:
    scores = get("tokenizer.ggml.scores", None) or [0.0] * len(tokens)
    entries = [
        # Runs of spaces that were made user-defined tokens are spelled with spaces here.
        sentencepiece_model.Piece(token.replace(" ", SPACE), float(score), int(kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    ]
    if sum(entry.type == sentencepiece_model.UNKNOWN for entry in entries) != 1:
        raise ValueError("a sentencepiece tokenizer must have exactly one unknown token")
    unknown = [entry.type for entry in entries].index(sentencepiece_model.UNKNOWN)
    model = sentencepiece_model.write(
        entries,
        model_type=sentencepiece_model.BPE,
        roles={**roles, "unk": unknown},
        dummy_prefix=bool(get("tokenizer.ggml.add_space_prefix", True)),
        removes_spaces=bool(get("tokenizer.ggml.remove_extra_whitespaces", False)),
    )
    try:
        return SentencePiece(model, options, {**roles, "unk": unknown})
    except RuntimeError as error:
        raise ValueError(f"the tokenizer's pieces make no sentencepiece model: {error}") from None
