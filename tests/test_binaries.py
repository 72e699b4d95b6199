"""Every binary answers --help at once, and user errors are one line that names what to change."""

import subprocess
import sys
import time

import pytest
from runs import ROOT, environment, run_binary

BINARIES = sorted(
    p.stem for p in (ROOT / "experiments").glob("*.py") if p.stem not in ("__init__", "cli")
)


@pytest.mark.parametrize("name", BINARIES)
def test_help_is_quick(name):
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", "--help"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert time.perf_counter() - begin < 2.0
    assert f"experiments.{name}" in done.stdout and "flags:" in done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("too short")
    (folder / "bad.txt").write_bytes(b"fine until here: \xff\xfe and on")
    (folder / "rows.jsonl").write_text('{"content": "a"}\n')
    (folder / "good.txt").write_text("some text that will do. " * 400)
    return folder


SMOKE = "--config=configs/smoke.py"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([SMOKE, "--config.modle.d_model=3"], ["no key 'modle'", "did you mean 'model'"]),
        (
            [SMOKE, "--config.model.d_modle=3"],
            ["--config.model has no key 'd_modle'", "did you mean 'd_model'"],
        ),
        (
            ["--config=configs/smok.py"],
            ["configs/smok.py: no such file", "did you mean configs/smoke.py"],
        ),
        ([SMOKE, "--inptu=x"], ["inptu", "input"]),
        ([SMOKE, "--input={files}/god.txt"], ["god.txt", "good.txt"]),
        ([SMOKE, "--input={files}/*.csv"], ["*.csv"]),
        ([SMOKE, "--input={files}/empty.txt"], ["empty.txt"]),
        ([SMOKE, "--input={files}/short.txt"], ["--config.length"]),
        ([SMOKE, "--input={files}/bad.txt"], ["bad.txt", "17"]),
        ([SMOKE, "--input={files}/rows.jsonl"], ["rows.jsonl", "content", "text"]),
        ([SMOKE, "--input={files}/good.txt", "--config.mesh.tensor=3"], ["mesh.tensor=3"]),
        (
            [SMOKE, "--input={files}/good.txt", "--config.model.attention=cudnn"],
            ["model.attention=cudnn", "backend is cpu"],
        ),
        (
            [SMOKE, "--input={files}/good.txt", "--config.model.attention=flash"],
            ["model.attention='flash'", "cudnn"],
        ),
        (
            [SMOKE, "--input={files}/good.txt", "--config.model.vocab_size=100"],
            ["model.vocab_size=100", "259"],
        ),
        (
            [
                SMOKE,
                "--input={files}/good.txt",
                "--config.optimizer.decay_rules=((r'^embed',True),)",
            ],
            ["optimizer.decay_rules"],
        ),
        ([SMOKE, "--input={files}/good.txt", "--config.steps=0"], ["steps=0"]),
        (
            [SMOKE, "--input={files}/good.txt", "--config.checkpoint.init_from={files}"],
            ["{files}", "no checkpoint"],
        ),
    ],
    ids=lambda v: (
        v[-1].split("/")[-1][:40] if isinstance(v, list) and v and v[-1].startswith("--") else ""
    ),
)
def test_one_line_errors(files, tmp_path, args, words):
    args = [a.format(files=files) for a in args]
    done = run_binary("pretrain", f"--workdir={tmp_path / 'run'}", *args)
    assert done.returncode == 1, done.stdout
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word.format(files=files) in lines[0], lines[0]


def test_missing_checkpoint(tmp_path):
    done = run_binary("generate", f"--checkpoint={tmp_path / 'none'}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no such folder" in done.stderr
