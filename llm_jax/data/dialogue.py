"""From a data config to conversations as tokens: reads, splits, renders, cuts, reports.

Data sets for fine-tuning are small, so every process makes all of it in memory; only the writer
writes files: the tokenizer (with the chat template), `rejected.jsonl` and `rendered_on.txt`.
"""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax import tokenizers
from llm_jax.config import DataConfig, DialogueConfig, SourceConfig, TokenizerConfig
from llm_jax.data import conversations, documents
from llm_jax.data.chat_corpus import (
    REJECTED,
    ChatCorpus,
    by_rule,
    find_template,
    keep_tokenizer,
    rendered_on,
    say_once,
    settle,
    with_system,
)
from llm_jax.data.conversations import Conversation, Rejected
from llm_jax.data.mixture import Component
from llm_jax.data.prepare import (
    EVAL,
    TRAIN,
    Texts,
    sources_of,
)
from llm_jax.data.rendering import Renderer
from llm_jax.data.tokens import Tokens, dtype_of


class _Part(NamedTuple):
    """Conversations of one source, for training or held out."""

    kind: str  # TRAIN or EVAL
    name: str  # of the source; "" for eval_inputs
    rows: list[Conversation]
    rejected: list[Rejected]


def prepare_dialogues(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    workdir: str,
    *,
    length: int,
    writer: bool = True,
) -> ChatCorpus:
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
    found = _read(data)
    rejected = [row for part in found for row in part.rejected]
    empty = [part for part in found if not part.rows]
    if empty or (rejected and cfg.malformed == "fail"):
        settle(rejected, [], cfg, root, writer)
        raise ValueError(_no_rows(empty[0], found))

    chosen, chat_format = find_template(cfg)
    now = rendered_on(root, writer)
    told = (
        (with_system(row.messages, cfg.system), row.tools)
        for part in found
        if part.kind == TRAIN
        for row in part.rows
    )
    used = keep_tokenizer(root, told, chosen, chat_format, tokenizer, now, writer)
    renderer = Renderer(used, train_on=cfg.train_on, now=now)
    made: list[tuple[_Part, Tokens | None, dict[str, Any]]] = []
    left_out: list[Rejected] = []
    for part in found:
        name = f"{part.kind} {part.name}" if data.sources and part.name else part.kind
        tokens, refused, unfit, counts = _examples(part.rows, renderer, cfg, length, name)
        rejected += refused
        left_out += unfit
        counts = {"part": name, **counts, "rejected": len(part.rejected) + len(refused)}
        made.append((part, tokens, counts))
    settle(rejected, left_out, cfg, root, writer)
    for _, tokens, counts in made:
        if tokens is None:
            raise ValueError(_nothing_to_train(counts, cfg, length))
    by_name = {part.name: tokens for part, tokens, _ in made if part.kind == TRAIN}
    parts = [counts for *_, counts in made]
    for source in sources_of(data):
        if source.text:
            by_name[source.name], counts = _replayed(source, data, used, length)
            parts.append(counts)
    held_out = [tokens for part, tokens, _ in made if part.kind == EVAL]
    say_once(renderer, chat_format)
    return ChatCorpus(
        renderer,
        root,
        [Component(s.name, by_name[s.name], s.weights) for s in sources_of(data)],
        Tokens.concatenate(held_out) if held_out else None,
        system=cfg.system,
        parts=parts,
        stop=chat_format.stop if chat_format else None,
    )


# --------------------------------------------------------------------------------------- reading


def _read(data: DataConfig) -> list[_Part]:
    """The parts of each source, and `eval_inputs`."""

    def rows_of(inputs: Sequence[str]) -> tuple[list[Conversation], list[Rejected]]:
        cfg = data.dialogue
        return conversations.read(inputs, layout=cfg.layout, max_turn_chars=cfg.max_turn_chars)

    found = []
    for source in sources_of(data):
        if source.text:
            continue
        rows, rejected = rows_of(source.inputs)
        start = len(rows)
        if data.eval_fraction and not data.eval_inputs:
            start = documents.held_out_start(len(rows), data.eval_fraction)
        found.append(_Part(TRAIN, source.name, rows[:start], rejected))
        if start < len(rows):
            found.append(_Part(EVAL, source.name, rows[start:], []))
    if data.eval_inputs:
        found.append(_Part(EVAL, "", *rows_of(data.eval_inputs)))
    return found


