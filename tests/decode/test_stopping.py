"""The automaton finds stop strings however they are cut into tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.decode.stopping import token_automaton


def stops_after(strings, token_bytes, ids):
    table, accept = token_automaton(strings, token_bytes)
    state = 0
    for n, i in enumerate(ids):
        state = table[state, i]
        if state == accept:
            return n
    return None


def test_across_tokens_and_overlaps():
    tokens = [b"a", b"b", b"ab", b"aab", b"c", b"", "é".encode()[:1], "é".encode()[1:]]
    assert stops_after(["abc"], tokens, [0, 3, 4]) == 2  # a + aab + c
    assert stops_after(["aabab"], tokens, [0, 3, 2]) == 2  # a a|ab: the failure link keeps "aab"
    assert stops_after(["abc"], tokens, [2, 5, 4]) == 2  # a token without bytes changes nothing
    assert stops_after(["é"], tokens, [6, 7]) == 1
    assert stops_after(["abc", "b"], tokens, [2]) == 0
    assert stops_after(["abcabc"], tokens, [2, 4, 2]) is None
    assert stops_after(["xb"], tokens, [1, 1]) is None


def test_empty_stop_is_an_error():
    with pytest.raises(ValueError, match="--stop"):
        token_automaton([""], [b"a"])


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("ab", max_size=3), min_size=1, max_size=4),
    st.data(),
)
def test_equals_searching_the_text(strings, vocabulary, data):
    ids = data.draw(st.lists(st.integers(0, len(vocabulary) - 1), max_size=10))
    text, want = "", None
    for n, i in enumerate(ids):
        text += vocabulary[i]
        if want is None and any(s in text for s in strings):
            want = n
    assert stops_after(strings, [v.encode() for v in vocabulary], ids) == want
    assert (
        np.asarray(token_automaton(strings, [v.encode() for v in vocabulary])[0]).dtype == np.int32
    )
