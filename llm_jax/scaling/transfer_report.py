"""What the experiments of `transfer` show: lines for a terminal, plots and a table for a report."""

from collections.abc import Sequence
from typing import Any

from llm_jax import report
from llm_jax.scaling.learning_rates import parabola_minimum
from llm_jax.scaling.transfer import Outcome, growth, mean_over_seeds

TITLES = {"mup": "muP", "standard": "standard parametrisation"}


def write(workdir: str, result: dict[str, Any]) -> str:
    """Writes WORKDIR/report.md and its plots; returns its path."""
    check = result["kind"] == "coordinate_check"
    title = "Coordinate check" if check else "Learning rate against width"
    blocks = [*(check_plots(result["rows"]) if check else transfer_plots(_outcomes(result)))]
    rows = growth_rows(result["rows"]) if check else optimum_rows(_outcomes(result))
    return str(report.write_report(workdir, title, [*blocks, report.Table(rows)]))


def lines(result: dict[str, Any]) -> list[str]:
    """The table of a result, for a terminal."""
    check = result["kind"] == "coordinate_check"
    rows = growth_rows(result["rows"]) if check else optimum_rows(_outcomes(result))
    return [
        "  ".join(f"{name} {report.format_number(value)}" for name, value in row.items())
        for row in rows
    ]


def optimum_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """For each parametrisation and width the best learning rate, its loss, and how far it is from
    that of the narrowest model."""
    rows, first = [], {}
    for (parametrization, width), by_rate in sorted(mean_over_seeds(outcomes).items()):
        best = parabola_minimum(list(by_rate), list(by_rate.values()))
        first.setdefault(parametrization, best)
        n = next(o.parameters for o in outcomes if o.width == width)
        rows.append(
            {
                "parametrisation": TITLES[parametrization],
                "width": width,
                "parameters": n,
                "best learning rate": best,
                "times that of the narrowest": best / first[parametrization],
                "loss there": min(by_rate.values()),
            }
        )
    return rows


def transfer_plots(outcomes: Sequence[Outcome]) -> list[report.Plot]:
    """For each parametrisation, loss against learning rate at every width; and the optimum against
    width for both."""
    means = mean_over_seeds(outcomes)
    plots = []
    top = max(v for by_rate in means.values() for v in list(by_rate.values())[:1])
    for parametrization in dict.fromkeys(p for p, _ in means):
        curves = {w: by_rate for (p, w), by_rate in sorted(means.items()) if p == parametrization}
        plots.append(
            report.Plot(
                name=f"transfer_{parametrization}",
                title=f"{TITLES[parametrization]}: loss against learning rate",
                xlabel="learning rate",
                ylabel="held-out loss, nats per token",
                xscale="log",
                ylim=(None, top + 0.2),
                series=[
                    report.Series(f"width {w}", list(c), list(c.values()))
                    for w, c in curves.items()
                ],
                vlines=[
                    report.Mark(parabola_minimum(list(c), list(c.values())))
                    for w, c in list(curves.items())[:1]
                ],
                caption="The dashed line is the optimum of the narrowest model.",
            )
        )
    rows = optimum_rows(outcomes)
    plots.append(
        report.Plot(
            name="optimum",
            title="Best learning rate against width",
            xlabel="width (d_model)",
            ylabel="times that of the narrowest model",
            xscale="log",
            yscale="log",
            series=[
                report.Series(
                    title,
                    [r["width"] for r in rows if r["parametrisation"] == title],
                    [
                        r["times that of the narrowest"]
                        for r in rows
                        if r["parametrisation"] == title
                    ],
                )
                for title in dict.fromkeys(r["parametrisation"] for r in rows)
            ],
            hlines=[report.Mark(1.5, "factor 1.5"), report.Mark(1 / 1.5)],
        )
    )
    return plots


def growth_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The slope of log change against log width for each place, by parametrisation."""
    slopes = growth(rows)
    return [
        {"where": where}
        | {
            f"slope, {title}": slopes[p, where]
            for p, title in TITLES.items()
            if (p, where) in slopes
        }
        for where in dict.fromkeys(r["where"] for r in rows)
    ]


def check_plots(rows: Sequence[dict[str, Any]]) -> list[report.Plot]:
    """For each parametrisation the change of activations at the last step against width."""
    last = max(r["step"] for r in rows)
    shown = [r for r in rows if r["step"] == last]
    low = min(r["change"] for r in shown if r["change"] > 0)
    high = max(r["change"] for r in shown)
    plots = []
    for parametrization in dict.fromkeys(r["parametrization"] for r in shown):
        mine = [r for r in shown if r["parametrization"] == parametrization]
        plots.append(
            report.Plot(
                name=f"coordinates_{parametrization}",
                title=f"{TITLES[parametrization]}: how far activations moved in {last} steps",
                xlabel="width (d_model)",
                ylabel="root mean square change",
                xscale="log",
                yscale="log",
                ylim=(low / 1.5, high * 1.5),
                series=[
                    report.Series(
                        where,
                        [r["width"] for r in mine if r["where"] == where],
                        [r["change"] for r in mine if r["where"] == where],
                    )
                    for where in dict.fromkeys(r["where"] for r in mine)
                ],
            )
        )
    return plots


def _outcomes(result: dict[str, Any]) -> list[Outcome]:
    return [Outcome(**values) for values in result["outcomes"]]