def _no_rows(part: _Part, found: list[_Part]) -> str:
    what = f"no token of the {part.kind} data would be trained"
    if not part.rejected:
        return f"{what}: all of its few rows are held out; lower data.eval_fraction"
    count, rules = len(part.rejected), by_rule(part.rejected)
    which = f"all of its {count} rows"
    if held_out := sum(len(other.rows) for other in found if other.name == part.name):
        which = f"{held_out} of its rows are held out (lower data.eval_fraction), the other {count}"
    return f"{what}: {which} are malformed ({rules}), the first {part.rejected[0]}"


# --------------------------------------------------------------------------------------- examples


def _examples(
    rows: list[Conversation], renderer: Renderer, cfg: DialogueConfig, length: int, name: str
) -> tuple[Tokens | None, list[Rejected], list[Rejected], dict[str, int]]:
    """Rows as tokens (None: not one of them is trained), those that the template refuses, those
    that do not fit `length` in a way that trains anything, counts."""
    texts, kept, refused, unfit, counts = [], [], [], [], Counter()
    for row in rows:
        try:
            texts.append(renderer.spans(with_system(row.messages, cfg.system), tools=row.tools))
            kept.append(row)
        except (ValueError, RecursionError) as e:
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
        written = trained.any()
        if len(ids) > length and cfg.too_long == "drop":
            counts["dropped"] += 1
            unfit.append(Rejected(row.source, row.line, "too long", f"{len(ids):,} tokens"))
            continue
        if len(ids) > length and cfg.too_long == "oldest":
            shorter = _shortened(row, renderer, cfg, length)
            counts["shortened"] += shorter is not None
            ids, trained = shorter or (ids, trained)
        if len(ids) > length:
            counts["cut"] += 1
            ids, trained = ids[:length], trained[:length]
        if not trained[1:].any():  # nothing stands before the first token
            rule = "untrained" if written else "unwritten"
            counts[rule] += 1
            unfit.append(Rejected(row.source, row.line, rule, f"in {len(ids):,} tokens"))
            continue
        documents_.append(ids)
        masks.append(trained)
    total = {
        "examples": len(documents_),
        "tokens": sum(map(len, documents_)),
        "trained tokens": int(sum(mask[1:].sum() for mask in masks)),
        **{key: counts[key] for key in ("cut", "shortened", "dropped", "untrained", "unwritten")},
    }
    if not documents_:
        return None, refused, unfit, total
    vocab_size = renderer.tokenizer.vocab_size
    offsets = np.cumsum([0] + [len(ids) for ids in documents_])
    ids = np.concatenate(documents_).astype(dtype_of(vocab_size))
    mask = np.concatenate(masks)
    made = Tokens([ids], offsets, vocab_size=vocab_size, name=name, trained=mask)
    return made, refused, unfit, total


def _replayed(
    source: SourceConfig, data: DataConfig, tokenizer: tokenizers.Tokenizer, length: int
) -> tuple[Tokens, dict[str, Any]]:
    """The training part of a source of plain text, in examples of at most `length` tokens that are
    all trained; what a text run would hold out is left out here as well."""
    before = [tokenizer.bos_id] if data.add_bos and tokenizer.bos_id is not None else []
    after = [tokenizer.eos_id] if data.add_eos and tokenizer.eos_id is not None else []
    pieces = []
    for document in Texts(data).documents(source, TRAIN):
        ids = tokenizer.encode(document.text)
        ids = [*(before if document.first else []), *ids, *(after if document.last else [])]
        pieces += [ids[i : i + length] for i in range(0, len(ids), length)]
    pieces = [ids for ids in pieces if len(ids) > 1]
    if not pieces:
        raise ValueError(f"data.sources: {source.name!r} has no text to train on")
    found = Tokens.from_lists(pieces, tokenizer.vocab_size)
    trained = np.ones(found.total, bool)
    found = Tokens(
        found.shards,
        found.offsets,
        vocab_size=tokenizer.vocab_size,
        name=source.name,
        trained=trained,
    )
    counts = {"examples": len(pieces), "tokens": found.total}
    return found, {"part": f"{TRAIN} {source.name} (text)", **counts, "trained tokens": found.total}


def _shortened(row: Conversation, renderer: Renderer, cfg: DialogueConfig, length: int) -> Any:
    """Without its oldest exchanges, as few of them as need be; the last one alone if that is too
    long as well."""
    messages = with_system(row.messages, cfg.system)
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
    if counts["unwritten"]:
        reasons.append(
            f"in {counts['unwritten']} the template writes none of the assistant's words, or has "
            "none in a {% generation %} block (data.dialogue.template)"
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
