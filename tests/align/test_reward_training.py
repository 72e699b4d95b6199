"""Reward models from end to end: tuned, with a LoRA, on kept features; as judges; their errors."""

import json

import jax
import numpy as np
import pytest
from preference_runs import make_base, preference_config, write_pairs

import llm_jax
from llm_jax.align import held_out, rewards
from llm_jax.align.reward import probe, splits, training
from llm_jax.train import checkpoint
from llm_jax.types import Batch


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("rows") / "pairs.jsonl")


def reward_config(base, rows, **changes):
    cfg = preference_config(base, rows, **{"model.head": "reward", "steps": 25, **changes})
    return cfg


def held_out_scores(run, rows):
    """Rewards of the last rows' answers, chosen and rejected, by the saved model."""
    judge = rewards.load(run)
    told = [json.loads(line) for line in rows.read_text().splitlines()][-12:]
    talk = lambda row, key: [  # noqa: E731
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row[key]},
    ]
    return [judge([talk(row, key) for row in told]) for key in ("chosen", "rejected")]


@pytest.fixture(scope="module")
def tuned(base, rows, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tuned")
    return workdir, training.train(reward_config(base, rows), workdir)


def test_a_tuned_model_learns_what_is_preferred(tuned):
    workdir, summary = tuned
    assert summary["eval/pair_accuracy"] == 1.0 and summary["eval/pairs"] == 12
    assert summary["eval/length_only_accuracy"] == 0.5  # all answers are as long as their rival
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)  # the head starts at 0
    report = (workdir / "report.md").read_text()
    for plot in ("rewards", "calibration", "length"):
        assert f"plots/{plot}.png" in report and (workdir / f"plots/{plot}.png").is_file()


def test_the_saved_model_judges_as_it_was_measured(tuned, rows):
    workdir, summary = tuned
    chosen, rejected = held_out_scores(workdir, rows)
    assert float(np.mean(chosen - rejected)) == pytest.approx(summary["eval/margin"], rel=1e-4)
    judge = rewards.judge(str(workdir))
    talk = [{"role": "user", "content": "The cat 1?"}, {"role": "assistant", "content": "good cat"}]
    longer = [talk[0], {"role": "assistant", "content": "good cat " * 5}]
    alone, among = judge([talk]), judge([longer, talk, longer])  # padding changes nothing
    assert among[1] == pytest.approx(alone[0], rel=1e-5)


def test_it_leaves_for_transformers_and_comes_back(tuned, rows, tmp_path):
    workdir, _ = tuned
    notes = llm_jax.load(workdir).export(tmp_path / "hf")
    bias = float(llm_jax.load(workdir).params["reward"]["bias"])
    assert bias == 0.0 or any("rewards are less by" in note for note in notes)
    for ours, theirs in zip(held_out_scores(workdir, rows), held_out_scores(tmp_path / "hf", rows)):
        np.testing.assert_allclose(theirs, ours - bias, atol=1e-5)
    card = (tmp_path / "hf/README.md").read_text()
    assert "AutoModelForSequenceClassification" in card and "'<|im_end|>'" in card
    # One of others is read at the last token that the template writes, a line break here.
    config = json.loads((tmp_path / "hf/config.json").read_text())
    del config["reward_read_at"]
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    judge, told = rewards.load(tmp_path / "hf"), [{"role": "user", "content": "a"}]
    told.append({"role": "assistant", "content": "b"})
    ids = llm_jax.load(workdir).tokenizer.apply_chat_template(told, tokenize=True)
    last = rewards._last(
        judge.params,
        Batch(tokens=np.array([ids]), segments=np.ones((1, len(ids)), np.int32)),
        np.array([len(ids) - 1]),
        judge.config,
    )
    np.testing.assert_allclose(judge([told]), np.asarray(last), atol=1e-5)


