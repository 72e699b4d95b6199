"""The file format of sentencepiece models: a protocol buffer, read and written by hand.

The library does not tell all that stands in a model and cannot build one from pieces, and its
generated classes need protobuf. Field numbers are those of sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Fields of the model, then of its trainer and normaliser.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_ROLE_IDS = {"unk": 40, "bos": 41, "eos": 42, "pad": 43}
_ROLE_PIECES = {"unk": 45, "bos": 46, "eos": 47, "pad": 48}
_CHARACTER_MAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5


class Piece(NamedTuple):
    text: str  # with U+2581 for each space
    score: float  # log-probability, or in a BPE model minus the rank of the merge
    type: int


def read(model: bytes) -> dict:
    """What a serialised model says about itself, without its pieces.

    Returns a dict with `type` (UNIGRAM, BPE or another number), `dummy_prefix` (a space is put
    before the text), `changes_text` (a character map, removed white space, or spaces that are not
    escaped), `byte_fallback`, `character_map` (compiled, b"" for none), `removes_spaces` and
    `escapes_spaces`. Raises ValueError for anything else than a whole model.
    """
    try:
        trainer, normalizer = _messages(model)
    except (KeyError, IndexError, TypeError):
        raise ValueError("this is not a sentencepiece model (or only a part of one)") from None
    character_map = normalizer.get(_CHARACTER_MAP, b"")
    removes_spaces = bool(normalizer.get(_REMOVE_SPACES, 1))
    escapes_spaces = bool(normalizer.get(_ESCAPE_SPACES, 1))
    return {
        "type": trainer.get(_MODEL_TYPE, UNIGRAM),
        "dummy_prefix": bool(normalizer.get(_DUMMY_PREFIX, 1)),
        "byte_fallback": bool(trainer.get(_BYTE_FALLBACK, 0)),
        "character_map": character_map,
        "removes_spaces": removes_spaces,
        "escapes_spaces": escapes_spaces,
        "changes_text": bool(character_map or removes_spaces or not escapes_spaces),
    }


def pieces(model: bytes) -> list[Piece]:
    """All pieces of a serialised model, in order of id."""
    found = []
    for number, value in _fields(model):
        if number == _PIECES:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            found.append(Piece(piece.get(1, b"").decode(), score, piece.get(3, NORMAL)))
    return found


def write(
    entries: Iterable[Piece],
    *,
    model_type: int,
    roles: Mapping[str, int | None],
    dummy_prefix: bool,
    removes_spaces: bool = False,
) -> bytes:
    """A model with these pieces that changes no text but for the prefix and extra spaces.

    Args:
      roles: id of "unk", "bos", "eos" and "pad", or None. "unk" must be the one UNKNOWN piece.
      dummy_prefix: put a space before every text.
      removes_spaces: make one of several spaces, and strip those at the ends.
    """
    entries = list(entries)
    byte_fallback = any(entry.type == BYTE for entry in entries)
    trainer = [(_MODEL_TYPE, model_type), (_VOCAB_SIZE, len(entries))]
    trainer += [(_BYTE_FALLBACK, int(byte_fallback)), *_role_fields(entries, roles)]
    normalizer = [(1, b"identity"), (_DUMMY_PREFIX, int(dummy_prefix))]
    normalizer += [(_REMOVE_SPACES, int(removes_spaces)), (_ESCAPE_SPACES, 1)]
    top = [(_PIECES, _piece(entry)) for entry in entries]
    return _message([*top, (_TRAINER, _message(trainer)), (_NORMALIZER, _message(normalizer))])


def replace(model: bytes, entries: Sequence[Piece]) -> bytes:
    """The model with other pieces, and all else as it was."""
    kept = [(number, value) for number, value in _fields(model) if number != _PIECES]
    # A message that comes twice is merged, the later field wins.
    size = (_TRAINER, _message([(_VOCAB_SIZE, len(entries))]))
    return _message([*((_PIECES, _piece(entry)) for entry in entries), *kept, size])


def without_prefix(model: bytes) -> bytes:
    """The model without the space before every text."""
    return model + _message([(_NORMALIZER, _message([(_DUMMY_PREFIX, 0)]))])


def _role_fields(
    entries: Sequence[Piece], roles: Mapping[str, int | None]
) -> list[tuple[int, int | bytes]]:
    fields: list[tuple[int, int | bytes]] = []
    for role, number in _ROLE_IDS.items():
        index = roles.get(role)
        # The library finds a role by its spelling; one that no piece has means "none".
        name = f"no {role}" if index is None else entries[index].text
        fields += [(number, -1 if index is None else index), (_ROLE_PIECES[role], name.encode())]
    return fields


def _piece(entry: Piece) -> bytes:
    text = entry.text.encode()
    head = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", entry.score)
    return head if entry.type == NORMAL else head + b"\x18" + _varint(entry.type)


def _message(fields: Iterable[tuple[int, int | bytes]]) -> bytes:
    """A serialised message of integers (varints) and byte strings."""
    out = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            out += _varint(number * 8) + _varint(value)
        else:
            out += _varint(number * 8 + 2) + _varint(len(value)) + value
    return bytes(out)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers in two's complement
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _messages(model: bytes) -> tuple[dict, dict]:
    """The fields of the trainer and the normaliser; each may come in several parts."""
    parts: dict[int, bytes] = {}
    for number, value in _fields(model):
        if number in (_TRAINER, _NORMALIZER):
            parts[number] = parts.get(number, b"") + value
    return dict(_fields(parts[_TRAINER])), dict(_fields(parts.get(_NORMALIZER, b"")))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) pairs of a protocol buffer message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}[wire_type] if wire_type != 2 else varint()
        if at + size > len(message):
            raise IndexError("truncated message")
        yield number, message[at : at + size]
        at += size
