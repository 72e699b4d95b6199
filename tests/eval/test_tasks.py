"""What tasks count as right, and what evaluate_tasks makes of a model's scores."""

import json
import math
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny import tiny_model

from llm_jax import tokenizers
from llm_jax.decode.generate import Completion
from llm_jax.eval import answers, datasets, run, tasks
from llm_jax.eval.datasets import Item
from llm_jax.eval.run import Options, evaluate_tasks
from llm_jax.eval.scoring import Score, score_continuations
from llm_jax.models import decoder
from llm_jax.nn import params as P


def scores(*pairs):
    return [Score(log_prob, False, n) for log_prob, n in pairs]


def test_normalisations_choose_differently():
    """-4 of "ab" (1 token), -9 of "abcdefghij" (6), -8 of "abcdef" (4), -5 of "a" (1):
    per character -2, -0.9, -1.33, -5; per token -4, -1.5, -2, -5; less -3, -6, -7.5, -3.5:
    -1, -3, -0.5, -1.5. Each metric has another answer, and only its own is right."""
    texts = ["ab", "abcdefghij", "abcdef", "a"]
    found = scores((-4, 1), (-9, 6), (-8, 4), (-5, 1))
    bare = scores((-3, 1), (-6, 6), (-7.5, 4), (-3.5, 1))
    for gold in range(4):
        item = Item("q", tuple(texts), (gold,))
        metrics, chosen = tasks.judge_choices(item, found, texts, bare)
        assert chosen == {"acc": 0, "acc_norm": 1, "acc_token": 1, "acc_pmi": 2}
        assert metrics == {name: float(choice == gold) for name, choice in chosen.items()}
    # Characters, not bytes, and without the delimiter:
    item = Item("q", ("éé", "abc"), (0,))
    _, chosen = tasks.judge_choices(item, scores((-3, 1), (-3.6, 1)), item.answers)
    assert chosen["acc_norm"] == 1  # -1.5 against -1.2; by bytes it would be -0.75 against -1.2
    _, chosen = tasks.judge_choices(item, scores((-3, 1), (-4.4, 1)), item.answers)
    assert chosen["acc_norm"] == 1  # -1.5 against -1.47; with the delimiter -1 against -1.1
    _, chosen = tasks.judge_choices(item, scores((-3, 2), (-2, 1)), item.answers)
    assert chosen["acc_token"] == 0
    assert tasks.judge_choices(item, scores((-3, 1), (-4, 1)))[0] == {"acc": 1.0}


def test_true_mass():
    item = Item("q", ("a", "b", "c"), (0, 2))
    found = scores(*[(math.log(p) - 900, 1) for p in (0.1, 0.2, 0.5)])
    assert tasks.true_mass(item, found) == pytest.approx(0.6 / 0.8)


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        ("3*4 = <<3*4=12>>12\n#### 12", "12", "12"),
        ("#### -1,234.\nSo 7", "-1,234.", "7"),
        ("It is $1,000. That is 5 more", None, "5"),
        ("so she pays $18.00.", None, "$18.00."),
        ("The answer is twelve", None, None),
        ("####12", None, "12"),  # the space belongs to it
        ("a #### 3 b #### 4", "3", "4"),
        ("Wait...", None, "..."),  # as lm_eval's expression has it: two of "$0-9.," in a row
        ("", None, None),
    ],
)
def test_gsm8k_extraction(text, strict, flexible):
    assert answers.strict_number(text) == strict
    assert answers.last_number(text) == flexible


