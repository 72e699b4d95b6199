"""experiments.transfer as a process."""

import json

import pytest
from runs import flags_of, run_binary

ARGS = ["--config=configs/transfer_tiny.py", "--widths=64,128", "--points=3"]


def outcome(parametrization, width, rate, loss):
    values = {"parametrization": parametrization, "width": width, "learning_rate": rate}
    return json.dumps(values | {"seed": 0, "loss": loss, "parameters": width**2}) + "\n"


@pytest.fixture
def workdir(tmp_path):
    """The folder of an experiment whose runs are all known: the standard way's optimum moves."""
    lines = []
    for rate, mup, standard in [(4e-3, 2.1, 2.0), (8e-3, 2.0, 2.2), (1.6e-2, 2.2, 2.5)]:
        lines += [outcome("mup", width, rate, mup) for width in (64, 128)]
        lines += [outcome("standard", 64, rate, mup), outcome("standard", 128, rate, standard)]
    lines.append(outcome("standard", 128, 2e-3, 2.1))
    (tmp_path / "outcomes.jsonl").write_text("".join(lines))
    return tmp_path


def test_goes_on_from_known_runs_and_reports(workdir, corpus):
    done = run_binary("transfer", *ARGS, f"--workdir={workdir}", f"--input={corpus}")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "best learning rate" in line]
    moved = [float(line.split("narrowest ")[1].split()[0]) for line in rows]
    # Parabolas through the three best: muP stands still, the other goes down by a factor of 2.
    assert moved == pytest.approx([1, 1, 1, 0.5], rel=0.2) and moved[3] < 0.6
    assert json.loads((workdir / "results.json").read_text())["kind"] == "transfer"
    assert "plots/transfer_mup.png" in (workdir / "report.md").read_text()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--widths=64"], "--widths=64: expected two or more"),
        (["--widths=64,wide"], "--widths=64,wide: expected two or more"),
        (["--widths=64,100"], "width 100 is not divisible"),
        (["--parametrizations=mup,sp"], "'sp' is none of mup, standard"),
        (flags_of({"data.eval_fraction": 0.0}), "set --config.data.eval_fraction above 0"),
    ],
)
def test_user_errors_are_one_line(args, words, tmp_path, corpus):
    done = run_binary("transfer", *ARGS, f"--workdir={tmp_path}", f"--input={corpus}", *args)
    assert done.returncode == 1
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "results.json").exists()
