"""From a data config to answers as tokens: reads, splits by prompt, renders, lays out, reports.

Rows with the same prompt become one document that branches into their answers (`data.branches`), so
far as it fits into a row. All processes make all of it in memory; the first writes the tokenizer and
what was left out, as for conversations.
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.config import DataConfig, DialogueConfig, TokenizerConfig
from llm_jax.data import branches, preferences
from llm_jax.data.branches import Document
from llm_jax.data.chat_corpus import (
    ChatCorpus,
    by_rule,
    find_template,
    keep_tokenizer,
    rendered_on,
    say_once,
    settle,
    with_system,
)
from llm_jax.data.conversations import Rejected
from llm_jax.data.mixture import Component
from llm_jax.data.preferences import Preference
from llm_jax.data.prepare import EVAL, TRAIN, sources_of
from llm_jax.data.rendering import Renderer
from llm_jax.data.tokens import Tokens, dtype_of
from llm_jax.types import OTHERS


class Wanted(NamedTuple):
    """What a run makes of answers."""

    reads: str = (
        "answers"  # "answers": their tokens are targets; "ends": their last tokens are read
    )
    pairs: bool = True  # answers without another to compare them with are of no use
    others: bool = False  # each document gets an answer to another prompt (KTO)


class Said(NamedTuple):
    """One held-out answer, for reports."""

    prompt: tuple[dict[str, Any], ...]
    answer: tuple[dict[str, Any], ...]
    group: int  # answers that are compared share it
    label: float
    tokens: int  # that a model is to write


class Comparisons(ChatCorpus):
    """A `ChatCorpus` of answers to compare.

    Attributes:
      held_out: what each answer of the evaluation data is, in its order.
    """

    held_out: list[Said]
    asked: list[tuple[dict[str, Any], ...]]  # prompts of the evaluation data, each once

    def prompts(self, limit: int) -> list[list[dict[str, Any]]]:
        """Up to `limit` held-out prompts, as they are rendered."""
        return [with_system(prompt, self._system) for prompt in self.asked[:limit]]


class _Part(NamedTuple):
    kind: str  # TRAIN or EVAL
    name: str  # of the source; "" for eval_inputs
    rows: list[Preference]
    rejected: list[Rejected]


class _Answer(NamedTuple):
    """A whole conversation in tokens; `trained` are those of the answer."""

    ids: np.ndarray
    trained: np.ndarray


def prepare_preferences(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    workdir: str,
    *,
    length: int,
    wanted: Wanted,
    writer: bool = True,
) -> Comparisons:
    """Training and held-out answers, in rows of at most `length` tokens.

    Held out are all rows of `eval_fraction` of the prompts of each source, or `eval_inputs`, from
    which prompts that are trained on are taken out.

    Args:
      writer: False on all processes but the first, which take the tokenizer that it has written.

    Raises:
      ValueError: a malformed row under `data.dialogue.malformed=fail`; a data set in which nothing
        can be compared; a packing that cuts answers.
      FileNotFoundError: an input that does not exist.
    """
    cfg = data.dialogue
    if data.packing not in ("first_fit", "pad", "bucket"):
        raise ValueError(
            f"data.packing={data.packing} cuts answers anywhere; use first_fit, pad or bucket"
        )
    root = os.path.join(workdir, "data")
    found = _read(data)
    rejected = [row for part in found for row in part.rejected]
    for part in found:
        if not part.rows:
            settle(rejected, [], cfg, root, writer)
            rules = f": all rows are malformed ({by_rule(rejected)}), the first {rejected[0]}"
            why = rules if rejected else "; see --input and data.eval_fraction"
            raise ValueError(f"no answers in the {part.kind} data{why}")
    template, chat_format = find_template(cfg)
    now = rendered_on(root, writer)
    told = (
        (with_system([*row.prompt, *answer], cfg.system), row.tools)
        for part in found
        if part.kind == TRAIN
        for row in part.rows
        for answer in row.answers
    )
    used = keep_tokenizer(root, told, template, chat_format, tokenizer, now, writer)
    renderer = Renderer(used, now=now)
    made: list[tuple[_Part, list[Document], list[Said], dict[str, Any]]] = []
    left_out: list[Rejected] = []
    for part in found:
        name = f"{part.kind} {part.name}" if data.sources and part.name else part.kind
        documents, said, unfit = _documents(part.rows, renderer, data, length, wanted)
        refused = [r for r in unfit if r.rule.startswith("refused")]
        left_out += [r for r in unfit if not r.rule.startswith("refused")]
        rejected += refused
        counts = _counts(name, documents, unfit, len(part.rejected) + len(refused), data)
        made.append((part, documents, said, counts))
    settle(rejected, left_out, cfg, root, writer)
    for _, _, _, counts in made:
        _check(counts, [*rejected, *left_out], wanted, length)

    def laid(documents: list[Document], name: str) -> Tokens:
        stream = branches.lay(documents, shared=data.preference.shared_prompt)
        size = renderer.tokenizer.vocab_size
        return Tokens(
            [stream.ids.astype(dtype_of(size))],
            stream.offsets,
            vocab_size=size,
            name=name,
            trained=stream.written_N,
            read=stream.ends_N if wanted.reads == "ends" else None,
            branches=stream.branches,
        )

    train = {
        part.name: laid(documents, counts["part"])
        for part, documents, _, counts in made
        if part.kind == TRAIN
    }
    held_out = [laid(d, c["part"]) for part, d, _, c in made if part.kind == EVAL]
    say_once(renderer, chat_format)
    corpus = Comparisons(
        renderer,
        root,
        [Component(s.name, train[s.name], s.weights) for s in sources_of(data)],
        Tokens.concatenate(held_out) if held_out else None,
        system=cfg.system,
        parts=[counts for *_, counts in made],
        stop=chat_format.stop if chat_format else None,
    )
    by_key = {row.key: row.prompt for part in found if part.kind == EVAL for row in part.rows}
    corpus.asked = list(by_key.values())
    corpus.held_out = _numbered(said for part, _, said, _ in made if part.kind == EVAL)
    return corpus


def _read(data: DataConfig) -> list[_Part]:
    """The parts of each source, and `eval_inputs`."""

    def rows_of(inputs: Sequence[str]) -> tuple[list[Preference], list[Rejected]]:
        layout, limit = data.preference.layout, data.dialogue.max_turn_chars
        return preferences.read(inputs, layout=layout, max_turn_chars=limit)

    held_out = rows_of(data.eval_inputs) if data.eval_inputs else ([], [])
    taken = {row.key for row in held_out[0]}
    found = []
    for source in sources_of(data):
        if source.text:
            raise ValueError(
                f"data.sources: {source.name!r} is text, which has no answers; drop it"
            )
        rows, rejected = rows_of(source.inputs)
        rest: list[Preference] = []
        if data.eval_inputs:
            rows = [row for row in rows if row.key not in taken]
        elif rows and data.eval_fraction:
            rows, rest = preferences.split(
                rows, data.eval_fraction, seed=data.preference.split_seed
            )
        found.append(_Part(TRAIN, source.name, rows, rejected))
        if rest:
            found.append(_Part(EVAL, source.name, rest, []))
    if data.eval_inputs:
        found.append(_Part(EVAL, "", *held_out))
    return found


# ------------------------------------------------------------------------------------- documents


def _documents(
    rows: list[Preference], renderer: Renderer, data: DataConfig, length: int, wanted: Wanted
) -> tuple[list[Document], list[Said], list[Rejected]]:
    """Rows as documents, what their answers are, and rows that cannot be used."""
    shared, unfit = data.preference.shared_prompt, []
    clusters: dict[Any, list[tuple[Preference, list[_Answer]]]] = {}
    for number, row in enumerate(rows):
        answers = _fitting(row, renderer, data, length, unfit)
        if answers is not None:
            # Rows that share their prompt share its tokens.
            key = row.key if shared else number
            clusters.setdefault(key, []).append((row, answers))
    documents, said = [], []
    for cluster in clusters.values():
        start = 0
        while start < len(cluster):
            count = 1
            document = _document(cluster[start : start + 1])
            while start + count < len(cluster):
                wider = _document(cluster[start : start + count + 1])
                if branches.size(wider, shared=shared) > length:
                    break
                document, count = wider, count + 1
            here = cluster[start : start + count]
            documents.append(document)
            flat = ((row, answer) for row, _ in here for answer in row.answers)
            for (row, answer), group, label, counted in zip(
                flat, document.groups, document.labels, document.counted, strict=True
            ):
                said.append(Said(row.prompt, answer, group, label, int(sum(counted))))
            start += count
    if wanted.others:
        documents = _with_others(documents, length, shared)
        said = []  # answers to other prompts are in between; KTO is not reported answer by answer
    return documents, said, unfit


def _document(rows: Sequence[tuple[Preference, list[_Answer]]]) -> Document:
    """Rows with one prompt as one document.

    The prompt is what all renderings begin with, up to the first token that is trained. Absolute
    scores compare across rows, rankings within theirs.
    """
    answers = [answer for _, own in rows for answer in own]
    n = min(int(np.argmax(a.trained)) for a in answers)
    first = answers[0].ids[:n]
    for other in answers[1:]:
        differs = np.flatnonzero(first != other.ids[: len(first)])
        first = first[: differs[0]] if len(differs) else first
    n, groups, labels = len(first), [], []
    for number, (row, _) in enumerate(rows, 1):
        groups += [number if row.kind == "ranked" else 0] * len(row.answers)
        labels += [float(x) for x in row.labels]
    order = {g: i for i, g in enumerate(dict.fromkeys(groups), 1)}
    groups = [order[g] for g in groups]
    return Document(
        first,
        [a.ids[n:] for a in answers],
        [a.trained[n:] for a in answers],
        groups,
        labels,
    )


def _fitting(
    row: Preference, renderer: Renderer, data: DataConfig, length: int, unfit: list[Rejected]
) -> list[_Answer] | None:
    """A row's answers, short enough for one row of a batch; None, and a line in `unfit`, if they
    cannot be used."""
    cfg, shared = data.dialogue, data.preference.shared_prompt

    def leave_out(rule: str, detail: str) -> None:
        unfit.append(Rejected(row.source, row.line, rule, detail))

    try:
        answers = _rendered(row.prompt, row, renderer, cfg)
    except (ValueError, RecursionError) as e:
        return leave_out("refused by the template", str(e))
    if not all(a.trained[1:].any() for a in answers):
        return leave_out("unwritten", "an answer of which the template marks no word")
    if not len(_document([(row, answers)]).prompt):
        return leave_out("no prompt", "no token stands in front of the answers")
    size = branches.size(_document([(row, answers)]), shared=shared)
    if size > length and cfg.too_long == "drop":
        return leave_out("too long", f"{size:,} tokens")
    prompt = row.prompt
    while size > length and cfg.too_long == "oldest":
        prompt = _without_oldest(prompt)
        if prompt is None:
            break
        answers = _rendered(prompt, row, renderer, cfg)
        size = branches.size(_document([(row, answers)]), shared=shared)
    if size > length:
        document = _document([(row, answers)])
        kept = _limits(document, length, shared)
        n = len(document.prompt)
        answers = [_Answer(a.ids[: n + k], a.trained[: n + k]) for a, k in zip(answers, kept)]
        if min(kept) <= 0 or not all(a.trained.any() for a in answers):
            return leave_out(
                "untrained", f"a prompt of {n:,} tokens leaves no room for answers in {length:,}"
            )
    texts = [a.ids.tobytes() for a in answers]
    if len(set(texts)) < len(texts):
        return leave_out("equal answers", f"they differ after {length:,} tokens, or not at all")
    return answers


def _rendered(
    prompt: Sequence[dict], row: Preference, renderer: Renderer, cfg: DialogueConfig
) -> list[_Answer]:
    """Whole conversations in tokens, up to the last that the model is to write."""
    asked, answers = with_system(prompt, cfg.system), []
    texts = [
        renderer.spans([*asked, *answer], tools=row.tools, after=len(asked))
        for answer in row.answers
    ]
    for ids, trained in renderer.encode(texts):
        end = len(trained) - int(np.argmax(trained[::-1])) if trained.any() else len(trained)
        answers.append(_Answer(ids[:end], trained[:end]))
    return answers


def _without_oldest(prompt: Sequence[dict]) -> tuple[dict, ...] | None:
    """A prompt without its oldest exchange; None if one question is left."""
    starts = [i for i, m in enumerate(prompt) if m["role"] == "user"]
    if len(starts) < 2:
        return None
    lead = itertools.takewhile(lambda m: m["role"] == "system", prompt)
    return (*lead, *prompt[starts[1] :])


def _limits(document: Document, length: int, shared: bool) -> list[int]:
    """How many tokens of each answer are kept, so that all fit: the longest lose first."""
    n, sizes = len(document.answers), [len(a) for a in document.answers]
    room = length - branches.size(document._replace(answers=[()] * n), shared=shared)
    limit, left = 0, n
    for size in sorted(sizes):
        if size * left > room:
            limit = room // left
            break
        room, left, limit = room - size, left - 1, size
    return [min(size, limit) for size in sizes]


def _with_others(documents: list[Document], length: int, shared: bool) -> list[Document]:
    """Documents with an answer to the next one's prompt, cut to the room that is left."""
    out = []
    for document, other in zip(documents, [*documents[1:], *documents[:1]], strict=True):
        # What was judged at all is 1 or 0: the better half of a pair, and the other.
        best = {
            g: max(x for h, x in zip(document.groups, document.labels) if h == g)
            for g in document.groups
        }
        paired = len(set(document.labels)) > 1
        labels = [
            float(x == best[g]) if paired else float(x > 0)
            for g, x in zip(document.groups, document.labels, strict=True)
        ]
        base = document._replace(labels=labels)
        room = length - branches.size(base, shared=shared) - (1 if shared else len(base.prompt))
        if room > 0 and other is not document:
            base = base._replace(
                answers=[*base.answers, other.answers[0][:room]],
                counted=[*base.counted, other.counted[0][:room]],
                groups=[*base.groups, 1],
                labels=[*labels, OTHERS],
            )
        out.append(base)
    return out


