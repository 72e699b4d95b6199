"""The report of the rankings experiment: claims and what is found of them, plots and tables."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import plots, report
from llm_jax.align.rankings.data import bits_of, comparisons_of, pairs_of, prompts_for
from llm_jax.align.rankings.findings import (
    BOTH,
    PAIRS,
    UNITS,
    Estimate,
    Findings,
    estimate,
    lines,
    stabilities,
)


def main_plot(f: Findings) -> report.Plot:
    """Accuracy against comparisons, a colour for each method, a curve of it for each noise."""
    n, series = f.sizes[0], []
    methods = (
        (PAIRS, "implied", "pairs, each by itself", "line"),
        ((n,), "listwise", f"rankings of {n}, listwise", "line"),
        ((n,), "implied", f"rankings of {n}, by pairs", "dashed"),
    )
    for i, noise in enumerate(f.noise):
        name = f.name(noise=noise)
        for j, (design, method, label, style) in enumerate(methods):
            y = [float(np.mean(f.bought(design, method, name, b))) for b in f.budgets]
            texts = [""] * (len(y) - 1) + [f"noise {noise:g}"] if j == 0 else None
            series.append(
                report.Series(
                    "" if i else label, f.budgets, y, style, color=plots.PALETTE[j], texts=texts
                )
            )
    return report.Plot(
        name="accuracy",
        title="Accuracy of a reward against what its labels cost",
        annotation=f"gumbel noise, mean over {f.settings['seeds']} seeds",
        xlabel=f"comparisons (a ranking of {n}: {comparisons_of(n)}, a pair: 1)",
        ylabel="accuracy on true pairs",
        xscale="log",
        xlim=(None, f.budgets[-1] * (f.budgets[-1] / f.budgets[0]) ** 0.16),  # room for the noises
        series=series,
    )


def fatigue_plot(f: Findings) -> report.Plot:
    """The lead of fresh pairs against fatigue, at equal comparisons and at equal reading."""
    series = []
    x = list(f.fatigues())
    for (i, n), unit in itertools.product(enumerate(f.sizes), ("comparisons", "answers_read")):
        found = f.differences(n, list(f.fatigues().values()), unit)
        style = "line" if unit == "comparisons" else "dashed"
        color = plots.PALETTE[i % len(plots.PALETTE)]
        series.append(_curve(f"{n} answers, {UNITS[unit]}", x, list(found.values()), style, color))
    return report.Plot(
        name="fatigue",
        title="The lead of fresh pairs over rankings, against fatigue",
        annotation=f"{f.usual}, as much as {f.budget:,} comparisons of rankings; above 0: pairs",
        xlabel="fatigue: noise grows as (n / 2)^fatigue",
        ylabel="points of accuracy",
        hlines=[report.Mark(0.0)],
        series=series,
        caption="Bands: 95 % intervals over seeds.",
    )


def _curve(
    label: str, x: Sequence[float], found: Sequence[Estimate], style: str, color: str
) -> report.Series:
    points = [[100 * v for v in d] for d in found]
    mean, low, high = (list(column) for column in zip(*points, strict=True))
    return report.Series(label, x, mean, style, low=low, high=high, color=color)


def count_table(f: Findings) -> list[dict[str, Any]]:
    """What there is to be said about n answers."""
    return [
        {
            "answers n": n,
            "orders n!": math.factorial(n),
            "pairs": pairs_of(n),
            "bits of a ranking": bits_of(n),
            "comparisons": comparisons_of(n),
            "pairs a bit": pairs_of(n) / bits_of(n),
            f"rankings for {f.budget:,} comparisons": prompts_for(f.budget, (n,)),
            "answers read": prompts_for(f.budget, (n,)) * n,
        }
        for n in sorted({2, 3, 4, 5, 6, 7, 8, 9, *f.sizes})
    ]


def accuracy_table(f: Findings) -> list[dict[str, Any]]:
    """Mean accuracies at the usual budget, by annotator."""
    columns = [("pairs", PAIRS, "implied")]
    for n in f.sizes:
        columns += [
            (f"{n}: listwise", (n,), "listwise"),
            (f"{n}: its pairs", (n,), "implied"),
            (f"{n}: judged pairs", (n,), "judged"),
        ]
    return [
        {"annotator": a} | {label: f"{np.mean(f.bought(d, m, a)):.3f}" for label, d, m in columns}
        for a in f.all
    ]


def difference_table(f: Findings) -> list[dict[str, Any]]:
    """Paired differences at the usual budget, in points, by annotator."""
    rows = []
    for a in f.all:
        row = {"annotator": a}
        for n in f.sizes:
            row[f"pairs - rankings of {n}"] = f.differences(n, [a])[a].points()
            row[f"the same, equal reading, {n}"] = f.differences(n, [a], "answers_read")[a].points()
            row[f"loss: pairwise - listwise, {n}"] = f.losses(n)[a].points()
        rows.append(row)
    return rows


def mixed_table(f: Findings) -> list[dict[str, Any]]:
    """Prompts with different numbers of answers: which loss, and how its pairs are weighed."""
    rows = []
    for a in f.all:
        by = {m: f.bought(f.mixed, m, a) for m in ("listwise", "implied", "implied_per_prompt")}
        rows.append(
            {
                "annotator": a,
                "listwise": f"{by['listwise'].mean():.3f}",
                "pairs count alike": f"{by['implied'].mean():.3f}",
                "prompts count alike": f"{by['implied_per_prompt'].mean():.3f}",
                "prompts - pairs": estimate(by["implied_per_prompt"] - by["implied"]).points(),
                "pairs - listwise": estimate(by["implied"] - by["listwise"]).points(),
            }
        )
    return rows


def stability_table(f: Findings) -> list[dict[str, Any]]:
    """`stabilities` in words, listwise / pairwise."""
    rows = []
    for r in stabilities(f):
        row = {"answers": r["answers"], "careless": f"{r['careless']:.0%}"}
        for key, title in (
            ("spread", "spread of gradient norms"),
            ("outlier", "pull of the careless"),
            ("condition", "condition"),
        ):
            both = r.get(key)
            row[title] = " / ".join(f"{both[m].mean:.2f}" for m in BOTH) if both else ""
        row["accuracy lost, points"] = " / ".join(f"{100 * r['lost'][m].mean:.1f}" for m in BOTH)
        row["std of accuracy, points"] = " / ".join(f"{100 * r['std'][m]:.2f}" for m in BOTH)
        row["ratio of the two"] = str(r["std ratio"])
        rows.append(row)
    return rows


def as_json(result: Mapping[str, Any]) -> str:
    """With a line for each run."""
    runs = ",\n".join(json.dumps(r, separators=(",", ":")) for r in result["runs"])
    rest = json.dumps({k: v for k, v in result.items() if k != "runs"}, separators=(",", ":"))
    return f'{rest[:-1]},"runs":[\n{runs}\n]}}\n'


def _folder(folder: str | Path) -> Path:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def write(folder: str | Path, result: Mapping[str, Any]) -> Path:
    """Writes results.json, report.md and its plots; returns the path of the report."""
    f = Findings(result)
    plots.replace_file(_folder(folder) / "results.json", as_json(result).encode())
    s = f.settings
    found = "\n".join(f"{i}. {line}" for i, line in enumerate(lines(result), start=1))
    unlike = f"; {s['nonlinear']:.0%} of its variance is a square of them" if s["nonlinear"] else ""
    blocks = [
        report.Text(
            f"A linear reward of {s['features']} features is learned from made-up annotators, who see "
            f"the true reward (a linear function of the features, standard deviation 1{unlike}) and "
            f"noise; it is tested on {s['test_pairs']:,} true pairs. Intervals are 95 %, over "
            f"{s['seeds']} seeds, of paired differences where there are two methods: one of twenty "
            "misses. A case is told where its interval leaves out 0; points are hundredths of "
            "accuracy.\n\n## What is found\n\n" + found
        ),
        main_plot(f),
        report.Text("## Counts"),
        report.Table(
            count_table(f),
            caption="A ranking holds fewer bits than it implies pairs: those are not independent",
        ),
        report.Text(
            "## Accuracy at equal cost\n\nA ranking of n costs ceil(log2 n!) comparisons, a pair 1. "
            "*pairs*: two answers to a prompt of their own. *n: judged pairs*: each pair of the same n "
            "answers by itself. *n: listwise*, *n: its pairs*: rankings, by Plackett-Luce and by the "
            "logistic loss on all pairs of them. Each method's L2 is the best of "
            "the same grid, on other true pairs."
        ),
        report.Table(accuracy_table(f), caption=f"Accuracy for {f.budget:,} comparisons"),
        report.Table(difference_table(f), caption="Differences in points, and 95 % intervals"),
        fatigue_plot(f),
        report.Text("## The loss on the same rankings"),
        report.Text(
            "Where all prompts have as many answers, it is the same whether each pair counts as one or "
            f"each prompt. Of prompts with {', '.join(map(str, f.mixed))} answers in turn it is not:"
        ),
        report.Table(
            mixed_table(f), caption=f"Accuracy for {f.budget:,} comparisons, mixed prompts"
        ),
        report.Text(
            "## Stability\n\nListwise / pairwise. The first three are at the true reward on the scale "
            "of the noise, where both losses lead if rankings are Plackett-Luce's: the spread is the "
            "standard deviation of prompts' gradient norms over their mean, the pull the mean norm of "
            "careless annotations over that of the others, the condition that of the Hessian."
        ),
        report.Table(stability_table(f)),
        report.Text(f"Made by `python -m experiments.rankings` in {result['seconds']:.0f} s."),
    ]
    return report.write_report(folder, "Pairs or rankings: what a reward is learned from", blocks)