def test_a_reward_model_writes_no_text(tuned, base):
    workdir, _ = tuned
    model = llm_jax.load(workdir)
    with pytest.raises(ValueError, match="a reward model judges texts and writes none"):
        model.generate(["a"], max_new_tokens=2)
    with pytest.raises(ValueError, match="no reward model but a language model"):
        rewards.load(base)
    cfg = preference_config(base, "x", **{"checkpoint.init_from": "-"})
    with pytest.raises(ValueError, match="is a reward model, which writes no text"):
        llm_jax.train.base_model.adopt(cfg, workdir)


def test_a_lora_with_its_head_is_all_that_is_saved(base, rows, tmp_path):
    changes = {"peft.method": "lora", "peft.rank": 4, "steps": 20}
    summary = training.train(reward_config(base, rows, **changes), tmp_path / "run")
    assert summary["eval/pair_accuracy"] == 1.0
    saved = checkpoint._metadata(*checkpoint.locate(tmp_path / "run"))
    names = {name.split("/")[-1] for name in configs_flat(saved)}
    assert names == {"a", "b", "w", "bias", "length"}
    chosen, rejected = held_out_scores(tmp_path / "run", rows)
    assert float(np.mean(chosen - rejected)) == pytest.approx(summary["eval/margin"], rel=1e-4)


def configs_flat(tree):
    from llm_jax.nn.params import flatten

    return flatten(tree)


def test_features_are_computed_once_and_fit_a_head(base, rows, tmp_path, monkeypatch):
    cfg = reward_config(base, rows, **{"reward.backbone": "features"})
    summary = probe.train(cfg, tmp_path / "run")
    assert summary["eval/pair_accuracy"] == 1.0 and summary["params_trained"] == 33
    chosen, rejected = held_out_scores(tmp_path / "run", rows)
    assert float(np.mean(chosen - rejected)) == pytest.approx(summary["eval/margin"], rel=1e-3)
    from llm_jax.align.reward import features

    (tmp_path / "run/summary.json").unlink()
    (tmp_path / "run/checkpoints").rename(tmp_path / "gone")
    monkeypatch.setattr(features, "features", None)  # another look at the model would fail
    again = probe.train(
        reward_config(base, rows, **{"reward.backbone": "features"}), tmp_path / "run"
    )
    assert again["eval/margin"] == summary["eval/margin"]
    # The backbone is the base's.
    saved = checkpoint.load_params(tmp_path / "run", specs_of(tmp_path / "run"))
    before = checkpoint.load_params(base, specs_of(base))
    for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves({k: saved[k] for k in before}), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def specs_of(run):
    from llm_jax import models

    return models.family("decoder").specs(checkpoint.load_config(run).model)


def test_splits_are_disjoint_and_tested_against_length(base, rows, tmp_path):
    changes = {"reward.backbone": "features", "reward.splits": 4, "reward.l2": 0.01}
    summary = probe.train(reward_config(base, rows, **changes), tmp_path)
    assert summary["splits/pairs"] == 48 and summary["splits/accuracy"] == 1.0
    assert summary["splits/accuracy of length"] == 0.5
    with pytest.raises(ValueError, match=r"reward.splits=6 .* of the 60 prompts"):
        probe.train(reward_config(base, rows, **{**changes, "reward.splits": 6}), tmp_path / "more")


def test_few_prompts_are_cross_validated_in_fewer_folds(base, tmp_path):
    changes = {"reward.backbone": "features", "data.eval_fraction": 0.0}
    cfg = reward_config(base, write_pairs(tmp_path / "three.jsonl", 3), **changes)
    found = probe.train(cfg, tmp_path / "three")
    assert found["train_pairs"] == 3
    cfg = reward_config(base, write_pairs(tmp_path / "one.jsonl", 1), **changes)
    with pytest.raises(ValueError, match="needs two prompts to train on; set it"):
        probe.train(cfg, tmp_path / "one")


def test_no_gain_in_any_part_is_no_finding():
    hits = {"reward": [np.array([1.0, 0.0])] * 4, "length": [np.array([0.0, 1.0])] * 4}
    found = splits._test("reward", hits, 0.25)
    assert found["gain"] == 0 and found["p, t-test over parts"] == 1


