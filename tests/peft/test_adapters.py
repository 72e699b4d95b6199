"""Bottleneck adapters, prompts and prefixes as methods of PEFT: what they declare and attach."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_batch, tiny_model

from llm_jax import config as configs
from llm_jax import tokenizers
from llm_jax.config import MoEConfig, PeftConfig
from llm_jax.decode.generate import generate
from llm_jax.models import decoder
from llm_jax.nn import params as nn_params
from llm_jax.objectives import likelihood
from llm_jax.peft import adapters, prompts, quantization

CFG = PeftConfig(method="adapter", rank=4)


@partial(jax.jit, static_argnames=("model", "cfg"))
def made(model, cfg, seed):
    base = nn_params.init(decoder.specs(model), jax.random.key(0))
    trained = nn_params.init(adapters.specs(decoder.specs(model), CFG), jax.random.key(seed))
    return base, trained


def moved(trained, seed=0):
    """The same, zero nowhere."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), trained)


@partial(jax.jit, static_argnames="model")
def log_probs(params, batch, model):
    return decoder.scores(params, batch, model).log_probs


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layers": 3, "norm": "layernorm", "out_bias": True, "mlp_bias": True},
        {"d_model": 64, "kv_heads": 2, "activation": "swiglu", "d_ff": 40},
        {"head_dim": 16, "norm_position": "sandwich", "activation": "geglu", "tied": False},
    ],
)
@pytest.mark.parametrize("r", [1, 8])
def test_the_number_of_parameters(changes, r):
    """2 L (2 D r + D + r), whatever the widths of the heads and of the MLP."""
    model = tiny_model(**changes)
    specs = adapters.specs(decoder.specs(model), PeftConfig(method="adapter", rank=r))
    d, layers = model.d_model, model.n_layers
    assert nn_params.count(specs) == 2 * layers * (2 * d * r + d + r)


def test_at_its_start_it_is_the_base_bit_for_bit():
    model = tiny_model(out_bias=True, mlp_bias=True)
    base, trained = made(model, None, 1)
    assert float(jnp.abs(trained["layers"]["attn"]["o"]["w"]["down"]).max()) > 0.1
    batch = random_batch(4, packed=True)
    tuned = adapters.attach(base, trained, CFG)
    np.testing.assert_array_equal(log_probs(tuned, batch, model), log_probs(base, batch, model))


def test_over_a_quantised_base_scan_is_loop_and_all_parts_learn():
    model = tiny_model(init_std=0.2)
    base, trained = made(model, None, 1)
    scheme = quantization.parse("nf4-32")
    base = quantization.quantize_tree(base, decoder.specs(model), scheme)
    trained, batch = moved(trained), random_batch(4)

    def loss(trained, model):
        scores = decoder.scores(adapters.attach(base, trained, CFG), batch, model)
        return likelihood.cross_entropy(scores, batch).value()

    scanned = configs.freeze(configs.override(configs.thaw(model), {"scan": True}))
    one, other = (
        jax.jit(jax.value_and_grad(partial(loss, model=m)))(trained) for m in (model, scanned)
    )
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), one[1], other[1])
    assert all(float(jnp.abs(g).max()) > 1e-5 for g in jax.tree.leaves(one[1]))


def test_generation_holds_adapters():
    """Cut into layers before the first token; the tokens are those of whole forward passes."""
    tokenizer = tokenizers.train("byte", [])
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    base, trained = made(model, None, 1)
    tuned = adapters.attach(base, moved(trained), CFG)
    (out,) = generate(
        tuned, model, tokenizer, [[5, 6, 7]], max_new_tokens=4, temperature=0, stop_at_end=False
    )
    ids = np.array([[5, 6, 7, *out.tokens]], np.int32)
    batch = random_batch(1, 6).replace(tokens=ids[:, :-1], targets=ids[:, 1:])
    np.testing.assert_allclose(log_probs(tuned, batch, model)[0, 2:], out.log_probs, atol=1e-4)
    assert not np.allclose(log_probs(base, batch, model)[0, 2:], out.log_probs, atol=1e-2)


def test_several_share_a_base():
    """Every array of the base is the same object in each tree; to switch is to take another tree."""
    model = tiny_model()
    base, trained = made(model, None, 1)
    first, second = (adapters.attach(base, moved(trained, s), CFG) for s in (1, 2))
    prompt = prompts.attach(base, prompts.from_tokens(base, [1, 2]), CFG)
    own = {id(x) for x in jax.tree.leaves(base)}
    for tree in (first, second, prompt):
        held = {id(x) for x in jax.tree.leaves(tree)}
        assert own <= held and held - own
    batch = random_batch(2)
    rows = [log_probs(tree, batch, model) for tree in (base, first, second, prompt)]
    for n, row in enumerate(rows):
        assert all(not np.allclose(row, other, atol=1e-3) for other in rows[:n])


def test_prompts_and_prefixes_declare_what_the_model_takes():
    model = tiny_model(kv_heads=2, n_layers=3)
    specs = decoder.specs(model)
    shapes = lambda tree: {p: s.shape for p, s in nn_params.flatten(tree).items()}  # noqa: E731
    prompt = PeftConfig(method="prompt", tokens=7)
    assert shapes(prompts.specs(specs, prompt)) == {"prefix/embeddings": (7, 32)}
    prefix = PeftConfig(method="prefix", tokens=7)
    assert shapes(prompts.specs(specs, prefix)) == {"prefix/k": (3, 7, 8), "prefix/v": (3, 7, 8)}
    # A prompt starts from different rows of the vocabulary.
    base, _ = made(model, None, 1)
    table = np.asarray(base["embed"]["tokens"])
    new, key = prompts.specs(specs, prompt), jax.random.key(0)
    x = prompts.start(base, new, key, prompt, vocab_size=9)["prefix"]["embeddings"]
    found = [int(np.flatnonzero((table == row).all(axis=1))[0]) for row in np.asarray(x)]
    assert len(set(found)) == 7 and max(found) < 9  # the rest of the table is padding


@pytest.mark.parametrize(
    ("method", "changes", "cfg", "message"),
    [
        (adapters, {"moe": True}, {"method": "adapter"}, "model.moe.n_experts"),
        (adapters, {}, {"method": "adapter", "rank": 0}, "peft.rank=0"),
        (prompts, {}, {"method": "prompt", "tokens": 0}, "peft.tokens=0"),
        (
            prompts,
            {"positions": "learned"},
            {"method": "prefix", "tokens": 16},
            "model.max_length=16",
        ),
    ],
)
def test_errors(method, changes, cfg, message):
    if "moe" in changes:
        changes = {"moe": MoEConfig(n_experts=4, top_k=2, d_ff=16)}
    with pytest.raises(ValueError, match=message):
        method.specs(decoder.specs(tiny_model(**changes)), PeftConfig(**cfg))
