"""Numbers of judged answers: how well scores agree with labels, and what length has to do with it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from llm_jax import report

BINS = 10  # of calibration


class Judged(NamedTuple):
    """Answers, each float or int [N]; those that are compared share their `group`."""

    scores: np.ndarray
    labels: np.ndarray
    tokens: np.ndarray
    groups: np.ndarray


class Pairs(NamedTuple):
    """Index of the preferred answer and of the other, int [P] each; groups in order."""

    better: np.ndarray
    worse: np.ndarray


def pairs_of(judged: Judged) -> Pairs:
    """All pairs of answers of one group with different labels, the preferred first."""
    better, worse = [], []
    order = np.argsort(judged.groups, kind="stable")
    cuts = np.flatnonzero(np.diff(judged.groups[order])) + 1
    for own in np.split(order, cuts) if len(order) else ():
        labels = judged.labels[own]
        i, j = np.nonzero(labels[:, None] > labels[None, :])
        better.append(own[i])
        worse.append(own[j])
    join = lambda parts: np.concatenate(parts) if parts else np.zeros(0, int)  # noqa: E731
    return Pairs(join(better), join(worse))


def right(ahead_P: np.ndarray) -> np.ndarray:
    """1 where the preferred answer is ahead, 1/2 where neither is."""
    return (ahead_P > 0) + 0.5 * (ahead_P == 0)


def measure(judged: Judged, *, shorter_wins: bool = True) -> dict[str, float]:
    """What `scores` are worth; names start with "eval/".

    pair_accuracy, its standard error over pairs, and that of always preferring the shorter answer
    (the longer one, if `shorter_wins` is False: what the training data says); accuracy on the pairs
    whose preferred answer is the shorter, and on the others; auc, the chance that a preferred answer
    scores above another one, also to another prompt; log_loss and calibration_error of
    sigmoid(score difference) as the probability of a preference (10 bins of equal width of the
    confidence, Naeini et al. 2015); length_correlation of score and tokens (Spearman); and where
    labels are more than two numbers, pearson and spearman of score and label. What cannot be said of
    the data is left out.
    """
    found: dict[str, float] = {}
    s, labels, tokens = judged.scores, judged.labels, judged.tokens
    pairs = pairs_of(judged)
    if len(pairs.better):
        ahead = s[pairs.better] - s[pairs.worse]
        longer = tokens[pairs.better] - tokens[pairs.worse]
        hits = right(ahead)
        found["pair_accuracy"] = float(hits.mean())
        found["pair_accuracy_stderr"] = (
            float(hits.std(ddof=1) / math.sqrt(len(hits))) if len(hits) > 1 else math.nan
        )
        found["length_only_accuracy"] = float(right(-longer if shorter_wins else longer).mean())
        for name, here in (("shorter", longer < 0), ("longer", longer > 0)):
            if here.any():
                found[f"accuracy_where_{name}_preferred"] = float(hits[here].mean())
        found["margin"] = float(ahead.mean())
        found["auc"] = auc(s[pairs.better], s[pairs.worse])
        found["log_loss"] = float(np.logaddexp(0.0, -ahead).mean())
        found["calibration_error"] = calibration(ahead)[0]
        found["pairs"] = len(ahead)
    if np.ptp(s) and np.ptp(tokens):
        found["length_correlation"] = float(stats.spearmanr(s, tokens).statistic)
    if len(np.unique(labels)) > 2 and np.ptp(s):
        found["pearson"] = float(stats.pearsonr(s, labels).statistic)
        found["spearman"] = float(stats.spearmanr(s, labels).statistic)
    return {f"eval/{name}": value for name, value in found.items()}


def auc(above: np.ndarray, below: np.ndarray) -> float:
    """The chance that one of `above` is larger than one of `below`, ties half (Mann-Whitney)."""
    ranks = stats.rankdata(np.concatenate([above, below]))
    n, m = len(above), len(below)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def calibration(ahead_P: np.ndarray) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error, and the bins: confidence, accuracy and how many pairs."""
    confidence = 1.0 / (1.0 + np.exp(-np.abs(ahead_P)))
    hits = right(ahead_P)
    which = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    rows, error = [], 0.0
    for b in range(BINS):
        here = which == b
        if here.any():
            row = {
                "confidence": float(confidence[here].mean()),
                "accuracy": float(hits[here].mean()),
            }
            rows.append(row | {"pairs": int(here.sum())})
            error += here.mean() * abs(row["confidence"] - row["accuracy"])
    return float(error), rows


def blocks(judged: Judged, said: Sequence[Any] = (), *, worst: int = 5) -> list[report.Block]:
    """Histograms, calibration, score against length, and the pairs that are most wrong; `said` has
    the texts (`data.comparisons.Said`)."""
    pairs = pairs_of(judged)
    if not len(pairs.better):
        return []
    better, worse = judged.scores[pairs.better], judged.scores[pairs.worse]
    low, high = min(better.min(), worse.min()), max(better.max(), worse.max())
    edges = np.linspace(low, high if high > low else low + 1.0, 31)
    middle = (edges[1:] + edges[:-1]) / 2
    lines = [
        report.Series(name, middle, np.histogram(x, edges)[0])
        for name, x in (("preferred", better), ("other", worse))
    ]
    error, bins = calibration(better - worse)
    found: list[report.Block] = [
        report.Text("## Held-out answers"),
        report.Plot("rewards", lines, title="Scores of answers", xlabel="score", ylabel="answers"),
        report.Plot(
            "calibration",
            [
                report.Series("perfect", [0.5, 1.0], [0.5, 1.0]),
                report.Series(
                    "pairs",
                    [b["confidence"] for b in bins],
                    [b["accuracy"] for b in bins],
                    style="points",
                ),
            ],
            title=f"Calibration (expected error {error:.3f})",
            xlabel="confidence, sigmoid of the difference",
            ylabel="accuracy",
        ),
        report.Plot(
            "length",
            [
                report.Series(name, judged.tokens[i], judged.scores[i], style="points")
                for name, i in (("preferred", pairs.better), ("other", pairs.worse))
            ],
            title="Score against length",
            xlabel="tokens of the answer",
            ylabel="score",
        ),
    ]
    order = np.argsort(better - worse)[:worst]
    for k in order if len(said) else ():
        i, j = int(pairs.better[k]), int(pairs.worse[k])
        if better[k] >= worse[k]:
            break
        texts = [f"[{m['role']}] {m['content']}" for m in said[i].prompt] + [
            f"[preferred, {judged.scores[i]:.3f}] {_text(said[i].answer)}",
            f"[other, {judged.scores[j]:.3f}] {_text(said[j].answer)}",
        ]
        found.append(
            report.Code("\n\n".join(texts), caption="A pair that is judged the other way round")
        )
    return found


def _text(messages: Sequence[dict]) -> str:
    return "\n".join(str(m["content"]) for m in messages)