def test_extraction_equals_lm_eval():
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    metrics = pytest.importorskip("lm_eval.api.metrics")
    strict = extraction.RegexFilter("#### (\\-?[0-9\\.\\,]+)")
    flexible = extraction.RegexFilter("(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    ignored = [",", "\\$", "(?s).*#### ", "\\.$"]
    gold = "He pays 1,000 + 5.\n#### 1,005"
    rng = np.random.default_rng(0)
    pieces = ["#### ", "1,005", "1005", "$", ".", "-", " ", "\n", "12", ",", "5", "so "]
    texts = ["".join(rng.choice(pieces, rng.integers(1, 8))) for _ in range(300)]
    right = 0
    for text in texts:
        for theirs, ours in ((strict, "strict"), (flexible, "flexible")):
            want = theirs.apply([[text]], [{}])[0][0]
            got = answers.EXTRACTIONS[ours](text)
            assert (got or "[invalid]") == want or (got, want) == (None, ""), text
            score = metrics.exact_match_hf_evaluate(
                [want], [gold], regexes_to_ignore=ignored, ignore_case=True
            )
            ok = answers.matches(got, gold, numbers=True)
            assert ok == bool(score["exact_match"]), text
            right += ok
    assert 20 < right < 500


def test_other_extractions():
    assert answers.letter("Thinking... the answer is (B).") == "B"
    assert answers.letter("Answer: c") == "C"
    assert answers.letter("D. because") == "D"
    assert answers.letter("Because of A") is None
    assert answers.first_line("\n Paris \nis") == "Paris"
    assert answers.whole("  a\nb ") == "a\nb"
    assert answers.matches("Paris", " paris", numbers=False)
    assert not answers.matches("1,000", "1000", numbers=False)
    assert answers.matches("1,000.", "x #### 1000", numbers=True)
    assert not answers.matches(None, "", numbers=False)


@pytest.fixture(scope="module")
def model():
    tokenizer = tokenizers.train("byte", [])
    cfg = tiny_model(vocab_size=tokenizer.vocab_size, init_std=0.3, max_length=512)
    return P.init(decoder.specs(cfg), jax.random.key(1)), cfg, tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


CHOICES = [
    {"question": f"What is {a} and {b}?", "choices": [f"{a}{b}", f"it is {b}", "no"], "answer": n}
    for a, b, n in [("x", "y", 0), ("p", "q", "it is q"), ("m", "n", "C"), ("u", "v", 1)]
]


def test_multiple_choice_end_to_end(model, tmp_path):
    """Metrics, records and calibration follow from the model's own scores of prompt and answer."""
    path = write(tmp_path / "mine.jsonl", CHOICES)
    records = []
    options = Options(input=path, batch_size=4, pmi=True)
    out = evaluate_tasks(*model, ["multiple_choice"], options, record=records.append)
    params, cfg, tokenizer = model
    gold = [0, 1, 2, 1]
    right, confidence = {"acc": [], "acc_norm": [], "acc_token": []}, []
    for row, answer, record in zip(CHOICES, gold, records, strict=True):
        pairs = [
            (tokenizer.encode(f"Question: {row['question']}\nAnswer:"), tokenizer.encode(" " + c))
            for c in row["choices"]
        ]
        log_p = np.array([s.log_prob for s in score_continuations(params, cfg, pairs)])
        np.testing.assert_allclose(record["log_probs"], log_p, atol=1e-4)
        right["acc"].append(log_p.argmax() == answer)
        right["acc_norm"].append((log_p / [len(c) for c in row["choices"]]).argmax() == answer)
        right["acc_token"].append((log_p / [len(c) + 1 for c in row["choices"]]).argmax() == answer)
        confidence.append(float(np.max(np.exp(log_p) / np.exp(log_p).sum())))
        assert record["gold"] == [answer]
    result = out["multiple_choice"]
    assert result["n"] == 4 and result["num_fewshot"] == 0 and result["window"] == 512
    for name, values in right.items():
        assert result["metrics"][name]["value"] == pytest.approx(np.mean(values))
        error = np.std(values, ddof=1) / 2
        assert result["metrics"][name]["stderr"] == pytest.approx(error)
    assert "acc_pmi" in result["metrics"]
    gap = np.zeros(10)  # bins (0, 0.1], (0.1, 0.2], ...
    for c, ok in zip(confidence, right["acc"], strict=True):
        gap[math.ceil(c * 10) - 1] += ok - c
    assert result["calibration_error"]["value"] == pytest.approx(np.abs(gap).sum() / 4, abs=1e-5)
    assert result["first_prompt"] == "Question: What is x and y?\nAnswer:"
    lines = [line.split() for line in run.table(out).splitlines()]
    assert [line[3] for line in lines[1:]] == [*result["metrics"], "calibration_error"]
    assert lines[1][:3] == ["multiple_choice", "4", "0"]


def test_calibration_has_ten_bins():
    """Confidence 0.35 and right, 0.45 and wrong: (0.65 + 0.45) / 2. In one bin it would be 0.1."""
    asked = [run.Question(Item("q", ("a", "b")), ["q"], ["a", "b"])] * 2
    judged = [{"metrics": {"acc": a}, "confidence": c} for a, c in [(1.0, 0.35), (0.0, 0.45)]]
    found = run._summary(asked, judged)["calibration_error"]
    assert found["value"] == pytest.approx(0.55) and found["bins"] == 10


def test_published_data_sets(monkeypatch):
    """--input=hf is the published data set, with its own split of worked examples."""
    loaded = []
    row = {"question": "q?", "answer": "#### 1"}

    def load_dataset(name, config, *, split):
        loaded.append((name, config, split))
        return [row, {**row, "question": split}]

    library = type("datasets", (), {"load_dataset": staticmethod(load_dataset)})
    monkeypatch.setitem(sys.modules, "datasets", library)
    asked = run._ask("gsm8k", None, Options(input="hf", num_fewshot=1))
    assert loaded == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    assert [q.item.question for q in asked] == ["q?", "test"]
    loaded.clear()
    monkeypatch.setitem(tasks.TASKS, "gsm8k", replace(tasks.TASKS["gsm8k"], num_fewshot=0))
    run._ask("gsm8k", None, Options(input="hf:mine"))
    assert loaded == [("mine", None, "test")]
    with pytest.raises(ValueError, match=r"--task=multiple_choice needs --input.*hf:NAME"):
        run._ask("multiple_choice", None, Options(input="hf"))


def test_mmlu_both_ways(model, tmp_path):
    """Letters against whole answers; micro, macro and categories; examples of the same subject."""
    dev, test = tmp_path / "dev", tmp_path / "test"
    dev.mkdir(), test.mkdir()
    sizes = {"anatomy": 3, "world_religions": 1}
    for subject, n in sizes.items():
        header = "question,choice0,choice1,choice2,choice3,answer\n"
        row = f"{subject} %d?,one {subject},two,three,four,%d\n"
        text = header + "".join(row % (i, i % 4) for i in range(n))
        (test / f"{subject}_test.csv").write_text(text)
        text = header + "".join(row % (i + 50, i) for i in range(2))
        (dev / f"{subject}_dev.csv").write_text(text)
    records = []
    options = Options(input=str(tmp_path), num_fewshot=2)
    result = evaluate_tasks(*model, ["mmlu"], options, record=records.append)["mmlu"]
    assert result["first_prompt"] == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "anatomy 50?\nA. one anatomy\nB. two\nC. three\nD. four\nAnswer: A\n\n"
        "anatomy 51?\nA. one anatomy\nB. two\nC. three\nD. four\nAnswer: B\n\n"
        "anatomy 0?\nA. one anatomy\nB. two\nC. three\nD. four\nAnswer:"
    )
    assert result["first_answers"] == ["A", "B", "C", "D"] and result["scoring"] == "letters"
    other = run._ask("mmlu", None, options)[-1].prompts[0]  # its examples are of its subject
    assert other.count("world_religions") == 6 and "about world religions." in other
    assert "anatomy" not in other
    by = {s: [r["metrics"]["acc"] for r in records if r["group"] == s] for s in sizes}
    assert result["metrics"]["acc"]["value"] == pytest.approx(
        np.mean([v for vs in by.values() for v in vs])
    )
    assert result["macro"]["acc"]["value"] == pytest.approx(
        np.mean([np.mean(v) for v in by.values()])
    )
    assert {s: g["n"] for s, g in result["groups"].items()} == sizes
    assert {c: g["n"] for c, g in result["categories"].items()} == {"stem": 3, "humanities": 1}
    assert "acc_norm" not in result["metrics"]  # letters are all as long

    one_each = Options(input=str(tmp_path), num_fewshot=0, scoring="answers", limit=1)
    result = evaluate_tasks(*model, ["mmlu"], one_each)["mmlu"]
    assert result["n"] == 2  # one of each subject
    assert result["first_answers"] == ["one anatomy", "two", "three", "four"]
    assert result["first_prompt"].endswith("about anatomy.\n\nQuestion: anatomy 0?\nAnswer:")
    assert {"acc", "acc_norm", "acc_token"} <= set(result["metrics"])


