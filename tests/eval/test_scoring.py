"""Scores of continuations equal the full logits', whatever the batching, sharing and cutting."""

import jax
import numpy as np
import pytest
from tiny import tiny_model

from llm_jax import sharding, tokenizers
from llm_jax.config import MeshConfig
from llm_jax.eval import scoring
from llm_jax.models import decoder
from llm_jax.nn import params as P
from llm_jax.types import Batch


@pytest.fixture(scope="module")
def model():
    cfg = tiny_model(init_std=0.3)  # sharp enough that orders and arg-maxima mean something
    return P.init(decoder.specs(cfg), jax.random.key(0)), cfg


def ids(rng, n):
    return rng.integers(1, 53, n).tolist()


def reference(params, cfg, row):
    """log p of each token after the first and whether it is the best, from the plain logits."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(row)] = row
    z = _logits(params, padded, cfg)[0, : len(row) - 1]
    log_p = np.asarray(jax.nn.log_softmax(z))
    at = np.arange(len(row) - 1), np.array(row[1:])
    return log_p[at], log_p.argmax(1) == at[1]


@jax.jit(static_argnames="cfg")
def _logits(params, tokens, cfg):
    return decoder.logits(params, decoder.hidden(params, Batch(tokens=tokens), cfg).x, cfg)


def check(model, requests, window=None, **options):
    params, cfg = model
    window = window or cfg.max_length
    scores = scoring.score_continuations(params, cfg, requests, window=window, **options)
    for (context, continuation), score in zip(requests, scores, strict=True):
        row = (context + continuation)[-(window + 1) :]
        log_p, best = reference(params, cfg, row)
        m = len(continuation)
        np.testing.assert_allclose(score.log_prob, log_p[-m:].sum(), atol=3e-5)
        assert score.greedy == best[-m:].all() and score.n_tokens == m
    return scores


def test_scores_equal_the_logits(model):
    rng = np.random.default_rng(0)
    shared = ids(rng, 9)
    requests = [(ids(rng, n), ids(rng, m)) for n, m in [(1, 1), (7, 3), (30, 2), (3, 12), (40, 5)]]
    requests += [(shared, [5]), (shared, [6]), (shared, [5, 6]), (shared, [7]), (ids(rng, 9), [7])]
    finished = []
    check(model, requests, window=63, batch_size=3, progress=finished.append)
    assert sum(finished) == len(requests)


def test_greedy(model):
    """The greedy continuation is found so; one with another last or first token is not."""
    params, cfg = model
    context = [3, 1, 4, 1, 5]
    row = list(context)
    for _ in range(3):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(row)] = row
        row.append(int(np.argmax(_logits(params, padded, cfg)[0, len(row) - 1])))
    best = row[5:]
    other = [(t + 1) % 53 for t in best]
    requests = [
        (context, best),
        (context, best[:1]),
        (context, [*best[:2], other[2]]),
        (context, [other[0], *best[1:]]),
        (context, other[:1]),
    ]
    assert [s.greedy for s in check(model, requests)] == [True, True, False, False, False]


def test_letters_share_one_pass(model, monkeypatch):
    """Four one-token continuations of one context are one row; other contexts are others."""
    rows = []
    real = scoring._batch
    monkeypatch.setattr(scoring, "_batch", lambda r, *a: rows.extend(r) or real(r, *a))
    contexts = [[1, 2, 3], [4, 5, 6, 7]]
    requests = [(context, [letter]) for letter in (9, 10, 11, 12) for context in contexts]
    check(model, requests, batch_size=2)
    assert sorted(map(len, rows)) == [3, 4]


def test_contexts_are_cut_from_the_left(model):
    """The last window + 1 tokens count: the model reads the last `window` before the final one.

    Cutting to `window` tokens of context + continuation would read one token less.
    """
    rng = np.random.default_rng(1)
    long = ids(rng, 40)
    requests = [(long, [3]), (long, [3, 4, 5]), (long[:8], [3])]
    scores = check(model, requests, window=8)
    short = check(model, [(long[-7:], [3])], window=8)
    assert abs(scores[0].log_prob - short[0].log_prob) > 1e-3
    with pytest.raises(ValueError, match="9 tokens does not fit the model's window of 8"):
        check(model, [([1], [2] * 9)], window=8)


def test_rows(model):
    params, cfg = model
    rng = np.random.default_rng(2)
    rows = [ids(rng, n) for n in (5, 0, 40, 1, 33, 12)]
    for start in ([], [7]):
        out = scoring.score_rows(params, cfg, rows, batch_size=2, start=start)
        for row, got in zip(rows, out, strict=True):
            assert got.dtype == np.float32 and got.shape == (max(len(start + row) - 1, 0),)
            if len(start + row) > 1:
                np.testing.assert_allclose(got, reference(params, cfg, start + row)[0], atol=3e-5)


def test_over_a_mesh(model):
    """Data-parallel scores are the same; five requests fill a batch that eight devices divide."""
    params, cfg = model
    rng = np.random.default_rng(3)
    requests = [(ids(rng, n), ids(rng, 1 + n % 2)) for n in (3, 4, 5, 6, 7)]
    want = scoring.score_continuations(params, cfg, requests, batch_size=4)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=4, tensor=2))):
        got = scoring.score_continuations(params, cfg, requests, batch_size=5)
    for a, b in zip(want, got, strict=True):
        assert abs(a.log_prob - b.log_prob) < 3e-5 and a[1:] == b[1:]


def test_refusals(model):
    params, cfg = model
    for request, message in [
        (([], [1]), "empty context"),
        (([1], []), "empty continuation"),
        (([1, 53], [1]), "token id 53 is outside the model's vocabulary of 53"),
        (([1], [99]), "token id 99"),
        (([1], [1, 99]), "token id 99"),
    ]:
        with pytest.raises(ValueError, match=message):
            scoring.score_continuations(params, cfg, [request])
    learned = tiny_model(positions="learned")
    with pytest.raises(ValueError, match="17 tokens does not fit the model's 16 positions"):
        scoring.score_rows({}, learned, [[1] * 18])


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 16, 23, 40])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_rolling(n, stride):
    """Each token is scored once, in order, with window - stride tokens of its own text before."""
    text = list(range(100, 100 + n))
    windows = list(scoring.rolling(text, window=8, stride=stride, prefix=9))
    assert [t for _, predicted in windows for t in predicted] == text
    for i, (context, predicted) in enumerate(windows):
        assert 1 <= len(context) + len(predicted) - 1 <= 8
        at = text.index(predicted[0])
        assert context == ([9, *text])[: at + 1][-len(context) :]  # what stands directly before
        if i:
            assert len(context) >= 8 - stride + 1 and len(predicted) <= stride


def test_rolling_equals_lm_eval():
    lm_eval = pytest.importorskip("lm_eval.utils")
    for n in (1, 8, 9, 20, 33):
        for stride in (8, 5, 1):
            text = list(range(n))
            windows = lm_eval.get_rolling_token_windows(text, 99, 8, 8 - stride + 1)
            want = [lm_eval.make_disjoint_window(w) for w in windows]
            assert list(scoring.rolling(text, window=8, stride=stride, prefix=99)) == want


def test_encode_pair():
    tokenizer = tokenizers.train("byte", [])
    byte = tokenizer.encode

    def pair(context, continuation, **options):
        return scoring.encode_pair(tokenizer, context, continuation, **options)

    assert pair("a b", " c") == (byte("a b"), byte(" c"))
    # Trailing white space moves; without that the space would be scored as context.
    assert pair("a b ", "c") == (byte("a b"), byte(" c"))
    assert pair("a b \n", "c") == (byte("a b"), byte(" \nc"))
    start = scoring.start_ids(tokenizer)
    assert pair("", "c") == (start, byte("c"))
    assert pair(" ", "c") == (start, byte(" c"))
    if tokenizer.bos_id is not None:
        bos = [tokenizer.bos_id]
        assert pair("a", " c", add_bos=True) == (bos + byte("a"), byte(" c"))
