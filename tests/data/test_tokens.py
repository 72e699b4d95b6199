"""Reading a tokenised corpus: any id at any place, whatever shard it is in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data.tokens import Tokens, dtype_of

SHARDS = st.lists(st.integers(min_value=1, max_value=9), min_size=1, max_size=5)


def sharded(sizes, vocab_size=1000):
    ids = np.arange(sum(sizes), dtype=dtype_of(vocab_size))
    shards = np.split(ids, np.cumsum(sizes)[:-1])
    return Tokens(shards, np.array([0, len(ids)]), vocab_size=vocab_size)


@given(SHARDS, st.data())
def test_windows_and_single_ids_do_not_see_the_shards(sizes, data):
    tokens = sharded(sizes)
    width = data.draw(st.integers(min_value=1, max_value=tokens.total))
    start = st.integers(min_value=0, max_value=tokens.total - width)
    starts = np.array(data.draw(st.lists(start, max_size=6)), np.int64)
    # The ids are their positions.
    np.testing.assert_array_equal(tokens.windows(starts, width), starts[:, None] + np.arange(width))
    np.testing.assert_array_equal(tokens.take(starts), starts)


def test_concatenate_shifts_documents():
    a, b = Tokens.from_lists([[1, 2], [3]], 9), Tokens.from_lists([[4], [5, 6]], 9)
    both = Tokens.concatenate([a, b])
    assert both.offsets.tolist() == [0, 2, 3, 4, 6]
    assert both.take(np.arange(6)).tolist() == [1, 2, 3, 4, 5, 6]
    assert both.documents == 4 and both.total == 6
    assert Tokens.concatenate([a]) is a


@pytest.mark.parametrize("vocab_size, dtype", [(65536, np.uint16), (65537, np.uint32)])
def test_the_smallest_type_that_holds_the_vocabulary(vocab_size, dtype):
    assert dtype_of(vocab_size) == dtype
    assert Tokens.from_lists([[vocab_size - 1]], vocab_size).take([0]) == vocab_size - 1
