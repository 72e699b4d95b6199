"""Rounds on the policy's own answers: what is refused before anything is drawn, and what they are
made of. The rounds themselves: tests/test_preference_chain.py."""

import json

import pytest
from preference_runs import make_base, preference_config, write_pairs

from llm_jax.align import judges, on_policy, prompts
from llm_jax.align.direct import training

OPTIONS = on_policy.Options(rounds=1, prompts=3, answers=3, held_out=2, max_new_tokens=6)
SHORT = {"steps": 1, "data.inputs": (), "data.eval_fraction": 0.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("rows") / "pairs.jsonl", 8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft.method": "prefix"}, "use lora or none"),
        ({"dpo.reference_path": "x"}, "--reference says what a round is held to"),
        (
            {"peft.method": "lora", "dpo.reference": "adapter"},
            "use --reference=previous, or dpo.reference=cached",
        ),
        ({"data.eval_inputs": ("x",)}, r"drop --eval_input"),
    ],
)
def test_what_would_fail_after_hours_is_refused(base, rows, tmp_path, changes, message):
    cfg = preference_config(base, rows, **{**SHORT, **changes})
    asked = prompts.read([str(rows)])[0]
    with pytest.raises(ValueError, match=message):
        on_policy.run(cfg, judges.rule("rule:shorter"), asked, tmp_path / "run", OPTIONS)
    assert not (tmp_path / "run").exists()


def test_a_round_asks_as_it_trains(base, rows, tmp_path, monkeypatch):
    """The system's turn is in front of every prompt; answers that were cut off lose points."""
    changes = {"data.dialogue.system": "Be kind.", "data.preference.layout": "rankings"}
    cfg = preference_config(base, rows, **{**SHORT, **changes})
    asked, judged = prompts.read([str(rows)])[0], []

    def judge(conversations):
        judged.extend(conversations)
        return [float(len(c[-1]["content"])) for c in conversations]

    options = on_policy.Options(**{**vars(OPTIONS), "missing_end_penalty": 1000.0})
    on_policy.run(cfg, judge, asked, tmp_path / "run", options, judged_by="length")
    assert all(c[0] == {"role": "system", "content": "Be kind."} for c in judged)
    told = [json.loads(line) for line in (tmp_path / "run/round-1/answers.jsonl").open()]
    assert len(told) == 3
    seen = [x for row in told for x in zip(row["scores"], row["finish_reasons"], strict=True)]
    assert any(reason == "length" for _, reason in seen)
    assert all((score < -900) == (reason == "length") for score, reason in seen)
    other = preference_config(base, rows, **{**SHORT, **changes, "dpo.beta": 0.3})
    with pytest.raises(ValueError, match="was begun with recipe="):
        on_policy.run(other, judge, asked, tmp_path / "run", options, judged_by="length")
    with pytest.raises(ValueError, match="was begun with prompts read="):
        cfg = preference_config(base, rows, **{**SHORT, **changes})
        on_policy.run(cfg, judge, asked[::-1], tmp_path / "run", options, judged_by="length")


def test_held_out_prompts_of_a_run(base, rows, tmp_path):
    changes = {"steps": 1, "data.eval_fraction": 0.25, "data.preference.split_seed": 3}
    training.train(preference_config(base, rows, **changes), tmp_path / "run")
    found = prompts.held_out(tmp_path / "run")
    everything = prompts.read([str(rows)])[0]
    assert len(found) == 2 and all(prompt in everything for prompt in found)
    assert found != everything[-2:]  # they are drawn
    trained = json.loads((tmp_path / "run/summary.json").read_text())
    assert trained["train_prompts"] == 6 and trained["eval/pairs"] == 2
    with pytest.raises(ValueError, match="was not trained on preferences"):
        prompts.held_out(base)
