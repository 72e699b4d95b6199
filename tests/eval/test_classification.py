"""Worked examples of the textbooks, and numbers that scikit-learn gives for the same input."""

import warnings

import numpy as np
import pytest

from llm_jax.eval import classification as C

# Made with scikit-learn 1.9.1 (zero_division=0) and scipy 1.17.1.
TARGETS = [3, 2, 2, 1, 1, 0, 0, 0, 0, 3, 2, 3, 2, 2, 3, 2, 2, 2, 2, 3, 1, 3, 2, 0, 1, 3, 2, 0, 3, 2]
TARGETS += [
    3,
    0,
    0,
    3,
    0,
    2,
    0,
    1,
    1,
    1,
    1,
    0,
    0,
    0,
    0,
    2,
    2,
    2,
    1,
    2,
    3,
    1,
    1,
    3,
    3,
    3,
    1,
    2,
    3,
    2,
]
CALLED = [2, 2, 2, 2, 1, 0, 0, 2, 0, 3, 2, 3, 2, 2, 3, 2, 2, 2, 2, 2, 0, 3, 0, 0, 1, 3, 2, 2, 3, 2]
CALLED += [3, 0, 0, 3, 0, 2, 0, 0, 1, 1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2, 0, 1, 1, 2, 3, 0, 1, 2, 3, 0]
LABELS = [1, 0, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0]
SCORES = [0.4, 0.5, 0.4, 0.6, 0.4, 0.5, 0.4, 0.6, 0.2, 0.2, 0.5, 0.0, 0.5, 0.6, 0.5]
SCORES += [0.0, 0.2, 0.0, 0.7, 0.2, 0.5, 0.7, 0.4, 0.7, 0.3, 0.3, 0.3, 0.5, 0.6, 0.5]


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_f1_is_the_harmonic_mean():
    assert C.f_score(0.95, 0.30) == pytest.approx(0.456, abs=5e-4)  # not their mean, 0.625
    assert C.f_score(0.65, 0.60) == pytest.approx(0.624, abs=5e-4)
    assert C.f_score(0.0, 0.0) == 0.0
    assert C.f_score(0.5, 1.0, beta=2.0) == pytest.approx(5 * 0.5 / (4 * 0.5 + 1))  # recall counts


def test_accuracy_of_a_rare_class_that_is_never_called():
    targets = ["orange"] * 990 + ["apple"] * 10
    found = C.report(targets, ["orange"] * 1000)
    assert found["accuracy"] == 0.99 and found["n"] == 1000
    apple, orange = found["classes"]
    assert apple == {"label": "apple", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 10}
    assert orange["precision"] == 0.99 and orange["recall"] == 1.0
    assert found["macro"]["recall"] == 0.5  # the weighted mean hides the apples: 0.99
    assert found["weighted"]["recall"] == pytest.approx(0.99)
    assert found["matthews"] == 0.0


def test_apples_and_oranges():
    targets = ["apple"] * 4 + ["orange"] * 6
    called = ["apple"] * 3 + ["orange"] + ["apple"] * 2 + ["orange"] * 4
    apple, orange = C.report(targets, called)["classes"]
    assert apple["precision"] == 3 / 5 and apple["recall"] == 3 / 4  # not the other way round
    assert apple["f1"] == pytest.approx(2 / 3)
    assert orange["precision"] == 4 / 5 and orange["recall"] == 4 / 6


def test_report_equals_scikit_learn():
    found = C.report(np.array(TARGETS), np.array(CALLED))
    assert found["labels"] == [0, 1, 2, 3] and [c["support"] for c in found["classes"]] == [
        14, 12, 19, 15
    ]  # fmt: skip
    assert found["confusion"] == [[11, 1, 2, 0], [4, 7, 1, 0], [4, 0, 15, 0], [2, 0, 3, 10]]
    want = {
        "precision": [0.5238095238095238, 0.875, 0.7142857142857143, 1.0],
        "recall": [0.7857142857142857, 0.5833333333333334, 0.7894736842105263, 2 / 3],
        "f1": [0.6285714285714286, 0.7, 0.75, 0.8],
    }
    for key, values in want.items():
        assert [c[key] for c in found["classes"]] == pytest.approx(values, rel=1e-12)
    means = {
        "macro": [0.7782738095238095, 0.7062969924812029, 0.719642857142857],
        "micro": [0.7166666666666667] * 3,
        "weighted": [0.7734126984126984, 0.7166666666666667, 0.7241666666666667],
    }
    for name, values in means.items():
        assert list(found[name].values()) == pytest.approx(values, rel=1e-12)
    assert found["accuracy"] == C.accuracy(TARGETS, CALLED) == pytest.approx(43 / 60)
    assert found["matthews"] == pytest.approx(0.6279389654335876, rel=1e-12)
    binary, _ = C.confusion([t == 0 for t in TARGETS], [p == 0 for p in CALLED])
    assert C.matthews(binary) == pytest.approx(0.5039601549991523, rel=1e-12)
    f_half = [C.f_score(c["precision"], c["recall"], 0.5) for c in found["classes"]]
    assert f_half == pytest.approx(
        [0.5612244897959183, 0.7954545454545454, 0.7281553398058253, 10 / 11]
    )


