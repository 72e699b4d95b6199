"""Every rule rejects what it is for and lets a good text pass; similarity is rouge-score's."""

import random

import pytest

from llm_jax.align.self_instruct import filters
from llm_jax.align.self_instruct.filters import Similarity
from llm_jax.align.self_instruct.tasks import SEED_TASKS, read_tasks

KNOWN = Similarity(["Name three animals that live in the desert."])


def test_similarity_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    rng = random.Random(0)
    vocabulary = ["the", "a", "Cat", "sat", "on", "mat,", "it's", "42", "été", "re-do", "..."]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(0, 14))) for _ in range(60)]
    ours = Similarity(texts[:20])
    for text in texts[20:]:
        want = [scorer.score(other, text)["rougeL"].fmeasure for other in texts[:20]]
        assert ours.all(text) == pytest.approx(want, abs=1e-12)


def test_similarity_is_of_subsequences_not_of_shared_words():
    # All four words are shared, of which only one can be taken in order: 1/4, not 1.
    assert Similarity(["one two three four"]).highest("four three two one") == 0.25


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "empty"),
        ("Explain how a bridge can carry \ufffd weight.", "bad characters"),
        ("Explain how a bridge\nCan it carry weight?", "several lines"),
        ("Task 3: explain how a bridge carries weight.", "echoes the prompt"),
        ("Write a new task about a bridge.", "echoes the prompt"),
        ("Étudie ce que dit la phrase.", "starts with non-ASCII"),
        ("- explain how a bridge carries weight.", "starts with punctuation"),
        ("Explain a bridge.", "too short"),
        ("Explain " + " ".join(f"w{i}" for i in range(150)), "too long"),
        ("Explain each of the following words:", "announces more"),
        ("Draw a bridge over a river.", "keyword"),
        ("Describe what the Image shows.", "keyword"),
        ("Write a program that adds two numbers.", "write a program"),
        ("Say it is good it is good it is good it is good", "repetition loop"),
        ("name three animals that live in the desert", "duplicate"),
        ("Name three animals that live in the cold desert.", "similar"),
        ("Explain how a bridge carries weight.", None),
        # "image" inside another word, and a word said three times, are no faults.
        ("Imagine a very very very tall tower.", None),
    ],
)
def test_instructions(text, rule):
    assert filters.instruction_fault(text, True, KNOWN, 0.7) == rule
    if text and rule != "empty":
        assert filters.instruction_fault(text, False, KNOWN, 0.7) == "truncated"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "empty"),
        (" ... ", "no word"),
        ("Sort the words", "repeats the instruction"),
        ("b a", "repeats the input"),
        ("Here they are:", "announces more"),
        ("I'm sorry, but I cannot help.", "refusal"),
        ("As an AI I have no words.", "refusal"),
        ("a b <|im_end|>", "echoes the prompt"),
        ("a b\nInput: c d", "echoes the prompt"),
        ("one line here\nother\none line here\nmore\none line here", "repetition loop"),
        (" ".join(f"w{i}" for i in range(401)), "too long"),
        ("a b", None),
    ],
)
def test_outputs(text, rule):
    assert filters.output_fault(text.strip(), True, "Sort the words.", "b, a") == rule
    if text:
        assert filters.output_fault(text.strip(), False, "Sort the words.", "b, a") == "truncated"


def test_inputs():
    instruction = "Sort the words."
    assert filters.input_fault("b, a", True, instruction) is None
    assert filters.input_fault("", True, instruction) is None  # none is needed
    assert filters.input_fault("sort the words", True, instruction) == "repeats the instruction"
    assert filters.input_fault("b, a", False, instruction) == "truncated"


def test_seed_tasks_are_twenty_different_ones_that_pass_the_rules():
    tasks = read_tasks(SEED_TASKS)
    assert len(tasks) == 20
    known = Similarity()
    for t in tasks:
        assert filters.output_fault(t.output, True, t.instruction, t.input) is None, t
        assert filters.input_fault(t.input, True, t.instruction) is None, t
        assert filters.instruction_fault(t.instruction, True, known, 0.5) is None, t
        known.add(t.instruction)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: a task has to be an object"),
        ('{"instruction": "Do it"}', "line 2: 'output' is missing or empty"),
        ('{"instruction": "Do it", "output": 3}', "line 2: 'output' has to be a text"),
        ('{"instruction": "Do it", "output": "x"}', "2 seed tasks; at least 8"),
    ],
)
def test_bad_seed_tasks_are_named(tmp_path, line, words):
    path = tmp_path / "seeds.jsonl"
    path.write_text('{"instruction": "Say yes.", "output": "yes"}\n' + line + "\n")
    with pytest.raises(ValueError, match=words):
        read_tasks(path)
