"""The forgetting lab: what is shown to a model, what is scored, what is kept, and who wins."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import run_config
from tiny import tiny_model

from llm_jax import config as configs
from llm_jax import models, tokenizers
from llm_jax.align import forgetting, forgetting_data, forgetting_report
from llm_jax.align.forgetting import REMEDIES, Base, Key, Lab
from llm_jax.align.forgetting_data import Encoded, Rows, TaskData
from llm_jax.align.forgetting_report import Estimate, winner
from llm_jax.data import task_rows
from llm_jax.data.instructions import Example
from llm_jax.data.prepare import prepare_corpus
from llm_jax.data.tokens import Tokens
from llm_jax.nn import params as nn_params
from llm_jax.types import Batch


def encoded(n, answer=2, prompt=5, choices=2):
    """Example number n: its prompt is n's, its right answer the token n + 1, `answer` times."""
    return Encoded((n,) * prompt, tuple(((n + 1 + c) % 50,) * answer for c in range(choices)), 0)


TASKS = {
    name: TaskData(
        name,
        tuple(encoded(10 * i + n % 7, answer=i + 1) for n in range(24)),
        tuple(encoded(10 * i + n, answer=i + 1) for n in range(4)),
        0,
    )
    for i, name in enumerate(["a", "b", "c"])
}
LAB = Lab(
    tasks=("a", "b"),
    unseen=("c",),
    examples=(8, 16),
    counts=(1, 2),
    seeds=2,
    rows=8,
    length=12,
    test_examples=4,
    windows=4,
)


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    cfg = run_config(corpus, length=16, **{"model.n_layers": 1, "optimizer.ema_decay": 0.0})
    found = prepare_corpus(cfg.data, cfg.tokenizer, str(tmp_path_factory.mktemp("base")))
    cfg.model = configs.thaw(tiny_model(n_layers=1, vocab_size=found.tokenizer.vocab_size))
    params = nn_params.init(models.family("decoder").specs(cfg.model), jax.random.key(0))
    return Base(
        configs.freeze(cfg), params, found.tokenizer, found.train[0].tokens, found.evaluation
    )


# ------------------------------------------------------------------------------------------- rows


def test_rows_count_once_whatever_they_hold():
    original = Tokens.from_lists([range(50)], 53)
    rows = Rows(
        [encoded(1, answer=1), encoded(2, answer=4)],
        per_step=2,
        length=12,
        seed=0,
        original=original,
        original_per_step=2,
    )
    batch = rows.batch(3)
    assert batch.tokens.shape == (4, 12) and rows.batch_size == 4
    # By tokens, two windows would have 24 of 29 shares, the answers 5.
    np.testing.assert_allclose(batch.weights.sum(axis=1), 1, rtol=1e-6)
    counts = sorted((batch.weights[:2] > 0).sum(axis=1).tolist())
    assert counts == [1, 4] and (batch.weights[2:] > 0).all()
    row = int(np.argmax((batch.weights[:2] > 0).sum(axis=1)))
    assert batch.tokens[row].tolist() == [2] * 5 + [3] * 3 + [0] * 4
    assert batch.targets[row][batch.weights[row] > 0].tolist() == [3] * 4
    assert batch.segments[row].tolist() == [1] * 8 + [0] * 4
    assert (np.diff(batch.tokens[2]) == 1).all()  # a window of the original text


def test_every_example_is_seen_as_often_as_told_in_a_new_order():
    rows = Rows([encoded(n) for n in range(24)], per_step=8, length=12, seed=1)
    assert rows.steps(2) == 6
    seen = [rows.batch(s).tokens[:, 0].tolist() for s in range(6)]
    for epoch in (seen[:3], seen[3:]):
        assert sorted(n for step in epoch for n in step) == list(range(24))
    assert seen[:3] != seen[3:]
    other = Rows([encoded(n) for n in range(24)], per_step=8, length=12, seed=2)
    assert other.batch(0).tokens[:, 0].tolist() != seen[0]


