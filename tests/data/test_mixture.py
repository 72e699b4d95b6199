"""Mixtures: the realised shares follow the wanted ones within one row, at every step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data.mixture import Mixture, check_weights, rows_per_step, shares

CONSTANT = ((0.0, 1.0),)
WEIGHT = st.floats(min_value=0.001, max_value=1)


def points(draw):
    fractions = sorted(draw(st.sets(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=1)))
    return tuple((f, draw(WEIGHT)) for f in fractions)


def test_the_example():
    rows = rows_per_step(np.tile([[2 / 3, 1 / 3]], (5, 1)), 2)
    assert rows.tolist() == [[2, 0], [1, 1], [1, 1], [2, 0], [1, 1]]


def test_weights_are_linear_between_their_points():
    # Annealing: the second source is let in over the last tenth.
    share = shares([CONSTANT, ((0.9, 0.0), (1.0, 3.0))], 101)
    np.testing.assert_allclose(share[:91, 1], 0)
    np.testing.assert_allclose(share[95, 1], 1.5 / 2.5)
    np.testing.assert_allclose(share[100], [0.25, 0.75])


@given(st.data(), st.integers(1, 5), st.integers(1, 9), st.integers(1, 60))
def test_shares_are_met_within_one_row_at_every_step(data, sources, batch_size, steps):
    share = shares([points(data.draw) for _ in range(sources)], steps)
    rows = rows_per_step(share, batch_size)
    assert (rows >= 0).all()
    assert (rows.sum(axis=1) == batch_size).all()
    # Rounding each step by itself would starve a source of share 0.4 / batch_size for ever.
    error = np.cumsum(rows, axis=0) - np.cumsum(share * batch_size, axis=0)
    assert np.abs(error).max() < 1 + 1e-6


def test_a_long_run_with_tiny_shares():
    share = shares([CONSTANT, ((0.0, 0.001),), ((0.0, 0.02),), ((0.0, 0.02),)], 5000)
    rows = rows_per_step(share, 2)
    error = np.cumsum(rows, axis=0) - np.cumsum(share * 2, axis=0)
    assert np.abs(error).max() < 1 + 1e-6
    assert rows[:, 1].sum() in (9, 10)


def test_rows_of_a_source_are_numbered_without_gaps_and_spread_over_the_batch():
    mixture = Mixture([CONSTANT, ((0.0, 3.0),)], steps=4, batch_size=8)
    seen = {0: [], 1: []}
    for step in range(4):
        source, row = mixture.step(step)
        for s in (0, 1):
            seen[s] += row[source == s].tolist()
        assert [int((source[i : i + 4] == 0).sum()) for i in (0, 4)] == [1, 1]
    assert seen == {0: list(range(8)), 1: list(range(24))}


@pytest.mark.parametrize(
    "weights, message",
    [
        ((), "points, not"),
        ((0.0, 1.0), "points"),
        (((0.0, 1.0), (0.0, 2.0)), "ascend"),
        (((0.5, 1.0), (1.5, 1.0)), r"within \[0, 1\]"),
        (((0.0, -1.0),), "negative"),
    ],
)
def test_wrong_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        check_weights("code", weights)


def test_all_weights_zero_is_an_error():
    with pytest.raises(ValueError, match="all weights are 0 at step 10 of 11"):
        shares([((0.0, 1.0), (1.0, 0.0))], 11)
