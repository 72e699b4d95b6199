"""Reading runs from a file: what is read, what is refused in one line, what is warned of."""

import numpy as np
import pytest

from llm_jax.scaling import runs

ROWS = [
    "size,tokens,final loss,set",
    "1e8,2e9,3.1,a",
    "2e8,4e9,2.9,a",
    "4e8,8e9,2.7,b",
    "8e8,1.6e10,2.5,b",
    "1.6e9,3.2e10,2.4,b",
]
COLUMNS = "N:size,D:tokens,loss:final loss"


def write(tmp_path, lines, name="runs.csv"):
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def changed(number, old, new):
    """ROWS with one cell of line `number` (from 1) changed."""
    lines = list(ROWS)
    assert old in lines[number - 1]
    lines[number - 1] = lines[number - 1].replace(old, new)
    return lines


def test_two_of_three_suffice(tmp_path):
    """6 N D = C whichever is left out; a table with all three keeps its own C."""
    want, _ = runs.read(write(tmp_path, ROWS), COLUMNS)
    np.testing.assert_allclose(want.c, 6 * want.n * want.d, rtol=1e-15)
    np.testing.assert_array_equal(want.n, [1e8, 2e8, 4e8, 8e8, 1.6e9])
    lines = ["N,D,C,loss"] + [
        f"{n!r},{d!r},{c!r},{y!r}"
        for n, d, c, y in zip(*map(np.ndarray.tolist, (want.n, want.d, want.c, want.loss)))
    ]
    path = write(tmp_path, lines, "three.csv")
    for columns in ("N,C,loss", "D,C,loss", "N,D,loss", None):
        got, source = runs.read(path, columns)
        for name in ("n", "d", "c", "loss"):
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-14)
        assert source.warnings == []
    got, _ = runs.read(path, "N,C,loss", flops_factor=8.0)
    np.testing.assert_allclose(got.d, want.c / (8 * want.n), rtol=1e-14)


def test_own_flops_are_kept_and_named(tmp_path):
    lines = ["N,D,C,loss"] + [f"{n},1e9,{7.2e9 * n},{3 - n / 1e9}" for n in (1e8, 2e8, 3e8, 4e8)]
    got, source = runs.read(write(tmp_path, lines))
    np.testing.assert_allclose(got.c, 7.2e9 * got.n)
    assert len(source.warnings) == 1 and "C/(N D) is 7.2, not 6" in source.warnings[0]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_any_delimiter_quotes_and_a_byte_order_mark(tmp_path, delimiter):
    lines = [delimiter.join(f'"{cell}"' for cell in line.split(",")) for line in ROWS]
    lines[0] = lines[0].replace("size", f"size{delimiter} in all")
    path = tmp_path / "runs.csv"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n")
    got, source = runs.read(path, f"N:size{delimiter} in all,D:tokens,loss:final loss")
    assert len(got) == 5 and got.n[0] == 1e8
    assert source.columns["N"] == f"size{delimiter} in all"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("N:Model Size,C:Training FLOP,loss:loss",
         {"N": "Model Size", "C": "Training FLOP", "loss": "loss"}),
        ("N, D, loss", {"N": "N", "D": "D", "loss": "loss"}),
        ("n:a:b,Loss:x, y,U_D:u", {"N": "a:b", "loss": "x, y", "unique": "u"}),
        ("unique:u,run:name,budget:b", {"unique": "u", "curve": "name", "budget": "b"}),
    ],
)  # fmt: skip
def test_columns_flag(text, want):
    assert runs.parse_columns(text) == want