def test_rewards_that_are_no_numbers_are_counted(base, rows, tmp_path, monkeypatch):
    """A held-out answer whose reward is not a number is not passed over in silence."""
    evaluate = held_out.HeldOut.evaluate

    def broken(self, params, batches):
        step = self._step
        self._step = lambda p, b: (lambda loss, said: (loss, said * np.nan))(*step(p, b))
        try:
            return evaluate(self, params, batches)
        finally:
            self._step = step

    monkeypatch.setattr(held_out.HeldOut, "evaluate", broken)
    summary = training.train(reward_config(base, rows, steps=1), tmp_path)
    assert summary["eval/not_finite"] == 24 and "eval/pair_accuracy" not in summary


def test_a_prompt_with_many_answers_is_evaluated_in_buckets(base, rows, tmp_path):
    """More answers than the tokens of a short bucket."""
    many = {"prompt": "How many?", "answers": [f"{i}" for i in range(100)]}
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(many) + "\n" + rows.read_text())
    changes = {"data.packing": "bucket", "data.eval_inputs": (str(held),), "length": 768}
    fresh = write_pairs(tmp_path / "fresh.jsonl", 20, seed=5)
    summary = training.train(
        reward_config(base, fresh, **changes, steps=1, **{"eval.batch_size": 8}), tmp_path / "run"
    )
    assert summary["eval/pairs"] == 100 * 99 // 2 + 60


@pytest.mark.parametrize("loss", ["hinge", "listwise", "regression"])
def test_every_loss_learns(base, rows, tmp_path, loss):
    changes = {"reward.backbone": "features", "reward.loss": loss, "reward.l2": 1e-3}
    summary = probe.train(reward_config(base, rows, **changes), tmp_path)
    assert summary["eval/pair_accuracy"] == 1.0


def test_controlling_for_length_takes_length_out_of_the_reward(base, tmp_path):
    """Half of the pairs are decided by length alone, and length goes with the preference."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(200):
        better = "good" if i % 2 else "poor" if rng.random() < 0.5 else "good"
        worse = "poor" if i % 2 else better
        more = " so" * (int(rng.integers(1, 6)) if rng.random() < 0.8 else 0)
        row = {"prompt": f"The cat {i}?", "chosen": f"{better}{more} x", "rejected": f"{worse} y"}
        lines.append(json.dumps(row))
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(lines))
    found = {}
    for control in (False, True):
        changes = {
            "reward.backbone": "features",
            "reward.l2": 0.03,
            "reward.control_length": control,
        }
        cfg = reward_config(base, path, **changes)
        found[control] = probe.train(cfg, tmp_path / str(control))
    assert abs(found[True]["eval/length_correlation"]) < abs(
        found[False]["eval/length_correlation"]
    )
    params = checkpoint.load_params(tmp_path / "True", specs_of(tmp_path / "True"))
    assert params["reward"]["length"] > 0.1
    params = checkpoint.load_params(tmp_path / "False", specs_of(tmp_path / "False"))
    assert params["reward"]["length"] == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.format": "text"}, "set data.format=preference"),
        ({"eval.tasks": ("boolq",)}, "eval.tasks asks a language model"),
        (
            {"reward.loss": "listwise", "reward.label_smoothing": 0.1},
            "reward.label_smoothing is for pairs",
        ),
        (
            {"reward.loss": "hinge", "reward.margin": 1.0},
            "reward.margin is for reward.loss=logistic",
        ),
        (
            {"reward.loss": "regression", "reward.control_length": True},
            "reward.control_length is for answers that are compared",
        ),
        ({"peft.method": "prefix"}, "a judge could be loaded with; use lora or none"),
    ],
)
def test_recipes_that_cannot_work(base, rows, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        training.train(reward_config(base, rows, **changes), tmp_path)


def test_features_of_a_tuned_backbone_are_refused(base, rows, tmp_path):
    cfg = reward_config(base, rows, **{"reward.backbone": "features", "peft.method": "lora"})
    with pytest.raises(ValueError, match=r"reward\.backbone=features"):
        probe.train(cfg, tmp_path)
