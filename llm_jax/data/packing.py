"""Tokens to rows: concatenate and split, first-fit, or one document a row.

A row is described by numbers; its arrays are made, for a whole batch at once, when it is asked for:
`tokens`, `targets` int32 [B, L], `weights` float32 [B, L], and `segments`, `positions` int32 [B, L]
where the packing needs them. They mean what `llm_jax.types.Batch` says.
"""

from dataclasses import dataclass

import numpy as np

from llm_jax.data import branches
from llm_jax.data.tokens import Tokens

KINDS = ("split", "first_fit", "pad", "bucket")
WINDOW = 1 << 18  # pieces that first-fit looks at together


# ------------------------------------------------------------------------------------------- split


def split_rows(
    tokens: Tokens, starts_B: np.ndarray, length: int, *, isolate: bool
) -> dict[str, np.ndarray]:
    """Rows of `length` consecutive tokens from each start on; targets are the tokens after them.

    Documents (1 2 3) and (4 5 6 7), L = 4, starts 0 and 4, isolated:

        tokens     1 2 3 4   5 6 7 .
        targets    2 3 4 5   6 7 . .
        weights    1 1 0 1   1 1 0 0    3 is the last of its document
        segments   1 1 1 2   1 1 1 0    the part of (4 5 6 7) in row 2 is a segment of its own
        positions  0 1 2 0   0 1 2 0

    Not isolated there are no `segments` and `positions`, and every token but the last of the corpus
    has a target. What lies past the end of the corpus (`.`) is 0.
    """
    window = _padded_windows(tokens, starts_B, length + 1)
    leaves = {
        "tokens": window[:, :-1].astype(np.int32),
        "targets": window[:, 1:].astype(np.int32),
        "weights": np.ones((len(starts_B), length), np.float32),
    }
    inside_B = np.maximum(tokens.total - starts_B, 0)  # tokens between the start and the end
    if (inside_B <= length).any():
        leaves["weights"][np.arange(1, length + 1) >= inside_B[:, None]] = 0
    if not isolate:
        return leaves
    starts_here = np.zeros((len(starts_B), length + 1), np.bool_)
    # Documents that begin in (start, start + L]; the last bound is the target of the last token.
    low = np.searchsorted(tokens.offsets, starts_B, "right")
    count = np.searchsorted(tokens.offsets, starts_B + length, "right") - low
    row = np.repeat(np.arange(len(starts_B)), count)
    starts_here[row, tokens.offsets[_ranges(low, count)] - starts_B[row]] = True
    leaves["weights"][starts_here[:, 1:]] = 0
    starts_here = starts_here[:, :-1]
    column = np.arange(length, dtype=np.int32)
    segment_start = np.maximum.accumulate(np.where(starts_here, column, 0), axis=1, dtype=np.int32)
    leaves["segments"] = np.cumsum(starts_here, axis=1, dtype=np.int32) + 1
    leaves["positions"] = column - segment_start
    if (inside_B < length).any():
        padding = column >= inside_B[:, None]
        leaves["segments"][padding] = leaves["positions"][padding] = 0
    return leaves


def _padded_windows(tokens: Tokens, starts_B: np.ndarray, width: int) -> np.ndarray:
    whole = starts_B + width <= tokens.total
    if whole.all():
        return tokens.windows(starts_B, width)
    window = np.zeros((len(starts_B), width), tokens.shards[0].dtype)
    window[whole] = tokens.windows(starts_B[whole], width)
    for b in np.flatnonzero(~whole & (starts_B < tokens.total)):  # at most one row of a corpus
        rest = tokens.take(np.arange(starts_B[b], tokens.total))
        window[b, : len(rest)] = rest
    return window


# ----------------------------------------------------------------------- whole documents in a row


