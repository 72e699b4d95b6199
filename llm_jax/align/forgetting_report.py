"""The report of the forgetting experiment: one table, one plot, curves, and a winner by rule."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm_jax import plots, report

Run = Mapping[str, Any]
KEPT = 0.95
RULE = (
    f"Rule: among the remedies that keep {KEPT:.0%} of the best gain on the target, the one that "
    "forgets least wins."
)


class Estimate(NamedTuple):
    """Mean over seeds and its standard error (NaN of a single seed)."""

    mean: float
    error: float

    def __str__(self) -> str:
        if math.isnan(self.error):
            return f"{self.mean:.4f}"
        return f"{self.mean:.4f} ± {self.error:.4f}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the mean."""
    n = len(values)
    return Estimate(
        float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    )


def forgetting(run: Run, before: Run) -> float:
    """Bits per byte of the original text after tuning, above those before."""
    return run["bits_per_byte"] - before["bits_per_byte"]


def gain(run: Run, before: Run, tasks: Sequence[str]) -> float:
    """By how much the answers' loss fell (nats a token), mean over tasks."""
    return float(np.mean([before["by_task"][t]["loss"] - run["by_task"][t]["loss"] for t in tasks]))


def accuracy(run: Run, tasks: Sequence[str]) -> float | None:
    """Share of right choices, mean over the tasks with choices; None: there is none."""
    known = [run["by_task"][t]["accuracy"] for t in tasks]
    known = [a for a in known if a is not None]
    return float(np.mean(known)) if known else None


def winner(points: Mapping[str, tuple[Estimate, Estimate]]) -> str:
    """The remedy that RULE names, of {remedy: (forgetting, gain)}."""
    best = max(gain.mean for _, gain in points.values())
    least = best - (1 - KEPT) * abs(best)  # below 0 where nothing was learned
    good = {name: lost.mean for name, (lost, gain) in points.items() if gain.mean >= least}
    return min(good, key=good.get)


class Findings:
    """results.json by remedy, size and number of tasks."""

    def __init__(self, result: Mapping[str, Any]):
        self.settings, self.before = result["settings"], result["before"]
        self.runs = list(result["runs"].values())
        self.target = self.settings["tasks"][0]
        # Those that are tuned on come first, in their order.
        self.tasks = list(dict.fromkeys([*self.settings["tasks"], *self.before["by_task"]]))
        self.others = self.tasks[1:]
        self.sizes = sorted({r["examples"] for r in self.runs})
        self.remedies = list(dict.fromkeys(r["remedy"] for r in self.runs))

    def over_seeds(
        self, value: Callable[[Run], float | None], remedy: str, examples: int, tasks: int = 1
    ) -> Estimate | None:
        """A value's mean and error; None where nothing was measured."""
        found = [
            value(r)
            for r in self.runs
            if (r["remedy"], r["examples"], r["tasks"]) == (remedy, examples, tasks)
        ]
        found = [v for v in found if v is not None]
        return estimate(found) if found else None

    def points(self) -> dict[str, tuple[Estimate, Estimate]]:
        """{remedy: (forgetting, gain on the target)} at the largest size."""
        out = {}
        for remedy in self.remedies:
            at = (remedy, self.sizes[-1])
            pair = self.over_seeds(self.forgot, *at), self.over_seeds(self.gained, *at)
            if None not in pair:
                out[remedy] = pair
        return out

    def forgot(self, run: Run) -> float:
        """As `forgetting`."""
        return forgetting(run, self.before)

    def gained(self, run: Run) -> float:
        """Gain on the target."""
        return gain(run, self.before, [self.target])

    def gained_others(self, run: Run) -> float:
        """Gain on all other tasks; below 0 is what was unlearned."""
        return gain(run, self.before, self.others)


def table(f: Findings) -> list[dict[str, Any]]:
    """A row for the base model and for each remedy at the largest size."""
    target, others = [f.target], f.others
    rows = [
        {
            "remedy": "before tuning",
            "original text, bits per byte": f"{f.before['bits_per_byte']:.4f}",
            "forgetting": "",
            "target: loss": f"{f.before['by_task'][f.target]['loss']:.4f}",
            "target: gain": "",
            "target: accuracy": accuracy(f.before, target),
            "target: exact": f.before["by_task"][f.target]["exact"],
            "others: gain": "",
            "others: accuracy": accuracy(f.before, others) if others else None,
        }
    ]
    for remedy in f.points():
        at = (remedy, f.sizes[-1])

        def over(value: Callable[[Run], Any], at=at) -> Estimate | None:
            return f.over_seeds(value, *at)

        rows.append(
            {
                "remedy": remedy,
                "original text, bits per byte": over(lambda r: r["bits_per_byte"]),
                "forgetting": over(f.forgot),
                "target: loss": over(lambda r: r["by_task"][f.target]["loss"]),
                "target: gain": over(f.gained),
                "target: accuracy": over(lambda r: accuracy(r, target)),
                "target: exact": over(lambda r: r["by_task"][f.target]["exact"]),
                "others: gain": over(f.gained_others) if others else None,
                "others: accuracy": over(lambda r: accuracy(r, others)) if others else None,
                "trained": next(r["trained_parameters"] for r in f.runs if r["remedy"] == remedy),
                "seconds": over(lambda r: r["seconds"]).mean,
                "seeds": sum((r["remedy"], r["examples"], r["tasks"]) == (*at, 1) for r in f.runs),
            }
        )
    return rows


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Estimate) else value


