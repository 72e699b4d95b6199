"""Compression from end to end on a tiny model, and what counts as worth having."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny import tiny_train

from llm_jax import models
from llm_jax.api import Model
from llm_jax.compression import frontier, schemes
from llm_jax.compression.frontier import Point
from llm_jax.eval.likelihood import perplexity
from llm_jax.nn import params as nn_params
from llm_jax.nn.params import flatten
from llm_jax.tokenizers.simple import Bytes


@pytest.fixture(scope="module")
def model(one_device):
    tokenizer = Bytes(["<|endoftext|>"])
    cfg = tiny_train(
        **{"model.vocab_size": tokenizer.vocab_size, "model.max_length": 64, "model.d_ff": 64}
    )
    specs = models.family(cfg.model.family).specs(cfg.model)
    params = jax.jit(lambda key: nn_params.init(specs, key))(jax.random.key(0))
    return Model(cfg, params, tokenizer, one_device)


TEXT = "The quick brown fox jumps over the lazy dog. " * 4


def test_compress_measures_reports_and_marks(model, tmp_path):
    names = ["nf4-8", "prune-50", "retrain-50"]
    training = schemes.Training(
        ids=np.array(model.tokenizer.encode(TEXT * 4)), steps=10, length=16, learning_rate=1e-2
    )
    options = frontier.Options(
        texts=[TEXT], source="a fox", window=32, decode_tokens=4, training=training
    )
    trees = {}
    kept = frontier.kept_in(str(tmp_path), "tiny", model.params, options)
    points = frontier.measure(
        names,
        model.config,
        model.params,
        model.tokenizer,
        options,
        kept=kept,
        done=lambda point, made: trees.update({point.scheme: made.params}),
    )
    by_name = {p.scheme: p for p in points}
    assert list(by_name) == ["float32", *names]
    base = by_name["float32"]
    assert base.nbytes == 4 * sum(x.size for x in flatten(model.params).values())
    matrices = sum(x.size for p, x in flatten(model.params).items() if p.endswith("/w"))
    # A bit a weight for the mask and half of the weights.
    assert by_name["prune-50"].nbytes == base.nbytes - 4 * matrices + matrices // 8 + 2 * matrices
    # Four bits a weight and a float32 for eight; pairs of both fill whole rows.
    assert by_name["nf4-8"].nbytes == base.nbytes - 4 * matrices + matrices
    assert by_name["prune-50"].sparsity == 0.5
    direct = perplexity(
        trees["nf4-8"], model.config.model, model.tokenizer, [TEXT], window=32, batch_size=4
    )
    assert by_name["nf4-8"].perplexity == direct["perplexity"]
    assert 0 < abs(by_name["nf4-8"].perplexity / base.perplexity - 1) < 0.05
    assert by_name["retrain-50"].perplexity < 0.8 * by_name["prune-50"].perplexity
    for path, w in flatten(trees["retrain-50"]).items():
        if path.endswith("/w"):
            assert float((w == 0).mean()) == 0.5
    assert all(p.tokens_per_second > 0 for p in points)

    report = frontier.write(points, str(tmp_path), kept.settings, ["python", "-m", "x"])
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["items"]) == list(by_name)
    assert "retrain-50" in report.read_text() and "a fox" in report.read_text()
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        "quality_size.png",
        "quality_speed.png",
    }

    def again(names, options):
        kept = frontier.kept_in(str(tmp_path), "tiny", model.params, options)
        parts = (model.config, model.params, model.tokenizer, options)
        return frontier.measure(names, *parts, kept=kept, done=lambda p, _: measured.append(p))

    measured = []  # the same directory: what is there is not measured again, and stays in
    assert [p.scheme for p in again(["nf4-8", "int8-row"], options)] == [*by_name, "int8-row"]
    assert [p.scheme for p in measured] == ["int8-row"]
    frontier.measure(  # unless its model is asked for
        ["nf4-8", "prune-50"],
        *(model.config, model.params, model.tokenizer, options),
        kept=frontier.kept_in(str(tmp_path), "tiny", model.params, options),
        again=["prune-50"],
        done=lambda p, made: measured.append(p),
    )
    assert [p.scheme for p in measured] == ["int8-row", "prune-50"]
    assert measured[1].perplexity == by_name["prune-50"].perplexity
    with pytest.raises(ValueError, match="differ in window; choose another --output"):
        again(["nf4-8"], replace(options, window=16))


def test_each_scheme_is_also_measured_with_an_int8_cache(model):
    options = frontier.Options(texts=[TEXT], window=32, decode_tokens=0, int8_cache=True)
    plain, cached = frontier.measure([], model.config, model.params, model.tokenizer, options)
    assert cached.scheme == "float32+int8-cache" and cached.nbytes == plain.nbytes
    assert abs(cached.perplexity / plain.perplexity - 1) < 0.005
    own = frontier.through_cache(
        model.params, model.config.model, model.tokenizer, [TEXT], window=32, batch_size=4
    )
    assert cached.perplexity != own["perplexity"]  # which is what a float32 cache would give
    assert plain.tokens_per_second is None


def test_through_the_plain_cache_is_the_usual_perplexity(model):
    cfg = model.config.model
    usual = perplexity(model.params, cfg, model.tokenizer, [TEXT], window=32, batch_size=4)
    ours = frontier.through_cache(
        model.params, cfg, model.tokenizer, [TEXT], window=32, batch_size=4
    )
    for name, value in ours.items():
        np.testing.assert_allclose(value, usual[name], rtol=1e-5)


def test_the_frontier_is_what_nothing_beats():
    make = lambda name, size, ppl, speed=None: Point(  # noqa: E731
        name, size, ppl, 1.0, speed, 1.0
    )
    points = frontier.marked(
        [
            make("base", 100, 10.0, 5.0),
            make("free", 50, 10.0, 4.0),  # as good and smaller, but slower
            make("worse", 60, 10.5, 3.0),
            make("small", 20, 12.0, 6.0),
            make("same", 20, 12.0),  # neither beats the other
        ]
    )
    assert {p.scheme: p.frontiers for p in points} == {
        "base": ("speed",),
        "free": ("size",),
        "worse": (),
        "small": ("size", "speed"),
        "same": ("size",),
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("int8-col", "'int8-col' is no scheme.*int8-channel.*gradual-50"),
        ("prune-100", "prunes everything"),
        ("prune-5:4", "keeps 5 of 4; take 1 to 4"),
        ("movement-50", "give it --train_steps"),
    ],
)
def test_unknown_schemes(name, words):
    with pytest.raises(ValueError, match=words):
        schemes.check(name, trains=False)


def test_random_windows_follow_the_seed_and_name_a_short_text():
    training = schemes.Training(ids=np.arange(100), batch_size=4, length=16, seed=3)
    batch = schemes.windows(training)
    np.testing.assert_array_equal(batch(5).tokens, schemes.windows(training)(5).tokens)
    assert (batch(5).tokens != batch(6).tokens).any()
    np.testing.assert_array_equal(batch(5).targets, batch(5).tokens + 1)
    with pytest.raises(ValueError, match="--train_input has 10 tokens"):
        schemes.windows(schemes.Training(ids=np.arange(10), length=16))
