"""Fused scores equal the plain ones in value and gradient, on any mesh, and never hold all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.nn import head

V, PADDED = 53, 56
B, L, D = 8, 6, 16


def arrays(seed=0):
    k = jax.random.split(jax.random.key(seed), 3)
    table = jax.random.normal(k[0], (PADDED, D))
    return table, jax.random.normal(k[1], (B, L, D)), jax.random.randint(k[2], (B, L), 0, V)


def plain(table, x, targets, softcap):
    """The same numbers from the whole [B, L, V] array."""
    z = head.logits(table, x, vocab_size=V, softcap=softcap)
    log_p = jax.nn.log_softmax(z, axis=-1)
    at = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return {
        "log_probs": at,
        "log_z": jax.nn.logsumexp(z, axis=-1),
        "correct": (jnp.argmax(z, axis=-1) == targets).astype(jnp.float32),
        "entropy": -jnp.sum(jnp.exp(log_p) * log_p, axis=-1),
        "mean_log_probs": jnp.mean(log_p, axis=-1),
    }


def weighted(scores):
    return sum(
        (n + 1) * jnp.sum(jnp.sin(jnp.arange(B * L).reshape(B, L) + n) * scores[name])
        for n, name in enumerate(head.TERMS)
    )


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("chunk", [0, 3, 20], ids=["auto", "three", "twenty"])
@pytest.mark.parametrize(
    "mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "tensor": 8}], ids=str
)
def test_scores_equal_plain_reference(softcap, chunk, mesh):
    table, x, targets = arrays()

    def fused(table, x):
        return weighted(
            head.token_scores(
                table, x, targets, vocab_size=V, softcap=softcap, chunk=chunk, want=head.TERMS
            )
        )

    def run(f):
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(table, x)

    want = run(lambda t, x: weighted(plain(t, x, targets, softcap)))
    mesh = sharding.make_mesh(MeshConfig(**(mesh or {})), jax.devices()[: 8 if mesh else 1])
    with jax.set_mesh(mesh):
        got = run(fused)
        forward = jax.jit(
            lambda t, x: head.token_scores(
                t, x, targets, vocab_size=V, softcap=softcap, chunk=chunk, want=head.TERMS
            )
        )
        values = forward(table, x)
    for name, value in plain(table, x, targets, softcap).items():
        np.testing.assert_allclose(values[name], value, atol=3e-5, err_msg=name)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)
    assert (np.asarray(got[1][0])[V:] == 0).all()  # rows that pad the table learn nothing


def test_unknown_score_is_an_error():
    with pytest.raises(ValueError, match="unknown scores"):
        head.token_scores(*arrays(), vocab_size=V, want=("log_prob",))


def test_no_array_of_tokens_by_vocabulary():
    """Vocabulary 131,072 and 8,192 tokens: 4.3 GB of logits in float32 that must not exist."""
    n_vocab, n_tokens, width = 131_072, 8_192, 64
    table = jax.ShapeDtypeStruct((n_vocab, width), jnp.float32)
    x = jax.ShapeDtypeStruct((8, n_tokens // 8, width), jnp.float32)
    targets = jax.ShapeDtypeStruct((8, n_tokens // 8), jnp.int32)

    def loss(table, x, targets, chunk):
        return -jnp.sum(
            head.token_scores(table, x, targets, vocab_size=n_vocab, chunk=chunk)["log_probs"]
        )

    def temporary(chunk):
        f = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=3)
        return f.lower(table, x, targets, chunk).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * n_vocab * n_tokens
    assert temporary(0) < 0.15 * logits
    assert temporary(n_vocab) > 0.9 * logits  # what the test would see if they did
