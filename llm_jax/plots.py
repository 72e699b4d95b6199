"""Plots as data, and how they are drawn: one look for every figure of a report.

A `Plot` is series, marks and contours; `save_plot` draws it to a PNG. The same plot gives the same
bytes.
"""

import io
import math
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STYLES = ("line", "dashed", "thin", "points", "bars")
SCALES = ("linear", "log")

# Okabe & Ito's palette (jfly.uni-koeln.de/color, 2008), told apart with any colour vision; its
# yellow is left out, it cannot be read on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, GREY, FAINT = "#222222", "#666666", "#E4E4E4"
SIZE_INCHES, DPI, FONT = (7.6, 4.0), 150, 10
MAX_DIRECT_LABELS = 6

# Matplotlib's text layout keeps caches that threads share.
_drawing = threading.Lock()


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one plot.

    A y of None was not measured and is left out; NaN was measured and breaks the line there.

    Attributes:
      style: `line`, `dashed`, `thin`, `points` or `bars` (bars take words as x, too).
      smooth: half-width in points of a centred Gaussian window (0: off). The values are then drawn
        faint and the smoothed line strong.
      low, high: edges of a band around the line, or bars at points, e.g. a confidence interval.
      color: any colour; None: the next of the palette, or of a scale where series are many.
      values: one number a point, shown by colour on the scale of the plot's colour bar; a line has
        the colour of its first.
      texts: a word beside each point; "" for none.
    """

    label: str
    x: Sequence
    y: Sequence[float | None]
    style: str = "line"
    smooth: int = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    color: str | None = None
    values: Sequence[float] | None = None
    texts: Sequence[str] | None = None


@dataclass(frozen=True)
class Mark:
    """A reference value: a dashed line across the plot."""

    value: float
    label: str = ""


@dataclass(frozen=True)
class Contours:
    """Filled level curves of z_YxX over a grid of x and y, under the series; `levels` may be few."""

    x: Sequence[float]
    y: Sequence[float]
    z_YxX: Any
    levels: Sequence[float]


@dataclass(frozen=True)
class Plot:
    """One figure, stored as `plots/<name>.png`; `annotation` is a grey line under the title.

    `values_label` and `values_scale` belong to the colour bar of series with `values`, or of the
    contours.
    """

    name: str
    series: Sequence[Series]
    title: str = ""
    xlabel: str = ""
    ylabel: str = ""
    xscale: str = "linear"
    yscale: str = "linear"
    xlim: tuple[float | None, float | None] = (None, None)
    ylim: tuple[float | None, float | None] = (None, None)
    hlines: Sequence[Mark] = ()
    vlines: Sequence[Mark] = ()
    annotation: str = ""
    caption: str = ""
    contours: Contours | None = None
    values_label: str = ""
    values_scale: str = "linear"


def save_plot(plot: Plot, path: str | os.PathLike) -> Path:
    """Draws one plot to a PNG file; the same plot gives the same bytes."""
    path = Path(path)
    buffer = io.BytesIO()
    with _drawing:
        # Without this the file would name the version of matplotlib that wrote it.
        make_figure(plot).savefig(buffer, format="png", metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, buffer.getvalue())
    return path


def smoothed(values: Sequence[float], width: int) -> np.ndarray:
    """Centred Gaussian mean over ±`width` points (two standard deviations); it does not lag.

    The start, where learning curves fall fastest, continues point-symmetrically to the left: the
    first value stays what it was. The end is mirrored. [N] in, [N] out; NaN stays NaN.
    """
    y_N = np.asarray(values, float)
    known_N = np.isfinite(y_N)
    width = min(width, len(y_N) - 1)
    if width <= 0 or not known_N.any():
        return y_N
    index_N = np.arange(len(y_N))
    filled_N = np.interp(index_N, index_N[known_N], y_N[known_N])
    before, after = 2 * filled_N[0] - filled_N[width:0:-1], filled_N[-2 : -width - 2 : -1]
    kernel = np.exp(-2 * (np.arange(-width, width + 1) / width) ** 2)
    total_N = np.convolve(np.concatenate([before, filled_N, after]), kernel, "valid")
    return np.where(known_N, total_N / kernel.sum(), np.nan)


def replace_file(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def check_plot(plot: Plot) -> None:
    """Raises ValueError for what no data can excuse: names, styles, scales, unequal lengths."""
    where = f"plot {plot.name!r}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", plot.name):
        raise ValueError(f"{where}: a name has letters, digits, '_', '-' and '.' only")
    no_limits = (None, None)
    for scale, limits in (
        (plot.xscale, plot.xlim),
        (plot.yscale, plot.ylim),
        (plot.values_scale, no_limits),
    ):
        if scale not in SCALES:
            raise ValueError(f"{where}: scale {scale!r} is none of {', '.join(SCALES)}")
        if scale == "log" and any(v is not None and v <= 0 for v in limits):
            raise ValueError(
                f"{where}: limits {limits} of a logarithmic axis; they must be positive"
            )
    for s in plot.series:
        if s.style not in STYLES:
            raise ValueError(f"{where}: style {s.style!r} is none of {', '.join(STYLES)}")
        for column in (s.y, s.low, s.high, s.values, s.texts):
            if column is not None and len(column) != len(s.x):
                wrong = f"x has {len(s.x)} values, another column {len(column)}"
                raise ValueError(f"{where}, series {s.label!r}: {wrong}")


def make_figure(plot: Plot) -> Any:
    """Draws a plot; returns a `matplotlib.figure.Figure` that belongs to no global state."""
    check_plot(plot)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shared = _shared_values(figure, axes, plot)
    words = list(dict.fromkeys(x for s in plot.series for x in s.x if isinstance(x, str)))
    points = [_points(s, plot, words) for s in plot.series]
    if any(np.isfinite(y).any() for _, y, _, _ in points):
        axes.set_xscale(plot.xscale)
        axes.set_yscale(plot.yscale)
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color=GREY)
        axes.tick_params(labelcolor="none")
    if all(s.style in ("line", "dashed", "thin") for s in plot.series):
        axes.margins(x=0.01)
    names = [_draw(axes, plot, i, *points[i], shared) for i in range(len(points))]
    reference = {"color": GREY, "linewidth": 1.1, "linestyle": (0, (4, 3)), "zorder": 1.5}
    for mark in (m for m in plot.hlines if _drawable(m.value, plot.yscale)):
        line = axes.axhline(mark.value, **reference)
        names.append(_Name(mark.label, GREY, line, math.inf, mark.value))
    for mark in (m for m in plot.vlines if _drawable(m.value, plot.xscale)):
        axes.axvline(mark.value, **reference)
        _note(axes, mark.label, (mark.value, 1), ("data", "axes fraction"), (4, -2), va="top")
    axes.set_xlim(*plot.xlim)
    axes.set_ylim(*plot.ylim)
    _dress(axes, plot, words)
    _write_names(figure, axes, [name for name in names if name.text])
    return figure


@dataclass(frozen=True)
class _Name:
    """The name of a drawn series whose last point is (x, y); bars and points have none (None)."""

    text: str
    color: Any
    artist: Any
    x: float | None = None
    y: float | None = None


def _points(s: Series, plot: Plot, words: list[str]) -> list[np.ndarray]:
    """x, y, low, high of what was measured; NaN where a value cannot be drawn on its axis."""
    keep = [j for j, y in enumerate(s.y) if y is not None]
    columns = []
    for column, scale in ((s.x, plot.xscale), *((c, plot.yscale) for c in (s.y, s.low, s.high))):
        column = [math.nan] * len(s.x) if column is None else column
        v = [words.index(column[j]) if isinstance(column[j], str) else column[j] for j in keep]
        v = np.array(v, float)
        columns.append(np.where(_drawable(v, scale), v, np.nan))
    return columns


def _shared_values(figure: Any, axes: Any, plot: Plot) -> dict[str, Any]:
    """Colour map and scale of what is shown by colour, and their bar; {} where nothing is."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, LogNorm, Normalize

    values = np.concatenate([[], *(s.values for s in plot.series if s.values is not None)])
    values = values[np.isfinite(values)]
    if plot.contours is not None:
        levels = list(plot.contours.levels)
        shared = {"cmap": colormaps["viridis_r"], "norm": BoundaryNorm(levels, 256)}
    elif len(values):
        low, high = values.min(), values.max()
        norm = LogNorm(low, high) if plot.values_scale == "log" else Normalize(low, high)
        shared = {"cmap": colormaps["viridis"], "norm": norm}
    else:
        return {}
    bar = figure.colorbar(ScalarMappable(**shared), ax=axes, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label(plot.values_label, color=INK, fontsize=FONT, parse_math=False)
    low, high = bar.vmin, bar.vmax
    if plot.contours is not None:
        ticks = levels[:: math.ceil(len(levels) / 8)]
    else:
        ticks = _ticks(low, high, plot.values_scale == "log")
    one_by_one = [_tick_labels([t])[0] for t in ticks]
    bar.set_ticks(ticks, labels=one_by_one if plot.values_scale == "log" else _tick_labels(ticks))
    bar.minorticks_off()
    bar.ax.tick_params(length=0, labelsize=FONT - 1)
    if plot.contours is not None:
        c = plot.contours
        axes.contourf(c.x, c.y, c.z_YxX, levels=levels, extend="neither", alpha=0.85, **shared)
        axes.contour(c.x, c.y, c.z_YxX, levels=levels, colors="white", linewidths=0.6)
    return shared


def _drawable(v: Any, scale: str) -> Any:
    # Beyond these limits the arithmetic of axes overflows.
    return (np.abs(v) < 1e100) & ((scale == "linear") | (np.asarray(v) > 1e-100))


def _draw(
    axes: Any, plot: Plot, i: int, x: Any, y: Any, low: Any, high: Any, shared: dict[str, Any]
) -> _Name:
    """Draws series `i` of those of a plot."""
    series = plot.series
    s, color = series[i], series[i].color or _color(i, len(series))
    if s.values is not None and len(s.values) and s.style != "points":
        color = shared["cmap"](shared["norm"](s.values[0]))
    banded = s.low is not None and s.high is not None
    if banded and s.style != "points":
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    if s.style == "bars":
        beside = [j for j, other in enumerate(series) if other.style == "bars"]
        width = 0.8 * min(np.diff(np.unique(x)), default=1.0) / len(beside)
        x = x + (beside.index(i) - (len(beside) - 1) / 2) * width
        bars = axes.bar(x, y, 0.94 * width, color=color)
        if len(beside) * len(x) <= 12:
            values = [f"{v:,.3g}" if abs(v) < 1000 else f"{round(v):,}" for v in y.tolist()]
            axes.bar_label(bars, values, padding=2, fontsize=FONT - 2, color=GREY)
        return _Name(s.label, color, bars)
    for at, text in zip(zip(x, y, strict=True), s.texts or (), strict=False):
        if text and np.isfinite(at).all():
            _note(axes, text, at, "data", (5, 3), fontsize=FONT - 2)
    if s.style == "points":
        return _Name(s.label, color, _points_artist(axes, s, color, x, y, low, high, shared))
    form = {"color": color, "linestyle": (0, (5, 2)) if s.style == "dashed" else "-"}
    if s.smooth:
        axes.plot(*_thinned(x, y), **form, linewidth=0.7, alpha=0.3, zorder=1.8)
        y = smoothed(y, s.smooth)
    # A short curve shows where it was measured, and a single value can be seen at all.
    marker = "o" if len(x) <= 20 and s.style == "line" else ""
    width = 0.9 if s.style == "thin" else 1.8
    (line,) = axes.plot(*_thinned(x, y), **form, linewidth=width, marker=marker, markersize=3.5)
    last = np.flatnonzero(np.isfinite(x + y))[-1:]
    return _Name(s.label, color, line, *x[last].tolist(), *y[last].tolist())


def _points_artist(
    axes: Any, s: Series, color: Any, x: Any, y: Any, low: Any, high: Any, shared: dict[str, Any]
) -> Any:
    if s.low is not None and s.high is not None:
        axes.vlines(x, low, high, color=color, linewidth=1.1, alpha=0.6)
    if s.values is not None:
        keep = [j for j, v in enumerate(s.y) if v is not None]
        form = {"s": 26, "linewidths": 0.5, "edgecolors": "white", "zorder": 2.5}
        return axes.scatter(x, y, c=np.asarray(s.values, float)[keep], **form, **shared)
    size, alpha = (4.5, 0.8) if len(x) <= 500 else (2.5, 0.35)  # a cloud shows its density
    form = {"markersize": size, "alpha": alpha, "markeredgewidth": 0}
    return axes.plot(x, y, "o", color=color, **form)[0]


def _thinned(x: np.ndarray, y: np.ndarray, most: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest point of every stretch: more than a picture has columns for."""
    if len(y) <= most:
        return x, y
    pick = []
    for stretch in np.array_split(np.arange(len(y)), most // 2):
        low, high = np.nan_to_num(y[stretch], nan=np.inf), np.nan_to_num(y[stretch], nan=-np.inf)
        pick += [stretch[np.argmin(low)], stretch[np.argmax(high)]]
    pick = np.unique(pick)
    return x[pick], y[pick]


def _color(i: int, n: int) -> Any:
    return PALETTE[i] if n <= len(PALETTE) else sweep_colors(n)[i]


def sweep_colors(n: int) -> list[str]:
    """n colours that show an order, from dark to light."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.92 * i / max(n - 1, 1))) for i in range(n)]


def _note(axes: Any, text: str, xy: tuple, coords: Any, offset: tuple, **style: Any) -> None:
    """Text at `offset` points from `xy`; a dollar sign in it is a dollar sign."""
    style = {"color": GREY, "fontsize": FONT - 1, "annotation_clip": False} | style
    axes.annotate(text, xy, offset, coords, "offset points", parse_math=False, **style)


def _dress(axes: Any, plot: Plot, words: list[str]) -> None:
    """Titles, ticks, grid: after the data and the limits are in place."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    if plot.xscale == "log" or any(s.style == "points" for s in plot.series):
        axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.tick_params(which="both", length=0, labelsize=FONT - 1)
    for axis in (axes.xaxis, axes.yaxis):
        logarithmic = axis.get_scale() == "log"
        ticks = _ticks(*sorted(axis.get_view_interval()), logarithmic)
        one_by_one = [_tick_labels([t])[0] for t in ticks]
        axis.set_ticks(ticks, labels=one_by_one if logarithmic else _tick_labels(ticks))
        axis.set_ticks([], minor=True)
    if words:
        crowded = len(words) * max(map(len, words)) > 90  # letters that fit side by side
        turn = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axes.set_xticks(range(len(words)), words, parse_math=False, **turn)
        axes.set_xlim(-0.6, len(words) - 0.4)
    axes.set_xlabel(plot.xlabel, color=INK, fontsize=FONT, parse_math=False)
    axes.set_ylabel(plot.ylabel, color=INK, fontsize=FONT, parse_math=False)
    bold = {"color": INK, "fontsize": FONT + 2, "fontweight": "bold"}
    _note(axes, plot.title, (0, 1), "axes fraction", (0, 24 if plot.annotation else 8), **bold)
    _note(axes, plot.annotation, (0, 1), "axes fraction", (0, 8))


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round values within [low, high]; on a logarithmic axis powers of 10, 2 and 5 times them."""
    from matplotlib.ticker import MaxNLocator

    decades = math.log10(high / low) if logarithmic else 0
    if decades < 0.8:
        ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    else:
        factors = (1, 2, 5) if decades < 2.5 else (1,)
        every = math.ceil(decades / 8)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [f * 10.0**p for p in powers if p % every == 0 for f in factors]
    slack = 1e-9 * (high - low)
    return [float(t) for t in ticks if low - slack <= t <= high + slack]


def _tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels of one unit and as many decimals as it takes: 0, 20k, 40k."""
    largest = max(map(abs, ticks), default=0.0)
    if largest >= 1e15 or largest < 1e-3:
        return [f"{t:.3g}".replace("e+", "e").replace("e-0", "e-") for t in ticks]
    units = ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k"), (0, 1, ""))
    unit, name = next((unit, name) for start, unit, name in units if largest >= start)
    scaled = [t / unit for t in ticks]
    slack = 1e-9 * largest / unit
    precise = (d for d in range(6) if all(abs(s - round(s, d)) < slack for s in scaled))
    digits = next(precise, 6)
    return [f"{s:,.{digits}f}{name}" if s else "0" for s in scaled]


def _write_names(figure: Any, axes: Any, names: list[_Name]) -> None:
    """Names beside the right ends of the lines where every line gets there, else a legend."""
    if len(names) < 2:
        return  # a single series is named by the title and the axes
    right = axes.get_xlim()[1]
    to_axes = (axes.transScale + axes.transLimits).transform
    ends = [to_axes((min(v.x, right), v.y))[0] for v in names if v.x is not None]
    if (
        len(figure.axes) > 1
        or len(ends) < len(names)
        or len(names) > MAX_DIRECT_LABELS
        or min(ends) < 0.95
    ):
        place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0}
        if len(figure.axes) > 1:  # the right is taken by a colour bar
            place = {"loc": "best", "framealpha": 0.8, "edgecolor": "none"}
        else:
            place["frameon"] = False
        artists, texts = [v.artist for v in names], [v.text for v in names]
        legend = axes.legend(artists, texts, fontsize=FONT - 1, **place)
        for text in legend.get_texts():
            text.set_parse_math(False)
        for handle in legend.legend_handles:
            if getattr(handle, "get_marker", lambda: "None")() == "o":
                handle.set(markersize=5, alpha=1.0)  # the dots of a cloud are small and faint
        return
    figure.draw_without_rendering()  # lays the axes out: the names' distances are in points
    names = sorted(names, key=lambda v: v.y)
    height = axes.get_window_extent().height * 72 / DPI
    y = [height * min(max(to_axes((right, v.y))[1], 0), 1) for v in names]
    for v, at in zip(names, _spread(y, gap=1.25 * FONT, floor=0.5 * FONT), strict=True):
        _note(axes, v.text, (1, 0), "axes fraction", (6, at), color=v.color, va="center")


def _spread(y: Sequence[float], gap: float, floor: float) -> list[float]:
    """Positions at least `gap` apart and above `floor`, as near to ascending `y` as can be."""
    groups: list[list[float]] = []  # after subtracting i * gap: isotonic regression, by pooling
    for i, value in enumerate(y):
        groups.append([value - i * gap])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    flat = [float(np.mean(group)) for group in groups for _ in group]
    return [max(value, floor) + i * gap for i, value in enumerate(flat)]
