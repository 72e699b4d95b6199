"""A rule judges the answer alone, and what is no rule is refused in one line."""

import numpy as np
import pytest

from llm_jax.align import judges


def asked(*texts):
    """Conversations whose question has what an answer is judged by."""
    return [
        [
            {"role": "user", "content": "Why? A cat, a cat, a cat."},
            {"role": "assistant", "content": t},
        ]
        for t in texts
    ]


@pytest.mark.parametrize(
    ("spec", "texts", "scores"),
    [
        ("rule:shorter", ["", "abc", "a cat."], [0, -3, -6]),
        ("rule:longer", ["", "abc", "a cat."], [0, 3, 6]),
        ("rule:contains:cat", ["a cat.", "A Cat", ""], [1, 0, 0]),
        ("rule:contains:a: b", ["so a: b", "a"], [1, 0]),  # all after the second colon
        ("rule:contains: ", ["one", "two words"], [0, 1]),
        ("rule:lacks:cat", ["a cat.", "A Cat", ""], [0, 1, 1]),
        (r"rule:matches:\d+", ["in 1999 too", "never"], [1, 0]),  # anywhere, not from the start
        (r"rule:matches:^(?:a|b):", ["b: yes", "so b: no"], [1, 0]),
        (
            "rule:ends",
            ["It is.", "It is", 'He said "go!"', "Really? ", "1. one\n2. two", ""],
            [1, 0, 1, 1, 0, 0],
        ),
        ("rule:unique_words", ["a b c d", "the The THE cat", "...", ""], [1, 0.5, 0, 0]),
    ],
)
def test_rules(spec, texts, scores):
    found = judges.rule(spec)(asked(*texts))
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, scores)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rule:shortr", "did you mean rule:shorter"),
        ("rule:kindness", "there are shorter, longer"),
        ("shorter", "did you mean rule:shorter"),
        ("rule:contains", "needs an argument: rule:contains:TEXT"),
        ("rule:lacks:", "needs an argument"),
        ("rule:longer:3", "takes no argument; drop '3'"),
        ("rule:matches:(", "no regular expression"),
    ],
)
def test_no_rule(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        judges.rule(spec)
    assert "\n" not in str(error.value)


def test_scores_stand_where_their_answers_do():
    prompts = [[{"role": "user", "content": str(i)}] for i in range(2)]
    answers = [["a", "bb", "ccc"], ["dddd", "eeeee", "ffffff"]]
    seen = []

    def judge(conversations):
        seen.extend(conversations)
        return np.array([len(c[-1]["content"]) for c in conversations])

    found = judges.score(judge, prompts, answers)
    np.testing.assert_array_equal(found, [[1, 2, 3], [4, 5, 6]])
    assert seen[3] == [*prompts[1], {"role": "assistant", "content": "dddd"}]
    assert prompts[0] == [{"role": "user", "content": "0"}]  # left as it was


def test_a_judge_that_does_not_judge():
    prompt, answers = [[{"role": "user", "content": "x"}]], [["a", "b"]]
    with pytest.raises(ValueError, match=r"2 conversations scores of shape \(1,\)"):
        judges.score(lambda c: np.zeros(1), prompt, answers)
    with pytest.raises(ValueError, match="1 scores that are not finite"):
        judges.score(lambda c: np.array([0.0, np.nan]), prompt, answers)
    with pytest.raises(ValueError, match="all of one size"):
        judges.score(lambda c: np.zeros(3), prompt * 2, [["a", "b"], ["c"]])
