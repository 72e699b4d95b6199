"""From a data config to answers as tokens: reads, splits by prompt, renders, lays out, reports.

Rows with the same prompt become one document that branches into their answers (`data.branches`), so
far as it fits into a row. All processes make all of it in memory; the first writes the tokenizer and
what was left out, as for conversations.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.config import DataConfig, TokenizerConfig
from llm_jax.data import answer_documents, branches, preferences
from llm_jax.data.answer_documents import Made, Said, Wanted
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

LEFT_OUT = ("too long", "untrained", "unwritten", "equal answers", "not judged")


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


class Part(NamedTuple):
    """Rows of one source, for training or held out."""

    kind: str  # TRAIN or EVAL
    name: str  # of the source; "" for eval_inputs
    rows: list[Preference]
    rejected: list[Rejected]


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
    found = read(data)
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
    made: list[tuple[Part, Made, dict[str, Any]]] = []
    left_out: list[Rejected] = []
    for part in found:
        name = f"{part.kind} {part.name}" if data.sources and part.name else part.kind
        own = answer_documents.make(part.rows, renderer, data, length, wanted)
        refused = [r for r in own.unfit if r.rule.startswith("refused")]
        left_out += [r for r in own.unfit if not r.rule.startswith("refused")]
        rejected += refused
        made.append((part, own, _counts(name, own, len(part.rejected) + len(refused), data)))
    settle(rejected, left_out, cfg, root, writer)
    for *_, counts in made:
        _check(counts, [*rejected, *left_out], wanted, length)

    def laid(documents: Sequence[branches.Document], name: str) -> Tokens:
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
        part.name: laid(own.documents, counts["part"])
        for part, own, counts in made
        if part.kind == TRAIN
    }
    held_out = [(own, counts["part"]) for part, own, counts in made if part.kind == EVAL]
    say_once(renderer, chat_format)
    corpus = Comparisons(
        renderer,
        root,
        [Component(s.name, train[s.name], s.weights) for s in sources_of(data)],
        Tokens.concatenate([laid(own.documents, n) for own, n in held_out]) if held_out else None,
        system=cfg.system,
        parts=[counts for *_, counts in made],
        stop=chat_format.stop if chat_format else None,
    )
    corpus.asked = [prompt for own, _ in held_out for prompt in own.asked]
    corpus.held_out = _numbered(own.said for own, _ in held_out)
    return corpus


def read(data: DataConfig) -> list[Part]:
    """The parts of each source, and `eval_inputs`, as a run divides them.

    Raises:
      ValueError, FileNotFoundError: as `preferences.read` does.
    """

    def rows_of(inputs: Sequence[str]) -> tuple[list[Preference], list[Rejected]]:
        layout, limit = data.preference.layout, data.dialogue.max_turn_chars
        return preferences.read(inputs, layout=layout, max_turn_chars=limit)

    found = []
    for source in sources_of(data):
        if source.text:
            raise ValueError(
                f"data.sources: {source.name!r} is text, which has no answers; drop it"
            )
        rows, rejected = rows_of(source.inputs)
        rest: list[Preference] = []
        if rows and data.eval_fraction and not data.eval_inputs:
            rows, rest = preferences.split(
                rows, data.eval_fraction, seed=data.preference.split_seed
            )
        found.append(Part(TRAIN, source.name, rows, rejected))
        if rest:
            found.append(Part(EVAL, source.name, rest, []))
    if data.eval_inputs:
        found.append(Part(EVAL, "", *rows_of(data.eval_inputs)))
    # What one source holds out is not trained on from another.
    held = {row.key for part in found if part.kind == EVAL for row in part.rows}
    return [
        part._replace(rows=[r for r in part.rows if part.kind == EVAL or r.key not in held])
        for part in found
    ]


# ---------------------------------------------------------------------------------------- counts


def _counts(name: str, made: Made, rejected: int, data: DataConfig) -> dict[str, Any]:
    """A row of the report's table."""
    documents = made.documents
    shared, ties = data.preference.shared_prompt, data.preference.ties
    rules = Counter(r.rule for r in made.unfit)
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
        "cut answers": made.cut,
        "rejected": rejected,
        **{rule: rules[rule] for rule in LEFT_OUT},
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
    """All answers, with groups that are numbered through from 0."""
    out, before = [], -1
    for part in parts:
        out += [said._replace(group=said.group + before) for said in part]
        before += max((said.group for said in part), default=0)
    return out
