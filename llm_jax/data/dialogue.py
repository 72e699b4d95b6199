"""From a data config to conversations as tokens: reads, splits, renders, cuts, reports.

Data sets for fine-tuning are small, so every process makes all of it in memory; only the writer
writes files: the tokenizer (with the chat template) and `rejected.jsonl`.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from llm_jax import tokenizers
from llm_jax.config import DataConfig, DialogueConfig, TokenizerConfig, TrainConfig
from llm_jax.data import conversations, documents
from llm_jax.data import loader as loader_
from llm_jax.data.conversations import Conversation, Rejected
from llm_jax.data.mixture import Component
from llm_jax.data.prepare import (
    EVAL,
    TOKENIZER,
    TRAIN,
    save_tokenizer,
    sources_of,
    training_options,
)
from llm_jax.data.rendering import Renderer
from llm_jax.data.tokens import Tokens, dtype_of
from llm_jax.tokenizers.chat_formats import FORMATS, ChatFormat

REJECTED = "rejected.jsonl"
SHOWN = 5  # rejected rows that are printed


class _Part(NamedTuple):
    """Conversations of one source, for training or held out."""

    kind: str  # TRAIN or EVAL
    name: str  # of the source; "" for eval_inputs
    rows: list[Conversation]
    rejected: list[Rejected]


class Dialogues:
    """What training needs of conversations; made by `prepare_dialogues`.

    Attributes:
      tokenizer: with the chat template in use.
      directory: where the tokenizer and the list of rejected rows are.
      train: the sources, as `make_loader` takes them.
      evaluation: the held-out examples, or None.
      end_tokens: ids that end an answer besides the tokenizer's end token.
      stop: strings that end an answer where no id does.
    """

    def __init__(
        self,
        data: DataConfig,
        renderer: Renderer,
        directory: str,
        train: list[Component],
        evaluation: Tokens | None,
        parts: list[dict[str, Any]],
        stop: Sequence[str],
    ):
        self._data, self._renderer, self._parts = data, renderer, parts
        self.tokenizer, self.directory = renderer.tokenizer, directory
        self.train, self.evaluation = train, evaluation
        special = self.tokenizer.special_tokens
        ends = {special[name] for name in (renderer.ending.strip(), *stop) if name in special}
        self.end_tokens = tuple(sorted(ends - {self.tokenizer.eos_id}))
        self.stop = tuple(name for name in stop if name not in special)

    @property
    def train_tokens(self) -> int:
        """Tokens of the training examples."""
        return sum(c.tokens.total for c in self.train)

    @property
    def eval_tokens(self) -> int:
        """Tokens of the held-out examples."""
        return 0 if self.evaluation is None else self.evaluation.total

    def loader(
        self, cfg: TrainConfig, blocks: Sequence[int] = (0,), block_count: int = 1
    ) -> loader_.Loader:
        """Batches of training; see `loader.make_loader`."""
        return loader_.make_loader(
            self.train,
            length=cfg.length,
            batch_size=cfg.batch_size,
            steps=cfg.steps,
            packing=cfg.data.packing,
            isolate_documents=cfg.data.isolate_documents,
            seed=cfg.seed,
            token_lengths=self.tokenizer.token_lengths(),
            shuffle=cfg.data.shuffle,
            blocks=blocks,
            block_count=block_count,
        )

    def eval_batches(
        self, cfg: TrainConfig, blocks: Sequence[int] = (0,), block_count: int = 1
    ) -> loader_.EvalBatches | None:
        """Batches of the held-out examples; see `loader.eval_batches`."""
        if self.evaluation is None:
            return None
        return loader_.eval_batches(
            self.evaluation,
            length=cfg.length,
            batch_size=cfg.eval.batch_size or cfg.batch_size // cfg.accumulation,
            packing=cfg.data.packing,
            isolate_documents=cfg.data.isolate_documents,
            rows=cfg.eval.rows,
            token_lengths=self.tokenizer.token_lengths(),
            blocks=blocks,
            block_count=block_count,
        )

    def parts(self) -> list[dict[str, Any]]:
        """A table for reports: what each part holds and what became of its rows."""
        return [dict(part) for part in self._parts]

    def prompt(self, text: str) -> list[int]:
        """Ids of `text` as a user's turn, up to where the assistant is to answer."""
        messages = _with_system([{"role": "user", "content": text}], self._data.dialogue.system)
        return self._renderer.prompt(messages)


