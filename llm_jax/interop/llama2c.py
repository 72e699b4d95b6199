"""llama2.c, Karpathy's Llama in one file of C: its weights (`model.bin`) and its `tokenizer.bin`.

Read are the legacy format, version 1 (float32) and version 2 (int8 in groups, as runq.c reads it).
All rotate neighbouring pairs of a head; rows of queries and keys are brought into Hugging Face's
order of halves.
"""

import functools
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from llm_jax import tokenizers
from llm_jax.interop.row_source import Source, Tensor, read_bytes
from llm_jax.tokenizers import Tokenizer, sentencepiece_model
from llm_jax.tokenizers.subword import SPACE, SentencePiece

_MAGIC = 0x616B3432  # "ak42"
_HEADER_BYTES = 256  # of versions 1 and 2
_BOS, _EOS, _FIRST_BYTE = 1, 2, 3  # ids, after <unk>


class Header(NamedTuple):
    version: int
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    length: int
    tied: bool
    group: int  # int8 numbers that share a scale, version 2
    size: int  # bytes


def read(
    path: str | Path, tokenizer_path: str | Path | None = None
) -> tuple[dict[str, Any], Source, Tokenizer]:
    """A model of llama2.c.

    Args:
      tokenizer_path: its `tokenizer.bin`, or anything `tokenizers.load` takes; None looks beside
        the weights for `tok512.bin` (of the right size), `tokenizer.bin` or the only `tok*.bin`.

    Returns:
      What its `config.json` would say, its tensors under Hugging Face's names (close them when
      done), and its tokenizer. A story ends with the token that starts one, so that both it and
      `</s>` are in `eos_token_id`.

    Raises:
      FileNotFoundError: no such file, or no tokenizer.
      ValueError: not such a file, or not a whole one, or a tokenizer of another size.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    header = _header(path)
    tensors, end = _layout(header)
    size = path.stat().st_size
    if size != end:
        raise ValueError(
            f"{path} has {size:,} bytes, a llama2.c model with its header has {end:,}: truncated, or "
            "no such model"
        )
    tokenizer_path = _find_tokenizer(path, header) if tokenizer_path is None else tokenizer_path
    tokenizer = _load_tokenizer(Path(tokenizer_path))
    if tokenizer.vocab_size != header.vocab_size:
        raise ValueError(
            f"{tokenizer_path} has {tokenizer.vocab_size} tokens, {path} has {header.vocab_size}; "
            "give the right one with --tokenizer"
        )
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": header.vocab_size,
        "hidden_size": header.dim,
        "intermediate_size": header.hidden_dim,
        "num_hidden_layers": header.n_layers,
        "num_attention_heads": header.n_heads,
        "num_key_value_heads": header.n_kv_heads,
        "head_dim": header.dim // header.n_heads,
        "hidden_act": "silu",
        "max_position_embeddings": header.length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": header.tied,
        "bos_token_id": _BOS,
        "eos_token_id": [_BOS, _EOS],
    }
    return config, Source(path, tensors), tokenizer


def _header(path: Path) -> Header:
    with open(path, "rb") as file:
        content = file.read(_HEADER_BYTES)
    if len(content) < 28:
        raise ValueError(f"{path} is not a llama2.c model: it has {len(content)} bytes")
    version, group, size = 0, 0, 28
    sizes = struct.unpack("<7i", content[:28])
    tied = sizes[5] > 0
    if sizes[0] == _MAGIC:
        version = sizes[1]
        if version not in (1, 2) or len(content) < _HEADER_BYTES:
            raise ValueError(f"{path}: version {version} of llama2.c's format is not supported")
        sizes, size = struct.unpack("<7i", content[8:36]), _HEADER_BYTES
        tied = bool(content[36])
        group = struct.unpack("<i", content[37:41])[0] if version == 2 else 0
    dim, hidden, layers, heads, kv_heads, vocab, length = (abs(n) for n in sizes)
    if not (0 < heads <= dim < 1 << 20 and layers < 1 << 12) or 0 in (
        hidden,
        layers,
        vocab,
        length,
    ):
        raise ValueError(f"{path} is not a llama2.c model: its header says {list(sizes)}")
    if dim % heads or heads % kv_heads or (dim // heads) % 2:
        raise ValueError(f"{path}: {dim} dimensions, {heads} heads, {kv_heads} of keys do not fit")
    if version == 2 and (group < 1 or dim % group):
        raise ValueError(f"{path}: groups of {group} numbers do not fit {dim} dimensions")
    return Header(version, dim, hidden, layers, heads, kv_heads, vocab, length, tied, group, size)


def _layout(header: Header) -> tuple[dict[str, Tensor], int]:
    """Hugging Face's name -> tensor, in the order of the file, and where the file ends."""
    dim, hidden = header.dim, header.hidden_dim
    kv_dim = dim // header.n_heads * header.n_kv_heads
    embedding = ("model.embed_tokens.weight", (header.vocab_size, dim))
    norm = ("model.norm.weight", (dim,))
    layer = {
        "attention_norm": ("input_layernorm.weight", (dim,)),
        "wq": ("self_attn.q_proj.weight", (dim, dim)),
        "wk": ("self_attn.k_proj.weight", (kv_dim, dim)),
        "wv": ("self_attn.v_proj.weight", (kv_dim, dim)),
        "wo": ("self_attn.o_proj.weight", (dim, dim)),
        "ffn_norm": ("post_attention_layernorm.weight", (dim,)),
        "w1": ("mlp.gate_proj.weight", (hidden, dim)),
        "w2": ("mlp.down_proj.weight", (dim, hidden)),
        "w3": ("mlp.up_proj.weight", (hidden, dim)),
    }
    matrices = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    if header.version == 0:
        # One block for each name, all layers in it; then the tables of cosines and sines.
        middle = ["attention_norm", *matrices[:4], "ffn_norm", *matrices[4:]]
        order = [embedding, *middle, norm, (None, (header.length, dim // header.n_heads))]
    else:
        order = ["attention_norm", "ffn_norm", norm, embedding, *matrices]
    if not header.tied:
        order.append(("lm_head.weight", (header.vocab_size, dim)))

    tensors, offset = {}, header.size
    for entry in order:
        if isinstance(entry, str):
            suffix, shape = layer[entry]
            names = [f"model.layers.{i}.{suffix}" for i in range(header.n_layers)]
        else:
            names, shape = [entry[0]], entry[1]
        for name in names:
            group = header.group if len(shape) > 1 else 0
            if name is not None:
                tensors[name] = _tensor(shape, offset, group, entry in ("wq", "wk"), header)
            count = math.prod(shape)
            offset += count + count // group * 4 if group else count * 4
    return tensors, offset


def _tensor(shape: tuple[int, ...], offset: int, group: int, is_qk: bool, header: Header) -> Tensor:
    columns = shape[1] if len(shape) > 1 else 1
    if group:
        scales = offset + math.prod(shape)
        decode = functools.partial(
            _int8, offset=offset, scales=scales, columns=columns, group=group
        )
    else:
        decode = functools.partial(_float32, offset=offset, columns=columns)
    head_dim = header.dim // header.n_heads if is_qk else 0
    return Tensor(shape, shape[0], columns, decode, head_dim)


def _float32(file: BinaryIO, start: int, stop: int, *, offset: int, columns: int) -> np.ndarray:
    content = read_bytes(file, offset + 4 * start * columns, 4 * (stop - start) * columns)
    return content.view("<f4").reshape(-1, columns)


def _int8(
    file: BinaryIO, start: int, stop: int, *, offset: int, scales: int, columns: int, group: int
) -> np.ndarray:
    """Integers times the scale of their group; groups may cross rows."""
    first, last = start * columns, stop * columns
    values = read_bytes(file, offset + first, last - first).view(np.int8).astype(np.float32)
    groups = first // group, -(-last // group)
    factors = read_bytes(file, scales + 4 * groups[0], 4 * (groups[1] - groups[0])).view("<f4")
    if not (np.isfinite(factors).all() and (factors >= 0).all()):
        raise ValueError(f"{file.name} has int8 groups in another order than runq.c reads them")
    at = first - groups[0] * group
    values *= np.repeat(factors, group)[at : at + len(values)]
    return values.reshape(-1, columns)


def _find_tokenizer(path: Path, header: Header) -> Path:
    for name in (f"tok{header.vocab_size}.bin", "tokenizer.bin"):
        if (path.parent / name).is_file():
            return path.parent / name
    found = sorted(set(path.parent.glob("tok*.bin")) - {path})
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "no tok*.bin"
        raise FileNotFoundError(
            f"{path}: beside it is {names}; give its tokenizer with --tokenizer"
        )
    return found[0]


def _load_tokenizer(path: Path) -> Tokenizer:
    if path.suffix == ".bin" and path.is_file():
        return read_tokenizer(path)
    return tokenizers.load(path)


def read_tokenizer(path: str | Path) -> SentencePiece:
    """The tokenizer in a `tokenizer.bin`: the scores and spellings of a sentencepiece BPE model.

    Raises ValueError if the file ends within a token or does not start with <unk> and the bytes.
    """
    content, tokens = Path(path).read_bytes(), []
    at = 4  # after the length of the longest token
    while at < len(content):
        if at + 8 > len(content):
            raise ValueError(f"{path} is truncated after {len(tokens)} tokens; copy it again")
        score, length = struct.unpack_from("<fi", content, at)
        if length < 0 or at + 8 + length > len(content):
            raise ValueError(f"{path} is truncated after {len(tokens)} tokens; copy it again")
        tokens.append((content[at + 8 : at + 8 + length], score))
        at += 8 + length
    expected = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % i for i in range(256))]
    # The two are written with line breaks around them, for the screen.
    if [text.strip() for text, _ in tokens[: len(expected)]] != expected:
        raise ValueError(
            f"{path} is not a tokenizer of llama2.c: no <unk>, <s>, </s> and 256 bytes"
        )
    types = [sentencepiece_model.UNKNOWN, *[sentencepiece_model.CONTROL] * 2]
    types += [sentencepiece_model.BYTE] * 256
    types += [sentencepiece_model.NORMAL] * (len(tokens) - len(types))
    pieces = [
        sentencepiece_model.Piece(
            (text.strip() if i < len(expected) else text).decode().replace(" ", SPACE), score, kind
        )
        for i, ((text, score), kind) in enumerate(zip(tokens, types, strict=True))
    ]
    roles = {"unk": 0, "bos": _BOS, "eos": _EOS, "pad": None}
    model = sentencepiece_model.write(
        pieces, model_type=sentencepiece_model.BPE, roles=roles, dummy_prefix=True
    )
    return SentencePiece(model, {"imported": True})
