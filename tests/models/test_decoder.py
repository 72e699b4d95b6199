"""Properties of the decoder, over the whole span of its config."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_batch, tiny_model

from llm_jax import models
from llm_jax.models import decoder
from llm_jax.models.linen import as_linen
from llm_jax.models.presets import PRESETS, preset
from llm_jax.nn import params as P
from llm_jax.objectives import likelihood
from llm_jax.types import Batch

# Every value of every choice stands in at least one of these.
VARIANTS = {
    "gpt2": {
        "positions": "learned",
        "norm": "layernorm",
        "norm_bias": True,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "activation": "gelu",
    },
    "llama": {
        "positions": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "tied": False,
        "kv_heads": 2,
    },
    "post_norm": {
        "positions": "sinusoidal",
        "norm": "layernorm",
        "norm_position": "post",
        "activation": "gelu_erf",
        "kv_heads": 1,
    },
    "nope": {"positions": "none", "activation": "relu2", "qk_norm": True, "attention_softcap": 5.0},
    "window": {"window": 4, "activation": "geglu", "logit_softcap": 4.0, "rope_fraction": 0.5},
    "yarn": {
        "rope_scaling": "yarn",
        "rope_factor": 2.0,
        "rope_original_length": 8,
        "rope_interleaved": True,
        "head_dim": 8,
    },
    "olmo2": {
        "norm_position": "reordered",
        "qk_norm": True,
        "qk_norm_over": "all",
        "kv_heads": 2,
        "rope_scaling": "llama3",
        "rope_factor": 4.0,
        "rope_original_length": 16,
    },
    "gemma3": {
        "n_layers": 3,
        "norm_position": "sandwich",
        "norm_unit_offset": True,
        "window": 4,
        "global_layers": (1,),
        "rope_theta": 100.0,
        "rope_local_theta": 10.0,
        "rope_scaling": "linear",
        "rope_factor": 2.0,
        "embed_scale": 5.0,
        "attention_scale": 0.3,
        "activation": "geglu",
    },
}


@partial(jax.jit, static_argnames="cfg")
def start(cfg, seed):
    return P.init(decoder.specs(cfg), jax.random.key(seed))


def setup(name, **changes):
    # Large weights, and no norm or bias at its neutral start, so that every part has an effect.
    cfg = tiny_model(**{"init_std": 0.15, **VARIANTS[name], **changes})
    flat = P.flatten(start(cfg, 1))
    ramp = lambda p: p + jnp.linspace(-0.2, 0.2, p.size).reshape(p.shape)  # noqa: E731
    return cfg, P.unflatten(
        {k: ramp(v) if k.endswith(("scale", "bias")) else v for k, v in flat.items()}
    )


@partial(jax.jit, static_argnames="cfg")
def all_logits(params, batch, cfg):
    return decoder.logits(params, trunk(params, batch, cfg), cfg)


@partial(jax.jit, static_argnames="cfg")
def trunk(params, batch, cfg, rng=None):
    return decoder.hidden(params, batch, cfg, rng=rng).x


def loss_and_grad(params, batch, cfg):
    f = lambda p: likelihood.cross_entropy(decoder.scores(p, batch, cfg), batch).value()  # noqa: E731
    return jax.jit(jax.value_and_grad(f))(params)


@pytest.mark.parametrize("name", VARIANTS)
def test_causal_by_gradient(name):
    """Logits at position t have exactly no gradient by the embedding of any later token."""
    cfg, params = setup(name)
    batch = random_batch(rows=1, length=12)
    t = 5

    def pick(extra_LxD):
        table = params["embed"]["tokens"]
        grown = {
            **params,
            "embed": {**params["embed"], "tokens": jnp.concatenate([table, extra_LxD])},
        }
        if "head" not in params:
            grown["head"] = {"w": table}
        rows = table.shape[0] + jnp.arange(12)[None]
        x = decoder.hidden(grown, batch.replace(tokens=rows), cfg).x
        return jnp.sum(decoder.logits(grown, x, cfg)[0, t] ** 2)

    g = jax.jit(jax.grad(pick))(params["embed"]["tokens"][batch.tokens[0]])
    size = np.abs(np.asarray(g)).sum(axis=1)
    assert (size[t + 1 :] == 0).all()
    windowed = cfg.window and not cfg.global_layers
    first = t - cfg.window * cfg.n_layers if windowed else -1
    seen = size[max(first + cfg.n_layers, 0) : t + 1]
    assert (seen > 0).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_packed_row_equals_its_documents_alone(name):
    cfg, params = setup(name)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 53, n) for n in (6, 3, 4)]
    row = np.concatenate([*documents, [0, 0, 0]])[None].astype(np.int32)
    segments = np.array([[1] * 6 + [2] * 3 + [3] * 4 + [0] * 3], np.int32)
    positions = np.array([[*range(6), *range(3), *range(4), 0, 0, 0]], np.int32)
    packed = np.asarray(
        all_logits(params, Batch(tokens=row, segments=segments, positions=positions), cfg)
    )
    assert np.isfinite(packed).all()
    start = 0
    for document in documents:
        alone = all_logits(params, Batch(tokens=document[None].astype(np.int32)), cfg)
        np.testing.assert_allclose(packed[0, start : start + len(document)], alone[0], atol=2e-5)
        start += len(document)
    merged = all_logits(params, Batch(tokens=row), cfg)  # what a missing mask would give
    assert np.abs(np.asarray(merged)[0, 6:13] - packed[0, 6:13]).max() > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_scan_equals_loop_equals_remat(name):
    batch = random_batch(packed=True)
    cfg, params = setup(name, n_layers=4)
    want_value, want_grad = loss_and_grad(params, batch, cfg)
    for changes in (
        {"scan": True},
        {"scan": True, "scan_unroll": 2},
        {"remat": "full"},
        {"scan": True, "remat": "full"},
        {"scan": True, "remat": "dots"},
        {"scan": True, "remat": "attention"},
    ):
        other, _ = setup(name, n_layers=4, **changes)
        value, grad = loss_and_grad(params, batch, other)
        np.testing.assert_allclose(value, want_value, rtol=1e-6, err_msg=str(changes))
        for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(want_grad), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4, err_msg=str(changes))


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decoding_equals_the_full_forward(name):
    """Rows of unequal length, padded on the left: a hole in the cache, in 1, 3 and 8 token calls."""
    cfg, params = setup(name)
    rng = np.random.default_rng(2)
    lengths, total = [12, 9], 12
    rows = [rng.integers(0, 53, n).astype(np.int32) for n in lengths]
    tokens = np.stack([np.pad(r, (total - len(r), 0)) for r in rows])
    position = np.arange(total)[None] - (total - np.array(lengths))[:, None]
    whole = Batch(
        tokens=tokens, segments=(position >= 0).astype(np.int32), positions=np.maximum(position, 0)
    )
    cache = decoder.init_cache(params, whole, cfg, 16)

    @jax.jit
    def step(batch, cache):
        out = decoder.hidden(params, batch, cfg, cache=cache)
        return decoder.logits(params, out.x, cfg), out.cache

    parts = []
    for start, end in [(0, 8), (8, 11), (11, 12)]:
        logits, cache = step(jax.tree.map(lambda x, a=start, b=end: x[:, a:b], whole), cache)
        parts.append(logits)
    cached = np.concatenate(parts, axis=1)
    for r, row in enumerate(rows):
        alone = np.asarray(all_logits(params, Batch(tokens=row[None]), cfg))[0]
        np.testing.assert_allclose(cached[r, total - len(row) :], alone, atol=3e-5)
    assert int(cache.index) == 12


def test_every_value_of_every_choice_is_tested():
    from llm_jax.config import CHOICES, ModelConfig

    for key in ("positions", "norm", "norm_position", "activation", "qk_norm_over"):
        default = getattr(ModelConfig(), key)
        assert {v.get(key, default) for v in VARIANTS.values()} == set(CHOICES[f"model.{key}"])


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gpt2", 124.4),
        ("gpt2-medium", 354.8),
        ("gpt2-large", 774.0),
        ("gpt2-xl", 1557.6),
        ("llama2-7b", 6738.4),
        ("llama2-13b", 13015.9),
        ("llama2-70b", 68976.6),
        ("llama3-405b", 405853.4),
        ("mixtral-8x7b", 46702.8),
        ("llama3.2-1b", 1235.8),
    ],
)
def test_presets_have_the_published_sizes(name, millions):
    from llm_jax.config import resolve_model

    cfg = preset(name)
    cfg.vocab_multiple = 1
    resolve_model(cfg, vocab_size=0, length=4096, backend="cpu")
    assert round(P.count(decoder.specs(cfg)) / 1e6, 1) == millions
    assert set(PRESETS) == {
        "gpt2",
        "gpt2-medium",
        "gpt2-large",
        "gpt2-xl",
        "llama2-7b",
        "llama2-13b",
        "llama2-70b",
        "llama3-405b",
        "mixtral-8x7b",
        "llama3.2-1b",
    }


def test_initial_scales():
    cfg = tiny_model(n_layers=8, d_model=64, head_dim=8, d_ff=256, positions="learned")
    flat = P.flatten(start(cfg, 0))
    for path, std in {
        "embed/tokens": 0.02,
        "layers/attn/q/w": 0.02,
        "layers/attn/o/w": 0.005,
        "layers/mlp/down/w": 0.005,
        "embed/positions": 0.02,
    }.items():
        np.testing.assert_allclose(np.std(flat[path]), std, rtol=0.05, err_msg=path)
    batch = random_batch()
    params = P.unflatten(flat)
    loss = float(loss_and_grad(params, batch, cfg)[0])
    assert abs(loss - np.log(53)) < 0.1  # padding rows of the table take no probability


def test_parameters_do_not_depend_on_their_neighbours():
    a = P.flatten(P.init(decoder.specs(tiny_model()), jax.random.key(0)))
    b = P.flatten(
        P.init(decoder.specs(tiny_model(positions="learned", tied=False)), jax.random.key(0))
    )
    assert set(b) - set(a) == {"embed/positions", "head/w"}
    for path in a:
        np.testing.assert_array_equal(a[path], b[path])


def test_bfloat16_keeps_masters_and_scores_in_float32():
    cfg, params = setup("llama", dtype="bfloat16")
    batch = random_batch()
    value, grad = loss_and_grad(params, batch, cfg)
    exact, _ = loss_and_grad(params, batch, setup("llama")[0])
    assert value.dtype == jnp.float32 and abs(float(value - exact)) < 0.05
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grad))
    assert trunk(params, batch, cfg).dtype == jnp.bfloat16


def test_as_linen_is_the_same_function():
    cfg, _ = setup("gpt2")
    module = as_linen("decoder", cfg)
    batch = random_batch(rows=2)
    variables = module.init(jax.random.key(0), batch.tokens)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes == P.map_specs(lambda s: s.shape, decoder.specs(cfg))
    np.testing.assert_allclose(
        module.apply(variables, batch.tokens),
        all_logits(variables["params"], Batch(tokens=batch.tokens), cfg),
        atol=1e-6,
    )


def test_unknown_family_names_the_known_ones():
    with pytest.raises(ValueError, match=r"model.family='decode' is unknown; there are decoder"):
        models.family("decode")


def test_golden_losses():
    """Update these only when a change of the numbers is meant, and say why in the commit."""
    golden = {"gpt2": 4.4530, "llama": 4.3464}
    batch = random_batch(packed=True)
    got = {name: float(loss_and_grad(setup(name)[1], batch, setup(name)[0])[0]) for name in golden}
    assert got == pytest.approx(golden, abs=2e-4)


def test_dropout_depends_on_rows_alone():
    cfg, params = setup("gpt2", dropout=0.3)
    batch = random_batch(rows=4)
    keys = jax.random.split(jax.random.key(7), 4)
    whole = trunk(params, batch, cfg, keys)
    half = trunk(params, jax.tree.map(lambda x: x[2:], batch), cfg, keys[2:])
    np.testing.assert_allclose(whole[2:], half, atol=3e-5)
    scanned, _ = setup("gpt2", dropout=0.3, scan=True)
    np.testing.assert_allclose(whole, trunk(params, batch, scanned, keys), atol=3e-5)
    assert np.abs(np.asarray(whole - trunk(params, batch, cfg))).max() > 0.1