def test_matthews_of_many_items():
    counts = np.array([[10**5, 2], [3, 10**5]])  # (TP+FP)(TP+FN)(TN+FP)(TN+FN) is above 2^63
    assert C.matthews(counts) == pytest.approx(0.99995, abs=1e-6)
    assert C.matthews(counts[::-1]) == pytest.approx(-0.99995, abs=1e-6)


def test_labels():
    found = C.report([0, 1], [0, 0], labels=[0, 1, 2])  # a class that nobody has counts as 0
    assert found["macro"]["recall"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="prediction 5 is none of the labels"):
        C.report([0, 1], [0, 5], labels=[0, 1])
    with pytest.raises(ValueError, match="2 targets and 1 predictions"):
        C.report([0, 1], [0])
    with pytest.raises(ValueError, match="0 targets"):
        C.accuracy([], [])


def test_render():
    lines = C.render(C.report(["yes", "no", "no"], ["yes", "yes", "no"])).splitlines()
    assert lines[1].split() == ["no", "1.000", "0.500", "0.667", "2"]
    assert lines[-1] == "accuracy 0.6667, Matthews 0.5000, n 3"


def test_correlations_equal_scipy():
    x = [-0.9, 3.1, -0.1, -2.0, -0.6, 0.7, -0.5, 1.4, 1.0, -0.2, -0.5, -1.0]
    y = [-1.6, 1.6, 1.1, -0.4, -1.9, -0.5, -2.3, 0.4, -2.1, -1.3, 0.8, -1.3]
    assert C.pearson(x, y) == pytest.approx(0.45282795202890985, rel=1e-12)
    assert C.spearman(x, y) == pytest.approx(0.3438596491228071, rel=1e-12)  # x and y have ties
    assert C.spearman([1, 2, 3], [1, 10, 1000]) == pytest.approx(1.0)  # Pearson's is 0.87
    assert C.pearson([1, 1, 1], [1, 2, 3]) == 0.0  # constant: undefined
    with pytest.raises(ValueError, match="not finite"):
        C.pearson([1, float("nan")], [1, 2])


def test_auc():
    assert C.roc_auc(LABELS, SCORES) == pytest.approx(0.6875, rel=1e-12)  # ties across classes
    assert C.roc_auc([0, 1, 0, 1], [0.5] * 4) == 0.5  # all tied; by order alone it would be 0.75
    assert C.roc_auc([0, 0, 1, 1], [1, 2, 3, 4]) == 1.0
    with pytest.raises(ValueError, match="all 3 targets are of class 1"):
        C.roc_auc([1, 1, 1], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="0 and 1"):
        C.roc_auc([1, 2], [0.1, 0.2])


def test_calibration_error():
    # Bins (0, 0.5] and (0.5, 1]: 0.5 is in the first. Gaps |0.5 - 0.4| and |2/3 - 0.8|.
    confidences, correct = [0.3, 0.5, 0.7, 0.8, 0.9], [0, 1, 1, 0, 1]
    want = 2 / 5 * 0.1 + 3 / 5 * abs(2 / 3 - 0.8)
    assert C.expected_calibration_error(confidences, correct, bins=2) == pytest.approx(want)
    # Gaps of opposite sign do not cancel between bins, as they do inside one.
    assert C.expected_calibration_error(confidences, correct, bins=1) == pytest.approx(0.04)
    rng = np.random.default_rng(0)
    p = rng.random(100_000)
    assert C.expected_calibration_error(p, rng.random(p.size) < p) < 0.01
    assert C.expected_calibration_error(p, rng.random(p.size) < p**2) == pytest.approx(
        1 / 6, abs=0.01
    )
    assert C.expected_calibration_error([0.0, 1.0], [0, 1]) == 0.0
    with pytest.raises(ValueError, match=r"0\.5 to 50"):
        C.expected_calibration_error([0.5, 50.0], [0, 1])


def test_brier():
    assert C.brier_score(SCORES, LABELS) == pytest.approx(0.218, rel=1e-12)
    p = [[0.49, 0.011, 0.499], [0.352, 0.27, 0.378], [0.296, 0.522, 0.182], [0.107, 0.421, 0.472]]
    p += [[0.094, 0.494, 0.412], [0.305, 0.518, 0.177], [0.728, 0.222, 0.05], [0.437, 0.127, 0.436]]
    assert C.brier_score(p, [0, 2, 2, 2, 0, 0, 1, 0]) == pytest.approx(0.783483, abs=1e-9)
    two = np.stack([1 - np.array(SCORES), SCORES], axis=1)
    assert C.brier_score(two, LABELS) == pytest.approx(2 * 0.218)
    with pytest.raises(ValueError, match="class numbers from 0 to 1"):
        C.brier_score(two[:1], [2])
