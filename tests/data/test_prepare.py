"""From a config to tokens: the split, the tokenizer's text, and reuse."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import data_worker as benchmark
from llm_jax import tokenizers
from llm_jax.config import DataConfig, SourceConfig, TokenizerConfig
from llm_jax.data import documents, shards
from llm_jax.data.prepare import prepare_corpus, prepare_in

ROOT = pathlib.Path(__file__).parents[2]
BYTE = TokenizerConfig(kind="byte")
TEXT = "".join(f"Line {i} of a text: café.\n" for i in range(400))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def text_of(tokenizer, tokens):
    return tokenizer.decode(tokens.take(np.arange(tokens.total)))


def test_train_and_held_out_text_are_the_whole(tmp_path, file):
    corpus = prepare_corpus(DataConfig(inputs=(file,)), BYTE, str(tmp_path / "run"))
    (train,) = corpus.train
    start = int(len(TEXT) * 0.9)
    assert text_of(corpus.tokenizer, train.tokens) == TEXT[:start]
    assert text_of(corpus.tokenizer, corpus.evaluation) == TEXT[start:]
    # The file ends in the held-out part, and only there.
    eos = corpus.tokenizer.eos_id
    assert (train.tokens.take(np.arange(train.tokens.total)) == eos).sum() == 0
    assert corpus.evaluation.take([corpus.evaluation.total - 1]) == [eos]


def test_as_nanogpt_splits_tinyshakespeare(tmp_path, data_dir):
    data = DataConfig(inputs=(f"{data_dir}/text/tinyshakespeare.txt",), add_eos=False)
    corpus = prepare_corpus(data, TokenizerConfig(kind="char"), str(tmp_path))
    # The counts that nanoGPT's data/shakespeare_char/prepare.py prints.
    assert corpus.train[0].tokens.total == 1_003_854
    assert corpus.evaluation.total == 111_540


def test_the_tokenizer_learns_from_the_training_part_only(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab" * 450 + "c" * 100)
    data = DataConfig(inputs=(str(path),), add_eos=False)
    corpus = prepare_corpus(data, TokenizerConfig(kind="char"), str(tmp_path / "run"))
    assert "c" not in text_of(corpus.tokenizer, corpus.evaluation)
    assert corpus.evaluation.manifest.unknown == 100


def count_reads(monkeypatch):
    calls, read = [], documents.read
    monkeypatch.setattr(documents, "read", lambda *a, **k: calls.append(a) or read(*a, **k))
    return calls


def test_a_second_run_reads_nothing(tmp_path, file, monkeypatch):
    config = TokenizerConfig(kind="char")
    data = DataConfig(inputs=(file,), add_eos=False)
    first = prepare_corpus(data, config, str(tmp_path / "run"))
    calls = count_reads(monkeypatch)
    second = prepare_corpus(data, config, str(tmp_path / "run"))
    follower = prepare_corpus(data, config, str(tmp_path / "run"), writer=False)
    assert calls == []
    for other in (second, follower):
        assert other.tokenizer.fingerprint() == first.tokenizer.fingerprint()
        assert other.evaluation.manifest.fingerprint() == first.evaluation.manifest.fingerprint()


@pytest.mark.parametrize("change", ["file", "fraction", "vocabulary"])
def test_whatever_changes_is_made_anew_and_said(tmp_path, file, change, caplog):
    config = TokenizerConfig(kind="char", vocab_size=40)
    data = DataConfig(inputs=(file,), add_eos=False)
    before = prepare_corpus(data, config, str(tmp_path / "run"))
    if change == "file":
        with open(file, "a") as f:
            f.write("more ~ text\n" * 50)
    elif change == "fraction":
        data.eval_fraction = 0.2
    else:
        config.vocab_size = 12
    after = prepare_corpus(data, config, str(tmp_path / "run"))
    assert "rebuilding the token shards" in caplog.text
    assert (
        after.train[0].tokens.manifest.fingerprint()
        != before.train[0].tokens.manifest.fingerprint()
    )
    with open(file) as f:
        characters = len(f.read())
    start = int(characters * (0.8 if change == "fraction" else 0.9))
    assert after.train[0].tokens.total == start


def test_runs_share_a_cache_without_fighting_over_it(tmp_path, file, caplog):
    cache = str(tmp_path / "cache")
    with_eos = DataConfig(inputs=(file,), cache_dir=cache)
    without = DataConfig(inputs=(file,), cache_dir=cache, add_eos=False)
    folders = [
        prepare_corpus(data, BYTE, str(tmp_path / name)).directory
        for data, name in ((with_eos, "a"), (without, "b"), (with_eos, "c"))
    ]
    assert folders[0] == folders[2] != folders[1]
    assert "rebuilding" not in caplog.text
    assert not os.path.exists(tmp_path / "a")


def test_sources_are_kept_apart_and_each_gives_its_end_for_evaluation(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 100)
    sources = tuple(
        SourceConfig(name=name, inputs=(str(tmp_path / f"{name}.txt"),), weights=((0.0, w),))
        for name, w in (("a", 1.0), ("b", 3.0))
    )
    data = DataConfig(sources=sources, add_eos=False)
    corpus = prepare_corpus(data, BYTE, str(tmp_path / "run"))
    assert [(c.name, c.weights) for c in corpus.train] == [
        ("a", ((0.0, 1.0),)),
        ("b", ((0.0, 3.0),)),
    ]
    assert [text_of(corpus.tokenizer, c.tokens) for c in corpus.train] == ["a" * 90, "b" * 90]
    assert text_of(corpus.tokenizer, corpus.evaluation) == "a" * 10 + "b" * 10
    assert corpus.evaluation.documents == 2


def test_held_out_text_of_its_own(tmp_path, file):
    (tmp_path / "other.txt").write_text("held out")
    data = DataConfig(inputs=(file,), eval_inputs=(str(tmp_path / "other.txt"),))
    corpus = prepare_corpus(data, BYTE, str(tmp_path / "run"))
    assert text_of(corpus.tokenizer, corpus.train[0].tokens) == TEXT
    assert text_of(corpus.tokenizer, corpus.evaluation) == "held out"
    nothing = prepare_corpus(
        DataConfig(inputs=(file,), eval_fraction=0.0), BYTE, str(tmp_path / "all")
    )
    assert nothing.evaluation is None
    assert text_of(nothing.tokenizer, nothing.train[0].tokens) == TEXT


def test_a_prepared_folder_is_an_input(tmp_path, file, monkeypatch):
    made = prepare_in(str(tmp_path / "out"), DataConfig(inputs=(file,)), BYTE)
    calls = count_reads(monkeypatch)
    data = DataConfig(inputs=(str(tmp_path / "out"),))
    # The config's own tokenizer is not trained: the prepared one counts.
    used = prepare_corpus(data, TokenizerConfig(), str(tmp_path / "run"))
    assert calls == []
    assert used.tokenizer.fingerprint() == made.tokenizer.fingerprint()
    assert used.train[0].tokens.name == str(tmp_path / "out" / "train")
    assert used.evaluation.total == made.evaluation.total
    with pytest.raises(ValueError, match=r"prepared with add_eos=True; set data\.add_eos=True"):
        data.add_eos = False
        prepare_corpus(data, TokenizerConfig(), str(tmp_path / "run"))
    other = str(tmp_path / "char")
    tokenizers.train("char", ["ab"]).save(other)
    with pytest.raises(ValueError, match=r"prepared with another tokenizer than .*char"):
        prepare_corpus(
            DataConfig(inputs=(str(tmp_path / "out"),)), TokenizerConfig(path=other), str(tmp_path)
        )
    with pytest.raises(ValueError, match="has to be the only input"):
        prepare_corpus(
            DataConfig(inputs=(str(tmp_path / "out"), file)), TokenizerConfig(), str(tmp_path)
        )


def test_a_tokenizer_by_path(tmp_path, file):
    tokenizer = tokenizers.train("char", [TEXT])
    tokenizer.save(str(tmp_path / "char"))
    config = TokenizerConfig(path=str(tmp_path / "char"))
    corpus = prepare_corpus(
        DataConfig(inputs=(file,), add_eos=False), config, str(tmp_path / "run")
    )
    assert corpus.tokenizer.fingerprint() == tokenizer.fingerprint()
    stored = tokenizers.load(os.path.join(corpus.directory, "tokenizer"))
    assert stored.fingerprint() == tokenizer.fingerprint()


def test_names_that_are_no_folder_names_are_refused(tmp_path, file):
    data = DataConfig(sources=(SourceConfig(name="../a", inputs=(file,)),))
    with pytest.raises(ValueError, match=r"data.sources: the name '../a'"):
        prepare_corpus(data, BYTE, str(tmp_path))


def test_a_follower_without_a_writer_is_told(tmp_path, file):
    with pytest.raises(FileNotFoundError):
        prepare_corpus(DataConfig(inputs=(file,)), BYTE, str(tmp_path / "run"), writer=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    # `python -m benchmarks.data` shows the same up to 1 GB.
    small, large = (benchmark.measure_memory(size, str(tmp_path)) for size in (30, 300))
    for work in ("prepare", "load"):
        assert large[work]["RssAnon"] < small[work]["RssAnon"] + 25, work


def test_preparing_data_does_not_import_jax():
    code = "import sys, llm_jax.data.prepare; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def run(*flags):
    return subprocess.run(
        [sys.executable, "-m", "experiments.prepare_data", *flags],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
    )


def test_the_binary_writes_shards_and_a_report(tmp_path, file):
    out = tmp_path / "out"
    done = run(f"--input={file}", f"--output={out}", "--vocab_size=300", "--length=64")
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "report.json").read_text())
    train, held_out = result["parts"]
    assert (train["part"], held_out["part"]) == ("train", "eval")
    assert train["bytes"] + held_out["bytes"] == len(TEXT.encode())
    assert train["tokens"] == shards.open_(str(out / "train")).total
    assert train["bytes_per_token"] == train["bytes"] / train["tokens"] > 1.5
    assert train["utilisation"]["split"] == 1.0
    assert 0.5 < train["utilisation"]["pad"] <= train["utilisation"]["first_fit"] <= 1.0
    report = (out / "report.md").read_text()
    assert "| train |" in report and "plots/document_lengths.png" in report
    assert (out / "plots" / "document_lengths.png").stat().st_size > 5000
    assert tokenizers.load(str(out / "tokenizer")).vocab_size == 300


def test_the_binary_ends_user_errors_in_one_line(tmp_path):
    done = run("--input=no_such_file.txt", f"--output={tmp_path / 'x'}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no_such_file.txt: no such file")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()
