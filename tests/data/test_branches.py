"""Answers that branch from one prompt: what a batch has of them, and that a model cannot tell."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from llm_jax import models
from llm_jax.data import branches
from llm_jax.data.branches import Document, lay, size
from llm_jax.data.loader import eval_batches, make_loader
from llm_jax.data.mixture import Component
from llm_jax.data.packing import answer_ids, target_places
from llm_jax.data.tokens import Tokens
from llm_jax.nn.params import init
from llm_jax.objectives import preference
from llm_jax.types import Batch

EXAMPLE = Document(
    [1, 2, 3], [[4, 5], [6, 7, 8]], [[True, True], [True, True, True]], [1, 1], [1.0, 0.0]
)
LENGTHS = np.ones(53, np.int32)
ROW = 12  # what the longest of `some_documents` fits into


def tokens_of(documents, *, shared, ends=False) -> Tokens:
    laid = lay(documents, shared=shared)
    return Tokens(
        [laid.ids.astype(np.uint16)],
        laid.offsets,
        vocab_size=53,
        trained=laid.written_N,
        read=laid.ends_N if ends else None,
        branches=laid.branches,
    )


def batches(documents, *, shared, ends=False, length=32, packing="first_fit", rows=2):
    return eval_batches(
        tokens_of(documents, shared=shared, ends=ends),
        length=length,
        batch_size=rows,
        packing=packing,
        token_lengths=LENGTHS,
    )


def some_documents(count=7, seed=0) -> list[Document]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        n = int(rng.integers(2, 4))
        answers = [rng.integers(0, 53, rng.integers(1, 5)).tolist() for _ in range(n)]
        counted = [[True] * len(a) for a in answers]
        labels = rng.permutation(n).astype(float).tolist()
        made.append(
            Document(
                rng.integers(0, 53, rng.integers(1, 6)).tolist(), answers, counted, [1] * n, labels
            )
        )
    return made


def test_the_example():
    (batch,) = batches([EXAMPLE], shared=True, length=11, rows=1)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 3, 6, 7, 8, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 2, 2, 2, 3, 3, 3, 3, 0, 0]]
    assert batch.parents.tolist() == [[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 5, 0, 0]]
    assert batch.answers.tolist() == [[0, 0, 1, 1, 1, 2, 2, 2, 2, 0, 0]]
    assert batch.weights.tolist() == [[0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0]]
    counted = np.where(batch.weights > 0, batch.targets, 0)
    assert counted.tolist() == [[0, 0, 4, 5, 0, 6, 7, 8, 0, 0, 0]]
    assert batch.groups.tolist() == [[1, 1]] and batch.labels.tolist() == [[1, 0]]


def test_a_reward_is_read_at_the_last_token_of_each_answer():
    (batch,) = batches([EXAMPLE], shared=True, ends=True, length=11, rows=1)
    assert batch.weights.tolist() == [[0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0]]
    (batch,) = batches([EXAMPLE], shared=False, ends=True, length=11, rows=1)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8]]
    assert batch.weights.tolist() == [[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]]
    assert batch.parents is None and batch.segments.tolist() == [[1] * 5 + [2] * 6]


def test_a_prompt_of_one_token_has_no_trunk():
    one = EXAMPLE._replace(prompt=[1])
    (batch,) = batches([one], shared=True, length=8, rows=1)
    assert batch.tokens.tolist() == [[1, 4, 5, 1, 6, 7, 8, 0]]
    assert batch.parents.tolist() == batch.segments.tolist() == [[1, 1, 1, 2, 2, 2, 2, 0]]


def test_documents_of_a_row_are_numbered_through():
    (batch,) = batches([EXAMPLE, EXAMPLE], shared=True, length=18, rows=1)
    assert batch.segments.tolist() == [[1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6]]
    assert batch.parents.tolist() == [[1] * 9 + [4] * 9]
    assert batch.groups.tolist() == [[1, 1, 2, 2]]
    # Row after row, an answer's number in the row tells the answers of both documents apart.
    assert batch.answers.tolist() == [[0, 0, 1, 1, 1, 2, 2, 2, 2, 0, 0, 3, 3, 3, 4, 4, 4, 4]]


@pytest.mark.parametrize("shared", [True, False])
def test_the_size_of_a_document_is_what_it_takes(shared):
    for document in some_documents():
        laid = lay([document], shared=shared)
        assert len(laid.ids) == size(document, shared=shared)


def test_a_shared_prompt_costs_one_prefix():
    long = EXAMPLE._replace(prompt=list(range(40)))
    # The prompt once, of which the last token stands in front of each answer, and the answers.
    assert size(long, shared=True) == 39 + (1 + 2) + (1 + 3)
    assert size(long, shared=False) == 40 + 2 + 40 + 3


@partial(jax.jit, static_argnames="cfg")
def log_probs_of(params, batch, cfg):
    return models.family("decoder").scores(params, batch, cfg, want=("log_probs",)).log_probs


def scores_by_answer(cfg, params, documents, **how):
    """log-probability of each answer, in the order of the documents."""
    made = batches(documents, **how)
    out = np.full(sum(len(d.answers) for d in documents), np.nan)
    tokens = tokens_of(documents, shared=how["shared"])
    for i, batch in enumerate(made):
        batch = jax.tree.map(jnp.asarray, batch)
        log_probs = log_probs_of(params, batch, cfg)
        found = np.asarray(preference.per_answer(log_probs, batch))
        rows = made.chosen[i * made.batch_size : (i + 1) * made.batch_size]
        ids = answer_ids(tokens, made.plan, rows)
        out[ids[ids >= 0]] = found[: len(rows)][ids >= 0]
    return out


def alone(cfg, params, document):
    """Each answer after its prompt in a row of its own, without segments; nothing sees the zeros
    behind it, which are there for one shape."""
    out = []
    for answer in document.answers:
        n, end = len(document.prompt), len(document.prompt) + len(answer)
        row = jnp.array([[*document.prompt, *answer] + [0] * (ROW - end)])
        log_probs = log_probs_of(params, Batch(tokens=row[:, :-1], targets=row[:, 1:]), cfg)
        out.append(float(log_probs[0, n - 1 : end - 1].sum()))
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "rope"},
        {"positions": "rope", "attention_block": 8},
        {"positions": "rope", "window": 4},
        {"positions": "rope", "window": 4, "attention_block": 8},
        {"positions": "learned", "max_length": 40, "attention": "reference"},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_sharing_packing_and_padding_change_no_answer(changes):
    """A wrong mask would show an answer its neighbour; wrong positions would put it behind that."""
    cfg = tiny_model(**changes)
    params = init(models.family("decoder").specs(cfg), jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x, params)  # far from uniform
    documents = some_documents()
    expected = np.concatenate([alone(cfg, params, d) for d in documents])
    for how in (
        {"shared": True, "packing": "first_fit"},
        {"shared": False, "packing": "first_fit"},
        {"shared": True, "packing": "pad"},
        {"shared": True, "packing": "bucket", "length": 40},
    ):
        found = scores_by_answer(cfg, params, documents, **how)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5, err_msg=str(how))


def test_answers_do_not_see_each_other():
    """The gradient of an answer's score with respect to its neighbour's tokens is exactly 0."""
    cfg = tiny_model(positions="rope")
    params = init(models.family("decoder").specs(cfg), jax.random.key(0))
    (batch,) = batches([EXAMPLE], shared=True, length=11, rows=1)
    batch = jax.tree.map(jnp.asarray, batch)

    def of(answer, other_tokens):
        tokens = jnp.where((batch.answers == 3 - answer), other_tokens, batch.tokens)
        b = batch.replace(tokens=tokens)
        log_probs = log_probs_of(params, b, cfg)
        return preference.per_answer(log_probs, b)[0, answer - 1]

    for answer in (1, 2):
        assert float(of(answer, 7)) == float(of(answer, 31))


def test_target_places_find_each_trained_token_once():
    documents = some_documents()
    tokens = tokens_of(documents, shared=True)
    made = batches(documents, shared=True)
    places = np.concatenate(
        [target_places(tokens, made.plan, made.chosen[i * 2 : i * 2 + 2]) for i in range(len(made))]
    )
    assert sorted(places[places >= 0]) == np.flatnonzero(tokens.trained).tolist()
    weights = np.concatenate([b.weights for b in made])[: len(places)]
    assert ((places >= 0) == (weights > 0)).all()
    targets = np.concatenate([b.targets for b in made])[: len(places)]
    assert (
        targets[places >= 0]
        == tokens.take(np.sort(places[places >= 0]))[np.argsort(np.argsort(places[places >= 0]))]
    ).all()


def test_reference_log_probs_come_at_their_targets():
    documents = some_documents()
    tokens = tokens_of(documents, shared=True)
    tokens.ref_log_probs = -np.arange(tokens.total, dtype=np.float32)
    made = eval_batches(tokens, length=32, batch_size=2, packing="first_fit", token_lengths=LENGTHS)
    seen = []
    for batch in made:
        here = batch.weights > 0
        assert (batch.ref_log_probs[~here] == 0).all()
        places = -batch.ref_log_probs[here].astype(int)
        assert (
            tokens.take(np.sort(places))[np.argsort(np.argsort(places))] == batch.targets[here]
        ).all()
        seen += places.tolist()
    assert sorted(seen) == np.flatnonzero(tokens.trained).tolist()


def test_concatenated_streams_give_the_rows_of_both():
    first, second = some_documents(3, seed=1), some_documents(4, seed=2)
    joined = Tokens.concatenate([tokens_of(first, shared=True), tokens_of(second, shared=True)])
    whole = tokens_of([*first, *second], shared=True)
    for name in branches.Branches._fields:
        np.testing.assert_array_equal(getattr(joined.branches, name), getattr(whole.branches, name))
    assert joined.branches.tokens_A.tolist() == [
        len(a) for d in [*first, *second] for a in d.answers
    ]


def test_sources_with_rows_of_many_and_few_answers_make_batches_of_one_shape():
    few = [
        d._replace(answers=d.answers[:2], counted=d.counted[:2], groups=[1, 1], labels=[1.0, 0.0])
        for d in some_documents(6, seed=3)
    ]
    parts = [
        Component("few", tokens_of(few, shared=True), ((0.0, 1.0),)),
        Component("many", tokens_of(some_documents(9, seed=4), shared=True), ((0.0, 1.0),)),
    ]
    loader = make_loader(
        parts, length=32, batch_size=4, steps=6, packing="first_fit", token_lengths=LENGTHS
    )
    shapes = {loader.batch(i).labels.shape for i in range(6)}
    assert len(shapes) == 1
    for i in range(6):
        batch = loader.batch(i)
        assert (batch.answers.max(axis=1) == (batch.groups > 0).sum(axis=1)).all()


def test_a_document_that_is_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="longer than a row of 8"):
        batches([EXAMPLE], shared=True, length=8)


@pytest.mark.parametrize("attention", ["cudnn", "pallas", "splash"])
def test_a_kernel_that_cannot_share_prompts_says_so(attention):
    cfg = tiny_model(attention=attention)
    params = init(models.family("decoder").specs(cfg), jax.random.key(0))
    (batch,) = batches([EXAMPLE], shared=True, length=16, rows=1)
    with pytest.raises(ValueError, match=attention):
        models.family("decoder").hidden(params, jax.tree.map(jnp.asarray, batch), cfg)