# ---------------------------------------------------------------------------------------- counts


def _counts(
    name: str, documents: list[Document], unfit: list[Rejected], rejected: int, data: DataConfig
) -> dict[str, Any]:
    """A row of the report's table."""
    shared, ties = data.preference.shared_prompt, data.preference.ties
    rules = Counter(r.rule for r in unfit)
    pairs, shorter, lengths = 0, 0.0, {1: [], 0: []}
    for d in documents:
        sizes = [int(np.sum(c)) for c in d.counted]
        for group in set(d.groups):
            own = [i for i, g in enumerate(d.groups) if g == group and d.labels[i] != OTHERS]
            for i, j, _, probability in preferences.ordered_pairs(
                [d.labels[i] for i in own], ties=ties
            ):
                pairs += 1
                if probability == 1.0:
                    better, worse = sizes[own[i]], sizes[own[j]]
                    shorter += (better < worse) + 0.5 * (better == worse)
                    lengths[1].append(better)
                    lengths[0].append(worse)
    answers = sum(len(d.answers) for d in documents)
    tokens = sum(branches.size(d, shared=shared) for d in documents)
    decided = max(len(lengths[1]), 1)
    return {
        "part": name,
        "prompts": len(documents),
        "answers": answers,
        "pairs": pairs,
        "tokens": tokens,
        "tokens without sharing": sum(branches.size(d, shared=False) for d in documents),
        "preferred tokens": sum(lengths[1]) / decided,
        "other tokens": sum(lengths[0]) / decided,
        "shorter preferred": shorter / decided,
        "rejected": rejected,
        **{rule: rules[rule] for rule in ("too long", "untrained", "unwritten", "equal answers")},
    }


def _check(counts: dict[str, Any], left_out: list[Rejected], wanted: Wanted, length: int) -> None:
    """Raises ValueError for a part from which nothing can be learned."""
    why = f": {by_rule(left_out)}, the first {left_out[0]}" if left_out else ""
    if not counts["answers"]:
        raise ValueError(
            f"no answer of the {counts['part']} data can be used{why} (--config.length={length}, "
            "data.dialogue.too_long)"
        )
    if wanted.pairs and not counts["pairs"]:
        raise ValueError(
            f"no pair in the {counts['part']} data: {counts['answers']} answers, none of them "
            f"preferred to another of the same prompt{why}; use reward.loss=regression, dpo.loss=kto "
            "or data.preference.ties=half"
        )


def _numbered(parts: Iterable[list[Said]]) -> list[Said]:
    """All answers, with groups that are numbered through."""
    out, number, last = [], -1, None
    for said in itertools.chain.from_iterable(parts):
        key = (said.prompt, said.group)
        if key != last:
            number, last = number + 1, key
        out.append(said._replace(group=number))
    return out
