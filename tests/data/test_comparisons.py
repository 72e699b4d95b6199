"""Preferences as tokens: what is held out, what fits, what is left out and why."""

import json

import numpy as np
import pytest

from llm_jax import config as configs
from llm_jax.config import DataConfig, SourceConfig, TokenizerConfig
from llm_jax.data.comparisons import OTHERS, Wanted, prepare_preferences
from llm_jax.data.packing import make_plan, packed_rows

F = float(np.float32(OTHERS))
PAIRS = [
    {"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No no no {i}"}
    for i in range(20)
]


def prepared(tmp_path, rows, *, length=128, wanted=Wanted(), **changes):  # noqa: B008
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "inputs": (str(path),),
        "format": "preference",
        "packing": "first_fit",
        "dialogue.template": "chatml",
        "eval_fraction": 0.0,
        **changes,
    }
    data = configs.override(DataConfig(), values)
    tokenizer = TokenizerConfig(kind="byte")
    return prepare_preferences(data, tokenizer, str(tmp_path / "run"), length=length, wanted=wanted)


def texts(corpus, tokens, number):
    """(trunk, [branches]) of a document as text."""
    own = slice(tokens.offsets[number], tokens.offsets[number + 1])
    ids = tokens.take(np.arange(own.start, own.stop))
    answer_N = tokens.branches.answer_N[own]

    def decode(here):
        return corpus.tokenizer.decode(ids[here].tolist(), skip_special=False)

    return decode(answer_N == 0), [decode(answer_N == k) for k in range(1, answer_N.max() + 1)]


def test_a_pair_is_a_prompt_and_two_answers_with_their_ends(tmp_path):
    corpus = prepared(tmp_path, PAIRS)
    tokens = corpus.train[0].tokens
    trunk, (chosen, rejected) = texts(corpus, tokens, 0)
    assert trunk == "<|im_start|>user\nQuestion 0?<|im_end|>\n<|im_start|>assistant"
    # The line break is the prompt's last token: it predicts the first of both.
    assert chosen == "\nYes, 0.<|im_end|>" and rejected == "\nNo no no 0<|im_end|>"
    own = slice(tokens.offsets[0], tokens.offsets[1])
    written = tokens.trained[own].astype(int)
    assert written.sum() == len("Yes, 0.") + len("No no no 0") + 2
    assert corpus.end_tokens == (corpus.tokenizer.special_tokens["<|im_end|>"],)
    (part,) = corpus.parts()
    assert (part["prompts"], part["answers"], part["pairs"]) == (20, 40, 20)
    assert part["shorter preferred"] == 1.0
    assert part["tokens"] < part["tokens without sharing"]


def test_no_prompt_is_on_both_sides(tmp_path):
    """Rows that share prompts go to one side together; by rows, half of these would be on both."""
    rows = [
        {"prompt": f"Question {i % 10}?", "chosen": f"a {i}", "rejected": f"b {i}"}
        for i in range(40)
    ]
    for seed in (-1, 0, 1):
        corpus = prepared(
            tmp_path / str(seed) if (tmp_path / str(seed)).mkdir() is None else tmp_path,
            rows,
            **{"eval_fraction": 0.3, "preference.split_seed": seed},
        )
        asked = {prompt[-1]["content"] for prompt in corpus.asked}
        assert len(asked) == 3
        train = {texts(corpus, corpus.train[0].tokens, d)[0] for d in range(7)}
        assert len(train) == 7
        assert not any(f"user\n{q}<" in text for q in asked for text in train)


