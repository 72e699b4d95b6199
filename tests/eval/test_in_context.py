"""Each sequence's function is new and can be told from its examples; accuracy is counted per shot."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from runs import start
from tiny import tiny_model

from llm_jax import tokenizers
from llm_jax.eval import in_context
from llm_jax.eval.in_context import Functions, accuracy_by_shots
from llm_jax.eval.run import Options, evaluate_tasks
from llm_jax.models import decoder
from llm_jax.nn import params as P


def examples(functions, batch):
    """(x [n, K + 1, x_tokens], y [n, K + 1]) read back from a batch."""
    rows = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
    rows = rows.reshape(len(rows), functions.shots + 1, functions.x_tokens + 1)
    return rows[..., :-1], rows[..., -1]


def test_lookup_sequences():
    functions = Functions(shots=12, labels=3, words=20, active=4)
    batch = functions.sample(300, np.random.default_rng(0))
    x, y = examples(functions, batch)
    assert batch.tokens.shape == (300, functions.length) and y.max() == 2 and y.min() == 0
    assert x.min() == 3 and x.max() == functions.vocab_size - 1 == 22
    maps = []
    for words, labels in zip(x[..., 0], y, strict=True):
        seen = {}
        for word, label in zip(words.tolist(), labels.tolist(), strict=True):
            assert seen.setdefault(word, label) == label  # one label for a word in a sequence
        assert len(seen) <= 4
        maps.append(seen)
    # But not across sequences, or weights could learn them.
    assert {m[3] for m in maps if 3 in m} == {0, 1, 2}
    # Only labels count, and each of them: input k's last token predicts it.
    weights, targets = np.asarray(batch.weights), np.asarray(batch.targets)
    assert (targets[weights == 1].reshape(300, -1) == y).all() and weights.sum() == y.size


def test_best_possible_is_what_remembering_gets():
    """A perfect memory that guesses else reaches `best`; 1 - (1 - 1/active)^(k+1) would be one
    example too many."""
    functions = Functions(shots=6, labels=4, words=10, active=3)
    rng = np.random.default_rng(1)
    x, y = examples(functions, functions.sample(20_000, rng))
    right = np.full(7, 0.25)
    for k in range(1, 7):
        seen = x[:, :k, 0] == x[:, k : k + 1, 0]
        remembered = np.where(seen.any(1), y[np.arange(len(y)), seen.argmax(1)], -1)
        guess = rng.integers(0, 4, len(y))
        right[k] = np.mean(np.where(remembered >= 0, remembered, guess) == y[:, k])
    np.testing.assert_allclose(functions.best(), right, atol=0.015)


def test_linear_sequences():
    """The labels of a sequence are linearly separable, as a fit that sees them all shows."""
    functions = Functions(kind="linear", shots=30, dimensions=4)
    assert functions.best() is None and functions.vocab_size == 10
    batch = functions.sample(50, np.random.default_rng(2))
    x, y = examples(functions, batch)
    bits = 2 * ((x - 2) % 2) - 1
    assert ((x - 2) // 2 == np.arange(4)).all()  # each dimension has tokens of its own
    for b, labels in zip(bits, y, strict=True):
        w = np.zeros(4)
        for _ in range(200):  # the perceptron
            for row, label in zip(b, labels, strict=True):
                if (row @ w > 0) != label:
                    w += (2 * label - 1) * row
        assert ((b @ w > 0) == labels).all()
    assert 0.4 < y.mean() < 0.6


def test_accuracy_by_shots(monkeypatch):
    """Only labels compete, at the place before each label; rows beyond one call count too."""
    functions = Functions(shots=3, labels=2, words=4, active=2)
    batch = functions.sample(10, np.random.default_rng(3))
    _, y = examples(functions, batch)

    class Oracle:
        """Right after two examples and more; a word always has the highest logit of all."""

        @staticmethod
        def hidden(params, batch, cfg):
            return type("Hidden", (), {"x": batch.tokens[..., None]})

        @staticmethod
        def logits(params, x, cfg):
            n = x.shape[0]
            at = calls[-1]
            calls.append(at + n)
            logits = np.zeros((n, 4, functions.vocab_size), np.float32)
            logits[..., 2:] = 9.0
            for k in range(4):
                label = y[at : at + n, k] if k >= 2 else 1 - y[at : at + n, k]
                logits[np.arange(n), k, label] = 1.0
            assert (x[..., 0] >= functions.n_labels).all()  # words, not labels
            return logits

    calls = [0]
    monkeypatch.setattr(in_context.models, "family", lambda name: Oracle)
    monkeypatch.setattr(in_context, "_choose", in_context._choose.__wrapped__)
    found = accuracy_by_shots(None, tiny_model(), functions, batch, rows=4)
    assert found.tolist() == [0, 0, 1, 1] and calls[-1] == 10


def test_refusals():
    with pytest.raises(ValueError, match="--active=9 has to be between 1 and --words=8"):
        Functions(words=8, active=9)
    with pytest.raises(ValueError, match="--function='cubic'"):
        Functions(kind="cubic")


def test_plots():
    result = {
        "title": "t",
        "shots": [0, 1, 2],
        "chance": 0.25,
        "best": [0.25, 0.5, 0.6],
        "models": [
            {"name": "b", "parameters": 20, "accuracy": [0.2, 0.4, 0.5], "stderr": [0.1] * 3},
            {"name": "a", "parameters": 10, "accuracy": [0.2, 0.3, 0.3], "stderr": [0.1] * 3},
        ],
    }
    shots, size = in_context.plots(result)
    assert [s.label[:1] for s in shots.series] == ["a", "b", "b"]  # by size, then the best possible
    assert shots.series[1].low == pytest.approx([0.2 - 0.196, 0.4 - 0.196, 0.5 - 0.196])
    assert [list(s.y) for s in size.series] == [[0.2, 0.2], [0.3, 0.4], [0.3, 0.5]]
    assert size.series[0].x == [10, 20]
    result["models"].pop()
    assert len(in_context.plots(result)) == 1


def test_binary(tmp_path):
    process = start(
        "in_context",
        f"--workdir={tmp_path}",
        "--sizes=8x1",
        "--steps=2",
        "--shots=3",
        "--test_sequences=20",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["shots"] == [0, 1, 2, 3] and len(result["models"][0]["accuracy"]) == 4
    assert (tmp_path / "plots" / "shots.png").stat().st_size > 1000


def test_real_task_by_shots(tmp_path):
    """Values are those of evaluate_tasks with so many worked examples, on the same questions."""
    tokenizer = tokenizers.train("byte", [])
    cfg = tiny_model(vocab_size=tokenizer.vocab_size, init_std=0.3, max_length=256)
    model = (P.init(decoder.specs(cfg), jax.random.key(0)), cfg, tokenizer)
    path = tmp_path / "mine.jsonl"
    rows = [{"question": f"q{i}", "choices": ["a", "bc", "d"], "answer": i % 3} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Options(input=str(path), limit=4)
    values, errors = in_context.task_by_shots(*model, "multiple_choice", [0, 2], options)
    for k, value, error in zip([0, 2], values, errors, strict=True):
        result = evaluate_tasks(*model, ["multiple_choice"], replace(options, num_fewshot=k))
        assert result["multiple_choice"]["n"] == 4
        assert result["multiple_choice"]["metrics"]["acc"] == {"value": value, "stderr": error}
    with pytest.raises(ValueError, match="--metric=f1: --task=multiple_choice has acc, acc_norm"):
        in_context.task_by_shots(*model, "multiple_choice", [0], options, metric="f1")
