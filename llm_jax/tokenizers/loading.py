"""Tokenizers from files: our own folders, and what other projects publish."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from llm_jax.tokenizers import chat, export, sentencepiece_model, simple
from llm_jax.tokenizers.base import CONFIG_FILE, CONFIG_FORMAT, ROLES, Tokenizer
from llm_jax.tokenizers.subword import (
    JSON_FILE,
    MODEL_FILE,
    HuggingFace,
    SentencePiece,
    import_tokenizers,
)

SPECIAL_TOKENS_FILE = "special_tokens_map.json"
# Names under which published tokenizers know a role, tried in this order.
_KNOWN_ROLES = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|endoftext|>"),
    "unk": ("<unk>", "[UNK]", "<|unk|>"),
    "bos": ("<s>", "<bos>", "[CLS]", "<|begin_of_text|>", "<|bos|>", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "[SEP]", "<|end_of_text|>", "<|eos|>", "<|endoftext|>"),
}
_OWN_FILES = (CONFIG_FILE, MODEL_FILE, JSON_FILE, simple.VOCABULARY_FILE)
_FOREIGN = "tokenizer.json, *.model, encoder.json + vocab.bpe, vocab.json + merges.txt, vocab.txt"


def load(path: str | pathlib.Path) -> Tokenizer:
    """The tokenizer in a folder or file.

    Knows what `save` wrote; a sentencepiece `.model`; a Hugging Face `tokenizer.json`, with the
    roles from `tokenizer_config.json` or `special_tokens_map.json` beside it; GPT-2's two files
    under either pair of names; BERT's `vocab.txt`, taken as uncased unless it has capitals.

    Raises:
      FileNotFoundError: nothing there, or nothing of these.
      ValueError: a file that is damaged or of a sort that is not supported.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"tokenizer {path}: no such file or folder")
    try:
        if path.is_file():
            return _load_file(path)
        names = {entry.name for entry in path.iterdir() if entry.is_file()}
        own = {n: (path / n).read_bytes() for n in sorted(names & set(_OWN_FILES))}
        if _own_config(own) is not None:
            return from_files({**own, **_template_files(path)})
        for name in (JSON_FILE, MODEL_FILE, "encoder.json", "vocab.json", "vocab.txt"):
            if name in names:
                return _load_file(path / name)
        models = sorted(name for name in names if name.endswith(".model"))
        if len(models) == 1:
            return _load_file(path / models[0])
    except ValueError as error:
        raise ValueError(f"tokenizer {path}: {error}") from None
    if models:
        raise ValueError(f"tokenizer {path}: several models, name one of {', '.join(models)}")
    raise FileNotFoundError(f"tokenizer {path}: none of {CONFIG_FILE} (ours), {_FOREIGN}")