@pytest.mark.parametrize(
    ("where", "losses"),
    [
        (["set=a"], [3.1, 2.9]),
        (["set!=a"], [2.7, 2.5, 2.4]),
        (["size=100000000"], [3.1]),  # as text "1e8" is no 100000000
        (["size>=4e8,tokens<2e10"], [2.7, 2.5]),
        (["size>=4e8", "tokens<2e10"], [2.7, 2.5]),
        (["size>1e9"], [2.4]),  # as text "8e8" > "1e9"
        (["final loss<=2.5"], [2.5, 2.4]),
    ],
)
def test_where_selects_rows(tmp_path, monkeypatch, where, losses):
    monkeypatch.setattr(runs, "FEWEST_ROWS", 1)
    got, _ = runs.read(write(tmp_path, ROWS), COLUMNS, where)
    np.testing.assert_array_equal(got.loss, losses)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("sets=a", "no column 'sets'; did you mean 'set'?"),
        ("set=c", "no row has it; 'set' is 'a', 'b'"),
        ("set", "not a condition such as"),
        ("size>big", "'big' is not a number"),
        ("set=a,size>1e9", "none of 5 rows meets all"),
        ("set=a", "2 usable rows; a law needs at least 4"),
    ],
)
def test_where_errors(tmp_path, where, words):
    with pytest.raises(ValueError) as error:
        runs.read(write(tmp_path, ROWS), COLUMNS, [where])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lines", "columns", "words"),
    [
        (ROWS, "N:sizes,D:tokens,loss:final loss", "no column 'sizes'; did you mean 'size'?"),
        (ROWS, "N:Size,D:tokens,loss:final loss", "did you mean 'size'?"),
        (ROWS, "N:size,loss:final loss", "two of N (parameters), D (tokens), C (FLOPs)"),
        (ROWS, "N:size,D:tokens", "must name the loss"),
        (ROWS, None, "must name the loss"),
        (ROWS, "params:size,D:tokens,loss:final loss", "'params' is no role"),
        (ROWS, "N:size,N:tokens,loss:final loss", "two columns for 'N'"),
        (ROWS, "N:set,D:tokens,loss:final loss", "line 2, column 'set': 'a' is not a plain number"),
        (changed(3, "2e8", "200M"), COLUMNS, "line 3, column 'size': '200M' is not a plain"),
        (changed(3, "2e8", '"200,000,000"'), COLUMNS, "'200,000,000' is not a plain number"),
        (changed(3, "2e8", "200_000_000"), COLUMNS, "'200_000_000' is not a plain number"),
        (changed(3, "2e8", "-2e8"), COLUMNS, "line 3, column 'size': '-2e8'; every value must be"),
        (changed(3, "2e8", "nan"), COLUMNS, "line 3, column 'size': 'nan'"),
        (changed(4, "8e9", "0"), COLUMNS, "line 4, column 'tokens': '0'"),
        (changed(2, "3.1", "-3.1"), COLUMNS, "line 2, column 'final loss': '-3.1'"),
        (changed(2, "3.1", "0"), COLUMNS, "line 2, column 'final loss': '0'"),
        (changed(5, ",b", ",b,c"), COLUMNS, "line 5: 5 cells, but the header has 4"),
        (changed(5, ",b", ""), COLUMNS, "line 5: 3 cells, but the header has 4"),
        (changed(1, "set", "size"), COLUMNS, "two columns are named 'size'"),
        (ROWS[1:], COLUMNS, "no column 'size'"),
        (["1,2,3", "4,5,6"], COLUMNS, "the first line has numbers only"),
        (ROWS[:1], COLUMNS, "a header and no rows"),
        (ROWS[:4], COLUMNS, "3 usable rows; a law needs at least 4"),
        ([""], COLUMNS, "the file is empty"),
        (['{"runs": [1, 2]}'], COLUMNS, "a header and no rows"),
        (changed(3, "a", '"a'), COLUMNS, "not a CSV file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(tmp_path, lines, columns, words):
    with pytest.raises(ValueError) as error:
        runs.read(write(tmp_path, lines), columns)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--input=.*nothing\.csv: no such file"):
        runs.read(tmp_path / "nothing.csv", COLUMNS)
    with pytest.raises(FileNotFoundError, match=r"a folder without runs\.csv"):
        runs.read(tmp_path, COLUMNS)
    for content in (b"\x89PNG\xff\xfe\x00", b"a,b\x00c\n1,2\n"):
        (tmp_path / "x.csv").write_bytes(content)
        with pytest.raises(ValueError, match="not a CSV file"):
            runs.read(tmp_path / "x.csv", COLUMNS)


@pytest.mark.parametrize("cell", ["nan", "", "inf", "NaN", "n/a"])
def test_a_run_without_a_loss_is_left_out_aloud(tmp_path, cell):
    got, source = runs.read(write(tmp_path, changed(3, "2.9", cell)), COLUMNS)
    np.testing.assert_array_equal(got.loss, [3.1, 2.7, 2.5, 2.4])
    assert source.warnings == [
        "no loss: 1 of 5 rows have no finite 'final loss' and are left out (the first in line 3)"
    ]
    assert (source.n_read, source.n_rows) == (5, 4)


def test_duplicates(tmp_path):
    """A row that repeats another in every column counts once; equal N, D, loss alone is a doubt."""
    got, source = runs.read(write(tmp_path, [*ROWS, ROWS[2], ROWS[2]]), COLUMNS)
    assert len(got) == 5
    assert source.warnings[0].startswith("duplicate rows: 2 of 7 rows repeat another in every")
    got, source = runs.read(write(tmp_path, [*ROWS, ROWS[2][:-1] + "z"]), COLUMNS)
    assert len(got) == 6 and source.warnings[0].startswith("duplicate rows: 1 rows equal another")


def test_failed_runs_of_a_sweep(tmp_path):
    """The header of our own sweeps: roles by name, other statuses out, numbers kept in `other`."""
    lines = ["run,status,N,D,C,budget,loss,learning_rate,error"]
    for i in range(1, 7):
        status, loss = ("failed", "") if i == 2 else ("finished", f"{4 - i / 10}")
        lines.append(f"r{i},{status},{i}e6,{6 / i}e7,3.6e14,3.6e14,{loss},1e-3,{status}")
    (tmp_path / "sweep").mkdir()
    write(tmp_path / "sweep", lines)
    got, source = runs.read(tmp_path / "sweep")
    assert len(got) == 5 and got.curve is None and set(got.budget) == {0}
    assert [w.split(":")[0] for w in source.warnings] == ["failed runs", "one budget only"]
    assert "1 of 6" in source.warnings[0]
    np.testing.assert_array_equal(got.other["learning_rate"], 5 * [1e-3])


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (["N,D,loss"] + [f"{n},1e9,{30 + n / 1e9}" for n in (1e8, 2e8, 3e8, 4e8)], "loss"),
        (["N,D,loss"] + [f"{n},1e9,{4 - n / 1e3}" for n in (100, 200, 300, 400)], "N"),
        (["N,D,loss"] + [f"{n},20,{4 - n / 1e9}" for n in (1e8, 2e8, 3e8, 4e8)], "D"),
        (["N,D,loss"] + [f"1e8,{d},{4 - d / 1e10}" for d in (1e9, 2e9, 3e9, 4e9)],
         "one model size"),
        (["N,C,loss"] + [f"{n},1e18,{4 - n / 1e9}" for n in (1e8, 2e8, 3e8, 4e8)],
         "one budget only"),
    ],
)  # fmt: skip
def test_what_looks_odd_is_named(tmp_path, lines, name):
    _, source = runs.read(write(tmp_path, lines))
    assert [w.split(":")[0] for w in source.warnings] == [name]


