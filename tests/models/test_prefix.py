"""A trained prefix in front of every document equals the tokens that it stands for."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import random_batch, tiny_model

from llm_jax import config as configs
from llm_jax import sharding, tokenizers
from llm_jax.config import MeshConfig, MoEConfig, PeftConfig
from llm_jax.decode.generate import generate
from llm_jax.eval.scoring import score_rows
from llm_jax.models import decoder
from llm_jax.nn import params as P
from llm_jax.objectives import likelihood
from llm_jax.peft import prompts
from llm_jax.types import Batch

IDS = np.array([3, 9, 20, 7, 1])  # what stands in front
N, L = len(IDS), 12
VARIANTS = {
    "gpt2": {"positions": "learned", "norm": "layernorm", "norm_bias": True, "max_length": 24},
    "interleaved": {"rope_interleaved": True, "scan": True, "remat": "full"},
    # Windows that reach the prefix of the document, but not of the row; blocks of keys.
    "windows": {"n_layers": 3, "window": 6, "global_layers": (1,), "attention_block": 4}
    | {"embed_scale": 3.0, "attention_softcap": 5.0},
    "experts": {"n_layers": 3},
}


@partial(jax.jit, static_argnames="cfg")
def start(cfg):
    return P.init(decoder.specs(cfg), jax.random.key(0))


def setup(name, **changes):
    if name == "experts":
        changes["moe"] = MoEConfig(n_experts=4, top_k=2, d_ff=16, first_dense=1)
    cfg = tiny_model(**{"init_std": 0.15, "kv_heads": 2, **VARIANTS[name], **changes})
    return cfg, start(cfg)


@partial(jax.jit, static_argnames="cfg")
def logits(params, batch, cfg):
    return decoder.logits(params, decoder.hidden(params, batch, cfg).x, cfg)


@partial(jax.jit, static_argnames="cfg")
def keys_and_values(params, cfg):
    return decoder.prefix_of(params, cfg)


def behind(params, cfg, method):
    """The tree with IDS in front, as a prompt or as keys and values."""
    tree = prompts.attach(params, prompts.from_tokens(params, IDS), PeftConfig())
    if method == "prefix":
        tree = {**params, "prefix": keys_and_values(tree, cfg)}
    return tree


def prepended(tokens):
    return np.concatenate([np.tile(IDS, (len(tokens), 1)), tokens], axis=1)


@pytest.mark.parametrize(
    ("name", "method"), [("gpt2", "prefix"), *((name, "prompt") for name in VARIANTS)]
)
def test_equals_the_tokens_in_front(name, method):
    """Of packed rows each document as if it were alone behind them, and without packing."""
    cfg, params = setup(name)
    tree, tokens = behind(params, cfg, method), random_batch(3, L).tokens
    want = logits(params, Batch(tokens=prepended(tokens)), cfg)[:, N:]
    # Documents of 5 and 4 tokens, then padding.
    segments = np.tile(np.array([1] * 5 + [2] * 4 + [0] * 3, np.int32), (3, 1))
    positions = np.tile(np.array([*range(5), *range(4), 0, 0, 0], np.int32), (3, 1))
    got = logits(tree, Batch(tokens=tokens, segments=segments, positions=positions), cfg)
    np.testing.assert_allclose(got[:, :5], want[:, :5], atol=2e-5)
    second = np.concatenate([tokens[:, 5:9], tokens[:, :8]], axis=1)
    alone = logits(params, Batch(tokens=prepended(second)), cfg)[:, N : N + 4]
    np.testing.assert_allclose(got[:, 5:9], alone, atol=2e-5)
    assert bool(jnp.isfinite(got).all())
    if name != "experts":
        got = logits(tree, Batch(tokens=tokens), cfg)
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_prompt_has_the_gradient_of_its_tokens_embeddings():
    """And scan, with rematerialised layers, = loop."""
    cfg, params = setup("interleaved", tied=False)
    batch, rows = random_batch(3, L), params["embed"]["tokens"].shape[0]

    def loss(prompt, cfg):
        scores = decoder.scores({**params, "prefix": prompt}, batch, cfg)
        return likelihood.cross_entropy(scores, batch).value()

    def loss_in_front(table):
        """The tokens in front have rows of their own, whose gradients are not those of the text's."""
        in_front = np.tile(np.arange(rows, rows + N), (3, 1))
        whole = Batch(
            tokens=np.concatenate([in_front, batch.tokens], axis=1),
            targets=np.pad(batch.targets, ((0, 0), (N, 0))),
            weights=np.pad(batch.weights, ((0, 0), (N, 0))),
        )
        tree = {**params, "embed": {"tokens": table}}
        return likelihood.cross_entropy(decoder.scores(tree, whole, cfg), whole).value()

    prompt = prompts.from_tokens(params, IDS)["prefix"]
    table = jnp.concatenate([params["embed"]["tokens"], prompt["embeddings"]])
    want, in_front = jax.jit(jax.value_and_grad(loss_in_front))(table)
    loop = configs.freeze(configs.override(configs.thaw(cfg), {"scan": False, "remat": "none"}))
    for one in (cfg, loop):
        got, gradient = jax.jit(jax.value_and_grad(partial(loss, cfg=one)))(prompt)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        np.testing.assert_allclose(gradient["embeddings"], in_front[rows:], atol=1e-6)
    assert float(jnp.abs(in_front[rows:]).max()) > 1e-3


