"""Examples-proportional mixing: the paper's formula, its two ends, and the table's figures."""

import numpy as np
import pytest

from llm_jax.data.mixture import rates, shares

SIZES = {"a": 8, "b": 1, "c": 27}


@pytest.mark.parametrize(
    "cap, temperature, wanted",
    [
        (0, 1, [8 / 36, 1 / 36, 27 / 36]),
        (0, 3, [2 / 6, 1 / 6, 3 / 6]),  # cube roots
        (8, 1, [8 / 17, 1 / 17, 8 / 17]),
        # Capped after the root it would be 2 : 1 : 3 again.
        (8, 3, [2 / 5, 1 / 5, 2 / 5]),
    ],
)
def test_the_example(cap, temperature, wanted):
    found = rates(SIZES, cap=cap, temperature=temperature)
    assert list(found) == list(SIZES)
    np.testing.assert_allclose(list(found.values()), wanted, rtol=1e-12)


def test_the_ends():
    np.testing.assert_allclose(list(rates(SIZES, temperature=1e9).values()), 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(list(rates(SIZES, cap=1).values()), 1 / 3)
    # A low temperature leaves the largest alone, and overflows nothing.
    np.testing.assert_allclose(list(rates(SIZES, temperature=1e-3).values()), [0, 0, 1], atol=1e-9)


def test_rates_are_the_weights_of_sources():
    found = rates(SIZES, cap=10, temperature=2)
    share = shares([((0.0, r),) for r in found.values()], 5)
    np.testing.assert_allclose(share[3], list(found.values()), rtol=1e-12)


@pytest.mark.parametrize(
    "examples, more, message",
    [
        ({}, {}, "an example of each task"),
        ({"a": 3, "b": 0}, {}, "there is none of 'b'"),
        ({"a": 3}, {"cap": -1}, "cap=-1"),
        ({"a": 3}, {"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_errors(examples, more, message):
    with pytest.raises(ValueError, match=message):
        rates(examples, **more)
