"""The evaluation binary on a tiny model, and the comparison of two runs."""

import json

import jax
import numpy as np
import pytest
from runs import run_binary, start
from tiny import tiny_train

from llm_jax import config as configs
from llm_jax import tokenizers
from llm_jax.eval import comparison, output
from llm_jax.models import decoder
from llm_jax.nn import params as P
from llm_jax.train.checkpoint import save_params

ROWS = [
    {"question": f"the quick {w}?", "choices": ["brown fox", "lazy dog", "tree"], "answer": n % 3}
    for n, w in enumerate(["over", "and", "then", "under", "some"])
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model with a byte tokenizer, saved."""
    tokenizer = tokenizers.train("byte", [])
    cfg = configs.thaw(tiny_train())
    cfg.model.vocab_size, cfg.model.max_length, cfg.model.n_heads = tokenizer.vocab_size, 64, 8
    configs.freeze(cfg)
    params = P.init(decoder.specs(cfg.model), jax.random.key(0))
    folder = tmp_path_factory.mktemp("model")
    save_params(folder, cfg, tokenizer, params)
    return folder


def test_binary(checkpoint, tmp_path):
    questions = tmp_path / "mine.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    results, items = tmp_path / "out" / "results.json", tmp_path / "items.jsonl"
    process = start(
        "evaluate",
        f"--checkpoint={checkpoint}",
        "--task=multiple_choice",
        f"--input={questions}",
        "--num_fewshot=1",
        "--seed=3",
        f"--output={results}",
        f"--items={items}",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "multiple_choice  5      1  acc" in out
    found = json.loads(results.read_text())["tasks"]["multiple_choice"]
    assert found["n"] == 5 and found["num_fewshot"] == 1 and found["window"] == 64
    records = [json.loads(line) for line in items.read_text().splitlines()]
    right = [r["metrics"]["acc"] for r in records]
    assert found["metrics"]["acc"]["value"] == pytest.approx(np.mean(right))
    assert found["first_prompt"].count("\n\n") == 1

    done = run_binary("evaluate", f"--compare={items},{items}")
    assert done.returncode == 0, done.stderr
    assert "= +0.0000 [+0.0000, +0.0000], p 1.0000" in done.stdout

    done = run_binary("evaluate", f"--checkpoint={checkpoint}", "--task=boolq")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --task=boolq needs --input: boolq.jsonl")
    assert done.stderr.count("\n") == 1


def records(values, task="boolq"):
    return [
        {"task": task, "index": i, "id": str(i), "group": "", "metrics": {"acc": v}}
        for i, v in enumerate(values)
    ]


def test_comparison_is_paired():
    """A model that is right on one question more, out of the same hard ones, differs by that alone.

    Unpaired, a difference of 0.1 between two accuracies of 40 items would have a standard error of
    about 0.11.
    """
    rng = np.random.default_rng(0)
    a = (rng.random(40) < 0.5).astype(float)
    b = a.copy()
    b[np.flatnonzero(a)[:4]] = 0.0
    found = comparison.compare(records(a), list(reversed(records(b))))["boolq"]
    acc = found["metrics"]["acc"]
    assert found["n"] == 40 and acc["difference"] == pytest.approx(0.1)
    assert acc["first"] == pytest.approx(a.mean()) and acc["second"] == pytest.approx(b.mean())
    assert acc["stderr"] == pytest.approx(np.sqrt(0.1 * 0.9 / 40), rel=0.1)
    assert acc["low"] <= 0.1 <= acc["high"] and acc["p_value"] < 0.2
    assert "boolq acc (n 40)" in comparison.table({"boolq": found})


def test_comparison_refuses_other_questions(tmp_path):
    with pytest.raises(ValueError, match=r"other questions \(3 and 2\).*--limit"):
        comparison.compare(records([1, 0, 1]), records([1, 0]))
    with pytest.raises(ValueError, match="tasks boolq against piqa"):
        comparison.compare(records([1, 0]), records([1, 0], task="piqa"))
    bad = tmp_path / "results.json"
    bad.write_text("{}\n")
    with pytest.raises(ValueError, match=r"results.json:1: not a record"):
        comparison.read_records(str(bad))
    with pytest.raises(FileNotFoundError, match="--compare"):
        comparison.read_records(str(tmp_path / "none"))


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "x.json"
    output.write_json(str(path), {"a": float("nan"), "b": [1.0, float("inf")]})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.0, None]}
    with pytest.raises(RuntimeError), output.replacing(str(path)) as file:
        file.write("half")
        raise RuntimeError
    assert json.loads(path.read_text())["b"] == [1.0, None]
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
