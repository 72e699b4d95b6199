"""The report renderer: what stands in report.md, what the plots show, what is refused."""

import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llm_jax import plots, report
from llm_jax.report import Code, Contours, Mark, Plot, Series, Table, Text, write_report

BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def pixels(plot: Plot) -> np.ndarray:
    """[height, width, 3]: the picture of a plot."""
    picture = io.BytesIO()
    plots.make_figure(plot).savefig(picture, format="png")
    return np.asarray(Image.open(picture).convert("RGB")).astype(int)


def has_color(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """[height, width]: where the picture has that colour."""
    return np.abs(picture - np.array(color)).max(axis=-1) < 12


def test_report_holds_every_block_in_order_and_its_plots_exist(tmp_path):
    blocks = [
        Text("## Numbers"),
        Table([{"name": "a|b", "value": 12345678}, {"name": "loss", "value": 1.98765}]),
        Plot("loss", [Series("train", [1, 2], [3.0, 2.0])], title="Loss", caption="As expected."),
        Code("def f():\n\treturn 1", caption="Sample", language="python"),
    ]
    path = write_report(tmp_path / "run", "A run", blocks)
    assert path == tmp_path / "run" / "report.md"
    assert path.read_text("utf-8") == (
        "# A run\n\n## Numbers\n\n"
        "| name | value |\n| :--- | ---: |\n| a\\|b | 12,345,678 |\n| loss | 1.988 |\n\n"
        "![Loss](plots/loss.png)\n\nAs expected.\n\n"
        "**Sample**\n\n```python\ndef f():\n\treturn 1\n```\n"
    )
    assert Image.open(tmp_path / "run" / "plots" / "loss.png").size == (1140, 600)
    assert {p.name for p in (tmp_path / "run").rglob("*")} == {"report.md", "plots", "loss.png"}


def test_code_cannot_break_out_of_its_fence_and_control_characters_show():
    text = report._markdown(Code("```\n````\n\x00\x1b[31m\ud800"))
    assert text == "`````\n```\n````\n\\x00\\x1b[31m\ud800\n`````"


def test_a_lone_surrogate_does_not_lose_the_report(tmp_path):
    path = write_report(tmp_path, "t", [Code("a\ud800b")])
    assert "a\\ud800b" in path.read_text("utf-8")


def test_table_columns_are_the_union_of_the_keys_in_order_of_appearance():
    table = report._markdown(Table([{"b": 1}, {"a": None, "b": "x\ny"}]))
    assert table == "| b | a |\n| :--- | ---: |\n| 1 |  |\n| x y | – |"
    chosen = report._markdown(Table([{"b": 1, "a": 2}], columns=["a"]))
    assert chosen == "| a |\n| ---: |\n| 2 |"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (2000, "2,000"),
        (2000.4, "2,000"),
        (-1234567.8, "-1,234,568"),
        (1.87654, "1.877"),
        (0.98765, "0.9877"),
        (99.996, "100.00"),
        (0.00012345, "0.0001234"),
        (3e-5, "3.000e-05"),
        (3.2e16, "3.200e+16"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (True, "yes"),
        (None, "–"),
        (np.float32(0.5), "0.5000"),
        (np.int64(12345), "12,345"),
        ("adamw", "adamw"),
    ],
)
def test_numbers_have_sensible_digits(value, text):
    assert report.format_number(value) == text


@given(st.floats(-1e300, 1e300))
def test_a_printed_number_is_within_its_last_digit(value):
    printed = float(report.format_number(value).replace(",", ""))
    assert abs(printed - value) <= 5.01e-4 * abs(value)


