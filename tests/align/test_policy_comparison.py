"""The run: what it writes is what was drawn, and its divergence is the one between the two models."""

import functools
import json

import jax
import numpy as np
import pytest
from runs import run_binary
from tiny import tiny_train

from llm_jax.align import judges, policy_comparison
from llm_jax.api import Model
from llm_jax.data import preferences
from llm_jax.models import family
from llm_jax.nn import params
from llm_jax.tokenizers import simple

PROMPTS = [[{"role": "user", "content": text}] for text in ("why", "so", "and then?", "no")]
OPTIONS = policy_comparison.Options(n=3, answers=2, max_new_tokens=4)


@pytest.fixture(scope="module")
def models(one_device):
    """The base, and the same model with its logits scaled up."""
    cfg = tiny_train(**{"model.vocab_size": 259, "model.n_layers": 1})
    tokenizer = simple.train_bytes()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    values = params.init(family(cfg.model.family).specs(cfg.model), jax.random.key(0))
    norm = {**values["final_norm"], "scale": values["final_norm"]["scale"] * 12}
    return (
        Model(cfg, values, tokenizer, one_device),
        Model(cfg, {**values, "final_norm": norm}, tokenizer, one_device),
    )


def read(folder):
    rows = [
        json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").split("\n")[:-1]
    ]
    return rows, json.loads((folder / "results.json").read_text())


def test_a_run(models, tmp_path):
    base, sharper = models
    points = policy_comparison.run(
        base,
        PROMPTS,
        judges.rule("rule:longer"),
        tmp_path,
        options=OPTIONS,
        against={"the same": lambda: base, "sharper": lambda: sharper},
    )
    assert [p.name for p in points] == ["base", "best of 2", "best of 3", "the same", "sharper"]
    same, other = points[3:]
    assert same.kl == 0 and same.kl_error == 0 and other.kl > 3 * other.kl_error > 0
    rows, results = read(tmp_path)
    assert len(rows) == 3 * len(PROMPTS)
    for row in rows:
        assert row["scores"] == [len(text) for text in row["answers"]]
        assert len(row["answers"]) == (4 if row["policy"] == "base" else 2)
    ours = np.array([row["scores"] for row in rows[:4]])
    assert points[0].score == pytest.approx(ours.mean()) == points[0].length
    assert points[2].score > points[0].score and points[2].wins is not None
    # The same model under another name: no answer is drawn with the random numbers of the base's.
    assert rows[4]["answers"][0] not in rows[0]["answers"]
    assert results["settings"]["n"] == 3 and results["points"][4]["kl"] == pytest.approx(other.kl)
    assert results["policies"][2]["k3"] > 0 and results["policies"][1]["k3"] == 0
    found, _ = preferences.read([str(tmp_path / "answers.jsonl")])
    assert found and found[0].kind == "rated"
    assert list(found[0].prompt) == PROMPTS[0]
    text = (tmp_path / "report.md").read_text()
    assert "sharper" in text and "[best of 3, " in text and (tmp_path / "plots").is_dir()


def test_what_was_drawn_is_not_drawn_again(models, tmp_path):
    """A judge that fails, and then a model that cannot be loaded, cost no answer."""
    calls, longer = [], judges.rule("rule:longer")

    def fails(conversations):
        calls.append(len(conversations))
        raise ValueError("no judge")

    def never():
        raise FileNotFoundError("gone")

    ask = functools.partial(policy_comparison.run, models[0], PROMPTS, options=OPTIONS)
    with pytest.raises(ValueError, match="no judge"):
        ask(fails, tmp_path / "a", against={"sharper": never})
    with pytest.raises(FileNotFoundError, match="gone"):
        ask(longer, tmp_path / "a", against={"sharper": never})
    assert (tmp_path / "a/drawn.json").is_file() and not (tmp_path / "a/results.json").exists()
    found = policy_comparison.run(
        None,
        PROMPTS,
        longer,
        tmp_path / "a",
        options=OPTIONS,  # asked for nothing again
    )
    assert found == ask(longer, tmp_path / "b")
    assert not (tmp_path / "a/drawn.json").exists()


def test_at_another_temperature_no_divergence_is_told(models, tmp_path):
    base, sharper = models
    options = policy_comparison.Options(n=3, answers=2, max_new_tokens=4, temperature=0.7)
    points = policy_comparison.run(
        base,
        PROMPTS,
        judges.rule("rule:longer"),
        tmp_path,
        options=options,
        against={"sharper": lambda: sharper},
    )
    assert points[-1].kl is None and points[1].kl is not None
    assert "temperature 0.7" in (tmp_path / "report.md").read_text()


def test_what_cannot_run(models, tmp_path):
    judge = judges.rule("rule:longer")
    with pytest.raises(ValueError, match="--temperature=0"):
        policy_comparison.Options(temperature=0.0)
    with pytest.raises(ValueError, match="--answers=0 has to be at least 1"):
        policy_comparison.Options(answers=0)
    with pytest.raises(ValueError, match=r"two of them at least \(--prompts"):
        policy_comparison.run(models[0], PROMPTS[:1], judge, tmp_path, options=OPTIONS)


def test_the_binary(models, tmp_path):
    models[0].save(tmp_path / "base")
    rows = [{"prompt": "why"}, {"prompt": "so"}, {"text": "none"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        f"--checkpoint={tmp_path / 'base'}",
        f"--input={tmp_path / 'rows.jsonl'}",
        f"--output={tmp_path / 'out'}",
        "--n=2",
        "--max_new_tokens=4",
    ]
    done = run_binary("best_of_n", *flags, "--judge=rule:shorter", f"--against={tmp_path / 'base'}")
    assert done.returncode == 0, done.stderr
    assert "2 prompts; 1 rows have none" in done.stdout and "best of 2" in done.stdout
    rows, results = read(tmp_path / "out")
    assert [row["policy"] for row in rows] == ["base"] * 2 + [str(tmp_path / "base")] * 2
    assert results["points"][-1]["kl"] == 0
    done = run_binary("best_of_n", *flags, "--judge=rule:shorter")
    assert done.returncode == 1 and "is there already; give another --output" in done.stderr
    assert read(tmp_path / "out")[1] == results
    done = run_binary("best_of_n", *flags, "--judge=rule:shorter", "--held_out_of=x")
    assert done.returncode == 1 and "is needed, and not both" in done.stderr