def test_rows_of_one_prompt_share_its_tokens_while_they_fit(tmp_path):
    rows = [{"prompt": "Q?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(3)]
    wide = prepared(tmp_path, rows, length=128).train[0].tokens
    assert wide.documents == 1 and wide.branches.group_A.tolist() == [1, 1, 2, 2, 3, 3]
    trunk, answers = texts(prepared(tmp_path, rows), wide, 0)
    assert len(answers) == 6
    narrow = prepared(tmp_path, rows, length=wide.total - 1).train[0].tokens
    assert narrow.branches.group_A.tolist() == [1, 1, 2, 2, 1, 1]
    assert (
        narrow.total
        == wide.total + len(trunk.encode()) - 2 * len("<|im_start|>") - len("<|im_end|>") + 3
    )
    apart = prepared(tmp_path, rows, **{"preference.shared_prompt": False}).train[0].tokens
    assert apart.documents == 3
    assert apart.trained.sum() == wide.trained.sum()


def test_ratings_of_one_prompt_are_compared_and_rankings_are_not(tmp_path):
    rated = [{"prompt": "Q?", "completion": f"a {i}", "score": i} for i in range(3)]
    corpus = prepared(tmp_path, rated)
    assert corpus.train[0].tokens.branches.group_A.tolist() == [1, 1, 1]
    assert corpus.parts()[0]["pairs"] == 3
    ranked = [
        {"prompt": "Q?", "answers": ["a", "b", "c"], "ranks": [2, 1, 2]},
        {"prompt": "Q?", "answers": ["d", "e"], "ranks": [1, 2]},
    ]
    corpus = prepared(tmp_path, ranked)
    b = corpus.train[0].tokens.branches
    assert b.group_A.tolist() == [1, 1, 1, 2, 2] and b.label_A.tolist() == [-1, -2, -2, -1, -2]
    assert corpus.parts()[0]["pairs"] == 3  # the tie is none
    half = prepared(tmp_path, ranked, **{"preference.ties": "half"})
    assert half.parts()[0]["pairs"] == 4


def test_the_longest_answers_lose_first(tmp_path):
    row = {"prompt": "Q?", "chosen": "a" * 50, "rejected": "b" * 8}
    whole = prepared(tmp_path, [row]).train[0].tokens.total
    corpus = prepared(tmp_path, [row], length=whole - 20)
    _, (chosen, rejected) = texts(corpus, corpus.train[0].tokens, 0)
    assert rejected == "\n" + "b" * 8 + "<|im_end|>"
    assert chosen == "\n" + "a" * (50 + 1 - 20)  # its end is lost with it
    assert corpus.train[0].tokens.total == whole - 20
    assert corpus.parts()[0]["cut answers"] == 1


def test_the_oldest_exchanges_go(tmp_path):
    talk = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "old " * 20},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": "new?"},
    ]
    row = {"prompt": talk, "chosen": "yes", "rejected": "no"}
    corpus = prepared(tmp_path, [row], length=100, **{"dialogue.too_long": "oldest"})
    trunk, answers = texts(corpus, corpus.train[0].tokens, 0)
    assert "Be kind." in trunk and "new?" in trunk and "old" not in trunk
    assert answers == ["\nyes<|im_end|>", "\nno<|im_end|>"]


def left_out(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run/data/rejected.jsonl").open()]


def test_what_cannot_be_compared_is_named(tmp_path):
    rows = [
        PAIRS[0],
        {"prompt": "Q?", "chosen": "same", "rejected": "same "},
        {"prompt": "Q?", "chosen": "", "rejected": "no"},
        {"prompt": "x" * 300, "chosen": "yes", "rejected": "no"},
        {"prompt": "Q?", "chosen": "a" * 200 + "b", "rejected": "a" * 200 + "c"},
    ]
    corpus = prepared(tmp_path, rows)
    assert corpus.parts()[0]["pairs"] == 1
    found = {row["line"]: (row["rule"], row["detail"]) for row in left_out(tmp_path)}
    assert found[2][0] == "equal answers" and found[3][0] == "empty answer"
    assert found[4][0] == "untrained" and "leaves no room for answers in 128" in found[4][1]
    assert found[5][0] == "equal answers" and "after 128 tokens" in found[5][1]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "Q?", "chosen": "same", "rejected": "same"}, "equal answers"),
        ({"prompt": "Q?", "chosen": "", "rejected": "no"}, "empty answer"),
        ({"prompt": "x" * 300, "chosen": "yes", "rejected": "no"}, "a prompt of 3"),
    ],
)
def test_data_of_such_rows_alone_is_an_error_that_names_them(tmp_path, row, message):
    with pytest.raises(ValueError, match=message) as error:
        prepared(tmp_path, [row])
    assert "\n" not in str(error.value)


def test_malformed_rows_can_be_fatal(tmp_path):
    rows = [*PAIRS, {"prompt": "Q?", "chosen": "same", "rejected": "same"}]
    with pytest.raises(ValueError, match=r"1 malformed rows .*rows\.jsonl:21: equal answers"):
        prepared(tmp_path, rows, **{"dialogue.malformed": "fail"})


