"""Subword tokenizers: sentencepiece models and Hugging Face `tokenizers`.

The libraries do the work. This file makes them exact (bytes in are bytes out), gives them one face,
and reads off what each id stands for.
"""

import json
import re
from collections.abc import Mapping

import numpy as np

from llm_jax.tokenizers import sentencepiece_model
from llm_jax.tokenizers.base import Tokenizer
from llm_jax.tokenizers.bpe_reference import byte_characters

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
SPACE = "\u2581"  # sentencepiece writes a space as this character
_SENTENCEPIECE_KINDS = {
    sentencepiece_model.UNIGRAM: "sentencepiece_unigram",
    sentencepiece_model.BPE: "sentencepiece_bpe",
}
_HUGGINGFACE_KINDS = {"BPE": "hf_bpe", "WordPiece": "hf_wordpiece", "Unigram": "hf_unigram"}


class SentencePiece(Tokenizer):
    """A sentencepiece BPE or unigram model, ours or anybody's.

    The ids are the library's, with one exception. The library cannot tell U+2581 from a space, so
    for models that otherwise change nothing (identity normalisation, no added or removed space,
    byte fallback: what `train` makes by default) that character is written with
    its byte pieces, which makes the model lossless. Other models are left as they are.
    """

    def __init__(
        self,
        model: bytes,
        options: Mapping[str, object] | None = None,
        roles: Mapping[str, int | None] | None = None,  # instead of the model's own
    ):
        import sentencepiece

        self._model = model
        spec = sentencepiece_model.read(model)
        if spec["type"] not in _SENTENCEPIECE_KINDS:
            raise ValueError("sentencepiece models of type word and char are not supported")
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._dummy_prefix = spec["dummy_prefix"]
        ids = list(range(self._processor.get_piece_size()))
        pieces = self._processor.id_to_piece(ids)
        named = [
            control or unknown
            for control, unknown in zip(
                self._processor.is_control(ids), self._processor.is_unknown(ids), strict=True
            )
        ]
        # Byte pieces are spelled <0x00> to <0xFF>, in this order.
        is_byte = self._processor.is_byte(ids)
        token_bytes = [
            bytes([int(piece[3:5], 16)]) if is_byte[i] else piece.replace(SPACE, " ").encode()
            for i, piece in enumerate(pieces)
        ]
        byte_ids = {token_bytes[i]: i for i in ids if is_byte[i]}
        if roles is None:
            own = {
                "pad": self._processor.pad_id(),
                "unk": self._processor.unk_id(),
                "bos": self._processor.bos_id(),
                "eos": self._processor.eos_id(),
            }
            roles = {name: i if i >= 0 else None for name, i in own.items()}
        super().__init__(
            kind=_SENTENCEPIECE_KINDS[spec["type"]],
            token_bytes=token_bytes,
            special_tokens={pieces[i]: i for i in ids if named[i]},
            roles=roles,
            lossless=len(byte_ids) == 256 and not (spec["changes_text"] or spec["dummy_prefix"]),
            options=options or {},
            strips_leading_space=spec["dummy_prefix"],
        )
        self._space_ids = (
            np.array([byte_ids[bytes([b])] for b in SPACE.encode()], np.int32)
            if self.lossless
            else None
        )
        self._no_prefix_processor = None

    def _encode_plain(self, texts: list[str]) -> list[np.ndarray]:
        if not self.lossless or not any(SPACE in text for text in texts):
            return self._run(self._processor, texts)
        parts = [text.split(SPACE) for text in texts]
        encoded = iter(self._run(self._processor, [part for row in parts for part in row]))
        joined = []
        for row in parts:
            pieces = [next(encoded)]
            for _ in row[1:]:
                pieces += [self._space_ids, next(encoded)]
            joined.append(np.concatenate(pieces))
        return joined

    def _encode_continuation(self, texts: list[str]) -> list[np.ndarray]:
        if not self._dummy_prefix:
            return self._encode_plain(texts)
        if self._no_prefix_processor is None:
            import sentencepiece

            model = sentencepiece_model.without_prefix(self._model)
            self._no_prefix_processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        return self._run(self._no_prefix_processor, texts)

    @staticmethod
    def _run(processor, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        return processor.encode(texts, out_type="numpy", num_threads=-1)

    def _model_files(self) -> dict[str, bytes]:
        return {MODEL_FILE: self._model}


class HuggingFace(Tokenizer):
    """A `tokenizer.json` of the Hugging Face library, ours or anybody's.

    Added tokens marked special become `special_tokens`; added tokens that are not marked stay what
    they are there, ordinary tokens found before all others.
    """

    def __init__(
        self,
        content: bytes,
        roles: Mapping[str, int | None],
        options: Mapping[str, object] | None = None,
    ):
        config = json.loads(content)
        kind = _model_type(config)
        added = {token["id"]: token for token in config.get("added_tokens", [])}
        special = {t["content"]: i for i, t in sorted(added.items()) if t["special"]}
        pieces = config["model"]["vocab"]
        if kind == "Unigram":
            pieces = {piece: i for i, (piece, _) in enumerate(pieces)}
        vocabulary = {**pieces, **{token["content"]: i for i, token in added.items()}}
        self._content = content
        plain = content if kind == "BPE" else _hide_special(config, special)
        self._library = self._load(plain, parse_special=False)
        self._parsing_library = None
        to_bytes, strips_leading_space = _piece_decoder(config)
        token_bytes = [b""] * (max([*vocabulary.values(), *added]) + 1)
        for piece, i in vocabulary.items():
            token_bytes[i] = piece.encode() if i in added else to_bytes(piece)
        super().__init__(
            kind=_HUGGINGFACE_KINDS[kind],
            token_bytes=token_bytes,
            special_tokens=special,
            roles=roles,
            lossless=kind == "BPE" and _is_byte_exact(config, set(vocabulary)),
            options=options or {},
            strips_leading_space=strips_leading_space,
        )

    @staticmethod
    def _load(content: bytes, parse_special: bool):
        try:
            library = import_tokenizers().Tokenizer.from_str(content.decode())
        except ImportError:
            raise
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"damaged tokenizer.json: {error}") from None
        library.no_padding()
        library.no_truncation()
        library.encode_special_tokens = not parse_special  # the library's name for "as plain text"
        return library

    def _encode_plain(self, texts: list[str]) -> list[np.ndarray]:
        return self._run(self._library, texts)

    def _encode_with_special(self, texts: list[str]) -> list[np.ndarray]:
        # The library's own parsing knows which special tokens eat the space beside them.
        if self._parsing_library is None:
            self._parsing_library = self._load(self._content, parse_special=True)
        return self._run(self._parsing_library, texts)

    @staticmethod
    def _run(library, texts: list[str]) -> list[np.ndarray]:
        encoded = library.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encoded]

    def _model_files(self) -> dict[str, bytes]:
        return {JSON_FILE: self._content}


