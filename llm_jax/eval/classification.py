"""Numbers that compare predictions with targets: classes, scores, probabilities.

A ratio without a denominator (the precision of a class that was never predicted) is 0, without a
warning: the class was not found.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats


def accuracy(targets: Sequence, predictions: Sequence) -> float:
    """Share of predictions that equal their target."""
    targets, predictions = _pairs(targets, predictions)
    return sum(t == p for t, p in zip(targets, predictions, strict=True)) / len(targets)


def confusion(
    targets: Sequence, predictions: Sequence, labels: Sequence | None = None
) -> tuple[np.ndarray, list]:
    """(counts [C, C], labels): counts[i, j] items of class labels[i] were called labels[j].

    Without `labels` they are all classes among targets and predictions, sorted.

    Raises:
      ValueError: sequences of different lengths or empty, or a class that `labels` lacks.
    """
    targets, predictions = _pairs(targets, predictions)
    if labels is None:
        found = dict.fromkeys(targets + predictions)
        labels = sorted(found, key=lambda label: (type(label).__name__, label))
    labels = _plain(labels)
    number = {label: n for n, label in enumerate(labels)}
    if len(number) < len(labels):
        raise ValueError(f"labels {labels} name a class twice")
    for name, values in (("target", targets), ("prediction", predictions)):
        missing = next((v for v in values if v not in number), None)
        if missing is not None:
            raise ValueError(f"the {name} {missing!r} is none of the labels {labels}")
    counts = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(counts, ([number[t] for t in targets], [number[p] for p in predictions]), 1)
    return counts, labels


def f_score(precision: float, recall: float, beta: float = 1.0) -> float:
    """F_β = (1 + β²) P R / (β² P + R): recall counts β times as much as precision. 0 if both are 0."""
    return _ratio((1 + beta**2) * precision * recall, beta**2 * precision + recall)


def report(targets: Sequence, predictions: Sequence, labels: Sequence | None = None) -> dict:
    """All that a confusion matrix says.

    Of class c with TP right, FP wrongly called c and FN of c called something else:

        precision = TP / (TP + FP)    recall = TP / (TP + FN)    F1 = 2 P R / (P + R)

    macro is the mean over classes, weighted the mean by support (items of the class), micro the
    ratio of the sums over classes, which for one label an item is the accuracy.

    Returns:
      n, accuracy, matthews; labels and confusion (lists, rows are targets); classes (a list in the
      order of labels, each with label, precision, recall, f1, support); macro, micro and weighted
      (precision, recall, f1 each). Plain Python numbers throughout.
    """
    counts, labels = confusion(targets, predictions, labels)
    true, called, support = np.diag(counts), counts.sum(axis=0), counts.sum(axis=1)
    classes = [_scores(*row) for row in zip(true, called, support, strict=True)]
    shares = {"macro": np.ones(len(labels)), "weighted": support}
    means = {
        name: {
            key: _ratio(sum(w * c[key] for w, c in zip(share, classes, strict=True)), share.sum())
            for key in ("precision", "recall", "f1")
        }
        for name, share in shares.items()
    }
    return {
        "n": int(counts.sum()),
        "accuracy": _ratio(true.sum(), counts.sum()),
        "matthews": matthews(counts),
        **means,
        "micro": _scores(true.sum(), called.sum(), support.sum()),
        "classes": [
            {"label": label, **scores, "support": int(n)}
            for label, scores, n in zip(labels, classes, support, strict=True)
        ],
        "labels": labels,
        "confusion": counts.tolist(),
    }


def render(found: dict) -> str:
    """The table of a `report`."""
    head = f"{'precision':>10}{'recall':>10}{'F1':>10}{'support':>10}"
    means = [(f"({name})", found[name] | {"support": found["n"]}) for name in _MEANS]
    rows = [(str(c["label"]), c) for c in found["classes"]] + means
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}{head}"]
    for name, c in rows:
        numbers = "".join(f"{c[key]:10.3f}" for key in ("precision", "recall", "f1"))
        lines.append(f"{name:{width}}{numbers}{c['support']:10d}")
    lines.append(
        f"accuracy {found['accuracy']:.4f}, Matthews {found['matthews']:.4f}, n {found['n']}"
    )
    return "\n".join(lines)


_MEANS = ("macro", "micro", "weighted")


def matthews(counts: np.ndarray) -> float:
    """Matthews' correlation of a confusion matrix [C, C], between -1 and 1; 0: no better than chance.

    With c right of s items, t_k items of class k and p_k called k,

        (c s - Σ t_k p_k) / sqrt((s² - Σ p_k²) (s² - Σ t_k²))

    which for two classes is (TP TN - FP FN) / sqrt((TP+FP) (TP+FN) (TN+FP) (TN+FN)). 0 where all
    items are of one class or called one class. Source: Gorodkin 2004, "Comparing two K-category
    assignments by a K-category correlation coefficient".
    """
    counts = np.asarray(counts, np.float64)
    s, called, support = counts.sum(), counts.sum(axis=0), counts.sum(axis=1)
    covariance = np.trace(counts) * s - called @ support
    # The product of both variances would overflow integers at 10^5 items.
    spread = np.sqrt(s**2 - called @ called) * np.sqrt(s**2 - support @ support)
    return _ratio(covariance, spread)


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Linear correlation of two equally long sequences; 0 where one of them is constant."""
    x, y = _numbers(x, y)
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(_ratio(x @ y, np.sqrt(x @ x) * np.sqrt(y @ y)), -1.0, 1.0))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation of the ranks, equal values sharing their mean rank."""
    x, y = _numbers(x, y)
    return pearson(stats.rankdata(x), stats.rankdata(y))


def roc_auc(targets: Sequence[int], scores: Sequence[float]) -> float:
    """Area under the ROC curve: P(a positive scores above a negative), ties counted half.

    `targets` are 0 or 1. From ranks (equal scores share their mean rank), with n₁ positives and n₀
    negatives: (Σ ranks of positives - n₁ (n₁ + 1) / 2) / (n₁ n₀).

    Raises:
      ValueError: targets other than 0 and 1, only one of the classes, or a score that is NaN.
    """
    targets, scores = _numbers(targets, scores)
    if not np.isin(targets, (0, 1)).all():
        raise ValueError("AUC takes targets 0 and 1")
    positives = int(targets.sum())
    negatives = len(targets) - positives
    if not positives or not negatives:
        only = 1 if positives else 0
        raise ValueError(f"AUC needs both classes: all {len(targets)} targets are of class {only}")
    ranks = stats.rankdata(scores)[targets == 1].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))


def expected_calibration_error(
    confidences: Sequence[float], correct: Sequence[int], bins: int = 15
) -> float:
    """Σ_m |B_m| / n · |accuracy(B_m) - confidence(B_m)| over equally wide bins of confidence.

    Bin m of M holds the items with confidence in ((m-1)/M, m/M], the first also 0. `confidences`
    are the probabilities of the predicted classes, `correct` is 0 or 1. The number depends on M,
    which therefore belongs beside it. Source: Guo et al. 2017, "On Calibration of Modern Neural
    Networks", equation 5 (M = 15).
    """
    confidences, correct = _probabilities(confidences, correct)
    if bins < 1:
        raise ValueError(f"bins={bins} has to be 1 or more")
    edges = np.arange(1, bins) / bins
    number = np.searchsorted(edges, confidences, side="left")
    gaps = np.bincount(number, weights=correct - confidences, minlength=bins)
    return float(np.abs(gaps).sum() / len(correct))


def brier_score(probabilities: Any, targets: Sequence[int]) -> float:
    """Mean squared error of probabilities; 0 is perfect.

    Of probabilities [n] of class 1 and targets 0 or 1: mean (p - y)², at most 1. Of [n, C] and class
    numbers: mean over items of Σ_c (p_c - [c = y])², Brier's own, at most 2: of the same two-class
    forecast it is twice the other.

    Raises:
      ValueError: other shapes, a class number outside C, or probabilities outside [0, 1].
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2:
        p, y = _probabilities(p, targets)
        return float(np.mean((p - y) ** 2))
    y = np.asarray(targets)
    if y.shape != p.shape[:1] or not len(y) or y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(
            f"probabilities {p.shape} need {len(p)} class numbers from 0 to {p.shape[1] - 1}"
        )
    _check_probabilities(p)
    return float(np.mean(np.sum((p - np.eye(p.shape[1])[y]) ** 2, axis=1)))