def test_single_answers_are_no_pairs(tmp_path):
    rows = [{"prompt": f"Q{i}?", "completion": "a", "score": i} for i in range(4)]
    with pytest.raises(ValueError, match="no pair in the train data: 4 answers"):
        prepared(tmp_path, rows)
    assert prepared(tmp_path, rows, wanted=Wanted(pairs=False)).parts()[0]["answers"] == 4


def test_a_packing_that_cuts_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"data\.packing=split cuts"):
        prepared(tmp_path, PAIRS, packing="split")


def test_kto_gets_an_answer_to_another_prompt(tmp_path):
    rows = [
        {"prompt": f"Q{i}?", "completion": f"answer {i}", "label": i % 2 == 0} for i in range(4)
    ]
    corpus = prepared(tmp_path, rows, wanted=Wanted(pairs=False, others=True))
    tokens = corpus.train[0].tokens
    assert tokens.branches.label_A.tolist() == [1, F, 0, F, 1, F, 0, F]
    assert texts(corpus, tokens, 0)[1] == [
        "\nanswer 0<|im_end|>",
        "\nanswer 1<|im_end|>",
    ]
    pairs = prepared(tmp_path, PAIRS, wanted=Wanted(pairs=False, others=True))
    assert pairs.train[0].tokens.branches.label_A[:3].tolist() == [1, 0, F]


KTO = Wanted(pairs=False, others=True)


def test_kto_takes_no_score_for_a_judgement(tmp_path):
    rows = [
        {"prompt": "A?", "completion": "alone", "score": 4},
        {"prompt": "B?", "chosen": "x", "rejected": "y", "margin": 0},
        {"prompt": "C?", "completion": "c1", "score": 4},
        {"prompt": "C?", "completion": "c2", "score": 3},
        {"prompt": "C?", "chosen": "c3", "rejected": "c4"},
        {"prompt": "C?", "completion": "c5", "label": False},
    ]
    corpus = prepared(tmp_path, rows, wanted=KTO)
    tokens = corpus.train[0].tokens
    assert texts(corpus, tokens, 0)[1] == [f"\nc{i}<|im_end|>" for i in (1, 2, 5, 3, 4)]
    assert tokens.branches.label_A.tolist() == [1, 0, 0, 1, 0]
    assert [(r["line"], r["rule"]) for r in left_out(tmp_path)] == [
        (1, "not judged"),
        (2, "not judged"),
    ]
    with pytest.raises(ValueError, match=r"1 not judged, the first .*: not judged: kto needs true"):
        prepared(tmp_path, rows[:1], wanted=KTO)


