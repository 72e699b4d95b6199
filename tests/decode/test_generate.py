"""Generation against the slow way: a full forward pass per token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from llm_jax import sharding, tokenizers
from llm_jax.config import MeshConfig
from llm_jax.decode.generate import generate
from llm_jax.models import decoder
from llm_jax.nn import params as P
from llm_jax.types import Batch


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train("byte", [])


@pytest.fixture(scope="module")
def model(tokenizer):
    cfg = tiny_model(vocab_size=tokenizer.vocab_size, init_std=0.3, kv_heads=2)
    return P.init(decoder.specs(cfg), jax.random.key(0)), cfg


@partial(jax.jit, static_argnames="cfg")
def full_forward(params, tokens, segments, cfg):
    return decoder.logits(
        params, decoder.hidden(params, Batch(tokens, segments, POSITIONS), cfg).x, cfg
    )


POSITIONS = np.arange(48, dtype=np.int32)[None]


def slowly(params, cfg, ids, n, penalty=1.0):
    """Greedy tokens and their log-probabilities, a whole forward pass for each."""
    ids, out = list(ids), []
    for _ in range(n):
        row = np.zeros((1, 48), np.int32)
        row[0, : len(ids)] = ids
        segments = (np.arange(48) < len(ids)).astype(np.int32)[None]
        z = np.asarray(full_forward(params, row, segments, cfg))[0, len(ids) - 1]
        log_p = z - np.log(np.exp(z - z.max()).sum()) - z.max()
        if penalty != 1:
            seen = sorted(set(ids))
            z = z.copy()
            z[seen] = np.where(z[seen] > 0, z[seen] / penalty, z[seen] * penalty)
        ids.append(int(z.argmax()))
        out.append((ids[-1], log_p[ids[-1]]))
    return out


def test_greedy_equals_full_forward_for_unequal_prompts(model, tokenizer):
    prompts = ["abc", "a much longer prompt than the first", ""]
    outs = generate(*model, tokenizer, prompts, max_new_tokens=6, temperature=0, stop_at_end=False)
    for prompt, out in zip(prompts, outs, strict=True):
        ids = tokenizer.encode(prompt) or [
            tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        ]
        want = slowly(*model, ids, 6)
        assert out.tokens == [t for t, _ in want]
        np.testing.assert_allclose(out.log_probs, [p for _, p in want], atol=1e-4)
        assert out.finish_reason == "length" and out.text == tokenizer.decode(out.tokens)


def test_repetition_penalty_sees_prompt_and_output(model, tokenizer):
    out = generate(
        *model,
        tokenizer,
        ["abcabc"],
        max_new_tokens=6,
        temperature=0,
        repetition_penalty=5.0,
        stop_at_end=False,
    )[0]
    assert out.tokens == [t for t, _ in slowly(*model, tokenizer.encode("abcabc"), 6, penalty=5.0)]
    plain = generate(
        *model, tokenizer, ["abcabc"], max_new_tokens=6, temperature=0, stop_at_end=False
    )[0]
    assert out.tokens != plain.tokens


def test_seed_reproduces_and_rows_are_independent(model, tokenizer):
    run = lambda prompts, seed: [  # noqa: E731
        c.tokens
        for c in generate(
            *model, tokenizer, prompts, max_new_tokens=8, seed=seed, stop_at_end=False
        )
    ]
    assert run(["x", "y"], 1) == run(["x", "y"], 1) != run(["x", "y"], 2)
    assert run(["x", "y"], 1)[0] == run(["x"], 1)[0]
    a, b = run(["x", "x"], 1)
    assert a != b  # equal prompts in one batch draw their own


def test_end_token_and_stop_strings(model, tokenizer):
    free = generate(*model, tokenizer, ["abc"], max_new_tokens=8, temperature=0, stop_at_end=False)[
        0
    ]
    stop = tokenizer.decode(free.tokens[2:4])
    if "\ufffd" not in stop:
        out = generate(
            *model,
            tokenizer,
            ["abc"],
            max_new_tokens=8,
            temperature=0,
            stop=[stop],
            stop_at_end=False,
        )[0]
        assert out.finish_reason == "stop" and out.text == free.text[: free.text.find(stop)]
        assert len(out.tokens) <= 4
    # Bias the end token to come first.
    params, cfg = model
    table = params["embed"]["tokens"]
    ids = tokenizer.encode("abc")
    x = decoder.hidden(params, Batch(tokens=np.array([ids], np.int32)), cfg).x[0, -1]
    ended = {**params, "head": {"w": table.at[tokenizer.eos_id].set(x * 100)}}
    out = generate(ended, cfg, tokenizer, ["abc"], max_new_tokens=8, temperature=0)[0]
    assert out.tokens == [tokenizer.eos_id] and out.finish_reason == "stop" and out.text == ""


def test_stop_string_across_tokens_is_cut_off(model, tokenizer):
    outs = generate(
        *model, tokenizer, ["abc"] * 8, max_new_tokens=32, seed=3, top_k=4, stop_at_end=False
    )
    for i, free in enumerate(outs):
        printable = [n for n in range(1, 30) if all(32 <= t < 127 for t in free.tokens[n : n + 2])]
        if not printable:
            continue
        stop = bytes(free.tokens[printable[0] : printable[0] + 2]).decode()
        out = generate(
            *model,
            tokenizer,
            ["abc"] * 8,
            max_new_tokens=32,
            seed=3,
            top_k=4,
            stop=[stop],
            stop_at_end=False,
        )[i]
        assert (
            stop not in out.text and free.text.startswith(out.text) and out.finish_reason == "stop"
        )
        break
    else:
        pytest.fail("the model never printed two characters")


def test_on_a_mesh_the_same_tokens(model, tokenizer):
    params, cfg = model
    alone = generate(params, cfg, tokenizer, ["ab", "cde", "f"], max_new_tokens=4, temperature=0)
    cfg8 = tiny_model(vocab_size=tokenizer.vocab_size, init_std=0.3, kv_heads=2, vocab_multiple=8)
    assert cfg8 == cfg
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        cut = jax.device_put(params, P.shardings(decoder.specs(cfg), mesh))
        outs = generate(cut, cfg, tokenizer, ["ab", "cde", "f"], max_new_tokens=4, temperature=0)
    assert [o.tokens for o in outs] == [o.tokens for o in alone]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a"], {"max_new_tokens": 0}, "--max_new_tokens=0"),
        ([[5, 9999]], {}, "token id 9999 is outside the model's vocabulary"),
        ([[-1]], {}, "token id -1"),
        (["a"], {"stop": [""]}, "--stop"),
    ],
)
def test_errors(model, tokenizer, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(*model, tokenizer, prompts, **{"max_new_tokens": 4, **options})


def test_learned_positions_run_out_loudly(tokenizer):
    cfg = tiny_model(vocab_size=tokenizer.vocab_size, positions="learned", max_length=16)
    params = P.init(decoder.specs(cfg), jax.random.key(0))
    with pytest.raises(ValueError, match="16 learned positions"):
        generate(params, cfg, tokenizer, ["hello world"], max_new_tokens=8)
    assert generate(params, cfg, tokenizer, ["hello"], max_new_tokens=8)[0].tokens
    assert jnp.isfinite(params["embed"]["positions"]).all()