@dataclass(frozen=True)
class Plan:
    """Which pieces of documents each row holds.

    Attributes:
      starts: int64 [P], first token of each piece, in the order of rows.
      sizes: int32 [P], its tokens, at most `length`.
      ends: bool [P], whether its document ends with it.
      rows: int64 [R + 1], first piece of each row, and P.
      answers: of documents that branch, the most answers that a row has.
    """

    starts: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray
    rows: np.ndarray
    length: int
    answers: int = 0

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def utilisation(self) -> float:
        """Share of the row places that hold a token."""
        return float(self.sizes.sum(dtype=np.int64)) / max(len(self) * self.length, 1)


def make_plan(tokens: Tokens, packing: str, length: int, window: int = WINDOW) -> Plan:
    """Plans the rows of "pad" (and "bucket") or "first_fit". A document longer than a row is cut into pieces.

    Lengths 7 3 2 4 1 at L = 4; the first becomes pieces of 4 and 3 tokens:

        pad         aaaa  aaa.  bbb.  cc..  dddd  e...    one piece a row, utilisation 17 / 24
        first_fit   aaaa  aaae  bbb.  cc..  dddd          17 / 20

    First-fit goes through the pieces of a window from long to short, and puts each into the first
    row that still has room (first-fit decreasing); rows are then ordered by their first token.
    Planning takes about 40 bytes and a microsecond or two a document.
    """
    starts, sizes, ends = _pieces(tokens.offsets, length)
    branches_ = tokens.branches
    if branches_ is not None and not ends.all():
        raise ValueError(
            f"{tokens.name}: a document that branches is longer than a row of {length}"
        )
    if packing in ("pad", "bucket"):
        most = int(branches_.answers_D.max()) if branches_ is not None else 0
        return Plan(starts, sizes, ends, np.arange(len(starts) + 1), length, most)
    if packing != "first_fit":
        raise ValueError(f"data.packing={packing!r}: only {', '.join(KINDS[1:])} have a plan")
    row_of, opened = np.empty(len(starts), np.int64), 0
    for low in range(0, len(starts), window):
        part = slice(low, low + window)
        row_of[part] = opened + first_fit(sizes[part], length)
        opened = int(row_of[part].max()) + 1
    earliest = np.full(opened, np.iinfo(np.int64).max)
    np.minimum.at(earliest, row_of, starts)
    rank = np.empty(opened, np.int64)
    rank[np.argsort(earliest)] = np.arange(opened)
    row_of = rank[row_of]
    order = np.lexsort((starts, row_of))
    rows = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=opened))])
    most = 0
    if branches_ is not None:  # pieces are documents
        most = int(np.bincount(row_of, branches_.answers_D).max())
    return Plan(starts[order], sizes[order], ends[order], rows, length, most)


