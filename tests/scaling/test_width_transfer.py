"""muP: activations move alike at every width, where the standard way moves them more and more."""

import math

import numpy as np
import pytest
from runs import run_config

from llm_jax.data.prepare import prepare_corpus
from llm_jax.scaling import transfer, transfer_report
from llm_jax.scaling.learning_rates import parabola_minimum
from llm_jax.train import in_memory


@pytest.fixture(scope="module")
def base_and_corpus(corpus, tmp_path_factory):
    base = run_config(
        corpus,
        **{
            "model.d_model": 32,
            "model.n_heads": 2,
            "model.init_std": 32**-0.5,
            "optimizer.ema_decay": 0.0,
            "optimizer.learning_rate": 1e-2,
            "optimizer.schedule": "constant",
            "optimizer.weight_decay": 0.0,
            "eval.rows": 64,
        },
    )
    folder = tmp_path_factory.mktemp("transfer")
    return base, prepare_corpus(base.data, base.tokenizer, str(folder))


def test_coordinate_check(base_and_corpus):
    base, corpus = base_and_corpus
    rows = transfer.coordinate_check(base, corpus, [32, 256], steps=3, seeds=1)
    slopes = transfer.growth(rows)
    moving = [w for p, w in slopes if p == "mup" and w != "attention 0" and w != "attention 1"]
    assert {"embedded", "attention_out 1", "mlp_out 0", "trunk", "logits"} <= set(moving)
    # Logits begin as noise that shrinks as 1 / sqrt(width), which a few steps do not yet drown.
    assert all(-0.4 < slopes["mup", where] < 0.2 for where in moving), slopes
    for where in ("attention_out 0", "attention_out 1", "mlp_out 0", "mlp_out 1"):
        assert slopes["standard", where] > 0.4, slopes
    report = transfer_report.growth_rows(rows)
    assert {r["where"] for r in report} >= set(moving)


def test_widths_differ_in_width_alone(base_and_corpus):
    base, corpus = base_and_corpus
    vocab = corpus.tokenizer.vocab_size
    wide = transfer.at_width(base, 128, "mup", vocab_size=vocab)
    assert (wide.model.n_heads, wide.model.head_dim, wide.model.d_ff) == (8, 16, 256)
    assert wide.model.mup_base_width == 32 and wide.model.logit_scale == 0.25
    standard = transfer.at_width(base, 128, "standard", vocab_size=vocab)
    assert standard.model.init_std == pytest.approx(128**-0.5)
    assert standard.model.mup_base_width == 0
    assert base.model.d_model == 32  # the recipe is left as it was
    with pytest.raises(ValueError, match=r"width 40 is not divisible .* heads of 16"):
        transfer.at_width(base, 40, "mup", vocab_size=vocab)
    with pytest.raises(ValueError, match="none of mup, standard"):
        transfer.at_width(base, 64, "ntk", vocab_size=vocab)


@pytest.mark.parametrize("best", [3e-4, 1e-2, 0.5])
def test_search_finds_a_minimum_between_neighbours(best):
    asked = []

    def loss(rate):
        asked.append(rate)
        return 2 + 0.1 * math.log(rate / best) ** 2

    found = transfer.search(loss, 1e-2)
    assert len(asked) == len(set(asked)) >= 5
    rates = list(found)
    assert rates == sorted(rates)
    np.testing.assert_allclose(np.diff(np.log(rates)), math.log(2), rtol=1e-9)
    # Exact for a parabola; the best of the rates themselves can be off by 40 %.
    assert parabola_minimum(rates, list(found.values())) == pytest.approx(best, rel=1e-6)


def test_search_survives_divergence_and_refuses_an_edge():
    found = transfer.search(lambda r: math.inf if r > 0.01 else -math.log(r), 1e-3)
    assert math.isinf(found[max(found)])
    assert parabola_minimum(list(found), list(found.values())) == pytest.approx(sorted(found)[-2])
    with pytest.raises(ValueError, match="keeps falling"):
        transfer.search(lambda r: r, 1e-3)
    with pytest.raises(ValueError, match="at the edge"):
        parabola_minimum([1, 2, 4], [3, 2, 1])


def test_an_experiment_resumes_and_refuses_another_recipe(base_and_corpus, tmp_path, monkeypatch):
    base, corpus = base_and_corpus
    made = []

    def measure(base, corpus, key):
        made.append(key)
        best = 1e-2 if key[0] == "mup" else 1e-2 * 32 / key[1]
        return transfer.Outcome(*key, 2 + math.log(key[2] / best) ** 2, 1000)

    monkeypatch.setattr(transfer, "measure", measure)

    def run():
        outcomes = transfer.Outcomes(str(tmp_path), base)
        transfer.search_all(base, corpus, outcomes, widths=[32, 128], seeds=2)
        return outcomes

    outcomes = run()
    with open(tmp_path / "outcomes.jsonl", "a") as f:
        f.write('{"parametrization": "mup", "wid')  # a process died while it wrote
    n = len(made)
    assert run().to_json() == outcomes.to_json() and len(made) == n > 0
    rows = transfer_report.optimum_rows(list(outcomes.known.values()))
    moved = {(r["parametrisation"], r["width"]): r["times that of the narrowest"] for r in rows}
    assert moved["muP", 128] == pytest.approx(1)
    assert moved["standard parametrisation", 128] == pytest.approx(1 / 4)
    result = {"kind": "transfer", "outcomes": outcomes.to_json()}
    path = transfer_report.write(str(tmp_path), result)
    assert "Best learning rate against width" in open(path).read()
    assert (tmp_path / "plots" / "optimum.png").stat().st_size > 10_000
    changed = type(base)(
        **{**{f: getattr(base, f) for f in base.__dataclass_fields__}, "steps": 99}
    )
    with pytest.raises(ValueError, match="recipe that differs in steps; choose another --workdir"):
        transfer.Outcomes(str(tmp_path), changed)


def test_one_run_is_measured_on_held_out_text(base_and_corpus, monkeypatch):
    base, corpus = base_and_corpus
    key = ("mup", 64, 1e-2, 0)
    outcome = transfer.measure(base, corpus, key)
    assert (outcome.parametrization, outcome.width, outcome.learning_rate, outcome.seed) == key
    assert 1.0 < outcome.loss < 6.0 and outcome.parameters > 10_000
    train = in_memory.train

    def broken(*args):
        return train(*args)._replace(losses=np.array([1.0, np.nan]))

    monkeypatch.setattr(in_memory, "train", broken)
    assert math.isinf(transfer.measure(base, corpus, key).loss)