@pytest.fixture(scope="module")
def talker():
    tokenizer = tokenizers.train("byte", [])
    cfg = tiny_model(vocab_size=tokenizer.vocab_size, init_std=0.3, kv_heads=2)
    return tokenizer, cfg, start(cfg)


def spoken(outs):
    return [o.tokens for o in outs], np.array([o.log_probs for o in outs])


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_generation_and_scores_continue_them(talker, method):
    """Unequal prompts, through the queue of layers; scores of unequal rows."""
    tokenizer, cfg, params = talker
    tree = behind(params, cfg, method)
    asked = [[65, 66, 67], [70, 71, 72, 73, 74, 75, 76], [80]]
    options = {"max_new_tokens": 5, "temperature": 0, "stop_at_end": False}
    want, want_p = spoken(generate(params, cfg, tokenizer, [[*IDS, *p] for p in asked], **options))
    got, got_p = spoken(generate(tree, cfg, tokenizer, asked, **options))
    assert got == want
    np.testing.assert_allclose(got_p, want_p, atol=1e-4)
    assert spoken(generate(params, cfg, tokenizer, asked, **options))[0] != want
    rows = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17]]
    scores = score_rows(tree, cfg, rows)
    for row, got in zip(score_rows(params, cfg, [[*IDS, *r] for r in rows]), scores, strict=True):
        np.testing.assert_allclose(got, row[N:], atol=1e-4)


def test_an_int8_cache_holds_a_prefix_too(talker):
    _, cfg, params = talker
    cfg = configs.freeze(configs.override(configs.thaw(cfg), {"cache_dtype": "int8"}))
    cache = jax.jit(decoder.init_cache, static_argnums=(2, 3))(
        behind(params, cfg, "prompt"), Batch(tokens=np.zeros((2, 3), np.int32)), cfg, 4
    )
    assert cache.length == N + 4 and int(cache.index) == N
    want = keys_and_values(behind(params, cfg, "prompt"), cfg)["k"]
    held = cache.layers["k"] * cache.layers["k_scale"]  # [M, B, K, S, Dh]
    got = held[:, 1, :, :N].swapaxes(1, 2).reshape(want.shape)
    np.testing.assert_allclose(got, want, atol=float(jnp.abs(want).max()) / 127)


@pytest.mark.parametrize(
    ("method", "axis"),
    [("prompt", "data"), ("prompt", "fsdp"), ("prefix", "tensor"), ("prefix", "stage")],
)
def test_on_a_mesh_the_same(method, axis):
    """The loss and the trained arrays' gradient, from packed rows."""
    cfg, params = setup("gpt2")
    tree, batch = behind(params, cfg, method), random_batch(4, L, packed=True)

    def loss(prefix, params):
        scores = decoder.scores({**params, "prefix": prefix}, batch, cfg)
        return likelihood.cross_entropy(scores, batch).value()

    prefix = tree.pop("prefix")
    want = jax.jit(jax.value_and_grad(loss))(prefix, params)
    mesh = sharding.make_mesh(MeshConfig(**{"data": 1, axis: 2}), jax.devices()[:2])
    with jax.set_mesh(mesh):
        specs = decoder.specs(cfg)
        cut = jax.device_put(params, P.shardings(specs, mesh))
        own = prompts.specs(specs, PeftConfig(method=method, tokens=N))["prefix"]
        prefix = jax.device_put(prefix, P.shardings(own, mesh))
        got = jax.jit(jax.value_and_grad(loss))(prefix, cut)
    np.testing.assert_allclose(got[0], want[0], rtol=2e-6)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6), got[1], want[1])


def test_learned_positions_are_fewer_by_the_prefix(talker):
    """Past the table's end rows would be clipped to its last one in silence."""
    tokenizer = talker[0]
    cfg, params = setup("gpt2", vocab_size=tokenizer.vocab_size)
    tree = behind(params, cfg, "prefix")
    with pytest.raises(ValueError, match=r"20 tokens behind peft.tokens=5 .* model.max_length=24"):
        decoder.hidden(tree, Batch(tokens=np.zeros((1, 20), np.int32)), cfg)
    with pytest.raises(ValueError, match="the model's 19 learned positions"):
        generate(tree, cfg, tokenizer, [[5] * 12], max_new_tokens=8)
    with pytest.raises(ValueError, match="does not fit the model's 19 positions"):
        score_rows(tree, cfg, [[5] * 21])


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_trained_alone_it_gives_a_constant_answer(method):
    """A frozen random model learns from its prefix to say 17 whatever it reads."""
    cfg, params = setup("interleaved", scan=False, remat="none")
    peft = PeftConfig(method=method, tokens=8)
    trained = prompts.start(
        params,
        prompts.specs(decoder.specs(cfg), peft),
        jax.random.key(1),
        peft,
        vocab_size=cfg.vocab_size,
    )
    batch = random_batch(8, L).replace(targets=np.full((8, L), 17, np.int32))
    optimizer = optax.adam(0.1)

    @jax.jit
    def step(trained, state):
        def loss(trained):
            scores = decoder.scores(prompts.attach(params, trained, peft), batch, cfg)
            return likelihood.cross_entropy(scores, batch).value(), jnp.mean(scores.correct)

        value, gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(trained, updates), state, value

    state = optimizer.init(trained)
    _, _, (first, _) = step(trained, state)
    for _ in range(100):
        trained, state, (last, correct) = step(trained, state)
    # Every token as probable as any other would be 3.97.
    assert first > 3.5 and last < 1.8 and correct > 0.9, (first, last, correct)
