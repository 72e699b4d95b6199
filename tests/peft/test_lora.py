"""LoRA: what it adds, when it changes nothing, and how it merges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_batch, tiny_model

from llm_jax import config as configs
from llm_jax import models
from llm_jax.config import PeftConfig
from llm_jax.nn import params as nn_params
from llm_jax.nn.low_rank import LowRank
from llm_jax.peft import lora

CFG = PeftConfig(method="lora", rank=4, alpha=12.0)


@pytest.fixture(scope="module")
def base():
    model = tiny_model()
    return model, nn_params.init(models.family("decoder").specs(model), jax.random.key(0))


def trained(model, cfg=CFG, seed=1, zero=False):
    specs = lora.specs(models.family("decoder").specs(model), cfg)
    values = nn_params.init(specs, jax.random.key(seed))
    if zero:
        return values
    noise = iter(jax.random.split(jax.random.key(seed + 1), 99))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), values)


def log_probs(model, params, batch, rng=None):
    return models.family("decoder").scores(params, batch, model, rng=rng).log_probs


def test_at_its_start_it_is_the_base_bit_for_bit(base):
    model, params = base
    tuned = lora.attach(params, trained(model, zero=True), CFG)
    batch = random_batch(packed=True)
    np.testing.assert_array_equal(log_probs(model, tuned, batch), log_probs(model, params, batch))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("targets", [CFG.targets, r"^embed/tokens$|/q/w$"])
def test_merged_is_unmerged(base, scan, targets):
    model, params = base
    cfg = PeftConfig(method="lora", rank=4, alpha=12.0, targets=targets)
    model = configs.thaw(model)
    model.scan, model.qkv_bias = scan, False
    model = configs.freeze(model)
    values = trained(model, cfg)
    tuned, batch = lora.attach(params, values, cfg), random_batch()
    merged = lora.merge(tuned)
    # A tied table is read twice, by rows and as the head.
    got, want = log_probs(model, tuned, batch), log_probs(model, merged, batch)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert float(jnp.abs(want - log_probs(model, params, batch)).max()) > 1e-3
    again = lora.unmerge(merged, values, cfg)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_the_scale_is_alpha_over_r_or_its_root():
    x, a, b = jnp.ones((1, 3)), jnp.ones((3, 4)), jnp.ones((4, 2))
    for cfg, factor in [
        (CFG, 12.0 / 4),
        (PeftConfig(rank=4, alpha=12.0, rank_stabilized=True), 12.0 / 2),
    ]:
        leaf = LowRank(jnp.zeros((3, 2)), a, b, scale=lora.scale(cfg))
        np.testing.assert_allclose(leaf.matmul(x), factor * 12.0)
        np.testing.assert_allclose(leaf.dequantize("float32"), factor * 4.0)


def test_adapters_share_their_base(base):
    model, params = base
    first, second = (lora.attach(params, trained(model, seed=s), CFG) for s in (1, 7))
    w = nn_params.flatten(params)["layers/mlp/up/w"]
    for tree in (first, second):
        leaf = nn_params.flatten(tree)["layers/mlp/up/w"]
        assert leaf.base is w and leaf.shape == w.shape
    batch = random_batch()
    assert not np.allclose(log_probs(model, first, batch), log_probs(model, second, batch))


def test_dropout_belongs_to_rows_and_to_training(base):
    model, params = base
    cfg = PeftConfig(method="lora", rank=4, alpha=12.0, dropout=0.5)
    tuned = lora.attach(params, trained(model, cfg), cfg)
    plain = lora.attach(params, trained(model, cfg), CFG)
    batch = random_batch(rows=4)
    np.testing.assert_array_equal(log_probs(model, tuned, batch), log_probs(model, plain, batch))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(jnp.arange(4))
    dropped = log_probs(model, tuned, batch, keys)
    assert not np.allclose(dropped, log_probs(model, plain, batch))
    half = jax.tree.map(lambda x: x[2:], batch)
    np.testing.assert_allclose(log_probs(model, tuned, half, keys[2:]), dropped[2:], atol=1e-6)
    # Its mean over many keys is the value without.
    leaf = nn_params.flatten(tuned)["layers/attn/q/w"]
    one = jax.tree.map(lambda x: x[0], leaf)
    x = jax.random.normal(jax.random.key(3), (1, 32))
    many = jax.random.split(jax.random.key(4), 20_000)
    y = one.seeded(many).matmul(jnp.broadcast_to(x, (20_000, 32)))
    np.testing.assert_allclose(y.mean(0), one.matmul(x)[0], atol=0.05)
    assert float(jnp.abs(y.std(0)).max()) > 0.1


@pytest.mark.parametrize(
    ("targets", "message"),
    [("/nothing/", "matches no parameter"), ("attn_norm", "which is no matrix")],
)
def test_patterns_are_checked(base, targets, message):
    model, _ = base
    with pytest.raises(ValueError, match=message):
        lora.specs(models.family("decoder").specs(model), PeftConfig(targets=targets))
