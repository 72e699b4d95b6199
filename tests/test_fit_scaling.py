"""The binary `experiments.fit_scaling`: the flags, the files, one-line errors."""

import json

import numpy as np
import pytest
from runs import run_binary

COLUMNS = "--columns=N:Model Size,C:Training FLOP,loss:loss"


def write(path, sizes=(1e8, 2e8, 4e8, 8e8), budgets=(1e19, 3e19, 1e20), sets=("a",)):
    lines = ["Model Size,Training FLOP,loss,set"]
    for name in sets:
        for c in budgets:
            for n in sizes:
                loss = 1.8 + 400 * n**-0.34 + 1000 * (c / 6 / n) ** -0.33 + 0.1 * (name == "b")
                lines.append(f"{n},{c},{loss},{name}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_command_of_the_manual(tmp_path):
    """A table with headers of its own, rows selected: the law that made them comes back."""
    table = write(tmp_path / "runs.csv", sets=("a", "b"))
    done = run_binary(
        "fit_scaling", f"--input={table}", COLUMNS, "--law=chinchilla3", "--where=set=a",
        "--bootstrap=40", "--seed=0", "--huber_delta=1e-3", f"--output={tmp_path / 'out'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert set(found) == {"chinchilla3"}
    params = found["chinchilla3"]["params"]
    for name, value in {"E": 1.8, "A": 400, "B": 1000, "alpha": 0.34, "beta": 0.33}.items():
        assert params[name] == pytest.approx(value, rel=1e-4)
    assert found["chinchilla3"]["n_rows"] == 12 and found["chinchilla3"]["converged"] is True
    assert found["chinchilla3"]["objective"] < 1e-12
    assert "chinchilla3" in done.stdout and "alpha    0.34" in done.stdout
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"--input={table} '{COLUMNS}' --law=chinchilla3 --where=set=a" in report


def test_a_sweep_folder_and_all_laws(tmp_path):
    """Default columns; what the table does not support is named on stdout and not in fit.json."""
    lines = ["run,status,N,D,C,budget,loss,seed"]
    for i, c in enumerate((1e15, 4e15, 1.6e16, 6.4e16)):
        best = 0.1 * c**0.5
        for x in np.geomspace(1 / 4, 4, 5):
            n, loss = best * x, 2 + 3 * 4.0 ** (-0.1 * i) + 0.1 * np.log(x) ** 2
            lines.append(f"r{i}_{x:.2f},finished,{n},{c / 6 / n},{c},{c},{loss},0")
    lines.append("r9,failed,1e6,1e9,6e15,,,0")
    (tmp_path / "runs.csv").write_text("\n".join(lines) + "\n")
    done = run_binary(
        "fit_scaling", f"--input={tmp_path}", "--law=all", "--bootstrap=20", "--at=1e18",
        f"--output={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "fit.json").read_text())
    assert "data_constrained" not in found and "data_constrained: skipped: " in done.stdout
    law = found["chinchilla2"]
    assert law["params"]["a"] == pytest.approx(0.5, abs=1e-6) and law["at"] == 1e18
    assert law["details"]["optimum"]["N*"] == pytest.approx(1e8, rel=1e-4)
    assert "warning: failed runs: 1 of 21 rows" in done.stdout
    assert any("failed runs" in w for w in law["warnings"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--input is needed"),
        (["--input=nothing.csv", "--output=x"], "--input=nothing.csv: no such file"),
        (["--input={table}", COLUMNS], "--output is needed"),
        (["{table}", "--output=x"], "not a flag; write --input="),
        (["--input={table}", "--output={out}"], "must name two of N"),
        (["--input={table}", COLUMNS, "--output={out}", "--law=chinchila3"], "--law=chinchila3"),
        (["--input={table}", COLUMNS, "--output={out}", "--where=set=z"], "no row has it"),
        (["--input={table}", COLUMNS, "--output={out}", "--level=90"], "--level=90"),
        (["--input={table}", COLUMNS, "--output={out}", "--huber_delta=0"], "--huber_delta=0"),
        (["--input={table}", COLUMNS, "--output={out}", "--holdout=x"], "--holdout=x"),
        (["--input={table}", COLUMNS, "--output={out}", "--law=data_constrained"],
         "data_constrained needs"),
        (["--input={one}", COLUMNS, "--output={out}", "--law=chinchilla3"], "one budget"),
        (["--input={one}", COLUMNS, "--output={out}", "--law=chinchilla2"], "2 budgets"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_one_line_errors(tmp_path, args, words):
    """Nothing is written, and the message says which flag to change."""
    paths = {
        "table": write(tmp_path / "runs.csv"),
        "one": write(tmp_path / "one.csv", sizes=np.geomspace(1e8, 1e9, 7), budgets=(1e19,)),
        "out": tmp_path / "out",
    }
    done = run_binary("fit_scaling", *(a.format(**paths) for a in args))
    assert done.returncode == 1 and words in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