def test_same_plot_same_bytes_also_from_many_threads(tmp_path):
    def plot(i):
        line = Series("line", range(50), np.sin(np.arange(50) + i), smooth=5)
        return Plot(f"p{i}", [line, Series("$x_1$", [0, 49], [i, 0])], title="A $5 plot")

    alone = [plots.save_plot(plot(i), tmp_path / f"a{i}.png").read_bytes() for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        paths = pool.map(lambda i: plots.save_plot(plot(i), tmp_path / f"b{i}.png"), range(4))
    assert [path.read_bytes() for path in paths] == alone
    assert len(set(alone)) == 4
    assert b"atplotlib" not in alone[0], "a PNG that names its writer changes with its version"


def test_smoothing_draws_the_values_faint_and_the_smooth_line_strong():
    noise = np.random.default_rng(0).choice([-1.0, 1.0], 2000)
    strong = {
        smooth: has_color(pixels(Plot("p", [Series("s", range(2000), noise, smooth=smooth)])), BLUE)
        for smooth in (0, 100)
    }
    assert strong[0].mean() > 0.3, "unsmoothed noise fills the axes"
    assert 0.001 < strong[100].mean() < 0.05, "smoothed, only the mean is strong"


def test_a_missing_value_is_bridged_and_a_nan_breaks_the_line():
    def columns(y):
        blue = has_color(pixels(Plot("p", [Series("s", range(30), y)])), BLUE).any(axis=0)
        return blue[np.flatnonzero(blue)[0] : np.flatnonzero(blue)[-1]]

    flat = [1.0] * 30
    assert columns(flat).all()
    assert columns(flat[:10] + [None] * 10 + flat[20:]).all()
    assert not columns(flat[:10] + [float("nan")] * 10 + flat[20:]).all()


def test_logarithmic_axis_makes_a_power_law_straight():
    x = np.logspace(0, 4, 200)
    series = [Series("s", x, x**-0.5)]
    blue = has_color(pixels(Plot("p", series, xscale="log", yscale="log")), BLUE)
    row, column = np.nonzero(blue)
    assert np.corrcoef(row, column)[0, 1] > 0.999
    row, column = np.nonzero(has_color(pixels(Plot("p", series)), BLUE))
    assert np.corrcoef(row, column)[0, 1] < 0.9


VIOLET, YELLOW = (0x44, 0x01, 0x54), (0xFD, 0xE7, 0x25)  # the ends of viridis


def test_values_are_shown_by_colour_on_one_scale():
    """A line takes the colour that its first value has in the scatter; the bar names the values."""
    dots = Series("", [1, 2], [1.0, 2.0], "points", values=[1e6, 1e9])
    thin = Series("", [1, 1.5], [2.0, 2.0], "thin", values=[1e9, 1e6])
    how = {"values_scale": "log", "values_label": "parameters"}
    figure = plots.make_figure(Plot("p", [dots, thin], **how))
    axes, bar = figure.axes
    scatter = axes.collections[0]
    assert [tuple(round(255 * v) for v in c[:3]) for c in scatter.to_rgba([1e6, 1e9])] == [
        VIOLET, YELLOW,
    ]  # fmt: skip
    assert [round(255 * v) for v in axes.lines[0].get_color()[:3]] == list(YELLOW)
    assert axes.lines[0].get_linewidth() < 1
    labels = [t.get_text() for t in bar.get_yticklabels()]
    assert "1M" in labels and "100M" in labels and bar.get_ylabel() == "parameters"


def test_contours_lie_under_the_series():
    x, y = np.linspace(1, 4, 30), np.linspace(1, 3, 20)
    z_YxX = y[:, None] + 0 * x
    field = Contours(x, y, z_YxX, [1.0, 1.5, 2.0, 2.5, 3.0])
    line = Series("s", [1, 4], [2, 2])
    picture = pixels(Plot("p", [line], contours=field, ylim=(1, 3)))
    blue = has_color(picture, BLUE)
    row = np.flatnonzero(blue.any(axis=1))
    assert blue[row].sum() > 800, "the line is not covered"
    above, below = (picture[int(row.mean()) + d, 400] for d in (-200, 200))
    assert above.sum() < below.sum() - 100, "what is low is light"


def test_points_have_bars_and_words():
    def drawn(**more):
        figure = plots.make_figure(Plot("p", [Series("s", [1, 2], [1.0, 2.0], "points", **more)]))
        return figure.axes[0]

    bars = drawn(low=[0.5, 1.5], high=[1.5, 2.5]).collections[0].get_segments()
    np.testing.assert_allclose(bars[1], [[2, 1.5], [2, 2.5]])
    words = [t.get_text() for t in drawn(texts=["first $1", ""]).texts]
    assert "first $1" in words and len([w for w in words if w]) == 1
    assert drawn(color="#123456").lines[0].get_color() == "#123456"


def test_lines_that_reach_the_right_edge_are_named_there_others_get_a_legend():
    def legend(*series, **more):
        return plots.make_figure(Plot("p", series, **more)).axes[0].get_legend()

    long, short = Series("a", [0, 10], [1, 2]), Series("b", [0, 5], [1, 3])
    assert legend(long, Series("b", [0, 10], [1, 2])) is None
    assert legend(long, hlines=[Mark(1.5, "reference")]) is None
    assert [t.get_text() for t in legend(long, short).get_texts()] == ["a", "b"]
    assert legend(*[Series(f"s{i}", [0, 1], [i, i]) for i in range(12)]) is not None


@given(st.lists(st.floats(0, 400), min_size=1, max_size=6).map(sorted))
def test_names_at_the_edge_keep_their_order_and_their_distance(y):
    spread = plots._spread(y, gap=12, floor=5)
    assert min(spread) >= 5
    assert all(b - a >= 12 - 1e-9 for a, b in pairwise(spread))
    if all(b - a >= 12 for a, b in pairwise(y)) and y[0] >= 5:
        assert spread == pytest.approx(y)


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0, 500, 1000], ["0", "500", "1,000"]),
        ([0, 5000, 10000], ["0", "5k", "10k"]),
        ([0, 2.5e5, 1e6], ["0", "0.25M", "1.00M"]),
        ([0, 2.5e9, 5e9], ["0", "2.5B", "5.0B"]),
        ([1e8], ["100M"]),
        ([1.5, 2.0, 2.5], ["1.5", "2.0", "2.5"]),
        ([0, 1e-4, 2e-4], ["0", "0.0001", "0.0002"]),
        ([0, 2e-5, 4e-5], ["0", "2e-5", "4e-5"]),
        ([1e18, 1e19], ["1e18", "1e19"]),
    ],
)
def test_ticks_share_a_unit(ticks, labels):
    assert plots._tick_labels(ticks) == labels


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", plots.SCALES)
@pytest.mark.parametrize(
    "y",
    [
        [],
        [2.0],
        [None, None],
        [float("nan")] * 3,
        [float("inf"), 1.0],
        [0.0, 0.0],
        [-1.0, 5.0],
        [1e300, 1e-300],
        [5.0, 5.0],
    ],
)
def test_no_data_is_too_odd_to_draw(y, scale, tmp_path):
    marks = [Mark(0.0, "zero"), Mark(float("nan"), "unknown")]
    plot = Plot("p", [Series("s", range(len(y)), y, smooth=2)], yscale=scale, hlines=marks)
    assert plots.save_plot(plot, tmp_path / "p.png").stat().st_size > 1000


