"""The loader: a function of (seed, step), the same for any number of processes; evaluation counts
each target once."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.loader import eval_batches, make_loader
from llm_jax.data.mixture import Component
from llm_jax.data.tokens import Tokens

V = 50_000
LENGTHS = np.random.default_rng(0).integers(1, 9, V).astype(np.int32)
PACKINGS = ["split", "first_fit", "pad"]


def corpus(total=4000, start=1, documents=90, seed=0):
    """Ids start, start + 1, ... in documents of random lengths: each id says where it stands."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, total), documents - 1, replace=False))
    ids = np.arange(start, start + total, dtype=np.uint16)
    shards = [ids[: total // 3], ids[total // 3 :]]
    return Tokens(shards, np.concatenate([[0], cuts, [total]]), vocab_size=V)


def loader(*tokens, weights=(), **changes):
    components = [
        Component(f"source{i}", t, weights[i] if weights else ((0.0, 1.0),))
        for i, t in enumerate(tokens or [corpus()])
    ]
    options = {"length": 32, "batch_size": 8, "steps": 100, "token_lengths": LENGTHS, "seed": 1}
    return make_loader(components, **(options | changes))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("isolate", [False, True])
def test_leaves_have_the_promised_shapes_and_types(packing, isolate):
    batch = loader(packing=packing, isolate_documents=isolate).batch(3)
    leaves = {k: v for k, v in vars(batch).items() if v is not None}
    expected = {"tokens", "targets", "weights", "bytes"}
    if packing != "split" or isolate:
        expected |= {"segments", "positions"}
    assert set(leaves) == expected
    for name, leaf in leaves.items():
        assert isinstance(leaf, np.ndarray) and leaf.shape == (8, 32)
        assert leaf.dtype == (np.float32 if name == "weights" else np.int32)
    np.testing.assert_array_equal(
        batch.bytes, np.where(batch.weights > 0, LENGTHS[batch.targets], 0)
    )
    assert batch.bytes[batch.weights > 0].min() > 0


@pytest.mark.parametrize("packing", PACKINGS)
def test_iterating_gives_what_random_access_gives(packing):
    data = loader(packing=packing, steps=12)
    for start in (0, 7):
        found = list(data.iterate(start))
        assert len(found) == 12 - start
        for step, batch in enumerate(found, start):
            assert_equal(batch, data.batch(step))
    assert list(data.iterate(12)) == []
    with pytest.raises(IndexError, match="step 12 is outside"):
        data.batch(12)


def test_a_new_loader_of_the_same_seed_continues_and_another_seed_differs():
    a, b, c = loader(), loader(), loader(seed=2)
    for step in (0, 30, 99):
        assert_equal(a.batch(step), b.batch(step))
        assert (a.batch(step).tokens != c.batch(step).tokens).any()
    assert a.identity == b.identity != c.identity


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("sources", [1, 2])
def test_blocks_in_order_are_the_whole_batch(packing, sources):
    tokens = [corpus(), corpus(2000, start=10_000, seed=1)][:sources]
    # Uneven shares: with even ones, every block would have the same pattern of sources.
    options = {"packing": packing, "weights": [((0.0, 1.0),), ((0.0, 0.4),)][:sources]}
    whole = loader(*tokens, **options)
    parts = [loader(*tokens, **options, blocks=(h,), block_count=4) for h in range(4)]
    some = loader(*tokens, **options, blocks=(0, 2, 3), block_count=4)  # not neighbours
    for step in (0, 17, 63):
        joined = jax.tree.map(lambda *rows: np.concatenate(rows), *[p.batch(step) for p in parts])
        assert_equal(joined, whole.batch(step))
    for step, batch in zip(range(5), some.iterate(), strict=False):
        rows = [0, 1, 4, 5, 6, 7]
        assert_equal(batch, jax.tree.map(lambda x: x[rows], whole.batch(step)))  # noqa: B023
    assert some.identity == whole.identity


def epoch(data, number, rows):
    """The rows of one epoch, in the order of training."""
    tokens = np.concatenate([data.batch(s).tokens for s in range(data.steps)])
    return tokens[number * rows : (number + 1) * rows]


@pytest.mark.parametrize("packing", ["first_fit", "pad"])
def test_every_epoch_has_every_token_once_in_another_order(packing):
    data = loader(packing=packing, steps=200)
    rows = data.epoch_rows["source0"]
    first, second = epoch(data, 0, rows), epoch(data, 1, rows)
    assert (first != second).any()
    for found in (first, second):
        assert sorted(found[found > 0].tolist()) == list(range(1, 4001))


def test_split_epochs_cut_at_other_places_and_lose_less_than_two_rows():
    data = loader(steps=200)
    rows = data.epoch_rows["source0"]
    offsets = set()
    for number in range(5):
        found = epoch(data, number, rows)
        offsets.add(int(found[0, 0] - 1) % 32)
        ids = np.unique(found)
        assert len(ids) == found.size and 4000 - len(ids) <= 2 * 32
        assert sorted(np.diff(np.sort(found[:, 0]))) == [32] * (rows - 1)  # all of one grid
    assert len(offsets) > 2
    # The order is shuffled: neighbours in training are rarely neighbours in the text.
    assert (np.abs(np.diff(found[:, 0].astype(int))) == 32).mean() < 0.2


def test_without_shuffling_the_text_comes_in_its_order():
    data = loader(shuffle=False, steps=20)
    rows = data.epoch_rows["source0"]
    assert rows == (4000 - 1) // 32
    found = epoch(data, 0, rows).ravel()
    assert found.tolist() == list(range(1, rows * 32 + 1))
    again = epoch(data, 1, 20)  # wraps around to the start
    assert again.size and epoch(data, 0, rows + 5)[rows:].ravel()[0] == 1


def test_epochs_shorter_than_a_batch():
    data = loader(corpus(70, documents=2), steps=5)
    assert data.epoch_rows["source0"] == 1
    starts = np.concatenate([data.batch(s).tokens[:, 0] for s in range(5)])
    assert set(starts) <= set(range(1, 33)) and len(set(starts)) > 5


@pytest.mark.parametrize("total", [33, 34, 50, 64, 65])
def test_the_smallest_corpora_lie_inside_their_rows(total):
    data = loader(corpus(total, documents=1), isolate_documents=False, steps=5)
    for batch in data:
        assert batch.weights.all() and batch.tokens.all()


def test_the_rows_do_not_depend_on_the_batch_size():
    small = loader(length=2, batch_size=7, steps=300)
    large = loader(length=2, batch_size=2100, steps=1)
    rows = np.concatenate([b.tokens for b in small])
    np.testing.assert_array_equal(rows, large.batch(0).tokens)


def test_a_mixture_follows_its_schedule():
    tokens = [corpus(), corpus(3000, start=10_000, seed=1)]
    schedule = [((0.0, 1.0),), ((0.0, 0.0), (0.5, 0.0), (1.0, 1.0))]
    data = loader(*tokens, weights=schedule, steps=101)
    second = np.array([(data.batch(s).tokens[:, 0] >= 10_000).sum() for s in range(101)])
    assert second[:51].sum() == 0
    at = np.arange(101) / 100
    weight = np.interp(at, [0.5, 1], [0, 1])
    wanted = np.cumsum(8 * weight / (1 + weight))
    assert np.abs(np.cumsum(second) - wanted).max() <= 1
    assert second[-1] == 4


def test_a_source_has_the_same_rows_with_and_without_company():
    # A second source must not change the order of the first: each has its own epochs.
    a, b = corpus(), corpus(3000, start=10_000, seed=1)
    alone, mixed = loader(a, steps=40), loader(a, b, steps=80)
    rows = np.concatenate([mixed.batch(s).tokens for s in range(80)])
    np.testing.assert_array_equal(
        rows[rows[:, 0] < 10_000], np.concatenate([x.tokens for x in alone.iterate()])
    )


@given(
    st.integers(2, 60), st.integers(1, 9), st.integers(1, 7), st.sampled_from(PACKINGS),
    st.booleans(), st.integers(0, 100),
)  # fmt: skip
@settings(max_examples=60)
def test_evaluation_counts_every_target_exactly_once(total, length, batch, packing, isolate, seed):
    documents = 1 + seed % min(total, 5)
    tokens = corpus(total, documents=documents, seed=seed)
    if isolate and total == documents:
        return
    options = {"packing": packing, "isolate_documents": isolate, "token_lengths": LENGTHS}
    batches = eval_batches(tokens, length=length, batch_size=batch, **options)
    found = list(batches)
    assert len(found) == len(batches)
    assert {b.tokens.shape for b in found} == {(batch, length)}
    counted = [t for b in found for t in b.targets[b.weights > 0].tolist()]
    starts = set((tokens.offsets[:-1] + 1).tolist())  # first tokens of documents
    if packing == "split":
        expected = [i for i in range(2, total + 1) if not (isolate and i in starts)]
        assert counted == expected
    elif isolate:
        assert sorted(counted) == [i for i in range(1, total + 1) if i not in starts]
    else:
        assert len(set(counted)) == len(counted)
        assert set(counted) >= set(range(1, total + 1)) - starts
    assert sum(b.bytes.sum() for b in found) == LENGTHS[counted].sum()


def test_evaluation_rows_are_evenly_spaced():
    options = {"length": 32, "batch_size": 4, "token_lengths": LENGTHS}
    some = list(eval_batches(corpus(32 * 100 + 1, documents=1), rows=10, **options))
    starts = np.concatenate([b.tokens[:, 0] for b in some])
    assert starts.tolist() == [1 + 320 * i for i in range(10)] + [0, 0]


@pytest.mark.parametrize("packing", PACKINGS)
def test_evaluation_is_split_into_blocks_of_one_number_of_batches(packing):
    options = {"length": 32, "batch_size": 8, "packing": packing, "token_lengths": LENGTHS}
    tokens = corpus(300, documents=5)
    whole = list(eval_batches(tokens, rows=9, **options))
    assert len(whole) == 2  # of the last batch, three of four blocks have padding only
    parts = [eval_batches(tokens, rows=9, blocks=(h,), block_count=4, **options) for h in range(4)]
    assert {len(p) for p in parts} == {2}  # one process with fewer would leave the others hanging
    for i, batch in enumerate(whole):
        assert_equal(jax.tree.map(lambda *x: np.concatenate(x), *[p[i] for p in parts]), batch)


def test_a_partial_last_row_keeps_the_shape_and_the_structure():
    tokens = corpus(40, documents=3)
    for isolate in (True, False):
        batches = list(
            eval_batches(tokens, length=32, batch_size=1, isolate_documents=isolate,
                         token_lengths=LENGTHS)
        )  # fmt: skip
        assert len(batches) == 2
        assert jax.tree.structure(batches[0]) == jax.tree.structure(batches[1])
        assert batches[1].tokens[0, :8].tolist() == list(range(33, 41))
        assert not batches[1].tokens[0, 8:].any() and not batches[1].weights[0, 7:].any()


@pytest.mark.parametrize(
    "tokens, changes, message",
    [
        (
            corpus(32, documents=1),
            {},
            r"source0: 32 tokens are less than one row of 32 .*--config.length",
        ),
        (corpus(90, documents=90), {}, "no trainable token: 90 tokens in 90 documents"),
        (corpus(90, documents=90), {"packing": "pad"}, "no trainable token"),
        (corpus(), {"block_count": 3}, r"batch_size=8 is not divisible by the 3 parts .*mesh.data"),
        (
            corpus(),
            {"token_lengths": LENGTHS[:99]},
            "vocabulary of 50,000, but the tokenizer has 99",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_a_one_line_error(tokens, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        loader(tokens, **changes)
    assert "\n" not in str(caught.value)


def test_evaluation_without_a_target_is_an_error():
    with pytest.raises(ValueError, match="held-out text: no trainable token"):
        eval_batches(corpus(1, documents=1), length=4, batch_size=1, token_lengths=LENGTHS)


def test_an_id_outside_the_vocabulary_is_an_error_when_it_is_met():
    tokens = Tokens([np.full(500, 60_000, np.uint16)], np.array([0, 500]), vocab_size=V, name="bad")
    with pytest.raises(
        ValueError, match=r"outside the vocabulary of 50,000: one of bad is damaged"
    ):
        loader(tokens).batch(0)


def test_iteration_can_stop_early_and_errors_come_through():
    data = loader()
    assert len(list(itertools.islice(data, 3))) == 3
    data._streams[0].tokens.shards[0][:] = 60_000
    with pytest.raises(ValueError, match="outside the vocabulary"):
        list(loader(Tokens([np.full(500, 60_000, np.uint16)], np.array([0, 500]), vocab_size=V)))


def test_random_windows_start_anywhere():
    text = corpus(total=400)
    random = loader(text, packing="random", isolate_documents=False, steps=600)
    firsts = np.concatenate([random.batch(i).tokens[:, 0] for i in range(600)])
    batch = random.batch(7)
    np.testing.assert_array_equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    assert batch.segments is None and (batch.weights == 1).all()
    assert set(firsts.tolist()) == set(
        range(1, 400 - 32 + 1)
    )  # every start that has all its targets
    counts = np.bincount(firsts)[1:]
    assert counts.max() < 3 * counts.mean()  # 13 on average: drawn alike
    assert_equal(
        random.batch(7), loader(text, packing="random", isolate_documents=False, steps=600).batch(7)
    )
    with pytest.raises(ValueError, match=r"data.shuffle=True"):
        loader(text, packing="random", shuffle=False)