def main_plot(f: Findings) -> report.Plot:
    """Forgetting against gain, a point with error bars for each remedy."""
    series = []
    for i, (remedy, (x, y)) in enumerate(f.points().items()):
        color = plots.PALETTE[i % len(plots.PALETTE)]
        ex, ey = np.nan_to_num([x.error, y.error])
        series += [
            report.Series(
                "", [x.mean], [y.mean], "points", low=[y.mean - ey], high=[y.mean + ey],
                color=color, texts=[remedy],
            ),
            report.Series("", [x.mean - ex, x.mean + ex], [y.mean] * 2, "thin", color=color),
        ]  # fmt: skip
    at = [x.mean for x, _ in f.points().values()]
    return report.Plot(
        name="forgetting",
        title=f"Learned and forgotten, {f.sizes[-1]:,} examples of {f.target}",
        xlabel="forgetting: bits per byte of the original text",
        ylabel="gain on the target, nats a token",
        xlim=(None, max(at) + 0.2 * (max(at) - min(at) or 1.0)),  # room for the names
        series=series,
        caption="Up and left is better. Bars: one standard error over seeds.",
    )


def size_plots(f: Findings) -> list[report.Plot]:
    """Forgetting and gain against the number of examples, a curve for each remedy."""
    out = []
    for name, title, ylabel, value in (
        ("sizes_forgetting", "Forgetting", "bits per byte above the base", f.forgot),
        ("sizes_gain", "Gain on the target", "nats a token", f.gained),
    ):
        series = []
        for remedy in f.remedies:
            found = [(n, f.over_seeds(value, remedy, n)) for n in f.sizes]
            series.append(_curve(remedy, [(n, e) for n, e in found if e]))
        out.append(
            report.Plot(
                name=name,
                title=f"{title} against examples",
                xlabel="examples of the target",
                ylabel=ylabel,
                xscale="log",
                series=series,
            )
        )
    return out


def task_plots(f: Findings) -> list[report.Plot]:
    """The same number of examples spread over more tasks; none where there is nothing but one."""
    counts = sorted({r["tasks"] for r in f.runs})
    if len(counts) < 2:
        return []
    tuned, fresh = f.tasks[: counts[-1]], f.tasks[counts[-1] :]

    def curve(label: str, value: Callable[[Run], float]) -> report.Series:
        found = [(c, f.over_seeds(value, "plain", f.sizes[-1], c)) for c in counts]
        return _curve(label, [(c, e) for c, e in found if e])

    gains = [
        curve("on the target", f.gained),
        curve(f"on all {len(tuned)} tasks", lambda r: gain(r, f.before, tuned)),
    ]
    if fresh:
        gains.append(curve("on tasks never tuned on", lambda r: gain(r, f.before, fresh)))
    title = f"{f.sizes[-1]:,} examples over more tasks, no remedy"
    return [
        report.Plot(
            name=name,
            title=f"{what}: {title}",
            xlabel="tasks",
            ylabel=ylabel,
            xscale="log",
            series=series,
        )
        for name, what, ylabel, series in (
            (
                "tasks_forgetting",
                "Forgetting",
                "bits per byte above the base",
                [curve("", f.forgot)],
            ),
            ("tasks_gain", "Gain", "nats a token", gains),
        )
    ]


def _curve(label: str, points: Sequence[tuple[int, Estimate]]) -> report.Series:
    errors = [0.0 if math.isnan(e.error) else e.error for _, e in points]
    means = [e.mean for _, e in points]
    return report.Series(
        label,
        [x for x, _ in points],
        means,
        low=[m - d for m, d in zip(means, errors, strict=True)],
        high=[m + d for m, d in zip(means, errors, strict=True)],
    )


def lines(result: Mapping[str, Any]) -> list[str]:
    """What the binary prints at the end."""
    f = Findings(result)
    points = f.points()
    out = [f"{name}: forgetting {x}, gain {y}" for name, (x, y) in points.items()]
    return [*out, f"winner: {winner(points)}", RULE]


def write(folder: str | Path, result: Mapping[str, Any]) -> Path:
    """Writes report.md and its plots; returns the path."""
    f = Findings(result)
    rows = [{k: _text(v) for k, v in row.items()} for row in table(f)]
    known = [k for k in rows[-1] if any(row.get(k) is not None for row in rows)]
    rows = [{k: row.get(k, "") for k in known} for row in rows]
    s = f.settings
    by_task = [
        {
            "task": name,
            "before": f.before["by_task"][name]["loss"],
            **{
                remedy: f.over_seeds(
                    lambda r, name=name: r["by_task"][name]["loss"], remedy, f.sizes[-1]
                ).mean
                for remedy in f.points()
            },
        }
        for name in f.tasks
    ]
    blocks = [
        report.Text(
            f"**Winner: {winner(f.points())}.** {RULE}\n\nTuned on {f.sizes[-1]:,} examples of "
            f"{f.target}, each seen {_times(s['epochs'])}; errors are one standard error over seeds. Losses "
            "are nats a token of the right answers; gain is by how much they fell, forgetting by how "
            "much the bits per byte of the original text rose."
        ),
        report.Table(rows),
        main_plot(f),
        report.Table(by_task, caption="Loss of each task's answers, mean over seeds"),
        *size_plots(f),
        *task_plots(f),
    ]
    return report.write_report(folder, "What tuning makes a model forget", blocks)