def test_what_a_remedy_adds_comes_on_top(base):
    made = {
        name: forgetting.make_rows(LAB, TASKS, base.train, Key(name, 1, 16, 0)) for name in REMEDIES
    }
    sizes = {name: rows.batch_size for name, rows in made.items()}
    assert sizes.pop("multi-task") == 16 and sizes.pop("replay") == 11  # 3 of 11 are replayed
    assert set(sizes.values()) == {8}
    plain, mixed = made["plain"].batch(1), made["multi-task"].batch(1)
    np.testing.assert_array_equal(plain.tokens, mixed.tokens[:8])  # the same target rows
    assert set((mixed.tokens[8:, 0] // 10).tolist()) == {1}  # of task b; c is never tuned on
    assert len({rows.steps(2) for rows in made.values()}) == 1


def test_more_tasks_share_the_examples(base):
    rows = forgetting.make_rows(LAB, TASKS, base.train, Key("plain", 2, 16, 0))
    tokens = np.concatenate([rows.batch(s).tokens for s in range(2)])
    assert [(tokens[:, 0] // 10 == i).sum() for i in range(3)] == [8, 8, 0]


def test_encoding_splits_prompt_and_answers():
    tokenizer = tokenizers.train("byte", [])
    asked = ({"role": "user", "content": "Good?"}, {"role": "assistant", "content": "yes"})
    found = forgetting_data.encode(tokenizer, Example("i", "t", 0, asked, ("no", "yes"), 1))
    end = tokenizer.eos_id
    assert tokenizer.decode(list(found.row)[1:-1]) == "Good?\nyes" and found.row[-1] == end
    assert [tokenizer.decode(list(a[:-1])).strip() for a in found.answers] == ["no", "yes"]
    assert found.answers[found.right][-1] == end


def test_too_few_examples_are_an_error(monkeypatch):
    tokenizer = tokenizers.train("byte", [])
    monkeypatch.setattr(
        task_rows.corpus, "questions", lambda: tuple((f"n{i}", "", f"text {i}") for i in range(50))
    )
    with pytest.raises(ValueError, match=r"python_question: only 0 examples of 8 .*--length=16"):
        forgetting_data.read_task("python_question", "", tokenizer, length=16, train=8, held_out=4)


def test_examples_that_fit_are_looked_for_in_all_of_a_task(monkeypatch):
    tokenizer = tokenizers.train("byte", [])
    answers = [f"a{i}" if i % 50 == 0 else f"{i} long " * 40 for i in range(2000)]
    rows = tuple((f"n{i}", f"q{i}", text) for i, text in enumerate(answers))
    monkeypatch.setattr(task_rows.corpus, "questions", lambda: rows)
    found = forgetting_data.read_task(
        "python_question", "", tokenizer, length=80, train=12, held_out=2
    )
    assert len(found.train) == 12 and found.held_out and found.too_long > 300


# ------------------------------------------------------------------------------------------ scores


def test_scores_are_those_of_plain_log_probabilities(base):
    found = forgetting.scores(LAB, base, TASKS, base.params)
    model = models.family("decoder")

    @jax.jit
    def every(tokens):
        x = model.hidden(base.params, Batch(tokens=tokens), base.config.model).x
        return jax.nn.log_softmax(model.logits(base.params, x, base.config.model)[0])

    def log_p(ids):
        every_LxV = every(np.array([ids[:-1]], np.int32))
        return np.asarray(every_LxV)[np.arange(len(ids) - 1), ids[1:]]

    b = TASKS["b"]
    nats = -np.concatenate([log_p(e.row)[len(e.prompt) - 1 :] for e in b.held_out])
    assert found["by_task"]["b"]["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    right = [
        np.argmax([log_p(e.prompt + a)[len(e.prompt) - 1 :].sum() for a in e.answers]) == e.right
        for e in b.held_out
    ]
    assert found["by_task"]["b"]["accuracy"] == np.mean(right)
    L = base.config.length
    places = np.arange(0, base.held_out.total - L, L)
    places = places[np.linspace(0, len(places) - 1, 4).astype(int)]
    windows = [base.held_out.take(np.arange(p, p + L + 1)).tolist() for p in places]
    total = -sum(log_p(w).sum() for w in windows)
    n_bytes = sum(len(base.tokenizer.decode(w[1:]).encode()) for w in windows)
    assert found["bits_per_byte"] == pytest.approx(total / n_bytes / math.log(2), rel=1e-5)


# ------------------------------------------------------------------------------- the whole of it


def test_runs_are_kept_and_not_done_again(base, tmp_path, monkeypatch):
    lab = Lab(
        **{f: getattr(LAB, f) for f in LAB.__dataclass_fields__} | {
    "remedies": ("plain", "LoRA"), "examples": (16,), "counts": (1,), "seeds": 1,
            "learning_rate": 1e-2,
        }
    )  # fmt: skip
    monkeypatch.setattr(forgetting, "read_tasks", lambda lab, tokenizer: TASKS)
    monkeypatch.setitem(
        REMEDIES, "LoRA", forgetting.Remedy({**REMEDIES["LoRA"].changes, "peft.rank": 2})
    )
    said = []
    result = forgetting.run(lab, base, tmp_path, progress=said.append)
    assert len(said) == len(result["runs"]) == 2
    before, runs = result["before"], list(result["runs"].values())
    assert [r["tasks"] for r in runs] == [1, 1]
    for run in runs:  # both learn the target; the base model is the same for both
        assert run["by_task"]["a"]["loss"] < before["by_task"]["a"]["loss"] - 0.05
        assert run["bits_per_byte"] != before["bits_per_byte"]
    assert runs[1]["trained_parameters"] < runs[0]["trained_parameters"] / 4
    kept = json.loads((tmp_path / "results.json").read_text())["items"]
    assert kept == {"before": before, **json.loads(json.dumps(result["runs"]))}

    def never(*args):
        raise AssertionError("a run that is known was done again")

    monkeypatch.setattr(forgetting, "tune", never)
    assert forgetting.run(lab, base, tmp_path)["runs"] == result["runs"]
    other = Lab(**{**{f: getattr(lab, f) for f in lab.__dataclass_fields__}, "epochs": 9})
    with pytest.raises(
        ValueError, match="measurements that differ in epochs; choose another --workdir"
    ):
        forgetting.run(other, base, tmp_path)
    trained_on = base._replace(params=jax.tree.map(lambda x: 1.01 * x, base.params))
    with pytest.raises(ValueError, match="differ in base_weights; choose"):
        forgetting.run(lab, trained_on, tmp_path)


def test_a_tuning_config_keeps_the_model_and_takes_the_remedy(base):
    for name in REMEDIES:
        cfg = forgetting.tuning_config(LAB, base.config, Key(name, 1, 16, 3), steps=20, rows=11)
        assert cfg.model == base.config.model and (cfg.seed, cfg.batch_size) == (3, 11)
        assert cfg.optimizer.weight_decay == 0 and cfg.optimizer.ema_decay == 0
        for path, value in REMEDIES[name].changes.items():
            assert configs.get(cfg, path) == value
    rates = [
        forgetting.tuning_config(LAB, base.config, Key(n, 1, 16, 0), steps=20, rows=8)
        .optimizer.learning_rate
        for n in ("plain", "LoRA")
    ]  # fmt: skip
    assert rates == [LAB.learning_rate, 5 * LAB.learning_rate]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"remedies": ("replays",)}, "--remedies: none is named 'replays'"),
        ({"unseen": ("a",)}, "--unseen has a, which --tasks tunes on"),
        ({"counts": (1, 3)}, "--task_counts=3, but --tasks names 2"),
        ({"tasks": ("a",), "counts": (1,)}, "needs more than one of --tasks"),
    ],
)
def test_what_cannot_be_measured(changes, message):
    values = {f: getattr(LAB, f) for f in LAB.__dataclass_fields__} | changes
    with pytest.raises(ValueError, match=message):
        forgetting.check(Lab(**values))


