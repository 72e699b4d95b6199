"""Evaluation inside training is experiments.evaluate on the state of that step."""

import json

import jax
import pytest
from runs import run_config

import llm_jax
from llm_jax.eval.run import Options, evaluate_tasks
from llm_jax.train import loop


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question": f"{i} plus {i}?", "choices": [f"{2 * i}", f"{i}", "none"], "answer": i % 3}
        for i in range(6)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_tasks_are_scored_whenever_the_model_is_evaluated(corpus, questions, tmp_path):
    changes = {
        "eval.tasks": ("multiple_choice",),
        "eval.task_input": str(questions),
        "eval.task_limit": 5,
        "eval.task_shots": 1,
        "eval.sample_tokens": 0,
        "optimizer.ema_decay": 0.0,
    }
    run = tmp_path / "run"
    summary = loop.train(run_config(corpus, **changes), run, devices=jax.devices()[:1])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "multiple_choice/acc" in r] == [6, 12]
    model = llm_jax.load(run)
    options = Options(input=str(questions), limit=5, num_fewshot=1)
    expected = evaluate_tasks(
        model.params, model.config.model, model.tokenizer, ["multiple_choice"], options
    )["multiple_choice"]
    assert expected["n"] == 5
    for metric, found in expected["metrics"].items():
        assert summary[f"multiple_choice/{metric}"] == pytest.approx(found["value"])
        assert lines[-1][f"multiple_choice/{metric}"] == summary[f"multiple_choice/{metric}"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval.tasks": ("multiple_chioce",)}, "multiple_chioce is unknown"),
        ({"eval.tasks": ("boolq",), "eval.task_input": "/nowhere"}, "/nowhere"),
    ],
)
def test_errors_come_before_the_first_step(corpus, tmp_path, changes, message):
    cfg = run_config(corpus, **changes)
    with pytest.raises((ValueError, OSError), match=message):
        loop.train(cfg, tmp_path / "run", devices=jax.devices()[:1])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
