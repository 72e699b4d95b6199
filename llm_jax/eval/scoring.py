"""How probable a model finds given tokens: the one place where evaluation runs the model.

Rows of any lengths are sorted, padded on the right to one of a few lengths (`bucket`) and scored a
batch at a time, so that few shapes are compiled and little padding is computed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import models, sharding
from llm_jax.config import ModelConfig
from llm_jax.data.packing import bucket
from llm_jax.decode.generate import start_ids
from llm_jax.types import Array, Batch, PyTree

Ids = Sequence[int]
Progress = Callable[[int], Any]  # called with the number of requests just finished (tqdm.update)


class Score(NamedTuple):
    """A continuation under a model, given its context."""

    log_prob: float  # nats, summed over its tokens
    greedy: bool  # each token is the most probable one at its place
    n_tokens: int


def score_rows(
    params: PyTree,
    cfg: ModelConfig,
    rows: Sequence[Ids],
    *,
    batch_size: int = 8,
    start: Ids = (),
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """log p of each token after the first of each row given those before it: float32 [n - 1], nats.

    `start` is put in front of every row; with one token in it all of a row's own are scored.

    Raises:
      ValueError: a row that a learned position table is too short for, or an id outside the
        vocabulary.
    """
    rows = [np.array([*start, *row], np.int32) for row in rows]
    out = [np.zeros(0, np.float32)] * len(rows)
    for group, scored in _scored(params, cfg, rows, batch_size):
        for n, log_probs, _ in scored:
            out[n] = log_probs
        if progress:
            progress(len(group))
    return out


def score_continuations(
    params: PyTree,
    cfg: ModelConfig,
    requests: Sequence[tuple[Ids, Ids]],
    *,
    batch_size: int = 8,
    window: int | None = None,
    progress: Progress | None = None,
) -> list[Score]:
    """Scores (context ids, continuation ids) pairs, neither of them empty.

    At most `window` tokens (default: what the model has room for) go into the model: of a longer
    pair the last window + 1 are kept, the context is cut from the left. Continuations of one token
    after the same context (the letters of a multiple choice) share one forward pass.

    Raises:
      ValueError: an empty context or continuation, a continuation longer than the window, or an id
        outside the vocabulary.
    """
    window = window or models.family(cfg.family).room(params, cfg)
    whole, alone, together = [], [], defaultdict(list)
    for n, (context, continuation) in enumerate(requests):
        if not len(context) or not len(continuation):
            empty = "continuation" if len(context) else "context"
            raise ValueError(f"request {n} has an empty {empty}; a context may be the start token")
        if len(continuation) > window:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens does not fit the model's window of "
                f"{window}"
            )
        row = np.array([*context, *continuation], np.int32)[-(window + 1) :]
        whole.append(row)
        if len(continuation) == 1:
            together[row[:-1].tobytes()].append(n)
        else:
            alone.append(n)

    out: list[Score | None] = [None] * len(requests)
    for group, scored in _scored(params, cfg, [whole[n] for n in alone], batch_size):
        for at, log_probs, correct in scored:
            m = len(requests[alone[at]][1])
            total = float(np.sum(log_probs[-m:], dtype=np.float64))
            out[alone[at]] = Score(total, bool(correct[-m:].all()), m)
        if progress:
            progress(len(group))
    families = list(together.values())
    contexts = [whole[members[0]][:-1] for members in families]
    candidates = [[int(whole[n][-1]) for n in members] for members in families]
    for group, scored in _scored_next(params, cfg, contexts, candidates, batch_size):
        for at, log_probs, correct in scored:
            for n, log_p, best in zip(families[at], log_probs, correct, strict=True):
                out[n] = Score(float(log_p), bool(best), 1)
        if progress:
            progress(sum(len(families[at]) for at in group))
    return out


def encode_pair(
    tokenizer: Any, context: str, continuation: str, *, add_bos: bool = False
) -> tuple[list[int], list[int]]:
    """Ids of a context and of the continuation after it, as lm-evaluation-harness cuts them.

    White space at the end of the context belongs to the continuation (tokens begin with their
    space), and the continuation is what the ids of both texts together have after as many ids as
    the context has alone. An empty context is the token that starts a text. Special tokens spelled
    out are read as such; `add_bos` begins the context with the tokenizer's begin token.
    """
    if not context:
        return start_ids(tokenizer), tokenizer.encode(continuation, special=True)
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    alone = tokenizer.encode(stripped, special=True)
    both = tokenizer.encode(stripped + continuation, special=True)
    bos = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
    if alone[:1] == bos:  # the text (a chat template) spells it already
        bos = []
    return bos + alone or start_ids(tokenizer), both[len(alone) :]


def rolling(
    ids: Ids, *, window: int, stride: int, prefix: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Cuts a text into (context, continuation) pairs in which each of its tokens is scored once.

    A pair puts at most `window` tokens into the model. The first predicts `window` tokens after
    `prefix`, each later one the next `stride`, which see at least window - stride tokens of their
    own text. stride = window is what lm-evaluation-harness calls rolling.

    Raises:
      ValueError: stride outside 1 .. window.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"--stride={stride} has to be between 1 and --window={window}")
    ids = [prefix, *ids]
    done, end = 1, min(window + 1, len(ids))
    while done < len(ids):
        yield ids[max(end - window - 1, 0) : done], ids[done:end]
        done, end = end, min(end + stride, len(ids))


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], int, int]]:
    """(indices, rows, padded length) of each batch, the longest first: memory runs out at once or
    not at all, and the time left is not underestimated."""
    if batch_size < 1:
        raise ValueError(f"--batch_size={batch_size} has to be at least 1")
    mesh = sharding.ambient_mesh()
    divisor = 1
    for axis in sharding.RULES["batch"] if mesh is not None else ():
        divisor *= mesh.shape[axis]
    rows = -(-batch_size // divisor) * divisor
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    for at in range(0, len(order), rows):
        group = order[at : at + rows]
        yield group, rows, bucket(lengths[group[0]])


def _padded(rows: list[Ids], n_rows: int, L: int, cfg: ModelConfig) -> np.ndarray:
    out = np.zeros((n_rows, L), np.int32)
    for padded, ids in zip(out, rows, strict=False):
        padded[: len(ids)] = ids
    if out.min() < 0 or out.max() >= cfg.vocab_size:
        bad = out[(out < 0) | (out >= cfg.vocab_size)][0]
        raise ValueError(f"token id {bad} is outside the model's vocabulary of {cfg.vocab_size}")
    return out


def _batch(rows: list[Ids], n_rows: int, L: int, cfg: ModelConfig, room: int) -> Batch:
    lengths = np.array([len(row) for row in rows] + [0] * (n_rows - len(rows)))
    if cfg.positions == "learned" and lengths.max() > room:
        raise ValueError(
            f"a text of {lengths.max()} tokens does not fit the model's {room} positions"
        )
    segments = (np.arange(L) < lengths[:, None]).astype(np.int32)
    positions = np.arange(L, dtype=np.int32) * segments
    return Batch(tokens=_padded(rows, n_rows, L, cfg), segments=segments, positions=positions)


def _scored(params, cfg, rows: list[np.ndarray], batch_size: int) -> Iterator:
    """(indices, [(index, log_probs [n - 1], correct [n - 1]), ...]) of each batch of rows [n]."""
    lengths = [max(len(row) - 1, 0) for row in rows]
    room = models.family(cfg.family).room(params, cfg)

    def start():
        for group, B, L in _batches(lengths, batch_size):
            batch = _batch([rows[n][:-1] for n in group], B, L, cfg, room)
            targets = _padded([rows[n][1:] for n in group], B, L, cfg)
            yield group, _target_scores(params, batch.replace(targets=targets), cfg)

    for group, (log_probs, correct) in _one_late(start()):
        yield (
            group,
            [
                (n, log_probs[i, : lengths[n]], correct[i, : lengths[n]])
                for i, n in enumerate(group)
            ],
        )


def _scored_next(params, cfg, rows: list[np.ndarray], candidates: list[list[int]], batch_size: int):
    """(indices, [(index, log_probs [K], correct [K]), ...]): rows [n] and K tokens after each."""
    width = max(map(len, candidates), default=0)
    width = 1 << max(width - 1, 0).bit_length()
    room = models.family(cfg.family).room(params, cfg)

    def start():
        for group, B, L in _batches([len(row) for row in rows], batch_size):
            batch = _batch([rows[n] for n in group], B, L, cfg, room)
            next_BxK = _padded([candidates[n] for n in group], B, width, cfg)
            last_B = np.maximum(batch.segments.sum(1) - 1, 0).astype(np.int32)
            yield group, _next_scores(params, batch, last_B, next_BxK, cfg)

    for group, (log_probs, correct) in _one_late(start()):
        yield (
            group,
            [
                (n, log_probs[i, : len(candidates[n])], correct[i, : len(candidates[n])])
                for i, n in enumerate(group)
            ],
        )


def _one_late(started: Iterator) -> Iterator:
    """Fetches each batch's numbers after the next one is on its way, so that no device waits."""
    before = None
    for group, out in started:
        if before is not None:
            yield before[0], jax.device_get(before[1])
        before = group, out
    if before is not None:
        yield before[0], jax.device_get(before[1])