def test_many_points_are_thinned_without_losing_the_extremes():
    y = np.zeros(100_000)
    y[[777, 98_765]] = 7.0, -7.0
    x, thin = plots._thinned(np.arange(100_000), y)
    assert len(thin) <= 4000
    assert (thin.max(), thin.min()) == (7.0, -7.0)
    assert (y[x] == thin).all() and (np.diff(x) > 0).all()


def test_smoothed_is_a_local_mean_that_does_not_lag():
    ramp = 3.0 - 0.01 * np.arange(100)
    np.testing.assert_allclose(plots.smoothed(ramp, 10)[:90], ramp[:90], rtol=1e-12)
    noise = np.random.default_rng(0).normal(0, 1, 4000)
    assert plots.smoothed(noise, 50)[100:-100].std() < 0.2
    broken = plots.smoothed([1.0, np.nan, 1.0, 1.0, np.nan], 2)
    np.testing.assert_array_equal(np.isnan(broken), [False, True, False, False, True])
    np.testing.assert_allclose(broken[[0, 2, 3]], 1.0)
    assert len(plots.smoothed([], 5)) == 0


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([Plot("a", []), Plot("a", [])], "two plots are named 'a'"),
        ([Plot("../a", [])], "plot '../a': a name has letters"),
        ([Plot("a", [], yscale="ln")], "scale 'ln' is none of linear, log"),
        ([Plot("a", [], yscale="log", ylim=(0, 1))], r"limits \(0, 1\) of a logarithmic axis"),
        ([Plot("a", [Series("s", [1], [1], style="dots")])], "style 'dots' is none of line"),
        ([Plot("a", [Series("s", [1, 2], [1])])], "series 's': x has 2 values, another column 1"),
        ([Plot("a", [Series("s", [1], [1], values=[])])], "x has 1 values, another column 0"),
        ([Plot("a", [], values_scale="ln")], "scale 'ln' is none of linear, log"),
    ],
)
def test_what_no_data_can_excuse_is_refused_before_anything_is_written(blocks, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "r", "t", blocks)
    assert not (tmp_path / "r").exists()


def test_a_block_of_another_kind_is_refused(tmp_path):
    with pytest.raises(TypeError, match="not str"):
        write_report(tmp_path, "t", ["just a string"])


def test_read_metrics_aligns_columns_and_tolerates_a_cut_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan"), "text": "a\u2028b"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join([*lines, '{"step": 3, "lo']), "utf-8")
    metrics = report.read_metrics(path)
    assert metrics["step"] == [1, 2]
    assert metrics["text"] == [None, "a\u2028b"]
    assert metrics["loss"][0] == 2.0 and np.isnan(metrics["loss"][1])
    path.write_text("", "utf-8")
    assert report.read_metrics(path) == {}


def test_read_metrics_lets_a_resumed_run_replace_what_it_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = [1, 2, 2, 3, 4, 5, 3, 4, 6]  # an extra line at step 2; resumed from the end of step 2
    path.write_text("".join(json.dumps({"step": s, "i": i}) + "\n" for i, s in enumerate(steps)))
    assert report.read_metrics(path) == {"step": [1, 2, 2, 3, 4, 6], "i": [0, 1, 2, 6, 7, 8]}


@pytest.mark.parametrize("line", ['{"step": 1,', "[1, 2]"])
def test_read_metrics_names_the_broken_line(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not"):
        report.read_metrics(path)


def test_import_is_light_and_drawing_touches_no_global_state(tmp_path):
    code = (
        "import sys, llm_jax, llm_jax.plots as p, llm_jax.report as r\n"
        "heavy = [m for m in ('jax', 'matplotlib') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "p.save_plot(r.Plot('p', [r.Series('s', [1, 2], [1, 2])]), sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "p.png")], check=True)