def test_budgets_are_recognised():
    """Exact, blurred by rounding of the steps, with close neighbours, and where there are none."""
    rng = np.random.default_rng(0)
    budgets = np.array([6e18, 1e19, 3e19, 6e19, 1e20])  # neighbours a factor 1.67 apart
    c, want = np.repeat(budgets, 8), np.repeat(np.arange(5), 8)
    n = np.tile(np.geomspace(1e8, 1e9, 8), 5)
    order = rng.permutation(40)
    for blur in (0.0, 1e-12, 0.03, 0.08):
        blurred = c * np.exp(blur * rng.uniform(-1, 1, 40))
        np.testing.assert_array_equal(runs.find_budgets(blurred[order], n[order]), want[order])
    assert runs.find_budgets(np.geomspace(1e18, 1e21, 40), n) is None
    assert runs.find_budgets(10 ** rng.uniform(18, 21, 40), n) is None
    assert runs.find_budgets(c, np.ones(40)) is None, "points of equal FLOPs and size are seeds"
    np.testing.assert_array_equal(runs.find_budgets(c[:8], n[:8]), np.zeros(8))


def test_a_column_of_budgets_or_of_runs(tmp_path):
    lines = ["N,C,loss,group,name"]
    for group, c in (("large", 1e20), ("small", 1e18)):
        lines += [f"{n},{c},{4 - n / 1e9},{group},m{n}" for n in (1e8, 2e8, 3e8)]
    path = write(tmp_path, lines)
    got, _ = runs.read(path, "N,C,loss,budget:group,run:name")
    np.testing.assert_array_equal(got.budget, [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(got.curve, [0, 1, 2, 0, 1, 2])
    lines[2] = lines[2].replace("large", "")
    with pytest.raises(ValueError, match="line 3: no 'group'"):
        runs.read(write(tmp_path, lines), "N,C,loss,budget:group")
