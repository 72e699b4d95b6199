"""Our tokenizers as files that Hugging Face's libraries read, with the same ids.

Every kind becomes a `tokenizer.json`, where what is special about it is said in that library's
terms. What cannot be said exactly is an error and not an approximation.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_jax.tokenizers import sentencepiece_model
from llm_jax.tokenizers.base import CONFIG_FILE, ROLES, Tokenizer
from llm_jax.tokenizers.bpe_reference import byte_characters
from llm_jax.tokenizers.sentencepiece_model import Piece
from llm_jax.tokenizers.simple import VOCABULARY_FILE
from llm_jax.tokenizers.subword import JSON_FILE, MODEL_FILE, SPACE

OWN_KEY = "llm_jax"  # our own settings within Hugging Face's tokenizer_config.json
_ADDS = ("add_bos_token", "add_eos_token")  # options of imported tokenizers
_SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_NEVER = -1e5  # log-probability of an entry that no text may become
# Python's \w, \s and \d as sets of code points; the other library's own differ in some hundred.
_WORD = r"\p{L}\p{N}_"
_WHITE = (
    r"\x{9}-\x{D}\x{1C}-\x{20}\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}"
    r"\x{205F}\x{3000}"
)
_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def huggingface_files(tokenizer: Tokenizer, model_max_length: int) -> dict[str, bytes]:
    """File name -> content of a folder that `AutoTokenizer.from_pretrained` reads.

    There `tokenizer(text, add_special_tokens=False)` gives what `encode(text, special=True)` gives
    here. One exception: where a unigram model has several ways to cut a text that are equally
    probable (a long run of spaces into pieces of 1, 10 and 1), rounding in sentencepiece decides the
    order of the pieces, and another there. Our own files are among them, so that `tokenizers.load`
    gives the same tokenizer back.

    Args:
      model_max_length: the longest input of the model, in tokens.

    Raises ValueError for a tokenizer that cannot be expressed exactly.
    """
    files = tokenizer.files()
    own = json.loads(files.pop(CONFIG_FILE))
    if JSON_FILE not in files:
        library = _tokenizer_json(tokenizer, files)
        ends = [
            (tokenizer.token_name(role), getattr(tokenizer, f"{role}_id"))
            if tokenizer.options.get(f"add_{role}_token")
            else None
            for role in ("bos", "eos")
        ]
        library["post_processor"] = post_processor(*ends)
        files[JSON_FILE] = (json.dumps(library, ensure_ascii=False, indent=1) + "\n").encode()
    names = {f"{role}_token": tokenizer.token_name(role) for role in ROLES}
    names = {key: name for key, name in names.items() if name is not None}
    adds = {key: own["options"][key] for key in _ADDS if key in own["options"]}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        **names,
        **adds,
        OWN_KEY: {"config": own, "tokenizer_json": _digest(files[JSON_FILE])},
    }
    return {**files, CONFIG_FILE: _to_json(config), _SPECIAL_TOKENS_FILE: _to_json(names)}


def post_processor(
    begin: tuple[str, int] | None, end: tuple[str, int] | None
) -> dict[str, Any] | None:
    """What makes Hugging Face's library put special tokens (name, id) around a text by default.

    `encode` here never does; callers of theirs say `add_special_tokens=False` for the same ids.
    """
    around = [token for token in (begin, end) if token]
    if not around:
        return None

    def pieces(sequence: str, kind: int) -> list[dict[str, Any]]:
        names = [begin and begin[0], None, end and end[0]]
        return [
            {"SpecialToken": {"id": name, "type_id": kind}}
            if i != 1
            else {"Sequence": {"id": sequence, "type_id": kind}}
            for i, name in enumerate(names)
            if name or i == 1
        ]

    return {
        "type": "TemplateProcessing",
        "single": pieces("A", 0),
        "pair": [*pieces("A", 0), *pieces("B", 1)],
        "special_tokens": {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in around},
    }


def own_config(files: Mapping[str, bytes]) -> dict[str, Any] | None:
    """Our own settings in a folder that `huggingface_files` wrote and nobody changed since."""
    config = json.loads(files[CONFIG_FILE])
    own = config.get(OWN_KEY) if isinstance(config, dict) else None
    if own is None or own["tokenizer_json"] != _digest(files.get(JSON_FILE, b"")):
        return None
    names = {index: name for name, index in own["config"]["special_tokens"].items()}
    for role, index in own["config"]["roles"].items():
        if config.get(f"{role}_token") != names.get(index):
            return None
    return own["config"]


def _tokenizer_json(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> dict[str, Any]:
    if MODEL_FILE in files:
        return _sentencepiece(tokenizer, files[MODEL_FILE])
    special = _added(tokenizer.special_tokens.items())
    if tokenizer.kind == "byte":
        vocabulary = {char: byte for byte, char in byte_characters().items()}
        return _library(
            _bpe(vocabulary, []), special, pre_tokenizer=_BYTE_LEVEL, decoder=_BYTE_LEVEL
        )
    unknown = None if tokenizer.unk_id is None else tokenizer.token_name("unk")
    entries = json.loads(files[VOCABULARY_FILE])
    if tokenizer.kind == "char":
        vocabulary = {char: index for index, char in enumerate(entries)}
        vocabulary |= tokenizer.special_tokens
        return _library(_bpe(vocabulary, [], unk_token=unknown), special, decoder={"type": "Fuse"})
    if tokenizer.kind == "word":
        vocabulary = dict(tokenizer.special_tokens)
        vocabulary |= {word: len(vocabulary) + index for index, word in enumerate(entries)}
        digit, word = (
            (r" ?\p{Nd}|", r"(?:(?!\p{Nd})[%s])") if _splits_digits(tokenizer) else ("", "[%s]")
        )
        pattern = rf" +(?= )|{digit} ?{word % _WORD}+| ?[^{_WORD}{_WHITE}]|[{_WHITE}]"
        cut = {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        # The model wants some unknown token; without ours, it reports the unknown word.
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": unknown or "<unk>"}
        return _library(model, special, pre_tokenizer=cut, decoder={"type": "Fuse"})
    raise ValueError(f"a tokenizer of kind {tokenizer.kind!r} has no form at Hugging Face")


def _splits_digits(tokenizer: Tokenizer) -> bool:
    return bool(tokenizer.options.get("split_digits"))


def _sentencepiece(tokenizer: Tokenizer, model: bytes) -> dict[str, Any]:
    spec = sentencepiece_model.read(model)
    if spec["character_map"] or not spec["escapes_spaces"]:
        raise ValueError(
            "this sentencepiece model normalises its text, which Hugging Face's library does not do "
            "in quite the same way"
        )
    entries = sentencepiece_model.pieces(model)
    if tokenizer.lossless:
        # With spaces spelled as spaces, U+2581 is a character like others: written in bytes.
        entries = [entry._replace(text=entry.text.replace(SPACE, " ")) for entry in entries]
    if len({entry.text for entry in entries}) != len(entries):
        raise ValueError("this sentencepiece model has pieces that differ in U+2581 and space only")
    special = {
        e.text: i for i, e in enumerate(entries) if i in set(tokenizer.special_tokens.values())
    }
    defined = {
        e.text: i for i, e in enumerate(entries) if e.type == sentencepiece_model.USER_DEFINED
    }
    if defined and not tokenizer.lossless:
        raise ValueError(
            "this sentencepiece model has user-defined pieces and changes spaces; Hugging Face's "
            "library cannot do both as sentencepiece does"
        )
    whole = spec["dummy_prefix"]
    return _library(
        _unigram(entries) if spec["type"] == sentencepiece_model.UNIGRAM else _merging(entries),
        [*_added(special.items(), normalized=whole), *_added(defined.items(), special=False)],
        normalizer=_spaces(spec, special) if not tokenizer.lossless else None,
        decoder={"type": "Sequence", "decoders": _decoders(tokenizer)},
    )


def _spaces(spec: Mapping[str, Any], special: Iterable[str]) -> dict[str, Any]:
    """What sentencepiece does to spaces, step by step."""
    steps: list[dict[str, Any]] = []
    if spec["removes_spaces"]:
        if spec["dummy_prefix"]:
            raise ValueError(
                "this sentencepiece model adds a space and removes others; Hugging Face's library "
                "cannot do both as sentencepiece does"
            )
        ends = rf"\A +|[ {SPACE}]+\z"
        steps += [_replace({"Regex": ends}, ""), _replace({"Regex": " {2,}"}, " ")]
    if spec["dummy_prefix"]:
        # Added once, to the whole text, and not before a special token. Therefore those are looked
        # up in the changed text ("normalized"), unlike anywhere else.
        names = "|".join(re.escape(name) for name in special)
        steps.append({"type": "Prepend", "prepend": SPACE})
        steps.append(_replace({"Regex": rf"\A{SPACE}(?={names})"}, ""))
    steps.append(_replace({"String": " "}, SPACE))
    return {"type": "Sequence", "normalizers": steps}


def _decoders(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    spaces = [] if tokenizer.lossless else [_replace({"String": SPACE}, " ")]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    strips = [strip] if tokenizer.strips_leading_space else []
    return [*spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strips]


def _merging(entries: Sequence[Piece]) -> dict[str, Any]:
    """Sentencepiece's BPE: neighbours merge into the piece with the best score.

    There a merge is known by its result, here by its parts, so a piece has all pairs that form it.
    Of equal scores (Llama 2's runs of spaces) sentencepiece takes the leftmost, so that one piece
    grows before the next begins: here the pairs with the longest left part come first.
    """
    scores = {e.text: e.score for e in entries if e.type == sentencepiece_model.NORMAL}
    merges = [
        (-score, -cut, -len(text), text)
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    pairs = [[text[:-left], text[-left:]] for _, left, _, text in sorted(merges)]
    return _bpe(
        {entry.text: index for index, entry in enumerate(entries)},
        pairs,
        unk_token=next(e.text for e in entries if e.type == sentencepiece_model.UNKNOWN),
        fuse_unk=True,
        byte_fallback=any(entry.type == sentencepiece_model.BYTE for entry in entries),
    )


def _unigram(entries: Sequence[Piece]) -> dict[str, Any]:
    found = (sentencepiece_model.NORMAL, sentencepiece_model.USER_DEFINED)
    return {
        "type": "Unigram",
        "unk_id": [entry.type for entry in entries].index(sentencepiece_model.UNKNOWN),
        "vocab": [[e.text, e.score if e.type in found else _NEVER] for e in entries],
        "byte_fallback": any(entry.type == sentencepiece_model.BYTE for entry in entries),
    }


def _bpe(
    vocabulary: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    *,
    unk_token: str | None = None,
    fuse_unk: bool = False,
    byte_fallback: bool = False,
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fuse_unk,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": dict(vocabulary),
        "merges": merges,
    }


def _added(
    tokens: Iterable[tuple[str, int]], *, special: bool = True, normalized: bool = False
) -> list[dict[str, Any]]:
    return [
        {
            "id": index,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": normalized,
            "special": special,
        }
        for name, index in tokens
    ]


def _library(
    model: Mapping[str, Any],
    added: list[dict[str, Any]],
    *,
    normalizer: Mapping[str, Any] | None = None,
    pre_tokenizer: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _replace(pattern: Mapping[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
