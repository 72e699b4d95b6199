"""muP: the table of Yang et al. (2022), and that a model of the base width is untouched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_batch, tiny_model, tiny_train

from llm_jax import config as configs
from llm_jax.models import decoder
from llm_jax.nn import params
from llm_jax.nn.params import Normal, flatten
from llm_jax.train import optimizer as opt


def spec_of(**changes):
    cfg = tiny_model(init_std=0.1, **changes)
    return flatten(decoder.specs(cfg)), cfg


def test_starts_and_rates_of_a_model_four_times_as_wide():
    moe = configs.MoEConfig(n_experts=4, n_shared=1)
    specs, cfg = spec_of(mup_base_width=8, tied=False, norm_bias=True, norm="layernorm", moe=moe)
    residual = 0.1 / np.sqrt(2 * cfg.n_layers)
    for path, want, rate in [
        ("embed/tokens", 0.1, 1.0),
        ("head/w", 0.1, 1.0),  # its share is the factor on the logits
        ("layers/attn/q/w", 0.1 / 2, 1 / 4),
        ("layers/attn/o/w", residual / 2, 1 / 4),
        ("layers/moe/experts/up/w", 0.1 / 2, 1 / 4),
        ("layers/moe/experts/down/w", residual / 2, 1 / 4),
        ("layers/moe/shared/down/w", residual / 2, 1 / 4),
        ("layers/moe/router/w", 0.1 / 4, 1 / 4),
    ]:
        assert specs[path].init == Normal(pytest.approx(want)), path
        assert specs[path].rate == rate, path
    vectors = [s for p, s in specs.items() if p.endswith(("scale", "bias"))]
    assert vectors and all(s.rate == 1.0 for s in vectors)
    assert cfg.logit_scale == 8 / 32


def test_the_base_width_is_the_standard_parametrisation():
    at_base, cfg = spec_of(mup_base_width=32)
    standard, plain = spec_of()
    assert at_base == standard
    assert cfg.logit_scale == 1.0 and plain.logit_scale == 0.0


def test_scales_of_logits_and_of_attention():
    cfg = tiny_model(mup_base_width=8, mup_base_head_dim=2)
    # sqrt(2) / head_dim, at the base 1 / sqrt(2); the standard way would be 1 / sqrt(head_dim).
    assert cfg.attention_scale == pytest.approx(np.sqrt(2) / 4)
    p = params.init(decoder.specs(cfg), jax.random.key(0))
    batch = random_batch()
    x = decoder.hidden(p, batch, cfg).x
    logits = decoder.logits(p, x, cfg)
    plain = jnp.einsum("bld,vd->blv", x, p["embed"]["tokens"])[..., : cfg.vocab_size]
    np.testing.assert_allclose(logits, plain / 4, atol=1e-5)
    log_p = jax.nn.log_softmax(logits)
    want = jnp.take_along_axis(log_p, batch.targets[..., None], axis=-1)[..., 0]
    # The fused head of training has the same factor.
    np.testing.assert_allclose(decoder.scores(p, batch, cfg).log_probs, want, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_moves_by_the_rate_and_decays_as_before(name):
    def step(base_width, decay):
        cfg = tiny_train(
            **{
                "model.mup_base_width": base_width,
                "optimizer.name": name,
                "optimizer.weight_decay": decay,
                "optimizer.schedule": "constant",
                "optimizer.warmup_steps": 0,
            }
        )
        specs = decoder.specs(cfg.model)
        made = opt.make_optimizer(cfg.optimizer, cfg.steps, specs)
        p = params.init(decoder.specs(tiny_model()), jax.random.key(0))  # the same for both
        grads = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size) * 1.7).reshape(x.shape), p)
        updates, _ = made.update(grads, made.init(p), p)
        return flatten(updates), flatten(p), cfg.optimizer.learning_rate

    standard, p, rate = step(0, 0.0)
    mup, _, _ = step(8, 0.0)
    decayed, _, _ = step(8, 0.5)
    for path, factor in [("layers/mlp/up/w", 1 / 4), ("embed/tokens", 1.0)]:
        np.testing.assert_allclose(mup[path], factor * standard[path], rtol=1e-5, atol=1e-9)
        # Decay at the rate's full size, not a quarter of it.
        want = mup[path] - rate * 0.5 * p[path]
        np.testing.assert_allclose(decayed[path], want, rtol=1e-5, atol=1e-8)
    norm = "layers/attn_norm/scale"
    np.testing.assert_allclose(decayed[norm], mup[norm], rtol=1e-6)


def test_what_muP_does_not_cover_is_an_error():
    with pytest.raises(ValueError, match=r"optimizer\.name=adafactor"):
        tiny_train(**{"model.mup_base_width": 8, "optimizer.name": "adafactor"})
    with pytest.raises(ValueError, match=r"set model\.mup_base_width too"):
        tiny_train(**{"model.mup_base_head_dim": 4})