# ------------------------------------------------------------------------------------------ report


def point(forgetting, gain, error=0.01):
    return Estimate(forgetting, error), Estimate(gain, error)


def test_the_winner_forgets_least_of_those_that_learn_as_much():
    points = {
        "plain": point(0.50, 1.000),
        "replay": point(0.10, 0.951),  # keeps 95 % of the best gain
        "frozen": point(0.00, 0.900),  # forgets nothing because it learns less
    }
    assert winner(points) == "replay"
    assert winner({**points, "replay": point(0.10, 0.949)}) == "plain"
    worse = {"plain": point(0.50, -1.00), "replay": point(0.10, -1.04), "L2": point(0.0, -1.06)}
    assert winner(worse) == "replay"


def result(seeds=3):
    """Made-up runs: replay halves what is forgotten, and learns as much."""

    def score(bits, target, other):
        tasks = {"c": 7.0, "a": target, "b": other}  # c is never tuned on
        return {
            "bits_per_byte": bits,
            "by_task": {
                n: {"loss": v, "exact": 0.5, "accuracy": 0.75 if n == "a" else None, "n": 4}
                for n, v in tasks.items()
            },
        }  # fmt: skip

    runs = {}
    for key in forgetting.keys(Lab(**{f: getattr(LAB, f) for f in LAB.__dataclass_fields__} | {
        "remedies": ("plain", "replay"), "seeds": seeds})):  # fmt: skip
        forgot = 0.01 * key.examples * (0.5 if key.remedy == "replay" else 1.0)
        loss = 1.0 - 0.02 * key.examples + 0.01 * key.seed
        runs[str(key)] = {
            **key._asdict(),
            **score(2.0 + forgot, loss, 3.0 + 0.1 * key.tasks),
            "trained_parameters": 10,
            "seconds": 1.0,
        }
    settings = {"tasks": ["a", "b"], "epochs": 2}
    return {"settings": settings, "before": score(2.0, 1.5, 3.0), "runs": runs}


def test_report(tmp_path):
    found = forgetting_report.Findings(result())
    f, g = found.points()["replay"]
    assert f.mean == pytest.approx(0.08) and g.mean == pytest.approx(0.81)
    assert g.error == pytest.approx(0.01 / math.sqrt(3))
    row = forgetting_report.table(found)[1]
    assert found.tasks == ["a", "b", "c"]
    assert row["others: gain"].mean == pytest.approx(-0.05) and row["seeds"] == 3
    path = forgetting_report.write(tmp_path, result())
    text = path.read_text()
    assert "**Winner: replay.**" in text and "0.0800 ± 0.0000" in text
    for name in ("forgetting", "sizes_forgetting", "sizes_gain", "tasks_forgetting", "tasks_gain"):
        assert (Path(tmp_path) / "plots" / f"{name}.png").stat().st_size > 5_000
    assert "winner: replay" in forgetting_report.lines(result())
    assert "± " not in str(forgetting_report.Findings(result(1)).points()["plain"][0])
