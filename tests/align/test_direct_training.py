"""Direct optimisation from end to end: every loss, every kind of reference, and what is refused."""

import json

import jax
import numpy as np
import pytest
from preference_runs import base_config, make_base, preference_config, write_pairs

from llm_jax.align.direct import training
from llm_jax.train.loop import train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("rows") / "pairs.jsonl")


def dpo_config(base, rows, **changes):
    return preference_config(
        base, rows, **{"steps": 6, "optimizer.learning_rate": 3e-3, "dpo.beta": 0.5, **changes}
    )


def curve(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    assert not any("bad_steps" in line for line in lines)
    return [line["loss"] for line in lines if "loss" in line]


LORA = {"peft.method": "lora", "peft.rank": 4}


def test_the_three_kinds_of_reference_are_one(base, rows, tmp_path):
    curves, summaries = {}, {}
    for kind in ("cached", "adapter", "model"):
        cfg = dpo_config(base, rows, **{**LORA, "dpo.reference": kind, "eval.at_start": True})
        summaries[kind] = training.train(cfg, tmp_path / kind)
        curves[kind] = curve(tmp_path / kind)
    assert curves["cached"][0] == pytest.approx(np.log(2), abs=1e-6)
    for kind in ("adapter", "model"):
        np.testing.assert_allclose(curves[kind], curves["cached"], rtol=2e-5)
        for name in ("eval_loss", "eval/pair_accuracy", "eval/margin"):
            expected = summaries["cached"][name]
            assert summaries[kind][name] == pytest.approx(expected, rel=1e-4), (kind, name)
    for summary in summaries.values():
        assert summary["eval_loss_at_start"] == pytest.approx(np.log(2), abs=1e-6)
        assert summary["eval/pair_accuracy"] == 1.0 and summary["eval_loss"] < 0.6


def test_cached_log_probs_are_computed_once(base, rows, tmp_path, monkeypatch):
    from llm_jax.align.direct import reference

    calls, real = [], reference.log_probs
    monkeypatch.setattr(reference, "log_probs", lambda *a: calls.append(real(*a)) or calls[-1])
    small = {"batch_size": 2, "checkpoint.every": 1, "data.packing": "pad"}
    cfg = dpo_config(base, rows, **{**small, "steps": 2})
    training.train(cfg, tmp_path, devices=jax.devices()[:1], dry_run=True)
    assert calls == []
    cfg = dpo_config(base, rows, **{**small, "steps": 2})
    training.train(cfg, tmp_path, devices=jax.devices()[:1])
    assert calls == [4, 12]  # the rows that training meets, of 48, and the held-out ones
    again = dpo_config(base, rows, **{**small, "steps": 3})
    training.train(again, tmp_path, devices=jax.devices()[:1])
    assert calls == [4, 12, 2, 0]
    other = make_base(tmp_path, seed=1)
    wrong = dpo_config(base, rows, **{**small, "steps": 4, "dpo.reference_path": str(other)})
    with pytest.raises(ValueError, match="was trained with another reference"):
        training.train(wrong, tmp_path, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    "changes",
    [
        {"dpo.loss": "ipo", "dpo.per_token": True},
        {
            "dpo.loss": "robust",
            "dpo.label_smoothing": 0.1,
            "dpo.length_penalty": 0.01,
            "dpo.sft": 0.5,
        },
        {"dpo.loss": "simpo", "dpo.beta": 2.0},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_every_loss_of_pairs_learns_what_is_preferred(base, rows, tmp_path, changes):
    cfg = dpo_config(base, rows, **{**LORA, **changes, "steps": 8, "eval.at_start": True})
    summary = training.train(cfg, tmp_path)
    assert summary["eval/pair_accuracy"] == 1.0
    assert summary["eval_loss"] < summary["eval_loss_at_start"]
    assert summary["reference"] == ("none" if cfg.dpo.loss in ("orpo", "simpo") else "adapter")


def test_a_price_on_tokens_takes_length_out_of_what_is_learned(base, tmp_path):
    """The longer of two answers is preferred, and nothing else tells them apart."""
    rows = tmp_path / "long.jsonl"
    pairs = [
        {
            "prompt": f"The cat {i}?",
            "chosen": "good cat" + " so" * (1 + i % 4),
            "rejected": "good cat",
        }
        for i in range(60)
    ]
    rows.write_text("\n".join(map(json.dumps, pairs)))
    margins = {}
    for price in (0.0, 0.3):
        cfg = dpo_config(base, rows, **{"steps": 12, "dpo.length_penalty": price})
        margins[price] = training.train(cfg, tmp_path / str(price))["eval/margin"]
    # 2.5 " so" of 3 bytes on average: at 0.3 a byte that is 2.25 of the logit, paid already.
    assert margins[0.0] > 1.0 and margins[0.3] < margins[0.0] - 0.5


def test_kto_learns_from_single_answers(base, tmp_path):
    path = tmp_path / "judged.jsonl"
    lines = [
        json.dumps(
            {"prompt": f"The cat {i}?", "completion": f"{word} cat", "label": word == "good"}
        )
        for i in range(30)
        for word in (("good",) if i % 3 else ("poor",))
    ]
    path.write_text("\n".join(lines))
    cfg = dpo_config(base, path, **{**LORA, "dpo.loss": "kto", "steps": 12, "eval.at_start": True})
    summary = training.train(cfg, tmp_path / "run")
    assert summary["eval_loss_at_start"] == pytest.approx(0.5, abs=1e-6)
    assert summary["eval/desirable_reward"] > summary["eval/undesirable_reward"] + 0.2


def test_its_own_answers_tell_how_far_it_moved(base, rows, tmp_path):
    changes = {**LORA, "dpo.sample_prompts": 4, "dpo.sample_tokens": 12, "steps": 12}
    summary = training.train(dpo_config(base, rows, **changes), tmp_path)
    assert summary["kl"] > 0.1 and 1 <= summary["generated_tokens_before"] <= 12
    report = (tmp_path / "report.md").read_text()
    assert "## Answers of its own" in report and "[after]" in report


def test_a_reference_of_another_size(base, rows, tmp_path):
    """It is measured against, and its own answers are not asked for; another one is noticed."""
    folder = tmp_path / "wide"
    folder.mkdir()
    wide = make_base(folder, **{"model.d_model": 48, "model.d_ff": 96})
    changes = {"dpo.reference_path": str(wide), "dpo.sample_prompts": 2, "dpo.sample_tokens": 8}
    for kind in ("cached", "model"):
        asked = {**changes, "dpo.reference": kind, "checkpoint.every": 1}
        summary = training.train(dpo_config(base, rows, steps=2, **asked), tmp_path / kind)
        assert summary["generated_tokens_before"] >= 1
        asked["dpo.reference_path"] = str(base)
        with pytest.raises(ValueError, match="was trained with another reference"):
            training.train(dpo_config(base, rows, steps=3, **asked), tmp_path / kind)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dpo.reference": "adapter"}, "dpo.reference=adapter is the model without its adapter"),
        ({**LORA, "peft.also": ("final_norm",), "dpo.reference": "adapter"}, "peft.also trains"),
        (
            {**LORA, "dpo.reference": "adapter", "dpo.reference_path": "x"},
            "drop dpo.reference_path",
        ),
        ({"dpo.loss": "simpo", "dpo.reference_path": "x"}, "dpo.loss=simpo has no reference"),
        ({"dpo.loss": "kto", "dpo.sft": 1.0}, "dpo.loss=kto judges single answers"),
        ({"dpo.per_token": True, "dpo.length_penalty": 0.1}, "dpo.length_penalty is for sums"),
        ({"dpo.loss": "orpo", "dpo.sft": 0.1}, "dpo.sft is not for dpo.loss=orpo"),
        ({"data.format": "dialogue"}, "set data.format=preference"),
        ({"dpo.label_smoothing": 0.5}, "has to be in"),
        ({"dpo.beta": 0.0}, "has to be above 0"),
    ],
)
def test_recipes_that_cannot_work(base, rows, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        training.train(dpo_config(base, rows, **changes), tmp_path)
    assert "\n" not in str(error.value)


def test_a_reference_with_another_vocabulary_is_named(base, rows, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h\n" * 200)
    other = base_config(**{"tokenizer.kind": "word", "tokenizer.vocab_size": 64, "length": 16})
    other.data.inputs, other.data.dialogue.template = (str(text),), ""
    train(other, tmp_path / "other")
    for kind in ("cached", "model"):
        path = str(tmp_path / "other")
        cfg = dpo_config(base, rows, **{"dpo.reference": kind, "dpo.reference_path": path})
        with pytest.raises(ValueError, match="has another vocabulary") as error:
            training.train(cfg, tmp_path / kind)
        assert "dpo.reference_path" in str(error.value)


def test_nothing_to_start_from_is_named(base, rows, tmp_path):
    cfg = dpo_config(base, rows)
    cfg.checkpoint.init_from = ""
    with pytest.raises(ValueError, match="--init_from is needed"):
        training.train(cfg, tmp_path)


def test_preferences_are_not_pretrained_on(base, rows, tmp_path):
    with pytest.raises(
        ValueError, match=r"learned from by experiments\.reward and experiments\.dpo"
    ):
        train(dpo_config(base, rows), tmp_path)