@pytest.mark.parametrize("shared", [True, False])
def test_ktos_other_answer_is_to_another_prompt(tmp_path, shared):
    """Pairs of one prompt, which do not fit into a row together, and one of another."""
    rows = [{"prompt": "Same?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(3)]
    rows.append({"prompt": "Other?", "chosen": "z", "rejected": "q"})
    changes = {"preference.shared_prompt": shared}
    one = prepared(tmp_path, rows[:1], **changes).train[0].tokens.total
    # Room for a pair and an answer to another prompt, and not for two pairs.
    length = one + (8 if shared else one // 2 + 2)
    corpus = prepared(tmp_path, rows, wanted=KTO, length=length, **changes)
    tokens, others = corpus.train[0].tokens, []
    for d in range(tokens.documents):
        told = texts(corpus, tokens, d)[1]
        others.append(("Same?" if "yes" in told[0] else "Other?", "z" in told[-1]))
    assert others[-1] == ("Other?", False) and len(others) > 2
    assert all(other for prompt, other in others[:-1])


def test_scores_are_compared_across_rows_without_a_shared_prompt(tmp_path):
    rows = [{"prompt": "Q?", "completion": f"a {i}", "score": i} for i in range(3)]
    corpus = prepared(tmp_path, rows, **{"preference.shared_prompt": False})
    assert corpus.parts()[0]["pairs"] == 3


@pytest.mark.parametrize("shared", [True, False])
def test_held_out_groups_are_those_that_are_compared(tmp_path, shared):
    """Rows of one prompt of every kind, in any order, in one document or several."""
    rows = [
        {"prompt": "Q?", "completion": "s1", "score": 3},
        {"prompt": "Q?", "chosen": "a", "rejected": "b"},
        {"prompt": "Q?", "completion": "j1", "label": True},
        {"prompt": "Q?", "chosen": "c", "rejected": "d"},
        {"prompt": "Q?", "completion": "s2", "score": 2},
        {"prompt": "Q?", "completion": "j2", "label": False},
    ]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = prepared(
        tmp_path,
        PAIRS,
        length=200,
        eval_inputs=(str(tmp_path / "held.jsonl"),),
        **{"preference.shared_prompt": shared},
    )
    of_group = {}
    for said in corpus.held_out:
        of_group.setdefault(said.group, set()).add(said.answer[0]["content"])
    wanted = [{"s1", "s2"}, {"j1", "j2"}, {"a", "b"}, {"c", "d"}]
    assert sorted(map(sorted, of_group.values())) == sorted(map(sorted, wanted))
    groups = [said.group for said in corpus.held_out]
    assert groups == sorted(groups)  # side by side


def test_what_one_source_holds_out_another_does_not_train_on(tmp_path):
    for name in ("one", "two"):
        lines = [json.dumps({**row, "chosen": f"{name} {row['chosen']}"}) for row in PAIRS]
        lines = lines if name == "one" else lines[::-1]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = tuple(
        SourceConfig(name=n, inputs=(str(tmp_path / f"{n}.jsonl"),)) for n in ("one", "two")
    )
    corpus = prepared(tmp_path, PAIRS, inputs=(), sources=sources, eval_fraction=0.1)
    held_out = {prompt[-1]["content"] for prompt in corpus.asked}
    assert held_out == {"Question 18?", "Question 19?", "Question 0?", "Question 1?"}
    assert [said.group for said in corpus.held_out] == [0, 0, 1, 1, 2, 2, 3, 3]
    for part in corpus.train:
        told = [texts(corpus, part.tokens, d)[0] for d in range(part.tokens.documents)]
        assert len(told) == 16 and not any(prompt in text for prompt in held_out for text in told)


def test_held_out_answers_are_in_the_order_of_the_tokens(tmp_path):
    corpus = prepared(tmp_path, PAIRS, eval_fraction=0.5)
    tokens = corpus.evaluation
    assert len(corpus.held_out) == len(tokens.branches.label_A)
    for d in range(tokens.documents):
        own = corpus.held_out[tokens.branches.first_D[d] : tokens.branches.first_D[d + 1]]
        assert texts(corpus, tokens, d)[1] == [f"\n{s.answer[0]['content']}<|im_end|>" for s in own]
        assert [s.tokens for s in own] == tokens.branches.tokens_A[2 * d : 2 * d + 2].tolist()
    assert [s.group for s in corpus.held_out] == [i // 2 for i in range(20)]


def test_rows_hold_no_more_answers_than_the_plan_says(tmp_path):
    corpus = prepared(tmp_path, PAIRS, length=256)
    tokens = corpus.train[0].tokens
    plan = make_plan(tokens, "first_fit", 256)
    leaves = packed_rows(tokens, plan, np.arange(len(plan)), isolate=True)
    assert leaves["labels"].shape == (len(plan), plan.answers)
    assert (leaves["groups"] > 0).sum() == 40 and leaves["answers"].max() == plan.answers


def test_the_real_harmless_dialogues(tmp_path, data_dir):
    data = configs.override(
        DataConfig(),
        {
            "inputs": (f"{data_dir}/preference/hh-harmless-test.jsonl.gz",),
            "packing": "first_fit",
            "dialogue.template": "chatml",
            "eval_fraction": 312 / 2297,
        },
    )
    corpus = prepare_preferences(
        data, TokenizerConfig(kind="byte"), str(tmp_path), length=4096, wanted=Wanted()
    )
    train, held_out = corpus.parts()
    assert train["pairs"] + held_out["pairs"] == 2299 and held_out["prompts"] == 312
    shorter = (
        train["shorter preferred"] * train["pairs"]
        + held_out["shorter preferred"] * held_out["pairs"]
    ) / 2299
    assert 0.54 < shorter < 0.57
    assert train["tokens"] < 0.65 * train["tokens without sharing"]
