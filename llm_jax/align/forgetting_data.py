"""Rows of the forgetting experiment: examples of tasks, windows of the original text, batches.

Every row counts once, whatever it holds: a target's weight is 1 / (targets of its row). Otherwise a
window of the original text, all of whose tokens are targets, would outweigh fifty answers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_jax.data.instructions import HELD_OUT, TRAIN, Example, examples
from llm_jax.data.tokens import Tokens
from llm_jax.decode.generate import start_ids
from llm_jax.eval.scoring import encode_pair
from llm_jax.tokenizers import Tokenizer
from llm_jax.types import Batch


@dataclass(frozen=True)
class Encoded:
    """An example as ids: the prompt, and each answer that may be chosen (or the right one)."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    right: int  # number of the right answer

    @property
    def row(self) -> tuple[int, ...]:
        """Prompt and right answer."""
        return self.prompt + self.answers[self.right]


def encode(tokenizer: Tokenizer, example: Example) -> Encoded:
    """Question, line break, answer, end of text: a base model knows no chat template."""
    asked, answer = (m["content"] for m in example.messages[-2:])
    ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    prompt, answers = [], []
    for text in example.choices or (answer,):
        prompt, ids = encode_pair(tokenizer, f"{asked}\n", text)
        answers.append((*ids, *ends))
    right = example.answer if example.choices else 0
    return Encoded((*start_ids(tokenizer), *prompt), tuple(answers), right)


@dataclass(frozen=True)
class TaskData:
    """A task's examples that fit a row; what did not is counted."""

    name: str
    train: tuple[Encoded, ...]
    held_out: tuple[Encoded, ...]
    too_long: int


def read_task(
    name: str, folder: str, tokenizer: Tokenizer, *, length: int, train: int, held_out: int
) -> TaskData:
    """At most so many examples of each part, whose rows have at most `length` tokens.

    Raises:
      ValueError: fewer than `train` or no held-out example fit.
    """
    limit = 2 * max(train, held_out) + 100  # long ones go
    while True:
        parts, _ = examples(name, folder, limit=limit)
        found = _fitting(name, parts, tokenizer, length, {TRAIN: train, HELD_OUT: held_out})
        enough = len(found.train) >= train and found.held_out
        if enough or max(map(len, parts.values())) < limit:
            break
        limit *= 4
    if not enough:
        raise ValueError(
            f"{name}: only {len(found.train)} examples of {train} for training and "
            f"{len(found.held_out)} held-out ones fit --length={length} tokens; raise it, ask for "
            "fewer examples (--examples), or leave the task out (--tasks)"
        )
    return found


def _fitting(
    name: str,
    parts: Mapping[str, Sequence[Example]],
    tokenizer: Tokenizer,
    length: int,
    most: Mapping[str, int],
) -> TaskData:
    """The first of each part that fit."""
    kept, too_long = {}, 0
    for part, wanted in most.items():
        kept[part] = []
        for example in parts[part]:
            if len(kept[part]) == wanted:
                break
            found = encode(tokenizer, example)
            longest = len(found.prompt) + max(map(len, found.answers))
            if longest <= length + 1:
                kept[part].append(found)
            else:
                too_long += 1
    return TaskData(name, tuple(kept[TRAIN]), tuple(kept[HELD_OUT]), too_long)


def interleaved(parts: Sequence[Sequence[Any]], total: int) -> list:
    """`total` items, the same number (to within one) of each part, in turn."""
    each = [list(part[: -(-total // len(parts))]) for part in parts]
    return [part[i] for i in range(max(map(len, each))) for part in each if i < len(part)][:total]


def drawn(rows: Sequence[Any], seed: int) -> list:
    """All of them in an order of the seed's."""
    return [rows[i] for i in np.random.default_rng([seed, 17]).permutation(len(rows))]


class Rows:
    """Batches by step: `per_step` rows of the examples, beside other rows of other kinds."""

    def __init__(
        self,
        examples: Sequence[Encoded],
        *,
        per_step: int,
        length: int,
        seed: int,
        others: Sequence[Encoded] = (),
        others_per_step: int = 0,
        original: Tokens | None = None,
        original_per_step: int = 0,
    ):
        self._length, self._seed = length, seed
        self._kinds = [(examples, per_step), (others, others_per_step)]
        self._original, self._windows = original, original_per_step
        self.batch_size = per_step + others_per_step + original_per_step

    def steps(self, epochs: int) -> int:
        """Steps that show every example `epochs` times."""
        rows, per_step = self._kinds[0]
        return -(-len(rows) * epochs // per_step)

    def batch(self, step: int) -> Batch:
        """[batch_size, length] rows; a function of the seed and the step alone."""
        L, B = self._length, self.batch_size
        tokens, targets, segments = np.zeros((3, B, L), np.int32)
        weights = np.zeros((B, L), np.float32)
        for b, (ids, first) in enumerate(self._step(step)):
            n = len(ids) - 1
            tokens[b, :n], targets[b, :n], segments[b, :n] = ids[:-1], ids[1:], 1
            weights[b, first - 1 : n] = 1 / (n - first + 1)
        positions = np.where(segments > 0, np.arange(L, dtype=np.int32), 0)
        return Batch(
            tokens=tokens, segments=segments, positions=positions, targets=targets, weights=weights
        )

    def _step(self, step: int) -> Iterator[tuple[Sequence[int], int]]:
        """(ids, place of the first that is a target) of each row of a step."""
        for kind, (rows, per_step) in enumerate(self._kinds):
            for number in range(step * per_step, (step + 1) * per_step):
                epoch, place = divmod(number, len(rows))
                order = np.random.default_rng([self._seed, kind, epoch]).permutation(len(rows))
                example = rows[order[place]]
                yield example.row, len(example.prompt)
        if self._windows:
            rng = np.random.default_rng([self._seed, len(self._kinds), step])
            width = self._length + 1
            starts = rng.integers(0, self._original.total - width + 1, self._windows)
            for window in self._original.windows(starts, width):
                yield window, 1