def import_tokenizers():
    """The Hugging Face library, or an ImportError that names the extra."""
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            "this tokenizer needs the Hugging Face library: pip install 'llm_jax[tokenizers]'"
        ) from None
    return tokenizers


def _model_type(config: Mapping) -> str:
    """BPE, WordPiece or Unigram; old files do not say which."""
    model = config.get("model", {})
    if "vocab" not in model:
        raise ValueError("damaged tokenizer.json: no vocabulary in it")
    guess = "BPE" if "merges" in model else "WordPiece"
    kind = model.get("type", "Unigram" if isinstance(model["vocab"], list) else guess)
    if kind not in _HUGGINGFACE_KINDS:
        raise ValueError(
            f"tokenizer.json has a model of type {kind}, supported are "
            f"{', '.join(_HUGGINGFACE_KINDS)}"
        )
    return kind


def _hide_special(config: Mapping, special: Mapping[str, int]) -> bytes:
    """A unigram or WordPiece `tokenizer.json` whose special tokens no text can spell.

    These models find an entry such as "</s>" in plain text like any other piece.
    """
    model = dict(config["model"])
    hidden = {name: f"\ufdd0\ufdd1{i}" for name, i in special.items()}  # noncharacters
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(piece, piece): i for piece, i in model["vocab"].items()}
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    else:
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
    kept = [token for token in config.get("added_tokens", []) if not token["special"]]
    return json.dumps(
        {**config, "added_tokens": kept, "model": model, "post_processor": None}
    ).encode()


def _piece_decoder(config: Mapping):
    """How a piece of a `tokenizer.json` becomes bytes, and whether a text loses its first space."""
    steps = _flatten(config.get("decoder"), "decoders")
    types = {step["type"]: step for step in steps}
    if "ByteLevel" in types:
        byte_of = {char: byte for byte, char in byte_characters().items()}

        def from_byte_level(piece: str) -> bytes:
            if all(char in byte_of for char in piece):
                return bytes(byte_of[char] for char in piece)
            return piece.encode()

        return from_byte_level, False
    if "WordPiece" in types:
        prefix, cleanup = types["WordPiece"]["prefix"], types["WordPiece"]["cleanup"]
        glued = {".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re"} if cleanup else set()

        def from_wordpiece(piece: str) -> bytes:
            if piece.startswith(prefix):
                return piece[len(prefix) :].encode()
            return ("" if piece in glued else " ").encode() + piece.encode()

        return from_wordpiece, True
    replace = types.get("Replace", {}).get("pattern") == {"String": SPACE}
    if "Metaspace" in types or replace:
        has_bytes = "ByteFallback" in types
        metaspace = types.get("Metaspace", {"prepend_scheme": "never"})
        strips = "Strip" in types or metaspace.get("prepend_scheme", "always") != "never"

        def from_metaspace(piece: str) -> bytes:
            if has_bytes and re.fullmatch("<0x[0-9A-F]{2}>", piece):
                return bytes([int(piece[3:5], 16)])
            return piece.replace(SPACE, " ").encode()

        return from_metaspace, strips
    raise ValueError(
        f"tokenizer.json has a decoder of type {list(types) or None}; supported: ByteLevel, "
        f"WordPiece, Metaspace, Replace of {SPACE}"
    )


def _is_byte_exact(config: Mapping, vocabulary: set[str]) -> bool:
    """Whether a `tokenizer.json` provably keeps every byte: byte-level BPE that changes nothing."""
    steps = _flatten(config.get("pre_tokenizer"), "pretokenizers")
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    removes = any(step.get("behavior") == "Removed" for step in steps)
    eats_space = any(token["lstrip"] or token["rstrip"] for token in config.get("added_tokens", []))
    return (
        config.get("normalizer") is None
        and bool(byte_level)
        and not any(step.get("add_prefix_space", True) for step in byte_level)
        and {step["type"] for step in steps} <= {"ByteLevel", "Split", "Digits"}
        and not (removes or eats_space)
        and set(byte_characters().values()) <= vocabulary
    )


def _flatten(step: Mapping | None, key: str) -> list[Mapping]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step[key] for inner in _flatten(part, key)]
    return [step]
