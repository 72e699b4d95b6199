"""Rows to batches: a function of (seed, step), so the state of the data is the step number."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llm_jax.data import packing as packing_
from llm_jax.data.mixture import Component, Mixture, check_weights
from llm_jax.data.permutation import permute
from llm_jax.data.tokens import Tokens
from llm_jax.types import Batch

PREFETCHED_GROUPS = 4
BUCKET_STEPS = 32  # rows of so many steps are sorted by length together
GROUP_TOKENS = 1 << 14
BLOCK_ROWS = 1024


class Loader:
    """Batches of training, by step number or one after another; made by `make_loader`.

    Attributes:
      steps: number of batches.
      identity: JSON-ready dict of all that the batches depend on; equal for equal data order. A
        checkpoint stores it beside the step number, and a resumed run compares.
      epoch_rows: rows of one pass over each source.
      utilisation: share of row places that hold a token, of each source.
    """

    def __init__(
        self,
        streams: list["_Stream"],
        mixture: Mixture,
        *,
        length: int,
        batch_size: int,
        steps: int,
        seed: int,
        token_lengths: np.ndarray,
        rows: np.ndarray,
        packing: str,
        shuffle: bool,
    ):
        self.steps = steps
        self._buckets, self._seed = packing == "bucket", seed if shuffle else None
        self._sorted = functools.lru_cache(maxsize=16)(self._sort)
        self._streams, self._mixture, self._token_lengths = streams, mixture, token_lengths
        self._rows, self._length = rows, length
        self.epoch_rows = {s.name: s.epoch_rows for s in streams}
        self.utilisation = {s.name: s.utilisation for s in streams}
        self.identity = {
            "seed": seed,
            "batch_size": batch_size,
            "sources": [s.identity for s in streams],
        }
        if len(streams) > 1 or self._buckets:
            # The curves of the weights stretch over them, and the last of them are sorted together.
            self.identity["steps"] = steps
        if self._buckets:
            self.utilisation = self._bucket_utilisation()

    def batch(self, step: int) -> Batch:
        """This process's rows of a step, as numpy arrays: its blocks of the rows that a process on
        its own would have. Raises IndexError for a step outside training."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside training's {self.steps} steps")
        return self._batches(step, step + 1)[0]

    def packed_rows(self) -> dict[str, np.ndarray]:
        """Of each source of packed documents, the rows of its plan that training meets, ascending."""
        steps = [self._step(s) for s in range(self.steps)]
        source_N = np.concatenate([source for source, _, _ in steps], axis=None)
        row_N = np.concatenate([row for _, row, _ in steps], axis=None)
        return {
            stream.name: stream.met(row_N[source_N == i]) for i, stream in enumerate(self._streams)
        }

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """`batch(start_step)`, ... to the last, made ahead of time in a background thread."""
        import grain

        if start_step >= self.steps:
            return
        # Small batches are made several at a time: making rows costs little, a call a lot.
        group = max(1, GROUP_TOKENS // (len(self._rows) * self._length))
        firsts = grain.MapDataset.range(start_step, self.steps, group)
        made = firsts.map(lambda first: self._batches(first, min(first + group, self.steps)))
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED_GROUPS)
        for batches in made.to_iter_dataset(options):
            yield from batches

    def _batches(self, start: int, stop: int) -> list[Batch]:
        steps = [self._step(s) for s in range(start, stop)]
        source_B = np.concatenate([source[self._rows] for source, _, _ in steps])
        row_B = np.concatenate([row[self._rows] for _, row, _ in steps])
        parts = []
        for i in np.unique(source_B):
            here = source_B == i
            parts.append((here, self._streams[i].rows(row_B[here])))
        leaves = _with_bytes(_merge(parts), self._token_lengths, [s.tokens for s in self._streams])
        size = len(self._rows)
        cuts = [
            (slice(i * size, (i + 1) * size), slice(length))
            for i, (_, _, length) in enumerate(steps)
        ]
        return [Batch(**{name: leaf[cut] for name, leaf in leaves.items()}) for cut in cuts]

    def _step(self, step: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(source, row number) of a step's rows, int64 [B] each, and the length of its rows."""
        if not self._buckets:
            return *self._mixture.step(step), self._length
        group, within = divmod(step, BUCKET_STEPS)
        source_SxB, row_SxB, length_S = self._sorted(group)
        return source_SxB[within], row_SxB[within], int(length_S[within])

    def _sort(self, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows of BUCKET_STEPS steps, those of like length in one step; the steps are in random
        order again. So the mixture and the epochs are those of "pad", within so many steps."""
        first = group * BUCKET_STEPS
        steps = range(first, min(first + BUCKET_STEPS, self.steps))
        source_N, row_N = np.concatenate([self._mixture.step(s) for s in steps], axis=1)
        size_N = np.empty_like(row_N)
        for i in np.unique(source_N):
            size_N[source_N == i] = self._streams[i].sizes(row_N[source_N == i])
        order_SxB = np.argsort(size_N, kind="stable").reshape(len(steps), -1)
        if self._seed is not None:
            words = [self._seed, group, *b"bucket"]
            order_SxB = np.random.default_rng(words).permutation(order_SxB)
        lengths = [
            min(packing_.bucket(n), self._length) for n in size_N[order_SxB].max(axis=1).tolist()
        ]
        return source_N[order_SxB], row_N[order_SxB], np.array(lengths)

    def _bucket_utilisation(self) -> dict[str, float]:
        """As `utilisation`, of the first thousand steps."""
        held, places = np.zeros((2, len(self._streams)))
        for group in range(min(-(-self.steps // BUCKET_STEPS), 32)):
            source_SxB, row_SxB, length_S = self._sorted(group)
            for i in np.unique(source_SxB):
                here = source_SxB == i
                held[i] += self._streams[i].sizes(row_SxB[here]).sum()
                places[i] += (here.sum(axis=1) * length_S).sum()
        share = held / np.maximum(places, 1)
        return {s.name: float(share[i]) for i, s in enumerate(self._streams)}

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate()


def make_loader(
    train: Sequence[Component],
    *,
    length: int,
    batch_size: int,
    steps: int,
    packing: str = "split",
    isolate_documents: bool = True,
    seed: int = 0,
    token_lengths: np.ndarray,
    shuffle: bool = True,
    blocks: Sequence[int] = (0,),
    block_count: int = 1,
) -> Loader:
    """A loader over weighted sources.

    Args:
      length, batch_size: tokens a row, rows a step over all processes.
      packing: "split", "first_fit" or "pad", see `llm_jax.data.packing`; or "random": windows as
        in "split", from places that are drawn anew for each row, with replacement; or "bucket": as
        "pad", but the rows of a step are of like length and padded to the longest of them alone
        (one of a few lengths, `packing.bucket`).
      isolate_documents: no token sees, or is predicted from, another document.
      token_lengths: int32 [V], UTF-8 bytes of each id.
      shuffle: rows come in another order in each epoch, and where `split` cuts differs as well;
        otherwise in the order of the text.
      blocks, block_count: of block_count equal blocks of a step's rows, those that this process
        loads, in order.

    Raises ValueError if a source has less than one row, or nothing that can be predicted.
    """
    rows = _rows_of(blocks, block_count, batch_size, "batch_size")
    if len({c.name for c in train}) < len(train):
        raise ValueError("data.sources: two sources have the same name")
    for component in train:
        check_weights(component.name, component.weights)
        _check_tokens(component.tokens, component.name, token_lengths, isolate_documents)
    streams = [
        _Stream(c, packing, length, isolate_documents, seed if shuffle else None) for c in train
    ]
    most = max(s.answers for s in streams)
    for stream in streams:  # batches of one shape, whichever sources they are from
        stream.answers = most
    return Loader(
        streams,
        Mixture([c.weights for c in train], steps, batch_size),
        length=length,
        batch_size=batch_size,
        steps=steps,
        seed=seed,
        token_lengths=np.asarray(token_lengths, np.int32),
        rows=rows,
        packing=packing,
        shuffle=shuffle,
    )


def _rows_of(blocks: Sequence[int], count: int, batch_size: int, key: str) -> np.ndarray:
    """Row numbers of some of `count` equal blocks of rows."""
    if batch_size % count:
        raise ValueError(
            f"{key}={batch_size} is not divisible by the {count} parts that the mesh cuts a batch "
            "into (mesh.data * mesh.fsdp * mesh.expert)"
        )
    return np.arange(batch_size).reshape(count, -1)[list(blocks)].reshape(-1)


class _Stream:
    """The endless rows of one source: epoch after epoch."""

    def __init__(
        self, component: Component, packing: str, length: int, isolate: bool, seed: int | None
    ):
        self.name, self.tokens = component.name, component.tokens
        self._length, self._isolate, self._seed = length, isolate, seed
        self._plan, self._slack = None, 0
        # Orders are made a block of rows at a time: most batches then only look theirs up.
        self._block = functools.lru_cache(maxsize=16)(self._order)
        self._random = packing == "random"
        if self._random and seed is None:
            raise ValueError("data.packing=random draws rows at random; it needs data.shuffle=True")
        if packing in ("split", "random"):
            targets = self.tokens.total - 1
            if targets < length:
                raise ValueError(
                    f"{self.name}: {self.tokens.total:,} tokens are less than one row of {length:,}"
                    " and the token after it; lower --config.length or add text (--input)"
                )
            # One row less where there are two: what is left gives every epoch room to shift.
            whole = targets // length
            self.epoch_rows = max(whole - 1, 1) if seed is not None else whole
            self._slack = min(targets - self.epoch_rows * length, length - 1)
            self.utilisation = 1.0
        else:
            self._plan = packing_.make_plan(self.tokens, packing, length)
            self.epoch_rows, self.utilisation = len(self._plan), self._plan.utilisation
        self.identity = {
            "name": self.name,
            "tokens": self.tokens.fingerprint(),
            "weights": [list(point) for point in component.weights],
            "packing": packing,
            "length": length,
            "isolate_documents": isolate,
            "shuffle": seed is not None,
        }

    @property
    def answers(self) -> int:
        """The most answers that a row has, of documents that branch."""
        return self._plan.answers if self._plan is not None else 0

    @answers.setter
    def answers(self, most: int) -> None:
        if self._plan is not None:
            self._plan = dataclasses.replace(self._plan, answers=most)

    def rows(self, numbers_B: np.ndarray) -> dict[str, np.ndarray]:
        """Rows by number, counted over all epochs."""
        rows_B = self._places(numbers_B)
        if self._plan is not None:
            return packing_.packed_rows(self.tokens, self._plan, rows_B, isolate=self._isolate)
        return packing_.split_rows(self.tokens, rows_B, self._length, isolate=self._isolate)

    def sizes(self, numbers_B: np.ndarray) -> np.ndarray:
        """Tokens of each of these rows where rows have one piece each ("pad", "bucket")."""
        return self._plan.sizes[self._places(numbers_B)]

    def met(self, numbers_N: np.ndarray) -> np.ndarray:
        """The rows of the plan that have these numbers, each once, ascending."""
        blocks = np.split(
            np.sort(numbers_N), np.flatnonzero(np.diff(np.sort(numbers_N) // BLOCK_ROWS)) + 1
        )
        return np.unique(
            np.concatenate([self._places(b) for b in blocks if len(b)] or [[]])
        ).astype(int)

    def _places(self, numbers_B: np.ndarray) -> np.ndarray:
        block_B = numbers_B // BLOCK_ROWS
        first = int(block_B.min())
        blocks = [self._block(b) for b in range(first, int(block_B.max()) + 1)]
        return np.concatenate(blocks)[numbers_B - first * BLOCK_ROWS]

    def _order(self, block: int) -> np.ndarray:
        """Of BLOCK_ROWS consecutive row numbers: the first token ("split", "random"), or the plan's row."""
        if self._random:
            words = [self._seed, block, *self.name.encode()]
            drawn_N = np.random.SeedSequence(words).generate_state(BLOCK_ROWS, np.uint64)
            return (drawn_N % np.uint64(self.tokens.total - self._length)).astype(np.int64)
        number_N = np.arange(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)
        epoch_N, index_N = np.divmod(number_N, self.epoch_rows)
        offset_N = np.zeros_like(index_N)
        for epoch in np.unique(epoch_N) if self._seed is not None else ():
            here = epoch_N == epoch
            words = [self._seed, int(epoch), *self.name.encode()]
            key, shift = np.random.SeedSequence(words).generate_state(2, np.uint64).tolist()
            index_N[here] = permute(index_N[here], self.epoch_rows, key)
            offset_N[here] = shift % (self._slack + 1)
        return index_N if self._plan is not None else index_N * self._length + offset_N


class EvalBatches:
    """The batches of a held-out text, in order; `len`, iteration and indexing.

    Attributes:
      rows: how many there are.
      batch_size: rows of a batch, over all processes.
      plan: of packed documents, which of them each row holds; else None.
      chosen: int64, the plan's rows in the order in which they come.
    """

    def __init__(self, make: Any, batch_size: int, plan: packing_.Plan | None, chosen: np.ndarray):
        self._make, self.rows, self.batch_size = make, len(chosen), batch_size
        self.plan, self.chosen = plan, chosen

    def __len__(self) -> int:
        return (self.rows + self.batch_size - 1) // self.batch_size

    def __getitem__(self, i: int) -> Batch:
        if not 0 <= i < len(self):
            raise IndexError(f"batch {i} of {len(self)}")
        return self._make(np.arange(i * self.batch_size, (i + 1) * self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))


def eval_batches(
    tokens: Tokens,
    *,
    length: int,
    batch_size: int,
    packing: str = "split",
    isolate_documents: bool = True,
    token_lengths: np.ndarray,
    rows: int = 0,
    chosen: np.ndarray | None = None,
    blocks: Sequence[int] = (0,),
    block_count: int = 1,
) -> EvalBatches:
    """A held-out text, each of its targets exactly once, in batches of one shape.

    Under "split" (and "random"), row i starts at token i * length, and the target of its last token is the first
    token of row i + 1. What is missing in the last row and the last batch is padding at the end,
    weight 0. (Not isolated, rows have no segments even then: a causal model does not see it.)

    Args:
      rows: this many rows only, evenly spaced over the text; 0: all.
      chosen: numbers of the rows, in place of `rows`.
      blocks, block_count: as in `make_loader`; `batch_size` is that of all processes.
    """
    _check_tokens(tokens, "the held-out text", token_lengths, isolate_documents)
    mine = _rows_of(blocks, block_count, batch_size, "eval.batch_size")
    windows = packing in ("split", "random")
    plan = None if windows else packing_.make_plan(tokens, packing, length)
    whole = -(-(tokens.total - 1) // length) if plan is None else len(plan)
    if chosen is None:
        chosen = np.arange(whole) if not 0 < rows < whole else np.arange(rows) * whole // rows
    if packing == "bucket":
        chosen = chosen[np.argsort(plan.sizes[chosen], kind="stable")]
    lengths_V = np.asarray(token_lengths, np.int32)

    def make(places_B: np.ndarray) -> Batch:
        width = length
        if packing == "bucket":
            last = chosen[min(places_B[-1], len(chosen) - 1)]
            width = min(packing_.bucket(int(plan.sizes[last])), length)
        places_B = places_B[mine]
        real_B = places_B < len(chosen)
        if plan is None:
            starts_B = np.full(len(places_B), tokens.total)  # past the end: all padding
            starts_B[real_B] = chosen[places_B[real_B]] * length
            leaves = packing_.split_rows(tokens, starts_B, length, isolate=isolate_documents)
        else:
            found = packing_.packed_rows(
                tokens, plan, chosen[places_B[real_B]], isolate=isolate_documents
            )
            leaves = _merge([(real_B, found)])
        leaves = _with_bytes(leaves, lengths_V, [tokens])
        by_answer = ("groups", "labels")  # [B, A]; all others are [B, L]
        short = {n: leaf if n in by_answer else leaf[:, :width] for n, leaf in leaves.items()}
        return Batch(**short)

    return EvalBatches(make, batch_size, plan, chosen)


def _check_tokens(tokens: Tokens, name: str, token_lengths: np.ndarray, isolate: bool) -> None:
    if len(token_lengths) != tokens.vocab_size:
        raise ValueError(
            f"{name}: tokens of a vocabulary of {tokens.vocab_size:,}, but the tokenizer has "
            f"{len(token_lengths):,}; prepare the data with this tokenizer"
        )
    if tokens.total - (tokens.documents if isolate else 1) < 1:
        raise ValueError(
            f"{name}: no trainable token: {tokens.total:,} tokens in {tokens.documents:,} "
            "documents leave nothing to predict; add text (--input)"
        )


def _merge(parts: list[tuple[np.ndarray, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Leaves of several sources at their places (bool [B]); other rows are 0."""
    if len(parts) == 1 and parts[0][0].all():
        return parts[0][1]
    merged = {}
    for here, leaves in parts:
        for name, values in leaves.items():
            if name not in merged:
                merged[name] = np.zeros((len(here), *values.shape[1:]), values.dtype)
            merged[name][here] = values
    return merged


def _with_bytes(
    leaves: dict[str, np.ndarray], lengths_V: np.ndarray, sources: list[Tokens]
) -> dict[str, np.ndarray]:
    try:
        bytes_BxT = lengths_V[leaves["targets"]]
    except IndexError:
        where = ", ".join(t.name for t in sources)
        raise ValueError(
            f"a token id of this batch is outside the vocabulary of {len(lengths_V):,}: one of "
            f"{where} is damaged; delete it and run the same command again to rebuild it"
        ) from None
    bytes_BxT[leaves["weights"] == 0] = 0
    return leaves | {"bytes": bytes_BxT}
