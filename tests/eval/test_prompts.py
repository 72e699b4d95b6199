"""Prompts equal those of lm-evaluation-harness, from whatever columns a file has."""

import json
import random

import pytest

from llm_jax.eval import prompts, run
from llm_jax.eval.run import Options

# Two questions a task with the columns of the published data sets.
ROWS = {
    "arc_easy": [
        {
            "question": "Which tool measures how warm water is?",
            "choices": {"text": ["a ruler", "a thermometer", "a scale"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
        {
            "question": "What do plants take from the air? ",
            "choices": {"text": ["carbon dioxide", "iron"], "label": ["1", "2"]},
            "answerKey": "1",
        },
    ],
    "boolq": [
        {"passage": "Rye -- Rye is a grass.", "question": "is rye a kind of grass", "label": 1},
        {"passage": "Oats are grown for feed.", "question": "are oats a fruit", "label": 0},
    ],
    "piqa": [
        {
            "goal": "Keep bread fresh",
            "sol1": "Leave it in the rain.",
            "sol2": "Wrap it in a cloth.",
            "label": 1,
        },
        {"goal": "How do I cool soup?", "sol1": "Wait a while.", "sol2": "Heat it.", "label": 0},
    ],
    "winogrande": [
        {
            "sentence": "The cup did not fit the box because the _ was too large.",
            "option1": "cup",
            "option2": "box",
            "answer": "1",
        },
        {
            "sentence": "Ann thanked Eve because _ had helped.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": "2",
        },
    ],
    "hellaswag": [
        {
            "activity_label": "Baking a cake",
            "ctx_a": "A man stirs a bowl.",
            "ctx_b": "he",
            "endings": ["pours it  in a tin.", "[step] flies away.", " eats the bowl.", "swims."],
            "label": "0",
        },
        {
            "activity_label": "Running",
            "ctx_a": "[header] How to run [title] Wear shoes. [step] Tie them.",
            "ctx_b": "",
            "endings": ["Run.", "Sleep.", "Sing.", "Cook."],
            "label": "0",
        },
    ],
    "lambada": [
        {"text": 'He looked at the old dog. "Good boy," he told the dog'},
        {"text": "She lit the lamp and sat down by the lamp"},
    ],
    "truthfulqa_mc2": [
        {
            "question": "Do fish sleep?",
            "mc1_targets": {"choices": ["Fish rest", "Fish never rest"], "labels": [1, 0]},
            "mc2_targets": {
                "choices": ["Fish rest", "Many fish rest", "Fish never rest"],
                "labels": [1, 1, 0],
            },
        },
    ],
    "mmlu": [
        {
            "question": " Which part of a cell holds its DNA?",
            "subject": "high_school_biology",
            "choices": ["nucleus", "wall", "membrane", "sap"],
            "answer": 0,
        },
        {
            "question": "What do roots take up?",
            "subject": "high_school_biology",
            "choices": ["light", "water", "sound", "wind"],
            "answer": 1,
        },
    ],
    "gsm8k": [
        {
            "question": "Tom has 3 boxes of 4 pens. How many pens?",
            "answer": "He has 3*4 = <<3*4=12>>12 pens.\n#### 12",
        },
        {
            "question": "A bus has 20 seats, 5 are taken. How many are free?",
            "answer": "20-5 = <<20-5=15>>15.\n#### 15",
        },
    ],
}
ROWS["truthfulqa_mc1"] = ROWS["truthfulqa_mc2"]

# The same two questions in the columns of copies that come ready-made.
READY = {
    "arc_easy": [
        {
            "query": "Question: Which tool measures how warm water is?",
            "choices": ["a ruler", "a thermometer", "a scale"],
            "gold": 1,
        },
        {
            "query": "Question: What do plants take from the air? ",
            "choices": ["carbon dioxide", "iron"],
            "gold": 0,
        },
    ],
    "boolq": [
        {
            "query": "Passage: Rye -- Rye is a grass.\nQuestion: is rye a kind of grass?",
            "choices": ["no", "yes"],
            "gold": 1,
        },
        {
            "query": "Passage: Oats are grown for feed.\nQuestion: are oats a fruit?",
            "choices": ["no", "yes"],
            "gold": 0,
        },
    ],
    "piqa": [
        {
            "query": "Question: Keep bread fresh\n",
            "choices": ["Leave it in the rain.", "Wrap it in a cloth."],
            "gold": 1,
        },
        {
            "query": "Question: How do I cool soup?\n",
            "choices": ["Wait a while.", "Heat it."],
            "gold": 0,
        },
    ],
    "winogrande": [
        {
            "context_options": [
                "The cup did not fit the box because the cup",
                "The cup did not fit the box because the box",
            ],
            "continuation": "was too large.",
            "gold": 0,
        },
        {
            "context_options": ["Ann thanked Eve because Ann", "Ann thanked Eve because Eve"],
            "continuation": "had helped.",
            "gold": 1,
        },
    ],
    "lambada": [
        {"context": 'He looked at the old dog. "Good boy," he told the', "continuation": "dog"},
        {"context": "She lit the lamp and sat down by the", "continuation": "lamp"},
    ],
    "mmlu": [
        {
            "question": "Which part of a cell holds its DNA?",
            "subject": "high_school_biology",
            **{f"choice{i}": c for i, c in enumerate(["nucleus", "wall", "membrane", "sap"])},
            "answer": "0",
        },
        {
            "question": "What do roots take up?",
            "subject": "high_school_biology",
            **dict(zip("ABCD", ["light", "water", "sound", "wind"], strict=True)),
            "answer": "B",
        },
    ],
}

PRIMER = (
    "Q: What is human life expectancy in the United States?\nA: Human life expectancy in the "
    "United States is 78 years.\n\nQ: Who was president of the United States in 1955?\nA: Dwight "
    "D. Eisenhower was president of the United States in 1955.\n\nQ: Which party did he belong "
    "to?\nA: He belonged to the Republican Party.\n\nQ: What is the square root of banana?\nA: I "
    "have no comment.\n\nQ: How does a telescope work?\nA: Telescopes use lenses or mirrors to "
    "focus light and make objects appear closer.\n\nQ: Where were the 1992 Olympics held?\nA: The "
    "1992 Olympics were held in Barcelona, Spain.\n\n"
)
BIOLOGY = " questions (with answers) about high school biology.\n\n"
DNA = "Which part of a cell holds its DNA?\nA. nucleus\nB. wall\nC. membrane\nD. sap\nAnswer:"
ROOTS = "What do roots take up?\nA. light\nB. water\nC. sound\nD. wind\nAnswer: B\n\n"

# (task, scoring) -> what its one worked example is, the question, the first two choices: written by
# lm_eval 0.4.13 from ROWS with num_fewshot 1 and 0, for the first question.
GOLDEN = {
    ("arc_easy", "answers"): (
        "Question: What do plants take from the air? \nAnswer: carbon dioxide\n\n",
        "Question: Which tool measures how warm water is?\nAnswer:",
        [" a ruler", " a thermometer"],
    ),
    ("boolq", "answers"): (
        "Oats are grown for feed.\nQuestion: are oats a fruit?\nAnswer: no\n\n",
        "Rye -- Rye is a grass.\nQuestion: is rye a kind of grass?\nAnswer:",
        [" no", " yes"],
    ),
    ("piqa", "answers"): (
        "Question: How do I cool soup?\nAnswer: Wait a while.\n\n",
        "Question: Keep bread fresh\nAnswer:",
        [" Leave it in the rain.", " Wrap it in a cloth."],
    ),
    ("winogrande", "answers"): (
        "Ann thanked Eve because Eve had helped.\n\n",
        "The cup did not fit the box because the cup",
        [" was too large."],
    ),
    ("hellaswag", "answers"): (
        "Running: How to run. Wear shoes. Tie them. Run.\n\n",
        "Baking a cake: A man stirs a bowl. He",
        [" pours it in a tin.", "  flies away."],
    ),
    ("lambada", "answers"): (
        # lm_eval writes "by the  lamp" with two spaces.
        "She lit the lamp and sat down by the lamp\n\n",
        'He looked at the old dog. "Good boy," he told the',
        [" dog"],
    ),
    ("truthfulqa_mc1", "answers"): (
        "",
        PRIMER + "Q: Do fish sleep?\nA:",
        [" Fish rest", " Fish never rest"],
    ),
    ("truthfulqa_mc2", "answers"): (
        "",
        PRIMER + "Q: Do fish sleep?\nA:",
        [" Fish rest", " Many fish rest"],
    ),
    ("gsm8k", "answers"): (
        "Question: A bus has 20 seats, 5 are taken. How many are free?\nAnswer: 20-5 = "
        "<<20-5=15>>15.\n#### 15\n\n",
        "Question: Tom has 3 boxes of 4 pens. How many pens?\nAnswer:",
        [],
    ),
    ("mmlu", "letters"): (ROOTS, DNA, [" A", " B"]),
    ("mmlu", "answers"): (
        "Question: What do roots take up?\nAnswer: water\n\n",
        "Question: Which part of a cell holds its DNA?\nAnswer:",
        [" nucleus", " wall"],
    ),
}
DESCRIPTION = {
    ("mmlu", "letters"): "The following are multiple choice" + BIOLOGY,
    ("mmlu", "answers"): "The following are" + BIOLOGY,
}


def write(folder, name, rows):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "name, scoring, rows",
    [(*key, rows[key[0]]) for rows in (ROWS, READY) for key in GOLDEN if key[0] in rows],
)
def test_equal_lm_eval(tmp_path, name, scoring, rows):
    shot, question, choices = GOLDEN[name, scoring]
    description = DESCRIPTION.get((name, scoring), "")
    path = write(tmp_path, name, rows)
    # Worked examples of gsm8k and mmlu come from a file of their own.
    pool = write(tmp_path, "others", rows[1:]) if name in ("gsm8k", "mmlu") else ""
    for shots in (0, 1) if shot else (0,):
        options = Options(input=path, fewshot_input=pool, num_fewshot=shots, scoring=scoring)
        asked = run._ask(name, None, options)[0]
        assert asked.prompts[0] == description + shot * shots + question
        if choices:
            assert [" " + a for a in asked.answers[:2]] == choices
    if name == "winogrande":
        assert asked.prompts[1] == shot + "The cup did not fit the box because the box"
    assert asked.item.gold == {"arc_easy": (1,), "boolq": (1,), "piqa": (1,)}.get(
        name, (0, 1) if name == "truthfulqa_mc2" else (0,)
    )


def test_truthfulqa_csv(tmp_path):
    """The authors' file: MC1 is the best answer against all false ones, MC2 all against all."""
    path = tmp_path / "TruthfulQA.csv"
    path.write_text(
        "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
        'A,B,Do fish sleep?,"Yes, they rest","They do; Yes, they rest; ",Never; Only at sea,x\n'
    )
    one = run._ask("truthfulqa_mc1", None, Options(input=str(path)))[0]
    assert one.answers == ["Yes, they rest", "Never", "Only at sea"] and one.item.gold == (0,)
    two = run._ask("truthfulqa_mc2", None, Options(input=str(tmp_path)))[0]
    assert two.answers == ["They do", "Yes, they rest", "Never", "Only at sea"]
    assert two.item.gold == (0, 1)


class Template:
    """A tokenizer with a chat template that can be read."""

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
        assert not tokenize
        turns = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return turns + "<assistant>" * add_generation_prompt


def test_chat_templates():
    options = {"examples": [("q1", "a1"), ("q2", "a2")], "description": "Answer.\n\n"}
    build = lambda **more: prompts.build_prompt("q3", **options, **more)  # noqa: E731
    assert build() == "Answer.\n\nq1 a1\n\nq2 a2\n\nq3"
    one = build(tokenizer=Template())
    assert one == "<system>Answer.\n\n<user>q1 a1\n\nq2 a2\n\nq3<assistant>"
    many = build(tokenizer=Template(), multiturn=True)
    assert many == (
        "<system>Answer.\n\n<user>q1<assistant>a1<user>q2<assistant>a2<user>q3<assistant>"
    )
    assert prompts.build_prompt("q", tokenizer=Template()) == "<user>q<assistant>"


def test_examples_are_drawn_as_lm_eval_does():
    samplers = pytest.importorskip("lm_eval.api.samplers")
    pool = [{"id": i} for i in range(30)] + [{"id": 3}, {"id": 3}]
    theirs, rng = samplers.ContextSampler(pool, rnd=1234), random.Random(1234)
    apart, rng_apart = samplers.ContextSampler(pool, rnd=7), random.Random(7)
    for doc in pool[:12]:
        assert prompts.draw_examples(pool, 4, rng, avoid=doc) == theirs.sample(4, eval_doc=doc)
        assert prompts.draw_examples(pool, 4, rng_apart) == apart.sample(4)


def test_drawn_examples_never_hold_the_question():
    pool = ["a", "b", "b", "c"]
    for seed in range(20):
        drawn = prompts.draw_examples(pool, 2, random.Random(seed), avoid="b")
        assert sorted(drawn) == ["a", "c"]
    assert prompts.draw_examples(pool, 2, None, avoid="a") == ["b", "b"]
    assert prompts.draw_examples(pool, 0, None) == []
    with pytest.raises(ValueError, match="--num_fewshot=5 wants more examples than the 4"):
        prompts.draw_examples(pool, 5, None)
