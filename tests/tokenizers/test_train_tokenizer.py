"""The binary: trains, saves, reports, and says in one line what is wrong."""

import json
import pathlib
import subprocess
import sys

import pytest

from llm_jax import tokenizers

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.train_tokenizer", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, prose):
    path = tmp_path_factory.mktemp("corpus") / "prose.txt"
    path.write_text(prose[:120_000], encoding="utf-8")
    return path


def test_trains_saves_and_compares(corpus, tmp_path):
    arguments = (f"--input={corpus}", "--vocab_size=700", "--special_tokens=<|user|>,<|end|>")
    done = run(*arguments, "--compare", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    tokenizer = tokenizers.load(tmp_path)
    expected = tokenizers.train(
        "sentencepiece_bpe",
        [corpus.read_text("utf-8")],
        vocab_size=700,
        special_tokens=["<|user|>", "<|end|>"],
    )
    assert tokenizer.fingerprint() == expected.fingerprint()
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["fingerprint"] == tokenizer.fingerprint()
    assert [row["kind"] for row in report["rows"]] == list(tokenizers.KINDS)
    written = (tmp_path / "report.md").read_text("utf-8")
    assert all(kind in written and kind in done.stdout for kind in tokenizers.KINDS)
    assert (tmp_path / "plots/bytes_per_token.png").stat().st_size > 0


def test_help_is_quick_and_loads_nothing_heavy():
    done = run("--help")
    assert "--[no]split_digits" in done.stdout
    code = "import sys, experiments.train_tokenizer; print('jax' in sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert loaded.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind=bpe"], "--kind=bpe is not a tokenizer"),
        (["--input=/no/such/file.txt"], "/no/such/file.txt"),
        (["--vocab_size=70000"], "--vocab_size="),
    ],
)
def test_a_user_error_is_one_line(corpus, tmp_path, arguments, message):
    done = run(f"--input={corpus}", f"--output={tmp_path}", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
