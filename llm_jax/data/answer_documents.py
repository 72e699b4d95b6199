"""Preferences as documents of tokens: a prompt with the answers to it that fit into a row together."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.config import DataConfig, DialogueConfig
from llm_jax.data import branches
from llm_jax.data.branches import Document
from llm_jax.data.chat_corpus import with_system
from llm_jax.data.conversations import Rejected
from llm_jax.data.preferences import KINDS, Preference
from llm_jax.data.rendering import Renderer
from llm_jax.types import OTHERS

_NOT_JUDGED = "kto needs true or false, or one answer that is better than another"
_NEITHER = 0.5  # the label of KTO's answers of which nobody says whether they are good


class Wanted(NamedTuple):
    """What a run makes of answers."""

    # "answers": their tokens are targets; "ends": their last tokens are read
    reads: str = "answers"
    pairs: bool = True  # answers without another to compare them with are of no use
    others: bool = False  # each document gets an answer to another prompt (KTO)


class Said(NamedTuple):
    """One held-out answer, for reports."""

    prompt: tuple[dict[str, Any], ...]
    answer: tuple[dict[str, Any], ...]
    group: int  # answers that are compared share it
    label: float
    tokens: int  # that a model is to write


class _Answer(NamedTuple):
    """A whole conversation in tokens; `trained` are those of the answer."""

    ids: np.ndarray
    trained: np.ndarray
    cut: bool = False  # its end did not fit


class _Fitted(NamedTuple):
    """A row with its answers in tokens."""

    row: Preference
    answers: list[_Answer]


class Made(NamedTuple):
    """What became of rows."""

    documents: list[Document]
    said: list[Said]  # of each answer in order; none with `Wanted.others`
    unfit: list[Rejected]
    cut: int  # answers whose end did not fit
    asked: list[tuple[dict[str, Any], ...]]  # the prompts, each once


def make(
    rows: list[Preference], renderer: Renderer, data: DataConfig, length: int, wanted: Wanted
) -> Made:
    """Documents of at most `length` tokens.

    Rows with the same prompt share a document so far as they fit. In it scores are compared across
    rows, and so are judgements; rankings only within theirs.
    """
    shared, unfit = data.preference.shared_prompt, []
    clusters: dict[Any, list[_Fitted]] = {}
    for number, row in enumerate(rows):
        answers = _fitting(row, renderer, data, length, unfit)
        if answers is not None:
            # Without a shared prompt a ranking has nothing to gain from others.
            alone = row.kind == "ranked" and not shared
            clusters.setdefault(number if alone else row.key, []).append(_Fitted(row, answers))
    documents, said, prompts, asked, cut, groups = [], [], [], {}, 0, 0
    for cluster in clusters.values():
        # The answers of a group stand side by side.
        cluster.sort(key=lambda f: KINDS.index(f.row.kind), reverse=True)
        start = 0
        while start < len(cluster):
            count = 1
            document = _document(cluster[start : start + 1])
            while start + count < len(cluster):
                wider = _document(cluster[start : start + count + 1])
                if not len(wider.prompt) or branches.size(wider, shared=shared) > length:
                    break
                document, count = wider, count + 1
            here = cluster[start : start + count]
            start += count
            if wanted.others:
                document = document._replace(labels=_desirable(document, here))
                if not {0.0, 1.0} & {*document.labels}:
                    unfit += [
                        Rejected(f.row.source, f.row.line, "not judged", _NOT_JUDGED) for f in here
                    ]
                    continue
            documents.append(document)
            prompts.append(here[0].row.key)
            asked.setdefault(prompts[-1], here[0].row.prompt)
            cut += sum(answer.cut for f in here for answer in f.answers)
            flat = ((f.row, answer) for f in here for answer in f.row.answers)
            for (row, answer), group, label, counted in zip(
                flat, document.groups, document.labels, document.counted, strict=True
            ):
                said.append(Said(row.prompt, answer, groups + group, label, int(sum(counted))))
            groups += max(document.groups)
    if wanted.others:
        # Answers to other prompts are in between; KTO is not reported answer by answer.
        documents, said = _with_others(documents, prompts, length, shared), []
    return Made(documents, said, unfit, cut, list(asked.values()))


def _document(rows: Sequence[_Fitted]) -> Document:
    """Rows with one prompt as one document.

    The prompt is what all renderings begin with, up to the first token that is trained.
    """
    answers = [answer for f in rows for answer in f.answers]
    n = min(int(np.argmax(a.trained)) for a in answers)
    first = answers[0].ids[:n]
    for other in answers[1:]:
        differs = np.flatnonzero(first != other.ids[: len(first)])
        first = first[: differs[0]] if len(differs) else first
    n, groups, labels = len(first), [], []
    for number, (row, _) in enumerate(rows):
        groups += [number if row.kind == "ranked" else row.kind] * len(row.answers)
        labels += [float(x) for x in row.labels]
    order = {g: i for i, g in enumerate(dict.fromkeys(groups), 1)}
    return Document(
        first,
        [a.ids[n:] for a in answers],
        [a.trained[n:] for a in answers],
        [order[g] for g in groups],
        labels,
    )


def _fitting(
    row: Preference,
    renderer: Renderer,
    data: DataConfig,
    length: int,
    unfit: list[Rejected],
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
    if not len(_document([_Fitted(row, answers)]).prompt):
        return leave_out("no prompt", "no token stands in front of the answers")
    size = branches.size(_document([_Fitted(row, answers)]), shared=shared)
    if size > length and cfg.too_long == "drop":
        return leave_out("too long", f"{size:,} tokens")
    prompt = row.prompt
    while size > length and cfg.too_long == "oldest":
        prompt = _without_oldest(prompt)
        if prompt is None:
            break
        answers = _rendered(prompt, row, renderer, cfg)
        size = branches.size(_document([_Fitted(row, answers)]), shared=shared)
    if size > length:
        document = _document([_Fitted(row, answers)])
        kept = _limits(document, length, shared)
        n = len(document.prompt)
        answers = [
            _Answer(a.ids[: n + k], a.trained[: n + k], n + k < len(a.ids))
            for a, k in zip(answers, kept)
        ]
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


# ------------------------------------------------------------------------------------ single answers


def _desirable(document: Document, rows: Sequence[_Fitted]) -> list[float]:
    """KTO's labels of a document's answers: what was judged as it was; of others the best of their
    group 1 and the rest 0, where one is better than another."""
    judged = [f.row.kind == "judged" for f in rows for _ in f.answers]
    of_group: dict[int, list[float]] = {}
    for group, label in zip(document.groups, document.labels, strict=True):
        of_group.setdefault(group, []).append(label)
    out = []
    for group, label, known in zip(document.groups, document.labels, judged, strict=True):
        own = of_group[group]
        if known:
            out.append(label)
        else:
            out.append(_NEITHER if min(own) == max(own) else float(label == max(own)))
    return out


def _with_others(
    documents: list[Document], prompts: list[str], length: int, shared: bool
) -> list[Document]:
    """Documents with an answer to the next prompt that is another, cut to the room that is left."""
    out = []
    for i, document in enumerate(documents):
        following = (j % len(documents) for j in range(i + 1, i + len(documents)))
        j = next((j for j in following if prompts[j] != prompts[i]), None)
        room = length - branches.size(document, shared=shared)
        room -= 1 if shared else len(document.prompt)
        if room > 0 and j is not None:
            document = document._replace(
                answers=[*document.answers, documents[j].answers[0][:room]],
                counted=[*document.counted, documents[j].counted[0][:room]],
                groups=[*document.groups, 1],
                labels=[*document.labels, OTHERS],
            )
        out.append(document)
    return out
