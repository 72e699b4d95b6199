"""Two models' heads against each other: equal to the whole arrays, which never exist."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.nn import distill_head, head
from llm_jax.nn.distill_head import Side
from llm_jax.objectives import distillation

V = 53
B, L, DS, DT = 4, 6, 8, 16  # the student is narrower than the teacher


def arrays():
    k = jax.random.split(jax.random.key(0), 5)
    student = jax.random.normal(k[0], (56, DS)), jax.random.normal(k[1], (B, L, DS))
    teacher = jax.random.normal(k[2], (64, DT)) * 0.5, jax.random.normal(k[3], (B, L, DT))
    return student, teacher, jax.random.randint(k[4], (B, L), 0, V)


def dense(student, teacher, targets, kind, temperature):
    """The same numbers from [B, L, V] arrays, with the formulas written out."""
    z = head.logits(*student, vocab_size=V, softcap=3.0)
    z_t = head.logits(*teacher, vocab_size=V, softcap=5.0)
    p, q = jax.nn.softmax(z_t / temperature), jax.nn.softmax(z / temperature)
    m = 0.3 * p + 0.7 * q
    kl = lambda a, b: jnp.sum(a * (jnp.log(a) - jnp.log(b)), axis=-1)  # noqa: E731
    log_p = jax.nn.log_softmax(z)
    return {
        "log_probs": jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0],
        "log_z": jax.nn.logsumexp(z, axis=-1),
        "correct": (jnp.argmax(z, axis=-1) == targets).astype(jnp.float32),
        "divergence": {
            "forward_kl": kl(p, q),
            "reverse_kl": kl(q, p),
            "jsd": 0.3 * kl(p, m) + 0.7 * kl(q, m),
        }[kind],
    }


def fused(student, teacher, targets, kind, temperature, chunk):
    return distill_head.compared_scores(
        Side(*student, 3.0),
        Side(*teacher, 5.0),
        targets,
        distillation.divergence(kind, 0.3),
        vocab_size=V,
        temperature=temperature,
        chunk=chunk,
    )


def weighted(scores):
    wave = jnp.sin(jnp.arange(B * L, dtype=jnp.float32)).reshape(B, L)
    return sum((n + 1) * jnp.sum((wave + n) * scores[k]) for n, k in enumerate(sorted(scores)))


@pytest.mark.parametrize(
    ("kind", "chunk", "mesh"),
    [
        ("forward_kl", 0, None),
        ("reverse_kl", 4, None),  # does not divide the length
        ("forward_kl", 2, {"data": 2}),
        ("jsd", 4, {"data": 1, "tensor": 2}),
        ("reverse_kl", 0, {"data": 1, "fsdp": 2}),
    ],
    ids=str,
)
def test_compared_scores_equal_the_dense_formulas(kind, chunk, mesh):
    student, teacher, targets = arrays()
    both = lambda f, *more: jax.jit(  # noqa: E731
        lambda s: (
            f(s, teacher, targets, kind, 2.0, *more),
            jax.grad(lambda s: weighted(f(s, teacher, targets, kind, 2.0, *more)))(s),
        )
    )
    want = both(dense)(student)
    devices = sharding.make_mesh(MeshConfig(**(mesh or {})), jax.devices()[: 2 if mesh else 1])
    with jax.set_mesh(devices):
        got = both(fused, chunk)(student)
    for name, value in want[0].items():
        np.testing.assert_allclose(got[0][name], value, atol=2e-5, err_msg=name)
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
    assert (np.asarray(got[1][0])[V:] == 0).all()  # rows that pad the table learn nothing


def test_the_teacher_is_not_differentiated():
    student, teacher, targets = arrays()
    grads = jax.grad(lambda t: weighted(fused(student, t, targets, "jsd", 1.0, 0)))(teacher)
    assert all((np.asarray(g) == 0).all() for g in grads)


def test_top_k_never_names_a_row_of_padding():
    _, (table, x), _ = arrays()
    table = table.at[V:].set(100 * jnp.sign(x[0, 0]))  # padding rows with huge logits
    ids, log_p = distill_head.top_k(Side(table, x), 5, vocab_size=V, chunk=4)
    whole = jax.nn.log_softmax(head.logits(table, x, vocab_size=V, softcap=0.0))
    np.testing.assert_allclose(log_p, jax.lax.top_k(whole, 5)[0], atol=1e-5)
    np.testing.assert_array_equal(ids, jax.lax.top_k(whole, 5)[1])


def test_candidate_logits_equal_the_dense_ones():
    (table, x), _, _ = arrays()
    ids = jax.random.randint(jax.random.key(9), (B, L, 7), 0, V)

    def plain(table, x):
        z = head.logits(table, x, vocab_size=V, softcap=3.0)
        return jnp.take_along_axis(z, ids, axis=-1)

    def gathered(table, x):
        return distill_head.candidate_logits(Side(table, x, 3.0), ids, chunk=4)

    run = lambda f: jax.value_and_grad(  # noqa: E731
        lambda t, x: jnp.sum(jnp.sin(f(t, x))), argnums=(0, 1)
    )(table, x)
    np.testing.assert_allclose(gathered(table, x), plain(table, x), atol=1e-5)
    for a, b in zip(jax.tree.leaves(run(gathered)), jax.tree.leaves(run(plain)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_no_array_of_tokens_by_vocabulary():
    """Vocabulary 65,536 and 8,192 tokens: 2.1 GB of logits a model that must not exist."""
    n_vocab, n_tokens = 65_536, 8_192
    abstract = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    targets = jax.ShapeDtypeStruct((8, n_tokens // 8), jnp.int32)

    def loss(student, teacher, targets, chunk):
        out = distill_head.compared_scores(
            Side(*student),
            Side(*teacher),
            targets,
            distillation.divergence("forward_kl"),
            vocab_size=n_vocab,
            chunk=chunk,
        )
        return jnp.sum(out["divergence"] - out["log_probs"])

    def temporary(chunk):
        student = abstract(n_vocab, 32), abstract(8, n_tokens // 8, 32)
        teacher = abstract(n_vocab, 64), abstract(8, n_tokens // 8, 64)
        lowered = jax.jit(jax.grad(loss), static_argnums=3).lower(student, teacher, targets, chunk)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    logits = 4 * n_vocab * n_tokens
    assert temporary(0) < 0.15 * logits
    assert temporary(n_tokens // 8) > logits  # what the test would see if they did
