"""What every tokenizer is, and how a stream of ids becomes text."""

import abc
import codecs
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.tokenizers import chat

CONFIG_FILE = "tokenizer_config.json"
CONFIG_FORMAT = "llm_jax tokenizer 1"
PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
ROLES = ("pad", "unk", "bos", "eos")
# Arguments of transformers' apply_chat_template that would otherwise go unread to the template.
_NOT_OURS = (
    *("padding", "truncation", "max_length", "return_tensors", "tokenizer_kwargs"),
    "sanitize_control_tokens",
)


class Tokenizer(abc.ABC):
    """Text to ids and back.

    A kind supplies `_encode_plain` and `_model_files`; the rest follows from one table: the bytes
    that each id stands for.

    Attributes:
      kind: one of `KINDS`, or "hf_unigram" for an imported one.
      vocab_size: number of ids, special tokens included.
      pad_id, unk_id, bos_id, eos_id: id of that role, or None.
      special_tokens: name -> id. `encode` never makes one of them from plain text.
      lossless: every UTF-8 string comes back byte for byte, and then the bytes of the ids of
        `encode(text)` joined are exactly the bytes of the text.
      options: the training options that shaped it; stored, never read.
      chat_template: the Jinja template of `apply_chat_template`, several by name, or None. May be
        set; `files`, and so checkpoints and the fingerprint, hold it.
    """

    chat_template: str | dict[str, str] | None = None

    def __init__(
        self,
        *,
        kind: str,
        token_bytes: Sequence[bytes],
        special_tokens: Mapping[str, int],
        roles: Mapping[str, int | None],
        lossless: bool,
        options: Mapping[str, object],
        strips_leading_space: bool = False,
    ):
        unknown = set(roles) - set(ROLES)
        if unknown:
            raise ValueError(f"unknown tokenizer roles {sorted(unknown)}; roles are {ROLES}")
        self.kind = kind
        self.vocab_size = len(token_bytes)
        self.special_tokens = dict(special_tokens)
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = (roles.get(name) for name in ROLES)
        self.lossless = lossless
        self.options = dict(options)
        # Imported tokenizers that put a space before the first word take it off again here.
        self.strips_leading_space = strips_leading_space
        self._bytes = list(token_bytes)
        self._bytes_with_names = list(token_bytes)
        for name, index in self.special_tokens.items():
            self._bytes[index] = b""
            self._bytes_with_names[index] = name.encode()

    @abc.abstractmethod
    def _encode_plain(self, texts: list[str]) -> list[np.ndarray]:
        """Ids [n] int32 of each text; the spelling of a special token is ordinary text."""

    @abc.abstractmethod
    def _model_files(self) -> dict[str, bytes]:
        """The files beside `tokenizer_config.json`."""

    def _encode_continuation(self, texts: list[str]) -> list[np.ndarray]:
        """As `_encode_plain`, for text that follows a special token."""
        return self._encode_plain(texts)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`. With `special`, the spelling of a special token becomes its id.

        Raises ValueError if the text is not valid Unicode (lone surrogates), or holds something
        that the tokenizer can neither spell nor mark as unknown.
        """
        return self.encode_batch([text], special=special)[0].tolist()

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[np.ndarray]:
        """Ids of each text, int32 arrays. The subword libraries spread the texts over threads."""
        if isinstance(texts, str):
            raise ValueError("encode_batch takes a list of texts; use encode for a single one")
        texts = list(texts)
        for number, text in enumerate(texts):
            check_unicode(text, number)
        if not special or not self.special_tokens:
            return self._encode_plain(texts)
        return self._encode_with_special(texts)

    def _encode_with_special(self, texts: list[str]) -> list[np.ndarray]:
        pattern = special_pattern(self.special_tokens)
        parts = [pattern.split(text) for text in texts]  # plain, special, plain, special, …, plain
        firsts = iter(self._encode_plain([row[0] for row in parts]))
        later = iter(self._encode_continuation([part for row in parts for part in row[2::2]]))
        encoded = []
        for row in parts:
            pieces = [next(firsts)]
            for name in row[1::2]:
                pieces += [np.array([self.special_tokens[name]], np.int32), next(later)]
            encoded.append(np.concatenate(pieces))
        return encoded

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; only bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int], skip_special: bool = True) -> bytes:
        """Exact bytes of `ids`. Raises ValueError for an id outside the vocabulary."""
        ids = np.asarray(ids)
        if ids.size == 0:
            return b""
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"decode takes a list of integers, not {ids.dtype} {ids.shape}")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            wrong = int(ids[(ids < 0) | (ids >= self.vocab_size)][0])
            raise ValueError(
                f"token id {wrong} is outside the vocabulary of {self.vocab_size} ({self.kind}); "
                "is this the tokenizer that made the ids?"
            )
        table = self.decode_table(skip_special)
        content = b"".join([table[i] for i in ids.tolist()])
        return content[1:] if self.strips_leading_space and content[:1] == b" " else content

    def decode_table(self, skip_special: bool = True) -> list[bytes]:
        """For each id what `decode` writes for it. Not a copy: do not change it."""
        return self._bytes if skip_special else self._bytes_with_names

    def token_bytes(self) -> list[bytes]:
        """For each id the bytes it stands for; b"" for special tokens and the unknown token."""
        return list(self._bytes)

    def token_lengths(self) -> np.ndarray:
        """Lengths of `token_bytes`, int32 [V]. Bits per byte divides by their sum."""
        return np.array([len(piece) for piece in self._bytes], np.int32)

    def token_name(self, role: str) -> str | None:
        """How the token of a role ("pad", "unk", "bos", "eos") is spelled; None without one."""
        index = getattr(self, f"{role}_id")
        return None if index is None else self._bytes_with_names[index].decode(errors="replace")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        **variables: Any,
    ) -> Any:
        """A conversation as the model was trained to read it (`chat.render` says how).

        Args:
          messages: dicts with "role" and "content", or a list of such conversations.
          chat_template: a template, or the name of one of the tokenizer's; None takes its own.
          tokenize: ids, without a further `bos` or `eos`, instead of text.
          return_dict: {"input_ids", "attention_mask"} instead of the ids alone.
          return_assistant_tokens_mask: the dict, with "assistant_masks": 1 for each token with a
            part in a `{% generation %}` block of the template.
          variables: for the template; they win over `bos_token` and its like.

        Returns:
          The text, the ids or the dict; a list of texts or ids, or a dict of lists, for a list of
          conversations.

        Raises ValueError without a template, and for whatever the template refuses.
        """
        if unsupported := sorted(set(variables) & set(_NOT_OURS)):
            raise ValueError(f"apply_chat_template does not take {', '.join(unsupported)} here")
        template = chat.choose(self.chat_template, chat_template, has_tools=tools is not None)
        if return_assistant_tokens_mask and not chat.marks_assistant(template):
            raise ValueError(
                "the chat template has no {% generation %} block, so it does not say which tokens "
                "are the assistant's; give chat_template= with one"
            )
        batched = bool(messages) and isinstance(messages[0], list | tuple)
        names = {f"{role}_token": self.token_name(role) for role in ROLES}
        variables = {**{key: name for key, name in names.items() if name is not None}, **variables}
        rendered = [
            chat.render(
                template,
                conversation,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
            for conversation in (messages if batched else [messages])
        ]
        texts = [text for text, _ in rendered]
        if not tokenize:
            return texts if batched else texts[0]
        ids = [row.tolist() for row in self.encode_batch(texts, special=True)]
        if not (return_dict or return_assistant_tokens_mask):
            return ids if batched else ids[0]
        result = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
        if return_assistant_tokens_mask:
            result["assistant_masks"] = [
                chat.tokens_within(self, text, row, spans).astype(int).tolist()
                for (text, spans), row in zip(rendered, ids, strict=True)
            ]
        return result if batched else {key: rows[0] for key, rows in result.items()}

    def files(self) -> dict[str, bytes]:
        """File name -> content: all that `from_files` needs. A checkpoint embeds this."""
        config = {
            "format": CONFIG_FORMAT,
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "special_tokens": self.special_tokens,
            "roles": {name: getattr(self, f"{name}_id") for name in ROLES},
            "lossless": self.lossless,
            "options": self.options,
        }
        content = json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        templates = chat.to_files(self.chat_template)
        return {CONFIG_FILE: content.encode(), **self._model_files(), **templates}

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes `files()` into `directory`, which is made if absent."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)

    def fingerprint(self) -> str:
        """SHA-256 over `files()`, hex. Two tokenizers with the same one are the same."""
        digest = hashlib.sha256()
        for name, content in sorted(self.files().items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def __reduce__(self):
        """Pickles as `files()`: the libraries lose settings when they pickle themselves."""
        from llm_jax.tokenizers.loading import from_files

        return from_files, (self.files(),)


class StreamDecoder:
    """Text from ids that arrive one by one, never half a character.

    All that `push` and `flush` return, joined, equals `tokenizer.decode(ids)`. A character whose
    bytes lie in several tokens is held back until it is whole; `flush` ends the stream and turns an
    unfinished one into U+FFFD. The unit is the Unicode code point: an emoji joined of several code
    points appears part by part, as no finite look-ahead tells whether another part follows.

    Args:
      prompt_ids: ids that stand before the stream and are not returned. Give them when streaming a
        continuation, so that its first token is not taken for the start of a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = True, prompt_ids: Sequence[int] = ()
    ):
        self._table = tokenizer.decode_table(skip_special)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.strips_leading_space
        for index in prompt_ids:
            self.push(index)

    def push(self, index: int) -> str:
        """Takes one id, returns the text that is now complete (often "")."""
        index = int(index)
        if not 0 <= index < len(self._table):
            raise ValueError(
                f"token id {index} is outside the vocabulary of {len(self._table)}; "
                "is this the tokenizer that made the ids?"
            )
        piece = self._table[index]
        if self._at_start and piece:
            self._at_start = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """Ends the stream: what is still held back, incomplete characters as U+FFFD."""
        return self._utf8.decode(b"", final=True)


def check_unicode(text: str, number: int = 0) -> None:
    """Raises ValueError if `text`, the `number`-th of a batch, cannot be written as UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"text {number} is {type(text).__name__}, not str")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text {number} has a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which UTF-8 cannot hold; read the file with errors='replace'"
        ) from None


def special_pattern(names: Sequence[str]) -> re.Pattern:
    """Matches any of `names`, the longest first, in one group (so that `split` returns them)."""
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def cut_inside(text: str, names: Sequence[str]) -> list[str]:
    """The text, cut after the first character of each of `names` in it.

    A trainer that sees these parts learns all characters of the text, and no piece that spells a
    special token.
    """
    starts = re.finditer(f"(?={special_pattern(names).pattern})", text)
    edges = [0, *(found.start() + 1 for found in starts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


def name_special_tokens(standard: Sequence[str], requested: Sequence[str]) -> list[str]:
    """Names of all special tokens in order of id: the kind's own, then the requested ones.

    Raises ValueError for a name that could be mistaken for a piece of text.
    """
    for name in requested:
        if len(name) < 2 or any(char.isspace() or char == "\u2581" for char in name):
            raise ValueError(
                f"special token {name!r} must have at least two characters and neither white space "
                "nor U+2581; change --special_tokens"
            )
        check_unicode(name)
    return list(dict.fromkeys([*standard, *requested]))


def roles_by_name(special_tokens: Mapping[str, int]) -> dict[str, int | None]:
    """The ids behind our own spellings <pad>, <unk>, <s>, </s>."""
    return {
        role: special_tokens.get(name)
        for role, name in zip(ROLES, (PAD, UNK, BOS, EOS), strict=True)
    }
