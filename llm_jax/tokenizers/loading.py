"""Tokenizers from files: our own folders, and what other projects publish."""

import json
import pathlib
from collections.abc import Mapping

from llm_jax.tokenizers import simple
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
        if CONFIG_FILE in names and _is_ours((path / CONFIG_FILE).read_bytes()):
            return from_files({name: (path / name).read_bytes() for name in sorted(names)})
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
    if not _is_ours(files.get(CONFIG_FILE, b"")):
        raise ValueError(f"{CONFIG_FILE} is missing or is not one that llm_jax wrote")
    config = json.loads(files[CONFIG_FILE])
    kind = config["kind"]
    try:
        if kind.startswith("sentencepiece"):
            tokenizer = SentencePiece(files[MODEL_FILE], config["options"])
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
    return HuggingFace(content, roles, {"imported": True})


def _load_file(path: pathlib.Path) -> Tokenizer:
    if path.suffix == ".model":
        return SentencePiece(path.read_bytes(), {"imported": True})
    if path.name == JSON_FILE:
        return from_huggingface(path.read_bytes(), _role_names(path.parent))
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


def _is_ours(content: bytes) -> bool:
    try:
        config = json.loads(content)
    except ValueError:
        return False
    return isinstance(config, dict) and config.get("format") == CONFIG_FORMAT