def _scores(true: int, called: int, support: int) -> dict[str, float]:
    precision, recall = _ratio(true, called), _ratio(true, support)
    return {"precision": precision, "recall": recall, "f1": f_score(precision, recall)}


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else 0.0


def _plain(values: Sequence) -> list:
    return [v.item() if hasattr(v, "item") else v for v in values]


def _pairs(targets: Sequence, predictions: Sequence) -> tuple[list, list]:
    targets, predictions = _plain(targets), _plain(predictions)
    if len(targets) != len(predictions) or not targets:
        raise ValueError(
            f"{len(targets)} targets and {len(predictions)} predictions: as many of both, and one "
            "at least"
        )
    return targets, predictions


def _numbers(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape or not x.size:
        raise ValueError(f"two lists of as many numbers are needed, not {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a number among them is not finite")
    return x, y


def _probabilities(p: Sequence[float], y: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    p, y = _numbers(p, y)
    _check_probabilities(p)
    if not np.isin(y, (0, 1)).all():
        raise ValueError("probabilities are compared with 0 and 1 only")
    return p, y


def _check_probabilities(p: np.ndarray) -> None:
    if not ((p >= 0) & (p <= 1)).all():  # NaN is not, either
        raise ValueError(f"probabilities from {p.min()} to {p.max()} do not lie in [0, 1]")
