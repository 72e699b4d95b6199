"""The plots of fitted laws: runs and envelope, IsoFLOP parabolas, contours with the efficient
frontier, residuals, bootstrap clouds, and the optima of all laws side by side."""

from collections.abc import Sequence

import numpy as np

from llm_jax.plots import INK, PALETTE, Contours, Mark, Plot, Series
from llm_jax.scaling import published
from llm_jax.scaling.fit import FRONTIER_ONLY, Fits, frontier_at
from llm_jax.scaling.laws import LAWS, LawFit
from llm_jax.scaling.laws.envelope import curve_of
from llm_jax.scaling.laws.optima import loss_at
from llm_jax.scaling.runs import Runs

PUBLISHED = {"kaplan": "Kaplan 2020", "hoffmann3": "Hoffmann 2022"}
# Laws of N and D, the one to draw contours of first.
PARAMETRIC = ("chinchilla3", "data_constrained", "kaplan")
BAND_SAMPLES = 1000


def _answers(result: Fits) -> dict[str, LawFit]:
    return {name: fit for name, fit in result.fits.items() if fit.converged}


def _colors(result: Fits) -> dict[str, str]:
    """Each law keeps its colour in all plots."""
    return dict(zip(LAWS, PALETTE))


def runs(result: Fits) -> list[Plot]:
    """Loss over compute with training curves and laws' frontiers; IsoFLOP curves; contours."""
    found = [_curves(result)]
    if result.runs.budget is not None:
        found.append(_isoflops(result))
    return found + [plot for name in PARAMETRIC[:1] for plot in _contours(result, name)]


def _curves(result: Fits) -> Plot:
    table = result.runs
    curve = curve_of(table)
    series = []
    for number in np.unique(curve):
        rows = np.flatnonzero(curve == number)
        rows = rows[np.argsort(table.c[rows], kind="stable")]
        series.append(
            Series("", table.c[rows], table.loss[rows], style="thin", values=table.n[rows])
        )
    series.append(Series("", table.c, table.loss, style="points", values=table.n))
    flops = np.geomspace(table.c.min(), max(result.options.at or 0, 10 * table.c.max()), 100)
    for name, fit in _answers(result).items():
        loss = _best_loss(name, fit, flops, result)
        if loss is not None:
            series.append(Series(name, flops, loss, style="dashed", color=_colors(result)[name]))
    return Plot(
        "curves",
        series,
        title="Runs, and the best loss of each budget by each law",
        annotation="thin lines join the points of one run, or of one size",
        xlabel="training FLOPs",
        ylabel="nats per token",
        xscale="log",
        yscale="log",
        values_label="parameters",
        values_scale="log",
    )


def _best_loss(name: str, fit: LawFit, flops: np.ndarray, result: Fits) -> np.ndarray | None:
    if name in FRONTIER_ONLY:
        return loss_at(fit.params, flops)
    best = frontier_at(fit.params, flops, result.options.flops_factor)
    if best is None:
        return None
    n, d = best
    return LAWS[name].predict(fit.params, _grid(result.runs, n, d, flops))


def _grid(table: Runs, n: np.ndarray, d: np.ndarray, c: np.ndarray) -> Runs:
    """Runs that were not: every token of theirs is seen once."""
    unique = None if table.unique is None else d
    return Runs(n=n, d=d, c=c, loss=np.full(n.shape, np.nan), unique=unique)


def _isoflops(result: Fits) -> Plot:
    table = result.runs
    fit = result.fits.get("chinchilla2")
    minima = {} if fit is None else {m["budget"]: m for m in fit.details.get("minima", [])}
    series, lows, highs = [], [], []
    for number in np.unique(table.budget):
        rows = np.flatnonzero(table.budget == number)
        c = np.full(len(rows), np.median(table.c[rows]))
        rows = rows[np.argsort(table.n[rows], kind="stable")]
        series.append(Series("", table.n[rows], table.loss[rows], style="points", values=c))
        lows.append(table.loss[rows].min())
        quarter, three = np.quantile(table.loss[rows], [0.25, 0.75])
        highs.append(min(table.loss[rows].max(), three + 1.5 * (three - quarter)))
        m = minima.get(int(number))
        if m is not None:
            x = np.geomspace(table.n[rows].min(), table.n[rows].max(), 60)
            y = m["loss"] + m["curvature"] * np.log(x / m["N"]) ** 2
            near = np.abs(np.log(x / m["N"])) < np.log(6)
            shade = np.full(near.sum(), c[0])
            series.append(Series("", x[near], y[near], style="thin", values=shade))
    if minima:
        n, loss = zip(*((m["N"], m["loss"]) for m in minima.values()), strict=True)
        series.append(Series("minimum of a budget", n, loss, style="points", color=INK))
    room = 0.04 * (max(highs) - min(lows))
    top = max(highs) + room
    return Plot(
        "isoflops",
        series,
        title="Loss over model size at equal compute",
        annotation="parabolas about the minima"
        + ("; runs that are far worse lie above the plot" if table.loss.max() > top else ""),
        xlabel="parameters",
        ylabel="nats per token",
        xscale="log",
        ylim=(min(lows) - room, top),
        values_label="training FLOPs",
        values_scale="log",
    )