def first_fit(sizes_P: np.ndarray, length: int) -> np.ndarray:
    """Row of each piece under first-fit decreasing, int64 [P]; sizes are from 1 to `length`.

    Sizes 1 3 2 2 at L = 4 go to rows 0 0 1 1: 3, then 2 and 2, then 1 beside the 3.

    All pieces of one size are placed at once, as first-fit fills the rows in turn with them, so the
    work grows with the number of different sizes, not with the number of pieces.
    """
    order = np.argsort(-sizes_P, kind="stable")
    row_P = np.empty(len(sizes_P), np.int64)
    distinct, counts = np.unique(-sizes_P[order], return_counts=True)
    room = np.empty(0, np.int64)  # free places of the rows that are not full
    names = np.empty(0, np.int64)  # their numbers, ascending
    opened = done = 0
    for size, count in zip(-distinct, counts, strict=True):
        fits = room // size
        filled = np.minimum(np.cumsum(fits), count)
        taken = np.diff(filled, prepend=0)
        placed = int(filled[-1]) if len(filled) else 0
        each = length // size  # pieces of this size in a row of their own
        fresh = -(-(count - placed) // each)
        taken = np.concatenate([taken, np.full(fresh, each)])
        if fresh:
            taken[-1] = count - placed - each * (fresh - 1)
        names = np.concatenate([names, np.arange(opened, opened + fresh)])
        room = np.concatenate([room, np.full(fresh, length)]) - taken * size
        row_P[order[done : done + count]] = np.repeat(names, taken)
        opened, done = opened + fresh, done + count
        keep = room > 0
        room, names = room[keep], names[keep]
    return row_P


def bucket(n: int) -> int:
    """The padded length of a row of n tokens: 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, ...

    Few lengths, so that few shapes are compiled; at most half of a row is padding, of long ones a third.
    """
    step = max(32, 1 << max((n - 1).bit_length() - 2, 0))
    return -(-max(n, 1) // step) * step


def packed_rows(
    tokens: Tokens, plan: Plan, rows_B: np.ndarray, *, isolate: bool
) -> dict[str, np.ndarray]:
    """The given rows of a plan.

    Documents (1 2 3), (4 5), and (6 7 8 9 10 11), which L = 5 cuts; rows of a first-fit plan:

        tokens     1 2 3 4 5   6 7 8 9 10    11 . . . .
        targets    2 3 4 5 .   7 8 9 10 11    . . . . .
        isolated:
        weights    1 1 0 1 0   1 1 1 1 1      0 0 0 0 0
        segments   1 1 1 2 2   1 1 1 1 1      1 0 0 0 0
        positions  0 1 2 0 1   0 1 2 3 4      0 0 0 0 0
        not isolated:
        weights    1 1 1 1 0   1 1 1 1 1      0 0 0 0 0
        segments   1 1 1 1 1   1 1 1 1 1      1 0 0 0 0
        positions  0 1 2 3 4   0 1 2 3 4      0 0 0 0 0

    The target of a cut piece's last token is the token that follows in the document (11 after 10);
    a document's last token has one only if another document begins after it in the row, and not
    isolated. So no token is the target of two.

    Documents that branch (`data.branches`) come with `parents` and `answers`, and with `groups` and
    `labels` [B, A] of a row's answers; what `tokens.ref_log_probs` knows of the targets comes as
    `ref_log_probs` [B, L].
    """
    length = plan.length
    pieces_B = plan.rows[rows_B + 1] - plan.rows[rows_B]
    piece_P = _ranges(plan.rows[rows_B], pieces_B)
    row_P = np.repeat(np.arange(len(rows_B)), pieces_B)
    start_P, size_P = plan.starts[piece_P], plan.sizes[piece_P].astype(np.int64)
    end_P = start_P + size_P
    first_P = np.repeat(np.cumsum(pieces_B) - pieces_B, pieces_B)  # the first piece of its row
    before_P = np.cumsum(size_P) - size_P
    column_P = before_P - before_P[first_P]

    # What a piece's last token is to predict, and whether it counts.
    target_P = np.minimum(end_P, tokens.total - 1)
    weight_P = (~plan.ends[piece_P]).astype(np.float32)
    if not isolate:
        # A piece with another one behind it is the end of a document. If that other piece is the
        # rest of a cut document, its first token already is the target of the part before it.
        joined_P = np.flatnonzero(row_P[1:] == row_P[:-1])
        next_P = start_P[joined_P + 1]
        begins = tokens.offsets[np.searchsorted(tokens.offsets, next_P)] == next_P
        target_P[joined_P[begins]], weight_P[joined_P[begins]] = next_P[begins], 1

    # From here on pieces are in the order of the corpus, in which shards are read fastest.
    order_P = np.argsort(start_P)
    size_P = size_P[order_P]
    ends_P = np.cumsum(size_P)
    within_N = np.arange(size_P.sum()) - np.repeat(ends_P - size_P, size_P)
    place_N = np.repeat((row_P * length + column_P)[order_P], size_P) + within_N

    def spread(values_N: np.ndarray | int, dtype: type = np.int32) -> np.ndarray:
        out = np.zeros(len(rows_B) * length, dtype)
        out[place_N] = values_N
        return out.reshape(len(rows_B), length)

    index_N = np.repeat(start_P[order_P], size_P) + within_N
    id_N = tokens.take(index_N)
    following_N, weight_N = np.roll(id_N, -1), np.ones(len(id_N), np.float32)
    counted_P = weight_P[order_P]
    following_N[ends_P - 1] = np.where(counted_P > 0, tokens.take(target_P)[order_P], 0)
    weight_N[ends_P - 1] = counted_P
    place_of_target_N = index_N + 1
    place_of_target_N[ends_P - 1] = target_P[order_P]
    if tokens.trained is not None:
        weight_N *= tokens.trained[place_of_target_N]
    if tokens.read is not None:
        weight_N = tokens.read[index_N].astype(np.float32)
    leaves = {
        "tokens": spread(id_N),
        "targets": spread(following_N),
        "weights": spread(weight_N, np.float32),
    }
    if tokens.ref_log_probs is not None:
        known_N = np.where(weight_N > 0, tokens.ref_log_probs[place_of_target_N], 0.0)
        leaves["ref_log_probs"] = spread(known_N, np.float32)
    if tokens.branches is not None:
        documents_P = np.searchsorted(tokens.offsets, plan.starts[piece_P], "right") - 1
        pieces = branches.Pieces(documents_P, row_P, first_P)
        found = branches.token_numbers(tokens.branches, pieces, index_N, np.repeat(order_P, size_P))
        leaves |= {name: spread(values_N) for name, values_N in found.items()}
        found = branches.answer_numbers(tokens.branches, pieces, len(rows_B), plan.answers)
        leaves |= {name: found[name] for name in ("groups", "labels")}
    elif isolate:
        ordinal_P = np.arange(len(piece_P)) - first_P
        leaves["segments"] = spread(np.repeat(ordinal_P[order_P] + 1, size_P))
        leaves["positions"] = spread(within_N)
    else:
        leaves["segments"] = spread(1)
        leaves["positions"] = spread(place_N % length)
    return leaves


def target_places(tokens: Tokens, plan: Plan, rows_B: np.ndarray) -> np.ndarray:
    """int64 [B, L]: where in the stream the target of each place stands that counts; -1 elsewhere.

    Of rows whose documents are whole.
    """
    places_BxL = np.full((len(rows_B), plan.length), -1, np.int64)
    for row, places_L in zip(rows_B, places_BxL, strict=True):
        pieces = slice(plan.rows[row], plan.rows[row + 1])
        at = 0
        for start, size in zip(plan.starts[pieces], plan.sizes[pieces], strict=True):
            targets_N = np.arange(start + 1, start + size)
            counted_N = tokens.trained[targets_N]
            places_L[at : at + size - 1][counted_N] = targets_N[counted_N]
            at += size
    return places_BxL


def answer_ids(tokens: Tokens, plan: Plan, rows_B: np.ndarray) -> np.ndarray:
    """int64 [B, A]: which answer of the stream each of a row's is; -1 where there is none."""
    pieces_B = plan.rows[rows_B + 1] - plan.rows[rows_B]
    piece_P = _ranges(plan.rows[rows_B], pieces_B)
    documents_P = np.searchsorted(tokens.offsets, plan.starts[piece_P], "right") - 1
    first_P = np.repeat(np.cumsum(pieces_B) - pieces_B, pieces_B)
    pieces = branches.Pieces(documents_P, np.repeat(np.arange(len(rows_B)), pieces_B), first_P)
    found = branches.answer_numbers(tokens.branches, pieces, len(rows_B), plan.answers)
    return found["ids"]


def _pieces(offsets: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, sizes and ends of documents cut every `length` tokens."""
    size_D = np.diff(offsets)
    count_D = -(-size_D // length)
    within_P = _ranges(np.zeros_like(count_D), count_D) * length
    size_P = np.repeat(size_D, count_D) - within_P
    starts = np.repeat(offsets[:-1], count_D) + within_P
    return starts, np.minimum(size_P, length).astype(np.int32), size_P <= length


def _ranges(low: np.ndarray, count: np.ndarray) -> np.ndarray:
    """low[0], low[0] + 1, ..., `count[0]` of them, then the same for the next."""
    before = np.cumsum(count) - count
    return np.repeat(low - before, count) + np.arange(count.sum())
