"""Documents that branch: a prompt, and several answers that each go on from it.

A document is stored as one stretch of tokens, its trunk and then its branches. The trunk is the prompt
without its last token, which each branch begins with: it has to predict the first token of every
answer. What a branch is, and where it goes on from, is known of each token.

Prompt (1 2 3) with the answers (4 5) and (6 7 8):

    tokens      1 2   3 4 5   3 6 7 8
    segments    1 1   2 2 2   3 3 3 3     in a batch; of further documents in a row 4, ...
    parents     1 1   1 1 1   1 1 1 1     what a token sees besides its own segment
    positions   0 1   2 3 4   2 3 4 5
    answers     . .   1 1 1   2 2 2 2     0 elsewhere
    targets     . .   4 5 .   6 7 8 .     where they count, for direct optimisation
    weights     . .   1 1 .   1 1 1 .
    weights     . .   . . 1   . . . 1     where a reward is read

Not shared, each answer has the whole prompt in front of it: segments of their own, without parents.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Branches(NamedTuple):
    """What is known of each token (N), answer (A) and document (D) besides the ids."""

    segment_N: np.ndarray  # int32, within its document, from 0
    parent_N: np.ndarray  # int32, the segment within its document that its own goes on from
    position_N: np.ndarray  # int32
    answer_N: np.ndarray  # int32, within its document, from 1; 0: of none
    group_A: np.ndarray  # int32, within its document, from 1: answers that are compared
    label_A: np.ndarray  # float32
    tokens_A: np.ndarray  # int64, that a model is to write
    first_D: np.ndarray  # int64 [D + 1], where a document's answers start
    segments_D: np.ndarray  # int64, of each document
    groups_D: np.ndarray  # int64, of each document
    shared: bool  # prompts are in front of their answers once

    @property
    def answers_D(self) -> np.ndarray:
        """Answers of each document."""
        return np.diff(self.first_D)


class Document(NamedTuple):
    """One prompt with answers to it."""

    prompt: Sequence[int]  # ids, at least one
    answers: Sequence[Sequence[int]]  # ids
    counted: Sequence[Sequence[bool]]  # of each answer, the tokens that a model is to write
    groups: Sequence[int]  # of each answer, from 1
    labels: Sequence[float]


class Laid(NamedTuple):
    """Documents in one stretch of tokens."""

    ids: np.ndarray
    offsets: np.ndarray  # int64 [D + 1]
    written_N: np.ndarray  # bool, tokens of answers that a model is to write
    ends_N: np.ndarray  # bool, the last token of each answer
    branches: Branches


def size(document: Document, *, shared: bool) -> int:
    """Tokens that it takes in a row."""
    answers, prompt = sum(map(len, document.answers)), len(document.prompt)
    n = len(document.answers)
    return prompt - 1 + n + answers if shared else n * prompt + answers


def lay(documents: Sequence[Document], *, shared: bool) -> Laid:
    """The tokens of documents, their prompts once (`shared`) or in front of every answer."""
    ids, written, ends, segment, parent, position, answer = ([] for _ in range(7))
    groups, labels, sizes, counts, n_segments, n_groups = ([] for _ in range(6))

    def add(part, *, counted, number, own, goes_on, start, at):
        """One stretch: `at` is how many of its first tokens are of no answer."""
        n = len(part)
        ids.append(np.asarray(part, np.int64))
        mask = np.zeros(n, bool)
        mask[n - len(counted) :] = counted
        written.append(mask)
        end = np.zeros(n, bool)
        end[-1:] = number > 0
        ends.append(end)
        for values, value in ((segment, own), (parent, goes_on)):
            values.append(np.full(n, value, np.int32))
        position.append(np.arange(start, start + n, dtype=np.int32))
        answer.append(np.where(np.arange(n) < at, 0, number).astype(np.int32))
        return n

    for d in documents:
        P, total, own = len(d.prompt), 0, 0
        if shared and P > 1:
            total += add(d.prompt[:-1], counted=(), number=0, own=0, goes_on=0, start=0, at=P)
            own = 1
        for number, (tokens, counted) in enumerate(zip(d.answers, d.counted, strict=True), 1):
            first = P - 1 if shared else 0
            total += add(
                [*d.prompt[first:], *tokens],
                counted=counted,
                number=number,
                own=own,
                goes_on=0 if shared and P > 1 else own,
                start=first,
                at=P - 1 - first,
            )
            own += 1
        sizes.append(total)
        counts.append(len(d.answers))
        n_segments.append(own)
        n_groups.append(max(d.groups))
        groups += d.groups
        labels += d.labels
    return Laid(
        np.concatenate(ids),
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        np.concatenate(written),
        np.concatenate(ends),
        Branches(
            *(np.concatenate(x) for x in (segment, parent, position, answer)),
            np.array(groups, np.int32),
            np.array(labels, np.float32),
            np.array([sum(c) for d in documents for c in d.counted], np.int64),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            np.array(n_segments, np.int64),
            np.array(n_groups, np.int64),
            shared,
        ),
    )


def concatenate(parts: Sequence[Branches]) -> Branches:
    """Those of several streams of tokens, one after another."""
    firsts, total = [np.zeros(1, np.int64)], 0
    for p in parts:
        firsts.append(p.first_D[1:] + total)
        total += p.first_D[-1]
    names = set(Branches._fields) - {"first_D", "shared"}
    joined = {n: np.concatenate([getattr(p, n) for p in parts]) for n in names}
    return Branches(**joined, first_D=np.concatenate(firsts), shared=parts[0].shared)


class Pieces(NamedTuple):
    """The documents of some rows, in the order of the rows."""

    document_P: np.ndarray  # int64, which
    row_P: np.ndarray  # int64, in which row
    first_P: np.ndarray  # int64, the first piece of its row


def _before(counts_P: np.ndarray, first_P: np.ndarray) -> np.ndarray:
    """How many of what is counted stand in a row before each piece."""
    before_P = np.cumsum(counts_P) - counts_P
    return before_P - before_P[first_P]


def token_numbers(
    b: Branches, pieces: Pieces, index_N: np.ndarray, piece_N: np.ndarray
) -> dict[str, np.ndarray]:
    """`segments`, `parents` (where prompts are shared), `positions` and `answers` of tokens, given
    where each stands in the stream and its piece."""
    segment_P = _before(b.segments_D[pieces.document_P], pieces.first_P)[piece_N]
    answer_P = _before(b.answers_D[pieces.document_P], pieces.first_P)[piece_N]
    own_N = b.answer_N[index_N]
    parents = {"parents": segment_P + b.parent_N[index_N] + 1} if b.shared else {}
    return parents | {
        "segments": segment_P + b.segment_N[index_N] + 1,
        "positions": b.position_N[index_N],
        "answers": np.where(own_N > 0, answer_P + own_N, 0),
    }


def answer_numbers(b: Branches, pieces: Pieces, rows: int, width: int) -> dict[str, np.ndarray]:
    """`groups`, `labels` [rows, width] of the answers of each row, and `ids`, their numbers in the
    whole stream; 0, 0 and -1 where there is none."""
    count_P = b.answers_D[pieces.document_P]
    answer_P = _before(count_P, pieces.first_P)
    group_P = _before(b.groups_D[pieces.document_P], pieces.first_P)
    within_A = np.arange(count_P.sum()) - np.repeat(np.cumsum(count_P) - count_P, count_P)
    which_A = np.repeat(b.first_D[pieces.document_P], count_P) + within_A
    place_A = np.repeat(pieces.row_P * width + answer_P, count_P) + within_A
    groups, labels = np.zeros(rows * width, np.int32), np.zeros(rows * width, np.float32)
    ids = np.full(rows * width, -1, np.int64)
    groups[place_A] = np.repeat(group_P, count_P) + b.group_A[which_A]
    labels[place_A] = b.label_A[which_A]
    ids[place_A] = which_A
    shape = (rows, width)
    return {
        "groups": groups.reshape(shape),
        "labels": labels.reshape(shape),
        "ids": ids.reshape(shape),
    }