def prepare_dialogues(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    workdir: str,
    *,
    length: int,
    writer: bool = True,
) -> Dialogues:
    """Training and held-out examples of at most `length` tokens.

    Held out are the last `eval_fraction` of the conversations of each source, or `eval_inputs`. A
    tokenizer without a `path` is trained on the rendered training part.

    Args:
      writer: False on all processes but the first, which take the tokenizer that it has written.

    Raises:
      ValueError: a malformed row under `data.dialogue.malformed=fail`; a data set of which no token
        would be trained; a packing that cuts conversations.
      FileNotFoundError: an input that does not exist.
    """
    cfg = data.dialogue
    if data.packing not in ("first_fit", "pad", "bucket"):
        raise ValueError(
            f"data.packing={data.packing} cuts conversations anywhere; use first_fit, pad or bucket"
        )
    root = os.path.join(workdir, "data")
    sources = sources_of(data)
    found: list[_Part] = []
    for source in sources:
        rows, rejected = _read(source.inputs, cfg)
        start = len(rows)
        if data.eval_fraction and not data.eval_inputs:
            start = documents.held_out_start(len(rows), data.eval_fraction)
        found.append(_Part(TRAIN, source.name, rows[:start], rejected))
        if start < len(rows):
            found.append(_Part(EVAL, source.name, rows[start:], []))
    if data.eval_inputs:
        found.append(_Part(EVAL, "", *_read(data.eval_inputs, cfg)))

    chosen, chat_format = _template(cfg)
    used = _tokenizer(
        os.path.join(root, TOKENIZER), found, cfg, chosen, chat_format, tokenizer, writer
    )
    renderer = Renderer(used, train_on=cfg.train_on)
    rejected = [row for part in found for row in part.rejected]
    made: list[tuple[_Part, Tokens | None, dict[str, Any]]] = []
    for part in found:
        name = f"{part.kind} {part.name}" if data.sources and part.name else part.kind
        tokens, refused, counts = _examples(part.rows, renderer, cfg, length, name)
        rejected += refused
        counts = {"part": name, **counts, "rejected": len(part.rejected) + len(refused)}
        made.append((part, tokens, counts))
    if writer:
        _write_rejected(os.path.join(root, REJECTED), rejected)
    _report(rejected, cfg, root)
    for _, tokens, counts in made:
        if tokens is None:
            raise ValueError(_nothing_to_train(counts, cfg, length))
    by_name = {part.name: tokens for part, tokens, _ in made if part.kind == TRAIN}
    held_out = [tokens for part, tokens, _ in made if part.kind == EVAL]
    _say_once(renderer, chat_format)
    return Dialogues(
        data,
        renderer,
        root,
        [Component(s.name, by_name[s.name], s.weights) for s in sources],
        Tokens.concatenate(held_out) if held_out else None,
        [counts for *_, counts in made],
        chat_format.stop if chat_format else (),
    )


# --------------------------------------------------------------------------------------- reading


def _read(inputs: Sequence[str], cfg: DialogueConfig) -> tuple[list[Conversation], list[Rejected]]:
    return conversations.read(inputs, layout=cfg.layout, max_turn_chars=cfg.max_turn_chars)