def _contours(result: Fits, name: str) -> list[Plot]:
    fit, table = result.fits.get(name), result.runs
    if fit is None or not fit.converged:
        return []
    factor = result.options.flops_factor
    c = np.geomspace(table.c.min() / 1.5, 10 * table.c.max(), 120)
    best_n, _ = frontier_at(fit.params, c, factor)
    low = min(table.n.min(), best_n.min()) / 1.5
    n = np.geomspace(low, max(table.n.max(), best_n.max()) * 1.5, 120)
    c_NxC, n_NxC = np.meshgrid(c, n)
    z_NxC = fit.params["E"] + fit.params["A"] * n_NxC ** -fit.params["alpha"]
    z_NxC += fit.params["B"] * (c_NxC / (factor * n_NxC)) ** -fit.params["beta"]
    least = max(fit.params["E"], 0.97 * min(z_NxC.min(), table.loss.min()))
    levels = _levels(z_NxC.min(), np.quantile(table.loss, 0.98), least)
    series = [
        Series("run", table.c, table.n, style="points", color=INK),
        Series("efficient frontier", c, best_n, color=PALETTE[1]),
    ]
    return [
        Plot(
            "contours",
            series,
            title=f"Loss by {name}, and the best size for each compute",
            xlabel="training FLOPs",
            ylabel="parameters",
            xscale="log",
            yscale="log",
            xlim=(c[0], c[-1]),
            ylim=(n[0], n[-1]),
            contours=Contours(c, n, z_NxC, levels),
            values_label="nats per token",
        )
    ]


def _levels(lowest: float, highest: float, least: float) -> list[float]:
    """About fifteen, denser towards the irreducible loss."""
    above = np.geomspace(max(lowest - least, 0.02), max(highest - least, 0.05), 15)
    return sorted({round(float(least + v), 2) for v in above})


def optima(result: Fits) -> list[Plot]:
    """N*(C) and D*/N* of every law with its band, and published laws beside them."""
    table = result.runs
    top = max(result.options.at or 0, 10 * table.c.max())
    flops = np.geomspace(table.c.min(), top, 60)
    sizes, ratios = [], []
    for name, fit in _answers(result).items():
        best = frontier_at(fit.params, flops, result.options.flops_factor)
        if best is None:
            continue
        n, d = best
        bands = _bands(fit, flops, result.options.flops_factor)
        color = _colors(result)[name]
        for out, value, band in ((sizes, n, bands[0]), (ratios, d / n, bands[1])):
            low, high = band if band is not None else (None, None)
            out.append(Series(name, flops, value, low=low, high=high, color=color))
    # Far from the runs of their papers the published laws would make the others one line.
    limits = [_limits(out, 4.0) for out in (sizes, ratios)]
    for key, label in PUBLISHED.items():
        n, d = frontier_at(published.LAWS[key], flops, 6.0)
        for out, value, (low, high) in ((sizes, n, limits[0]), (ratios, d / n, limits[1])):
            if low is not None and (value.max() < low or value.min() > high):
                continue
            out.append(Series(label, flops, value, style="dashed", color="#777777"))
    common = {
        "xlabel": "training FLOPs",
        "xscale": "log",
        "yscale": "log",
        "vlines": (Mark(float(table.c.max()), "largest run"),),
    }
    level = f"bands: {result.options.level:.0%} bootstrap intervals; dashed: published laws"
    return [
        Plot("optimal_size", sizes, title="Best model size for each compute", annotation=level,
             ylabel="parameters", ylim=limits[0], **common),
        Plot("tokens_per_parameter", ratios, title="Tokens per parameter of the best model",
             annotation=level, ylabel="tokens per parameter", ylim=limits[1], **common),
    ]  # fmt: skip