@partial(jax.jit, static_argnames="cfg")
def _target_scores(params: PyTree, batch: Batch, cfg: ModelConfig) -> tuple[Array, Array]:
    batch = jax.tree.map(lambda x: sharding.constrain(x, "batch", "length"), batch)
    scores = models.family(cfg.family).scores(params, batch, cfg, want=("log_probs", "correct"))
    # Whole on every device, so that each process of a job can read them.
    return sharding.constrain(scores.log_probs, None, None), sharding.constrain(
        scores.correct, None, None
    )


@partial(jax.jit, static_argnames="cfg")
def _next_scores(
    params: PyTree, batch: Batch, last_B: Array, next_BxK: Array, cfg: ModelConfig
) -> tuple[Array, Array]:
    model = models.family(cfg.family)
    batch = jax.tree.map(lambda x: sharding.constrain(x, "batch", "length"), batch)
    x_BxLxD = model.hidden(params, batch, cfg).x
    x_Bx1xD = jnp.take_along_axis(x_BxLxD, last_B[:, None, None], axis=1)
    log_p_BxV = jax.nn.log_softmax(model.logits(params, x_Bx1xD, cfg)[:, 0])
    log_probs = jnp.take_along_axis(log_p_BxV, next_BxK, axis=1)
    correct = next_BxK == jnp.argmax(log_p_BxV, axis=1)[:, None]
    return sharding.constrain(log_probs, None, None), sharding.constrain(correct, None, None)