def test_last_word(model, tmp_path):
    params, cfg, tokenizer = model
    rows = [{"text": "a b c"}, {"text": "one two threes"}]
    path = write(tmp_path / "lambada.jsonl", rows)
    out = evaluate_tasks(*model, ["lambada"], Options(input=path))["lambada"]
    pairs = [("a b", " c"), ("one two", " threes")]
    pairs = [tuple(map(tokenizer.encode, pair)) for pair in pairs]
    log_p = [s.log_prob for s in score_continuations(params, cfg, pairs)]
    assert out["metrics"]["perplexity"]["value"] == pytest.approx(
        math.exp(-np.mean(log_p)), rel=1e-4
    )
    assert out["metrics"]["acc"]["value"] == 0.0 and "log_prob" not in out["metrics"]


def test_generation(model, tmp_path, monkeypatch):
    """Answers go back to their own questions whatever the batches, and both extractions count."""
    rows = [{"question": "q" * (5 * i), "answer": f"so\n#### {i}"} for i in range(5)]
    path = write(tmp_path / "test.jsonl", rows)
    seen = []

    def generate(params, cfg, tokenizer, prompts, **options):
        seen.append((len(prompts), options["max_new_tokens"]))
        texts = [tokenizer.decode(p) for p in prompts]
        return [Completion(f"It is {t.count('q') // 5}", [], [], "stop") for t in texts]

    monkeypatch.setattr(run, "generate", generate)
    options = Options(input=path, num_fewshot=0, batch_size=2, max_new_tokens=7)
    records = []
    out = evaluate_tasks(*model, ["gsm8k"], options, record=records.append)["gsm8k"]
    assert out["metrics"]["exact_match_flexible"]["value"] == 1.0
    assert out["metrics"]["exact_match_strict"]["value"] == 0.0
    assert [r["text"] for r in records] == [f"It is {i}" for i in range(5)]
    assert seen == [(2, 7)] * 3  # one shape, the last batch too
    with pytest.raises(ValueError, match="--max_new_tokens=600 leaves no room"):
        evaluate_tasks(*model, ["gsm8k"], Options(input=path, num_fewshot=0, max_new_tokens=600))