def _limits(series: Sequence[Series], room: float) -> tuple[float | None, float | None]:
    """Limits of a logarithmic axis that leave this factor above and below the lines."""
    values = np.concatenate([[], *(np.asarray(s.y) for s in series)])
    values = values[np.isfinite(values) & (values > 0)]
    return (values.min() / room, values.max() * room) if len(values) else (None, None)


def _bands(fit: LawFit, flops: np.ndarray, flops_factor: float) -> list:
    """Percentile bands of N* and D*/N* over the FLOPs, from up to BAND_SAMPLES resamples."""
    if not fit.samples:
        return [None, None]
    samples = {k: v[:BAND_SAMPLES, None] for k, v in fit.samples.items()}
    n_RxC, d_RxC = frontier_at(samples, flops, flops_factor)
    tail = 50 * (1 - fit.level)
    with np.errstate(all="ignore"):
        return [np.nanpercentile(v, [tail, 100 - tail], axis=0) for v in (n_RxC, d_RxC / n_RxC)]


def residuals(result: Fits) -> list[Plot]:
    """Residuals of log loss of every law of N and D: against the prediction, and by compute."""
    found = []
    table = result.runs
    for name in PARAMETRIC:
        fit = result.fits.get(name)
        if fit is None or not fit.converged:
            continue
        predicted = LAWS[name].predict(fit.params, table)
        percent = 100 * np.log(table.loss / predicted)
        for key, x, label, scale, values, what in (
            ("prediction", predicted, "predicted nats per token", "linear", table.c,
             "training FLOPs"),
            ("compute", table.c, "training FLOPs", "log", table.n, "parameters"),
        ):  # fmt: skip
            found.append(
                Plot(
                    f"residuals_{name}_by_{key}",
                    [Series("", x, percent, style="points", values=values)],
                    title=f"Residuals of {name}, by {key}",
                    annotation="measured less predicted, in % of the loss",
                    xlabel=label,
                    ylabel="%",
                    xscale=scale,
                    hlines=(Mark(0.0),),
                    values_label=what,
                    values_scale="log",
                )
            )
    return found


def clouds(result: Fits) -> list[Plot]:
    """Bootstrap samples: exponent a against E of one law, and against N* of all."""
    found, best = [], []
    for name, fit in _answers(result).items():
        if not fit.samples:
            continue
        color = _colors(result)[name]
        if name == "chinchilla3":
            cloud = Series("a resample", fit.samples["E"], fit.samples["a"], "points", color=color)
            point = Series("fit to all runs", [fit.params["E"]], [fit.params["a"]], "points",
                           color=INK)  # fmt: skip
            found.append(
                Plot(
                    "cloud_E_a",
                    [cloud, point],
                    title="Bootstrap: irreducible loss and the exponent of N*",
                    xlabel="E, nats per token",
                    ylabel="a of N* ~ C^a",
                )
            )
        optimum = frontier_at(fit.samples, fit.at, result.options.flops_factor)
        if optimum is not None:
            best.append(Series(name, optimum[0], fit.samples["a"], style="points", color=color))
    if best:
        found.append(
            Plot(
                "cloud_optimum",
                best,
                title="Bootstrap: the best size and its growth with compute",
                annotation=f"N* at {fit.at:.3g} FLOPs",
                xlabel="N*, parameters",
                ylabel="a of N* ~ C^a",
                xscale="log",
            )
        )
    return found


def held_out(result: Fits) -> list[Plot]:
    """Predicted against measured loss of the held-out runs, with the intervals of the law."""
    series: list[Series] = []
    values: Sequence[float] = []
    for name, rows in result.predictions.items():
        measured = [r["measured"] for r in rows]
        series.append(
            Series(
                name,
                measured,
                [r["predicted"] for r in rows],
                style="points",
                low=[r["low"] for r in rows],
                high=[r["high"] for r in rows],
                color=_colors(result)[name],
            )
        )
        values = [*values, *measured]
    low, high = min(values), max(values)
    series.append(Series("as measured", [low, high], [low, high], style="dashed", color="#777777"))
    return [
        Plot(
            "held_out",
            series,
            title="Held-out runs",
            annotation=f"bars: {result.options.level:.0%} intervals of the law",
            xlabel="measured, nats per token",
            ylabel="predicted",
        )
    ]