def _report(rejected: list[Rejected], cfg: DialogueConfig, root: str) -> None:
    """Names what was left out, or fails for it."""
    if not rejected:
        return
    by_rule = ", ".join(f"{n} {rule}" for rule, n in conversations.counts(rejected).items())
    if cfg.malformed == "fail":
        raise ValueError(
            f"{len(rejected)} malformed rows ({by_rule}), the first {rejected[0]}; mend them, or "
            "leave them out with data.dialogue.malformed=skip"
        )
    logging.warning(
        "%d malformed rows are left out (%s); all are in %s",
        len(rejected),
        by_rule,
        os.path.join(root, REJECTED),
    )
    for row in rejected[:SHOWN]:
        logging.warning("  %s", row)


def _write_rejected(path: str, rejected: list[Rejected]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".partial", "w") as f:
        for row in rejected:
            line = {"file": row.source, "line": row.line, "rule": row.rule, "detail": row.detail}
            f.write(json.dumps(line) + "\n")
    os.replace(path + ".partial", path)


def _with_system(messages: Sequence[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return list(messages)


# --------------------------------------------------------------------------- template, tokenizer


def _template(cfg: DialogueConfig) -> tuple[str | None, ChatFormat | None]:
    """The template that the config names (None: the tokenizer's own), and its format if known."""
    if cfg.template in FORMATS:
        return FORMATS[cfg.template].template, FORMATS[cfg.template]
    if not cfg.template:
        return None, None
    path = os.path.expanduser(cfg.template)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"data.dialogue.template={cfg.template}: neither a file nor one of {', '.join(FORMATS)}"
        )
    with open(path, encoding="utf-8") as f:
        return f.read(), None


def _tokenizer(
    folder: str,
    found: list[_Part],
    cfg: DialogueConfig,
    template: str | None,
    chat_format: ChatFormat | None,
    config: TokenizerConfig,
    writer: bool,
) -> tokenizers.Tokenizer:
    """The tokenizer of the run, with the template, which `folder` holds afterwards."""
    if not writer:
        return tokenizers.load(folder)
    if config.path:
        made = tokenizers.load(config.path)
        if template is None and made.chat_template is None:
            raise ValueError(
                f"{config.path} has no chat template; name one in data.dialogue.template "
                f"({', '.join(FORMATS)} or a file)"
            )
    else:
        if template is None:
            raise ValueError(
                "a tokenizer that is trained now has no chat template; name one in "
                f"data.dialogue.template ({', '.join(FORMATS)} or a file)"
            )
        options = training_options(config)
        kind, max_bytes = options.pop("kind"), options.pop("train_bytes")
        names = chat_format.special_tokens if chat_format else ()
        options["special_tokens"] = tuple(dict.fromkeys([*options["special_tokens"], *names]))
        # Any tokenizer renders the text that this one is trained on.
        plain = tokenizers.train("byte", [], special_tokens=options["special_tokens"])
        texts = _rendered(found, Renderer(plain, template, train_on="all"), cfg)
        made = tokenizers.train(kind, texts, max_bytes=max_bytes, **options)
    if template is not None:
        made.chat_template = template
    save_tokenizer(made, folder, None)
    return made


def _rendered(found: list[_Part], renderer: Renderer, cfg: DialogueConfig) -> Iterator[str]:
    """The texts of the training part that the template does not refuse."""
    for part in found:
        for row in part.rows if part.kind == TRAIN else ():
            with contextlib.suppress(ValueError):
                messages = _with_system(row.messages, cfg.system)
                yield renderer.spans(messages, tools=row.tools)[0]


def _say_once(renderer: Renderer, chat_format: ChatFormat | None) -> None:
    special = renderer.tokenizer.special_tokens
    missing = [n for n in chat_format.special_tokens if n not in special] if chat_format else []
    if missing:
        logging.info(
            "note: the tokenizer has no special token %s; the template's is plain text to it",
            ", ".join(missing),
        )
    if not renderer.ending:
        logging.warning(
            "note: the template writes nothing behind an answer, so the model does not learn to end"
        )


# --------------------------------------------------------------------------------------- examples


def _examples(
    rows: list[Conversation], renderer: Renderer, cfg: DialogueConfig, length: int, name: str
) -> tuple[Tokens | None, list[Rejected], dict[str, int]]:
    """Rows as tokens (None: not one of them is trained), those that the template refuses, counts."""
    texts, kept, refused, counts = [], [], [], Counter()
    for row in rows:
        try:
            texts.append(renderer.spans(_with_system(row.messages, cfg.system), tools=row.tools))
            kept.append(row)
        except ValueError as e:
            refused.append(Rejected(row.source, row.line, "refused by the template", str(e)))
    try:
        examples = renderer.encode(texts)
    except ValueError:  # one by one, then, to find which
        examples, all_kept, kept = [], kept, []
        for row, text in zip(all_kept, texts, strict=True):
            try:
                examples += renderer.encode([text])
                kept.append(row)
            except ValueError as e:
                refused.append(Rejected(row.source, row.line, "refused by the tokenizer", str(e)))
    documents_, masks = [], []
    for row, (ids, trained) in zip(kept, examples, strict=True):
        if len(ids) > length and cfg.too_long == "drop":
            counts["dropped"] += 1
            continue
        if len(ids) > length and cfg.too_long == "oldest":
            shorter = _shortened(row, renderer, cfg, length)
            counts["shortened"] += shorter is not None
            ids, trained = shorter or (ids, trained)
        if len(ids) > length:
            counts["cut"] += 1
            ids, trained = ids[:length], trained[:length]
        if not trained[1:].any():  # nothing stands before the first token
            counts["untrained"] += 1
            continue
        documents_.append(ids)
        masks.append(trained)
    total = {
        "examples": len(documents_),
        "tokens": sum(map(len, documents_)),
        "trained tokens": int(sum(mask[1:].sum() for mask in masks)),
        **{key: counts[key] for key in ("cut", "shortened", "dropped", "untrained")},
    }
    if not documents_:
        return None, refused, total
    vocab_size = renderer.tokenizer.vocab_size
    offsets = np.cumsum([0] + [len(ids) for ids in documents_])
    ids = np.concatenate(documents_).astype(dtype_of(vocab_size))
    mask = np.concatenate(masks)
    return Tokens([ids], offsets, vocab_size=vocab_size, name=name, trained=mask), refused, total


def _shortened(row: Conversation, renderer: Renderer, cfg: DialogueConfig, length: int) -> Any:
    """Without its oldest exchanges, as few of them as need be; the last one alone if that is too
    long as well."""
    messages = _with_system(row.messages, cfg.system)
    first = next(i for i, m in enumerate(messages) if m["role"] != "system")
    starts = [i for i, m in enumerate(messages) if m["role"] == "user" and i > first]
    shorter = None
    for start in starts:
        rest = messages[start:]
        if not any(m["role"] == "assistant" for m in rest):
            break
        shorter = renderer([*messages[:first], *rest], tools=row.tools)
        if len(shorter.ids) <= length:
            break
    return shorter


def _nothing_to_train(counts: dict[str, Any], cfg: DialogueConfig, length: int) -> str:
    reasons = []
    if counts["rejected"]:
        reasons.append(f"{counts['rejected']} rows are malformed (see {REJECTED})")
    if counts["dropped"]:
        reasons.append(
            f"{counts['dropped']} are longer than --config.length={length} "
            "(data.dialogue.too_long=drop; raise it, or cut)"
        )
    if counts["untrained"]:
        reasons.append(
            f"in {counts['untrained']} no token of the assistant is left within "
            f"--config.length={length} (data.dialogue.train_on={cfg.train_on}; raise the length, or "
            "set data.dialogue.too_long=oldest)"
        )
    return (
        f"no token of the {counts['part']} data would be trained: "
        f"{'; '.join(reasons) or 'there are no rows (data.inputs, data.eval_fraction)'}"
    )