def from_files(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer whose `files()` these are; further files are ignored.

    Raises ValueError if a file is missing or not what its name says.
    """
    config = _own_config(files)
    if config is None:
        raise ValueError(f"{CONFIG_FILE} is missing or is not one that llm_jax wrote")
    kind = config["kind"]
    try:
        if kind.startswith("sentencepiece"):
            tokenizer = SentencePiece(files[MODEL_FILE], config["options"], config["roles"])
        elif kind.startswith("hf"):
            tokenizer = HuggingFace(files[JSON_FILE], config["roles"], config["options"])
        else:
            tokenizer = simple.from_model_files(kind, files, config)
    except KeyError as error:
        raise ValueError(f"a tokenizer of kind {kind} needs {error.args[0]}") from None
    if tokenizer.vocab_size != config["vocab_size"]:
        raise ValueError(
            f"{CONFIG_FILE} says {config['vocab_size']} tokens, the files beside it have "
            f"{tokenizer.vocab_size}; they do not belong together"
        )
    tokenizer.chat_template = chat.from_files(files)
    return tokenizer


def from_huggingface(
    content: bytes, role_names: Mapping[str, str | None] | None = None
) -> HuggingFace:
    """The tokenizer of a `tokenizer.json`.

    Args:
      role_names: token of each role ("pad", "unk", "bos", "eos"); None looks for the usual names.
    """
    config = json.loads(content)
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict):
        raise ValueError("this is not a tokenizer.json of the Hugging Face library: no model in it")
    vocabulary = {token["content"]: token["id"] for token in config.get("added_tokens", [])}
    unknown = model.get("unk_token")
    if role_names is None:
        role_names = {
            role: next((name for name in names if name in vocabulary), None)
            for role, names in _KNOWN_ROLES.items()
        }
        role_names["unk"] = role_names["unk"] or unknown
    pieces = model.get("vocab") or {}
    if isinstance(pieces, dict):
        vocabulary = {**pieces, **vocabulary}
    absent = sorted({name for name in role_names.values() if name} - set(vocabulary))
    if absent:
        raise ValueError(f"special tokens {absent} are not in the vocabulary of tokenizer.json")
    roles = {role: vocabulary.get(name) for role, name in role_names.items()}
    first = _first_token(config.get("post_processor"))
    adds = {"add_bos_token": True} if first and first == role_names.get("bos") else {}
    return HuggingFace(content, roles, {"imported": True, **adds})


def _load_file(path: pathlib.Path) -> Tokenizer:
    if path.suffix == ".model":
        return _load_sentencepiece(path)
    if path.name == JSON_FILE:
        tokenizer = from_huggingface(path.read_bytes(), _role_names(path.parent))
        tokenizer.options |= _adds_bos(path.parent)
        tokenizer.chat_template = chat.from_files(_template_files(path.parent))
        return tokenizer
    if path.name in ("encoder.json", "vocab.bpe"):
        return _load_gpt2(path.parent / "encoder.json", path.parent / "vocab.bpe")
    if path.name in ("vocab.json", "merges.txt"):
        return _load_gpt2(path.parent / "vocab.json", path.parent / "merges.txt")
    if path.name == CONFIG_FILE:
        return load(path.parent)
    if path.suffix == ".txt":
        return _load_bert(path)
    if path.suffix == ".json":
        return from_huggingface(path.read_bytes())
    raise ValueError(f"not a tokenizer file; known are {_FOREIGN}")


def _role_names(folder: pathlib.Path) -> dict[str, str | None] | None:
    """What Hugging Face's files beside a `tokenizer.json` say about roles; None if nothing does."""
    found: dict[str, str | None] = {}
    for name in (SPECIAL_TOKENS_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            continue
        config = json.loads((folder / name).read_bytes())
        for role in ROLES:
            token = config.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                found[role] = token
    return found or None


def _adds_bos(folder: pathlib.Path) -> dict[str, bool]:
    """{"add_bos_token": whether a text begins with the begin token}, if the folder says so."""
    path = folder / CONFIG_FILE
    says = json.loads(path.read_bytes()).get("add_bos_token") if path.is_file() else None
    return {"add_bos_token": says} if isinstance(says, bool) else {}


def _first_token(processor: Mapping | None) -> str | None:
    """The special token that a `tokenizer.json` puts in front of a text."""
    if not processor:
        return None
    if processor["type"] == "Sequence":
        found = (_first_token(inner) for inner in processor["processors"])
        return next((token for token in found if token), None)
    single = processor.get("single") or [{}]
    return single[0].get("SpecialToken", {}).get("id")


def _template_files(folder: pathlib.Path) -> dict[str, bytes]:
    """The files of a folder that may hold chat templates."""
    paths = [folder / name for name in (chat.TEMPLATE_FILE, "chat_template.json", CONFIG_FILE)]
    paths += sorted((folder / chat.TEMPLATE_FOLDER).glob("*.jinja"))
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()
    }


def _load_sentencepiece(path: pathlib.Path) -> SentencePiece:
    """A sentencepiece model with what Hugging Face's files beside it add: tokens, roles, template.

    Their special tokens become control pieces, their other added tokens user-defined pieces.
    """
    model, folder = path.read_bytes(), path.parent
    own = SentencePiece(model, {"imported": True})
    names, added = _role_names(folder) or {}, _added_tokens(folder)
    pieces = _with_added(sentencepiece_model.pieces(model), names, added) if names or added else []
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    roles = {role: ids.get(names.get(role), getattr(own, f"{role}_id")) for role in ROLES}
    if pieces and pieces != sentencepiece_model.pieces(model):
        model = sentencepiece_model.replace(model, pieces)
    # A model of its own says nothing about it; the classes that read one begin texts with <s>.
    adds = _adds_bos(folder) or {"add_bos_token": True}
    tokenizer = SentencePiece(model, {"imported": True, **(adds if names else {})}, roles)
    tokenizer.chat_template = chat.from_files(_template_files(folder))
    return tokenizer


def _added_tokens(folder: pathlib.Path) -> dict[int, tuple[str, bool]]:
    """Id -> (name, special) of the tokens that Hugging Face's files add to a vocabulary."""
    added = {}
    if (folder / "added_tokens.json").is_file():
        names = json.loads((folder / "added_tokens.json").read_bytes())
        added = {index: (name, True) for name, index in names.items()}
    if (folder / CONFIG_FILE).is_file():
        config = json.loads((folder / CONFIG_FILE).read_bytes())
        for index, token in config.get("added_tokens_decoder", {}).items():
            added[int(index)] = (token["content"], bool(token.get("special", True)))
    return added


def _with_added(
    pieces: list[sentencepiece_model.Piece],
    names: Mapping[str, str | None],
    added: Mapping[int, tuple[str, bool]],
) -> list[sentencepiece_model.Piece]:
    for index, (name, special) in sorted(added.items()):
        if index > len(pieces):
            raise ValueError(f"added token {name!r} has id {index}, but {len(pieces)} comes next")
        if index == len(pieces):
            pieces.append(sentencepiece_model.Piece(name, 0.0, sentencepiece_model.NORMAL))
        if pieces[index].text != name:
            raise ValueError(
                f"added token {name!r} has id {index}, which is {pieces[index].text!r} in the model"
            )
        if pieces[index].type != sentencepiece_model.UNKNOWN:
            kind = sentencepiece_model.CONTROL if special else sentencepiece_model.USER_DEFINED
            pieces[index] = pieces[index]._replace(type=kind)
    absent = sorted({name for name in names.values() if name} - {piece.text for piece in pieces})
    if absent:
        raise ValueError(f"special tokens {absent} are not in the vocabulary of the model")
    return [
        piece._replace(type=sentencepiece_model.CONTROL)
        if piece.text in names.values() and piece.type != sentencepiece_model.UNKNOWN
        else piece
        for piece in pieces
    ]


def _load_gpt2(vocabulary: pathlib.Path, merges: pathlib.Path) -> HuggingFace:
    for path in (vocabulary, merges):
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer {path}: no such file; it belongs to the other one")
    hf = import_tokenizers()
    ids = json.loads(vocabulary.read_bytes())
    lines = merges.read_text("utf-8").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    library = hf.Tokenizer(hf.models.BPE(vocab=ids, merges=pairs))
    library.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = hf.decoders.ByteLevel()
    library.add_special_tokens([name for name in ("<|endoftext|>",) if name in ids])
    return from_huggingface(library.to_str().encode())


def _load_bert(path: pathlib.Path) -> HuggingFace:
    hf = import_tokenizers()
    pieces = path.read_text("utf-8").split("\n")
    ids = {piece: i for i, piece in enumerate(pieces) if piece}
    special = [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name in ids]
    if "[UNK]" not in special:
        raise ValueError("no [UNK] among its lines, so it is not a BERT vocabulary")
    cased = any(piece.lower() != piece for piece in ids if not piece.startswith("["))
    library = hf.Tokenizer(hf.models.WordPiece(vocab=ids, unk_token="[UNK]"))
    library.normalizer = hf.normalizers.BertNormalizer(lowercase=not cased)
    library.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    library.decoder = hf.decoders.WordPiece()
    library.add_special_tokens(special)
    return from_huggingface(library.to_str().encode())


def _own_config(files: Mapping[str, bytes]) -> dict[str, Any] | None:
    """Our settings, in a folder of ours or in one that we wrote for Hugging Face."""
    try:
        config = json.loads(files.get(CONFIG_FILE, b""))
    except ValueError:
        return None
    if isinstance(config, dict) and config.get("format") == CONFIG_FORMAT:
        return config
    return export.own_config(files)
