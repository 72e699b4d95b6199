"""What scores of answers are worth, by hand."""

import math

import numpy as np
import pytest

from llm_jax import report
from llm_jax.align.judgements import Judged, auc, blocks, calibration, measure, pairs_of
from llm_jax.data.comparisons import Said


def judged(scores, labels, tokens=None, groups=None) -> Judged:
    n = len(scores)
    return Judged(
        np.array(scores, float),
        np.array(labels, float),
        np.array(tokens if tokens is not None else range(1, n + 1)),
        np.array(groups if groups is not None else np.arange(n) // 2),
    )


def test_pairs_are_within_groups_and_ties_are_none():
    found = pairs_of(judged([0] * 6, [1, 0, 2, 2, 1, 5], groups=[0, 0, 1, 1, 1, 2]))
    assert list(zip(*map(list, found), strict=True)) == [(0, 1), (2, 4), (3, 4)]
    unordered = pairs_of(judged([0] * 4, [1, 1, 0, 0], groups=[7, 3, 7, 3]))
    assert sorted(zip(*map(list, unordered), strict=True)) == [(0, 2), (1, 3)]


def test_numbers_of_pairs_by_hand():
    """Differences +1, -2, 0 and +3; the preferred answer is shorter in the first and the last."""
    found = measure(judged([1, 0, 0, 2, 5, 5, 3, 0], [1, 0] * 4, tokens=[2, 3, 9, 4, 7, 7, 1, 2]))
    hits = [1, 0, 0.5, 1]
    assert found["eval/pair_accuracy"] == np.mean(hits)
    assert found["eval/pair_accuracy_stderr"] == pytest.approx(np.std(hits, ddof=1) / 2)
    assert found["eval/length_only_accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert found["eval/accuracy_where_shorter_preferred"] == 1.0
    assert found["eval/accuracy_where_longer_preferred"] == 0.0
    assert found["eval/margin"] == 0.5 and found["eval/pairs"] == 4
    log_loss = sum(math.log1p(math.exp(-d)) for d in (1, -2, 0, 3)) / 4
    assert found["eval/log_loss"] == pytest.approx(log_loss)
    longer = measure(judged([1, 0], [1, 0], tokens=[2, 3]), shorter_wins=False)
    assert longer["eval/length_only_accuracy"] == 0.0


def test_swapping_every_label_turns_accuracy_and_auc_round():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=40)
    one, other = (measure(judged(scores, labels * 20)) for labels in ([1, 0], [0, 1]))
    for name in ("pair_accuracy", "auc"):
        assert one[f"eval/{name}"] == pytest.approx(1 - other[f"eval/{name}"])
    assert one["eval/margin"] == pytest.approx(-other["eval/margin"])


def test_auc_is_the_share_of_all_comparisons():
    rng = np.random.default_rng(0)
    above, below = rng.integers(0, 5, 13), rng.integers(0, 4, 17)
    every = (above[:, None] > below[None, :]) + 0.5 * (above[:, None] == below[None, :])
    assert auc(above, below) == pytest.approx(every.mean())


def test_calibration_of_a_judge_that_is_right_as_often_as_it_says():
    rng = np.random.default_rng(0)
    ahead = rng.normal(0, 2, 40_000)
    truth = np.where(rng.random(len(ahead)) < 1 / (1 + np.exp(-ahead)), ahead, -ahead)
    error, bins = calibration(truth)
    assert error < 0.01
    assert all(abs(b["confidence"] - b["accuracy"]) < 0.03 for b in bins)
    # Twice as sure as it may be: the error is its mean excess of confidence.
    assert calibration(2 * truth)[0] == pytest.approx(
        np.mean(1 / (1 + np.exp(-2 * np.abs(ahead))) - 1 / (1 + np.exp(-np.abs(ahead)))), abs=0.01
    )


def test_agreement_with_ratings_is_measured_where_there_are_some():
    scores, labels = [0.1, 0.4, 0.2, 0.9, 0.7], [1, 3, 2, 5, 4]
    found = measure(judged(scores, labels, groups=range(5)))
    assert found["eval/spearman"] == pytest.approx(1.0)
    assert found["eval/pearson"] == pytest.approx(np.corrcoef(scores, labels)[0, 1])
    assert "eval/pair_accuracy" not in found  # nobody compared them
    assert "eval/spearman" not in measure(judged([1, 2], [1, 0]))


def test_the_report_shows_the_pairs_that_are_most_wrong(tmp_path):
    told = judged([0, 9, 3, 1, 0, 1], [1, 0] * 3)
    words = ["a0", "a1", "b0", "b1", "c0", "c1"]
    said = [
        Said(
            ({"role": "user", "content": f"Q{word[0]}"},),
            ({"role": "assistant", "content": word},),
            i // 2,
            told.labels[i],
            1,
        )
        for i, word in enumerate(words)
    ]
    found = blocks(told, said)
    shown = [b.text for b in found if isinstance(b, report.Code)]
    assert len(shown) == 2  # the right one is not among them
    assert shown[0] == "[user] Qa\n\n[preferred, 0.000] a0\n\n[other, 9.000] a1"
    assert "c0" in shown[1]
    report.write_report(tmp_path, "t", found)
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        "rewards.png",
        "calibration.png",
        "length.png",
    }
    assert blocks(judged([1], [1])) == []
