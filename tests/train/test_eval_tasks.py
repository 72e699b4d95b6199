"""Evaluation inside training is experiments.evaluate on the state of that step."""

import json

import jax
import pytest
from runs import run_config

import llm_jax
from llm_jax.eval.run import Options, evaluate_tasks
from llm_jax.train import loop


@pytest.fixture
def passages(tmp_path):
    path = tmp_path / "lambada.jsonl"
    rows = [{"text": f"{i} pears and {i} apples are {2 * i} fruits"} for i in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_tasks_are_scored_whenever_the_model_is_evaluated(corpus, passages, tmp_path):
    """Equal to the last digits in a perplexity, which no other state of the model would give."""
    changes = {
        "eval.tasks": ("lambada",),
        "eval.task_input": str(passages),
        "eval.task_limit": 5,
        "eval.task_shots": 1,
        "eval.sample_tokens": 0,
        "optimizer.ema_decay": 0.0,
    }
    run = tmp_path / "run"
    summary = loop.train(run_config(corpus, **changes), run, devices=jax.devices()[:1])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {r["step"]: r["lambada/perplexity"] for r in lines if "lambada/perplexity" in r}
    assert list(found) == [6, 12]
    options = Options(input=str(passages), limit=5, num_fewshot=1)
    for step, value in found.items():
        model = llm_jax.load(run / "checkpoints" / str(step))
        weights = (model.params, model.config.model, model.tokenizer)
        expected = evaluate_tasks(*weights, ["lambada"], options)["lambada"]
        assert expected["n"] == 5
        assert value == pytest.approx(expected["metrics"]["perplexity"]["value"], rel=1e-4)
    assert summary["lambada/perplexity"] == found[12] != pytest.approx(found[6], rel=1e-2)


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
