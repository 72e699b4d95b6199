"""Filters on literal distributions, and what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.decode.sampling import choose, filter_logits, make_sampling, penalise

P = np.array([[0.5, 0.25, 0.15, 0.06, 0.04]])
LOGITS = jnp.log(jnp.array(P))


def kept(**options):
    z = filter_logits(LOGITS, make_sampling(**options))
    return (np.asarray(z)[0] > -1e29).astype(int).tolist()


def test_filters_keep_these():
    assert kept() == [1, 1, 1, 1, 1]
    assert kept(top_k=2) == [1, 1, 0, 0, 0]
    assert kept(top_p=0.5) == [1, 0, 0, 0, 0]  # 0.5 is reached by the first alone
    assert kept(top_p=0.51) == [1, 1, 0, 0, 0]
    assert kept(top_p=0.9) == [1, 1, 1, 0, 0]
    assert kept(top_p=0.91) == [1, 1, 1, 1, 0]
    assert kept(top_p=1e-6) == [1, 0, 0, 0, 0]
    assert kept(min_p=0.3) == [1, 1, 1, 0, 0]  # at least 0.15
    assert kept(min_p=0.29, top_k=2) == [1, 1, 0, 0, 0]
    # top-p counts what top-k has left: 0.5 / 0.75 = 0.67 reaches 0.6
    assert kept(top_k=2, top_p=0.6) == [1, 0, 0, 0, 0]
    # a high temperature flattens first, so that top-p keeps more
    assert sum(kept(top_p=0.9, temperature=10.0)) == 5


def test_temperature_and_draws():
    sampling = make_sampling(temperature=0.5)
    keys = jax.random.split(jax.random.key(0), 4000)
    token, log_p = choose(jnp.tile(LOGITS, (4000, 1)), keys, None, sampling)
    share = np.bincount(token, minlength=5) / 4000
    want = P[0] ** 2 / (P[0] ** 2).sum()
    np.testing.assert_allclose(share, want, atol=0.03)
    np.testing.assert_allclose(log_p, np.log(P[0])[np.asarray(token)], rtol=1e-5)  # the model's own
    greedy, _ = choose(LOGITS, keys[:1], None, make_sampling(temperature=0))
    assert int(greedy[0]) == 0


def test_penalty_divides_positive_and_multiplies_negative():
    z = jnp.array([[2.0, -2.0, 1.0]])
    out = penalise(z, jnp.array([[True, True, False]]), jnp.float32(2.0))
    np.testing.assert_allclose(out, [[1.0, -4.0, 1.0]])


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.0},
        {"repetition_penalty": 0},
    ],
)
def test_bad_numbers_name_their_flag(bad):
    with pytest.raises(ValueError, match=f"--{next(iter(bad))}="):
        make_sampling(**bad)