def test_generation_with_a_model(model, tmp_path):
    rows = [{"prompt": "Say something:", "answer": "x"}]
    path = write(tmp_path / "generation.jsonl", rows)
    records = []
    options = Options(input=str(path), max_new_tokens=4, extract=("exact",))
    out = evaluate_tasks(*model, ["generation"], options, record=records.append)["generation"]
    assert set(out["metrics"]) == {"exact_match_exact"} and isinstance(records[0]["text"], str)


def test_refusals(model, tmp_path):
    """Before anything is computed, in one line that names what to change."""
    rows = CHOICES[:1]
    for folder in ("mine", "another"):
        (tmp_path / folder).mkdir()
    path = write(tmp_path / "mine" / "mine.jsonl", rows)
    write(tmp_path / "another" / "train.jsonl", rows)  # of another data set: not gsm8k's examples
    for names, options, message in [
        (["arc_eazy"], {}, "--task=arc_eazy is unknown"),
        (["boolq"], {}, "--task=boolq needs --input: boolq.jsonl"),
        (["arc"], {"input": str(tmp_path)}, "no arc_easy.jsonl"),
        (["piqa"], {"input": path}, "no column 'goal', only subject, question.*wanted: goal, sol1"),
        (["winogrande"], {"input": path, "scoring": "letters"}, "--scoring=letters makes no sense"),
        (["multiple_choice"], {"input": path, "scoring": "x"}, "--scoring='x' is unknown"),
        (["multiple_choice"], {"input": path, "num_fewshot": 1}, "--num_fewshot=1 wants more"),
        (["generation"], {"input": path, "extract": ("y",)}, "--extract=y is unknown"),
        (["gsm8k"], {"input": path}, "beside it for worked examples; .*--fewshot_input"),
        (["mmlu"], {"input": str(tmp_path / "no.csv")}, "no such file"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            evaluate_tasks(None, model[1], model[2], names, Options(**options))
    bad = write(tmp_path / "bad.jsonl", [{**CHOICES[0], "answer": 3}])
    with pytest.raises(ValueError, match="row 1: the answer is number 3 of 3 choices"):
        evaluate_tasks(None, model[1], model[2], ["multiple_choice"], Options(input=bad))
    (tmp_path / "cut.jsonl").write_text('{"question": "a", "choi')
    with pytest.raises(ValueError, match=r"cut.jsonl: damaged file"):
        evaluate_tasks(
            None, *model[1:], ["multiple_choice"], Options(input=str(tmp_path / "cut.jsonl"))
        )


def test_perplexity_task(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times.")
    out = evaluate_tasks(*model, ["perplexity"], Options(input=str(text), window=16, stride=8))
    found = out["perplexity"]
    assert (
        found["n"] == 1 and found["tokens"] == 52 and (found["window"], found["stride"]) == (16, 8)
    )
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(
        math.exp(found["metrics"]["nats_per_token"]["value"])
    )


def test_real_files(data_dir):
    """Every file of the real collection can be read, with as many questions as it should have."""
    for name, n in {
        "eval/arc_easy.jsonl": 2376,
        "eval/arc_challenge.jsonl": 1172,
        "eval/boolq.jsonl": 3270,
        "eval/piqa.jsonl": 1838,
        "eval/winogrande.jsonl": 1267,
        "eval/lambada_openai.jsonl": 5153,
        "gsm8k/test.jsonl": 1319,
    }.items():
        key = name.split("/")[-1].split(".")[0].split("_openai")[0]
        task = tasks.TASKS["gsm8k" if "gsm8k" in name else key]
        items = datasets.read_items(f"{data_dir}/{name}", task.read, wants=task.wants)
        assert len(items) == n
        question = tasks.pose(task, items[0], "answers")[0][0]
        assert not question.startswith(("Question: Question:", "Passage:"))
        assert not question.endswith((" ", "\n\nAnswer:"))
    mmlu = run._ask("mmlu", None, Options(input=f"{data_dir}/mmlu"))
    assert len(mmlu) == 14042 and len({q.item.group for q in mmlu}) == 57
    assert {q.item.group for q in mmlu} == set(tasks.MMLU_CATEGORY)
    for name in ("truthfulqa_mc1", "truthfulqa_mc2"):
        assert len(run._ask(name, None, Options(input=f"{data_dir}/eval"))) == 817
