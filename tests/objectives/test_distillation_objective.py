"""Divergences by hand, buckets against whole distributions, and the loss they make."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.objectives import distillation
from llm_jax.types import Batch, Scores

log = lambda *p: jnp.log(jnp.array(p))  # noqa: E731


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("forward_kl", 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)),  # 0.1438
        ("reverse_kl", 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)),  # 0.1308
        # beta = 0.2: m = (0.7, 0.3); with the shares swapped m would be (0.55, 0.45)
        (
            "jsd",
            0.2 * (0.5 * np.log(0.5 / 0.7) + 0.5 * np.log(0.5 / 0.3))
            + 0.8 * (0.75 * np.log(0.75 / 0.7) + 0.25 * np.log(0.25 / 0.3)),
        ),
    ],
)
def test_by_hand(kind, value):
    between = distillation.divergence(kind, 0.2)
    np.testing.assert_allclose(between(log(0.5, 0.5), log(0.75, 0.25)), value, rtol=1e-5)
    assert abs(between(log(0.9, 0.1), log(0.9, 0.1))) < 1e-7


def test_errors():
    with pytest.raises(ValueError, match="--divergence=kl is unknown"):
        distillation.divergence("kl")
    with pytest.raises(ValueError, match=r"--beta=1\.0"):
        distillation.divergence("jsd", 1.0)


def buckets(teacher, student, k, kind, temperature):
    """The divergence [B, T] from the teacher's k most probable tokens."""
    known, ids = jax.lax.top_k(teacher, k)
    scores = Scores(candidate_log_probs=jnp.take_along_axis(student, ids, axis=-1))
    batch = Batch(tokens=ids[..., 0], candidates=ids, candidate_log_probs=known)
    between = distillation.divergence(kind)
    return distillation.bucket_divergence(scores, batch, between, temperature=temperature)


@pytest.mark.parametrize("kind", distillation.DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_whole_vocabulary_as_candidates_is_the_whole_distribution(kind, temperature):
    z_t, z = jax.random.normal(jax.random.key(0), (2, 3, 4, 29)) * 2
    teacher = jax.nn.log_softmax(z_t)

    def full(z):
        tempered = lambda z: jax.nn.log_softmax(z / temperature)  # noqa: E731
        return jnp.sum(distillation.divergence(kind)(tempered(z_t), tempered(z)))

    def known(z):
        return jnp.sum(buckets(teacher, jax.nn.log_softmax(z), 29, kind, temperature))

    for a, b in zip(jax.value_and_grad(known)(z), jax.value_and_grad(full)(z), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_what_is_left_is_one_bucket():
    teacher, student = log(0.5, 0.3, 0.2)[None, None], log(0.25, 0.05, 0.7)[None, None]
    want = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    # Renormalised, the one candidate would have probability 1 in both, and the divergence be 0.
    np.testing.assert_allclose(buckets(teacher, student, 1, "forward_kl", 1.0), want, rtol=1e-5)


def test_what_a_student_spends_outside_counts_where_the_teacher_spends_nothing():
    teacher, student = log(0.6, 0.4, 1e-9)[None, None], log(0.3, 0.2, 0.5)[None, None]
    # Without the student's bucket its candidates would be renormalised, and the divergence be 0.
    np.testing.assert_allclose(
        buckets(teacher, student, 2, "forward_kl", 1.0), np.log(2), rtol=1e-4
    )


def test_a_candidate_costs_the_tail():
    """Raising the candidates above the teacher's mass is punished: the gradient turns at equality."""
    teacher = log(0.5, 0.3, 0.2)[None, None]
    f = lambda z: buckets(teacher, jax.nn.log_softmax(z), 2, "forward_kl", 1.0).sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(f)(teacher), jnp.zeros((1, 1, 3)), atol=1e-6)
    assert jax.grad(f)(log(0.55, 0.35, 0.1)[None, None])[0, 0, 2] < 0  # the tail has to grow


def test_a_confident_student_has_a_finite_loss_and_gradient():
    teacher = log(0.5, 0.3, 0.2)[None, None]
    z = jnp.array([60.0, 0.0, -60.0])[None, None]
    for kind in distillation.DIVERGENCES:
        f = lambda z: buckets(teacher, jax.nn.log_softmax(z), 2, kind, 1.0).sum()  # noqa: B023,E731
        value, grad = jax.value_and_grad(f)(z)
        assert jnp.isfinite(value) and jnp.isfinite(grad).all()


def test_the_loss_is_a_mixture_with_the_square_of_the_temperature():
    rng = np.random.default_rng(0)
    log_probs, apart = -rng.random((2, 3)), rng.random((2, 3))
    weights = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
    scores = Scores(
        log_probs=jnp.array(log_probs, jnp.float32),
        log_z=jnp.zeros((2, 3)),
        correct=jnp.zeros((2, 3)),
        divergence=jnp.array(apart, jnp.float32),
    )
    batch = Batch(tokens=jnp.zeros((2, 3), jnp.int32), weights=jnp.array(weights))
    loss = distillation.distillation(scores, batch, alpha=0.25, temperature=3.0)
    mean = lambda x: (x * weights).sum() / 3  # noqa: E731
    # Without the square of the temperature, 0.25 times the divergence.
    want = 0.75 * mean(-log_probs) + 0.25 * 9 * mean(apart)
    np.testing.assert_allclose(loss.value(), want, rtol=1e-6)
    np.testing.assert_allclose(loss.metrics["divergence"].value(), mean(apart), rtol=1e-6)
    np.testing.assert_allclose(loss.metrics["nll"].value(), mean(-log_probs), rtol=1e-6)
