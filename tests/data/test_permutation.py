"""The computed permutation is one, changes with its key, and looks random."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data.permutation import permute

KEY = st.integers(min_value=0, max_value=2**64 - 1)


@given(st.integers(min_value=1, max_value=300), KEY)
def test_every_index_comes_exactly_once(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@given(st.integers(min_value=2, max_value=2**62), KEY, st.lists(KEY, min_size=1, max_size=5))
def test_each_index_goes_where_it_goes_alone(size, key, numbers):
    indices = np.array([n % size for n in numbers])
    alone = [int(permute(indices[i : i + 1], size, key)[0]) for i in range(len(indices))]
    together = permute(indices, size, key)
    assert together.tolist() == alone
    assert (together >= 0).all() and (together < size).all()


def test_sizes_beyond_32_bits_reach_all_of_their_range():
    # grain's index_shuffle (0.2.18) stays below 2^31 whatever the size.
    size = 10**12
    found = permute(np.arange(10_000), size, 1)
    assert len(np.unique(found)) == 10_000
    np.testing.assert_allclose(
        np.quantile(found / size, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02
    )


@pytest.mark.parametrize("size", [1000, 4096, 4097])
def test_orders_look_random(size):
    orders = np.stack([permute(np.arange(size), size, key) for key in range(20)])
    # Neighbours and different keys are uncorrelated: |r| has a standard deviation of 1/sqrt(size).
    limit = 5 / np.sqrt(size)
    for a, b in itertools.pairwise(orders):
        assert abs(np.corrcoef(a, b)[0, 1]) < limit
        assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < limit
        assert abs(np.corrcoef(a, np.arange(size))[0, 1]) < limit
    # Every index goes everywhere: the mean over 20 keys is near the middle.
    assert np.abs(orders.mean(axis=0) / size - 0.5).max() < 6 / np.sqrt(12 * 20)
