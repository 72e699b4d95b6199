"""Preferences from files: six layouts, labels that say what was said, and no damaged row unnamed."""

import gzip
import itertools
import json
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax import corpus
from llm_jax.data import conversations, preferences
from llm_jax.data.conversations import RULES, Malformed, counts
from llm_jax.data.preferences import LAYOUTS, ordered_pairs, pair_rows, parse, read, split


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text):
    return {"role": "tool", "content": text}


def both(chosen, rejected, **more):
    return {"chosen": chosen, "rejected": rejected, **more}


def pair(chosen="b", rejected="c", prompt="a", **more):
    return both(chosen, rejected, prompt=prompt, **more)


def ranking(*answers, **more):
    return {"prompt": "a", "answers": list(answers), **more}


# ---------------------------------------------------------------------------------------- layouts

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
A, S = [user("a")], [system("s")]
BC, XY = [assistant("b"), user("c")], [assistant("x"), user("y")]
CALLED = [assistant("", tool_calls=CALL), tool("9")]
HH = "\n\nHuman: a \n\nAssistant: b\n\nHuman: c\n\nAssistant:"
RANKED = (1, 0), "ranked"
# what -> row, prompt, answers (a text: one turn), labels, kind
ROWS = {
    "pairs": (pair(), A, "bc", *RANKED),
    "pairs, question": (both("b", "c", question="a", system="s"), [*S, *A], "bc", *RANKED),
    "pairs, instruction": (
        both("b", "c", instruction="a", input="i"),
        [user("a\n\ni") | {"instruction": "a", "input": "i"}], "bc", *RANKED,
    ),
    "pairs, scores": (pair(score_chosen=8, score_rejected=2.5), A, "bc", (8, 2.5), "rated"),
    "pairs, a tie": (pair(chosen_score=-1, rejected_score=-1), A, "bc", (-1, -1), "rated"),
    "pairs, margin": (pair(margin=3), A, "bc", (3, 0), "ranked"),
    "pairs, the prompt again": (pair([user(" a\n"), assistant("b")], [user("a"), assistant("c")]), A, "bc", *RANKED),
    "pairs, the prompt again, as chats": (
        pair([*A, *XY, assistant("b")], [*A, *XY, assistant("c")]), [*A, *XY], "bc", *RANKED,
    ),
    "pairs, the system's turn in the answers": (
        pair([*S, *A, assistant("b")], [*S, *A, assistant("c")]), [*S, *A], "bc", *RANKED,
    ),
    "pairs, the system's turn in the row": (pair([*A, assistant("b")], system="s"), [*S, *A], "bc", *RANKED),
    "pairs, messages": (pair([assistant("b")], assistant("c"), [*S, *A]), [*S, *A], "bc", *RANKED),
    # A prompt that the answers do not repeat is taken as it is, also where they share more.
    "pairs, longer answers": (
        pair([*XY, assistant("b")], [*XY, assistant("c")]), A, ([*XY, assistant("b")], [*XY, assistant("c")]), *RANKED,
    ),
    "pairs, tools": (pair(prompt=[*A, *CALLED], tools=TOOLS), [*A, *CALLED], "bc", *RANKED),
    "dialogues": (both(HH + " d\n", HH + " e"), [*A, *BC], "de", *RANKED),
    "dialogues, apart before the last turn": (
        both(HH + " d", "\n\nHuman: a\n\nAssistant: x"), A, ([*BC, assistant("d")], "x"), *RANKED,
    ),
    # The prompt ends in a turn of the user, and what was answered differently is no part of it.
    "dialogues, apart at a question": (
        both(HH + " d", HH.replace("c", "z") + " d"), A,
        ([*BC, assistant("d")], [assistant("b"), user("z"), assistant("d")]), *RANKED,
    ),
    "dialogues, apart at a question after a tool": (
        both([*A, *CALLED, user("c"), assistant("d")], [*A, *CALLED, user("z"), assistant("d")]), A,
        ([*CALLED, user("c"), assistant("d")], [*CALLED, user("z"), assistant("d")]), *RANKED,
    ),
    # The rejected dialogue is the beginning of the other: its answer is no part of the prompt.
    "dialogues, one begins the other": (
        both(HH + " d", "\n\nHuman: a\n\nAssistant: b"), A, ([*BC, assistant("d")], "b"), *RANKED,
    ),
    "dialogues, words that are no marks": (
        both("\n\nHuman: a\nHuman: x\n\nAssistant: b Assistant: y", "\n\nHuman: a\nHuman: x\n\nAssistant:c"),
        [user("a\nHuman: x")], ("b Assistant: y", "c"), *RANKED,
    ),
    "dialogues, messages": (
        both([*S, *A, assistant("b")], [*S, *A, assistant("c")], system="s"), [*S, *A], "bc", *RANKED,
    ),
    "sharegpt": (
        both({"from": "gpt", "value": "b"}, "c", conversations=[*S, {"from": "human", "value": "a"}]),
        [*S, *A], "bc", *RANKED,
    ),
    "sharegpt, system": (both("b", "c", conversations=A, system="s"), [*S, *A], "bc", *RANKED),
    "rankings": (ranking(*"bcd"), A, "bcd", (2, 1, 0), "ranked"),
    "rankings, ranks": (
        {"prompt": "a", "responses": list("bcde"), "ranks": [3, 1, 2, 1]}, A, "cedb", (-1, -1, -2, -3), "ranked",
    ),
    "rankings, scores": (
        {"prompt": "a", "completions": ["b", [assistant("c")], assistant("d")], "scores": [0.5, 9, 0.5]}, A, "cbd",
        (9, 0.5, 0.5), "rated",
    ),
    "rankings, ratings": ({"question": "a", "answers": ["b", "c"], "ratings": [1, 2]}, A, "cb", (2, 1), "rated"),
    "rankings, as Nectar has them": (
        ranking({"answer": "b", "rank": 2}, {"answer": "c", "rank": 1.0}, prompt="\n\nHuman: a\n\nAssistant: "), A,
        "cb", (-1, -2), "ranked",
    ),
    "rankings, as UltraFeedback has them": (
        {"instruction": "a", "completions": [{"response": r, "overall_score": s} for r, s in (("b", 7), ("c", 8.5))]},
        A, "cb", (8.5, 7), "rated",
    ),
    "rankings, an answer drawn twice": (
        {"prompt": "a", "answers": list("bcbd"), "scores": [1, 0, 1, 0]}, A, "bcd", (1, 0, 0), "rated",
    ),
    "pairs, a prompt of marked turns": (
        pair("d", "e", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"), [*A, *BC], "de", *RANKED,
    ),
    "pairs, ratings": (pair(**{"chosen-rating": 5, "rejected-rating": 4}), A, "bc", (5, 4), "rated"),
    "ratings": ({"prompt": "a", "completion": "b", "score": 3}, A, "b", (3,), "rated"),
    "ratings, rating": ({"prompt": "a", "answer": "b", "rating": -0.5}, A, "b", (-0.5,), "rated"),
    "ratings, the prompt again": (
        {"prompt": "a", "response": [*A, *XY, assistant("b")], "score": 3}, A, ([*XY, assistant("b")],), (3,), "rated",
    ),
    "judged": ({"prompt": "a", "completion": "b", "label": True}, A, "b", (1,), "judged"),
    "judged, number": ({"prompt": "a", "response": "b", "label": 0}, A, "b", (0,), "judged"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_every_layout_becomes_a_prompt_and_labelled_answers(tmp_path, name):
    row, prompt, answers, labels, kind = ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    (found,), rejected = read([str(path)])
    assert rejected == []
    assert list(found.prompt) == prompt
    assert [list(answer) for answer in found.answers] == [
        [assistant(answer)] if isinstance(answer, str) else answer for answer in answers
    ]
    assert found.labels == labels and all(type(label) is float for label in found.labels)
    assert (found.kind, found.source, found.line) == (kind, str(path), 1)
    assert found.tools == (tuple(TOOLS) if "tools" in row else None)
    layout = name.partition(",")[0]
    assert read([str(path)], layout=layout) == ([found], [])
    other = {"dialogues": "ratings", "judged": "pairs"}.get(layout, "judged")
    (refused,) = read([str(path)], layout=other)[1]
    assert refused.rule == "unknown layout" and refused.detail.endswith(f"not those of {other}")


def test_there_is_a_row_for_every_layout_and_a_line_in_the_docstring():
    assert {name.partition(",")[0] for name in ROWS} == set(LAYOUTS)
    assert {kind for *_, kind in ROWS.values()} == set(preferences.KINDS)
    for layout in LAYOUTS:
        assert f"\n    {layout} " in preferences.__doc__


def test_a_named_layout_is_used_whatever_other_keys_a_row_has():
    dialogue = [[user("x"), assistant(text)] for text in "bc"]
    row = {"prompt": "a", "chosen": dialogue[0], "rejected": dialogue[1], "label": True}
    with pytest.raises(Malformed, match="no prompt: an answer begins with another prompt"):
        parse(row)
    assert parse(row, "dialogues").prompt == (user("x"),)
    row |= {"completion": "d"}
    assert parse(row, "judged").labels == (1.0,)


def test_lists_lines_packed_files_and_folders_hold_the_same_rows(tmp_path):
    rows = [row for row, *_ in ROWS.values()]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    found, rejected = read([str(tmp_path)])
    assert rejected == [] and len(found) == 2 * len(rows)
    assert [p.key for p in found[: len(rows)]] == [p.key for p in found[len(rows) :]]
    assert [p.line for p in found] == [*range(1, len(rows) + 1)] * 2


def test_rows_of_a_table_have_null_where_others_have_keys(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [pair(margin=2.0), pair(), {"prompt": "a", "completion": "b", "label": True}]
    path = str(tmp_path / "rows.parquet")
    keys = {key for row in rows for key in row}
    parquet.write_table(pyarrow.table({k: [row.get(k) for row in rows] for k in keys}), path)
    found, rejected = read([path])
    assert rejected == []
    assert [p.labels for p in found] == [(2, 0), (1, 0), (1,)]


def test_embedded_preferences_are_preferences_and_questions_are_none():
    found, rejected = read(["embedded:preferences"])
    assert rejected == []
    assert len(found) == len(corpus.questions()) == len({p.key for p in found})
    assert {p.kind for p in found} == {"ranked"}
    assert found[0].answers[0][0]["content"] == corpus.questions()[0][2]
    with pytest.raises(ValueError, match=r"embedded:questions: conversations, not preferences.*"):
        read(["embedded:questions"])
    with pytest.raises(ValueError, match=r"embedded:docs: a text, .*is embedded:preferences$"):
        read(["embedded:docs"])
    with pytest.raises(ValueError, match=r":preferences: preferences, not conv.* embedded:questio"):
        conversations.read(["embedded:preferences"])


def test_errors_of_whole_inputs_name_what_to_change(tmp_path):
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"a.csv: preferences are in .json, .* \(data.inputs\)"):
        read([str(tmp_path / "a.csv")])
    with pytest.raises(ValueError, match=r"no preference in .*b.jsonl: no rows"):
        read([str(tmp_path / "b.jsonl")])
    with pytest.raises(ValueError, match="layout='pair' is unknown; there are auto, dialogues, "):
        read([str(tmp_path / "b.jsonl")], layout="pair")
    with pytest.raises(FileNotFoundError):
        read([str(tmp_path / "c.jsonl")])


# ------------------------------------------------------------------------------------------ rules

# rule -> rows that break it
BROKEN = {
    "unknown layout": [{}, {"prompt": "a", "chosen": "b"}, {"prompt": "a", "completion": "b"}, pair(rejected=None)],
    "wrong type": [
        3, [user("a"), assistant("b")], pair(prompt=3), pair(chosen=3), pair(chosen=["b"]), pair(tools="f"),
        pair(system=["s"]), {"prompt": "a", "answers": "bc"}, ranking("b", None), both("b", "c", conversations="a"),
        both("b", "c", instruction="a", input=3),
    ],
    "lone surrogate": [pair("\ud83d"), pair(prompt="\udc80"), ranking("b", "\ud83d")],
    "missing role": [
        pair([{"content": "b"}]), both("b", HH + " d"), both("x" + HH + " d", HH + " e"),
        both("Human: a\n\nAssistant: b", "Human: a\n\nAssistant: c"),
    ],
    "unknown role": [pair([{"role": "judge", "content": "b"}])],
    "two turns in a row": [pair([assistant("b"), assistant("d")]), both(HH + " d\n\nAssistant: e", HH + " e")],
    "assistant first": [both([assistant("b")], [assistant("c")]), both(HH + " d", "\n\nAssistant: b")],
    "no answer": [
        pair([]), pair([assistant("b"), user("c")]), pair([user("a")]), pair([], prompt=[*A, *XY]), ranking("b", []),
        both([], []), both("", HH + " e"), both(HH + " d\n\nHuman: e", HH + " e"),
    ],
    "empty answer": [
        pair(""), pair(rejected=" \n"), ranking("b", "c", ""), both(HH, HH + " e"),
        {"prompt": "a", "completion": "", "label": True},
    ],
    "empty question": [
        pair(prompt=""), pair(prompt=[user(" ")]), both("b", "c", question=""),
        both("\n\nHuman:\n\nAssistant: b", "\n\nHuman:\n\nAssistant: c"),
    ],
    "long turn": [pair("b" * 1_000_000), pair(prompt="b" * 1_000_000)],
    "no prompt": [
        pair(prompt=[]), pair(prompt=S), pair(prompt=[user("a"), assistant("b")]),
        pair(prompt=[user("a"), assistant("b")], chosen=[user("d"), assistant("e")]),
        pair([user("x"), assistant("b")]),
        pair([tool("x"), assistant("b")]),
        pair([*A, tool("x"), assistant("b")]),
        pair([*S, *A, assistant("b")]),  # the other answer does not have it
        pair([*S, *A, assistant("b")], [system("t"), *A, assistant("c")]),
        pair([*S, *A, assistant("b")], [*S, *A, assistant("c")], system="t"),
        both(HH + " d", HH.replace(" a ", " z ") + " e"),
        both([*S, *A, assistant("b")], [*A, assistant("c")]),
        both("b", "c", conversations=[]),
    ],
    "one answer": [ranking(), ranking("b"), ranking("b", scores=[1])],
    "equal answers": [
        pair("b", " b\n"), pair([assistant("b")], "b"), ranking("b", "c", "b"), both(HH + " d", HH + " d"),
        pair(assistant("", tool_calls=CALL), assistant("", tool_calls=CALL)),
    ],
    "unranked": [
        pair(score_chosen=3), pair(score_chosen="3", score_rejected="2"),
        pair(score_chosen=True, score_rejected=False), pair(score_chosen=math.nan, score_rejected=1),
        pair(margin=math.inf), pair(margin=[1]),
        *(ranking("b", "c", scores=x) for x in (2, [1], [1, 2, 3], [1, None], [1, -math.inf])),
        *(ranking("b", "c", scores=[1, x]) for x in (10**400, 1e39, "2")), ranking("b", "c", ranks=[1, True]),
        ranking("b", "c", ranks=[1, 2], scores=[1, 2]),
        *({"prompt": "a", "answer": "b", "score": x} for x in ("good", False, math.nan)),
        *({"prompt": "a", "answer": "b", "label": x} for x in (2, "true", [1], math.nan)),
    ],
    "contradiction": [
        pair(score_chosen=1, score_rejected=2), pair(chosen_score=-2.0, rejected_score=-1.0), pair(margin=-0.1),
    ],
}  # fmt: skip


def test_every_damaged_row_is_named_with_its_rule_and_number(tmp_path):
    good = json.dumps(pair()).encode()
    lines, expected = [good], []
    for rule, rows in BROKEN.items():
        for row in rows:
            lines += [json.dumps(row).encode(), good]
            expected.append((len(lines) - 1, rule))
    lines += [good[:-3], good, good.replace(b"a", b"\xff", 1), good]
    expected += [(len(lines) - 3, "not JSON"), (len(lines) - 1, "invalid UTF-8")]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    found, rejected = read([str(path)])
    assert [(r.line, r.rule) for r in rejected] == expected
    assert [p.line for p in found] == list(range(1, len(lines) + 1, 2))
    for row in rejected:
        assert "\n" not in str(row) and len(row.detail) <= 200
    assert set(counts(rejected)) == set(RULES) - {
        "refused by the template", "refused by the tokenizer", "unwritten", "too long", "untrained",
    }  # fmt: skip


def test_a_long_turn_is_a_matter_of_the_limit():
    row = pair("b" * 11)
    assert parse(row, max_turn_chars=11).labels == (1, 0)
    with pytest.raises(Malformed, match="long turn: turn 2 has 11 characters"):
        parse(row, max_turn_chars=10)


def test_no_depth_of_nesting_ends_a_run(tmp_path):
    rows = [pair([assistant("b", x="@")], prompt=[user("a") | {"tool_calls": "@"}])] * 80
    deep = ["[" * depth + "]" * depth for depth in range(920, 1000)]
    path = tmp_path / "rows.jsonl"
    texts = [json.dumps(row).replace('"@"', d) for row, d in zip(rows, deep, strict=True)]
    path.write_text("\n".join(texts))
    found, rejected = read([str(path)])
    assert len(found) + len(rejected) == 80 and found and rejected
    assert {r.rule for r in rejected} <= {"not JSON", "wrong type"}


TEXT = st.sampled_from(["", " ", "a", "b", HH + " x", "\n\nHuman: a", "\ud800", "1"]) | st.text()
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "x"]),
        "from": st.sampled_from(["human", "gpt"]) | SCALAR,
        "content": TEXT | SCALAR,
        "value": TEXT,
        "tool_calls": SCALAR | st.lists(SCALAR),
    },
)
JSON = st.recursive(
    SCALAR | TURN | st.lists(TURN, max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
KEYS = sorted({key for told in preferences._TOLD_BY.values() for keys in told for key in keys}) + [
    *("ranks", "scores", "ratings", "margin", "score_chosen", "score_rejected", "chosen_score"),
    *("system", "tools", "input"),
]


@given(
    JSON | st.dictionaries(st.sampled_from(KEYS), JSON, max_size=8),
    st.sampled_from(["auto", *LAYOUTS]),
)
def test_any_json_is_a_preference_or_malformed(row, layout):
    try:
        found = parse(row, layout)
    except Malformed as e:
        assert e.rule in RULES
        return
    assert found.prompt[-1]["role"] in ("user", "tool")
    assert len(found.answers) == len(found.labels) >= 1
    assert all(answer[0]["role"] == answer[-1]["role"] == "assistant" for answer in found.answers)
    assert list(found.labels) == sorted(found.labels, reverse=True)
    assert all(math.isfinite(label) for label in found.labels)
    assert len(found.key) == 64


# ------------------------------------------------------------------------------------------ pairs


def test_every_order_of_distinct_labels_has_pairs_of_its_own():
    # 5 answers: 10 pairs in each of the 120 orders, and no two orders have the same pairs.
    seen = set()
    for labels in itertools.permutations([4.0, 2.5, 0.0, -1.0, -7.0]):
        pairs = ordered_pairs(labels)
        assert len(pairs) == math.comb(5, 2)
        for p in pairs:
            assert labels[p.preferred] > labels[p.other]
            assert p.margin == labels[p.preferred] - labels[p.other] and p.probability == 1.0
        seen.add(frozenset((p.preferred, p.other) for p in pairs))
    assert len(seen) == math.factorial(5)


@given(st.lists(st.integers(0, 3).map(float), max_size=7))
def test_ties_are_dropped_or_kept_once_by_half(labels):
    dropped, kept = ordered_pairs(labels), ordered_pairs(labels, ties="half")
    tied = sum(math.comb(n, 2) for n in Counter(labels).values())
    assert len(kept) == math.comb(len(labels), 2)
    assert [p for p in kept if p.margin] == dropped and len(kept) - len(dropped) == tied
    assert all(p.probability == 0.5 for p in kept if not p.margin)
    assert len({frozenset(p[:2]) for p in kept}) == len(kept)  # each two once, not both ways
    with pytest.raises(ValueError, match="ties='keep' is neither drop nor half"):
        ordered_pairs([1.0, 1.0], ties="keep")


@pytest.mark.parametrize("name", ROWS)
def test_pairs_that_are_written_come_back(name):
    found = parse(ROWS[name][0])
    back = [parse(json.loads(json.dumps(row))) for row in pair_rows(found, ties="half")]
    assert [p.key for p in back] == [found.key] * len(back)
    assert [(p.answers, p.labels[0] - p.labels[1]) for p in back] == [
        ((found.answers[i], found.answers[j]), margin)
        for i, j, margin, _ in ordered_pairs(found.labels, ties="half")
    ]
    assert all(p.prompt == found.prompt and p.tools == found.tools for p in back)
    n = len(found.answers)
    assert len(back) == math.comb(n, 2)
    untied = [p for p in back if p.labels[0] > p.labels[1]]
    assert len(list(pair_rows(found, ties="drop"))) == len(untied)


# ------------------------------------------------------------------------------------------ split


def test_a_key_is_of_the_prompt_alone():
    key = parse(pair()).key
    assert parse(pair("x", "y", margin=2)).key == key
    assert parse(pair(prompt=" a\n")).key == key
    assert parse({"chosen": [*A, assistant("b")], "rejected": [*A, assistant("c")]}).key == key
    others = [
        pair(prompt="A"),
        pair(system="s"),
        pair(prompt=[user("x"), assistant("y"), user("a")]),
        pair(prompt=[tool("a")]),
        pair(tools=TOOLS),
    ]
    keys = {parse(row).key for row in others}
    assert len(keys) == len(others) and key not in keys


def shared_prompts(prompts=10, rows=40):
    """Rows of which four have each prompt: those of a prompt are far apart."""
    return [parse(pair(f"b{i}", prompt=f"a{i % prompts}")) for i in range(rows)]


@pytest.mark.parametrize("seed", [-1, 0, 1])
@pytest.mark.parametrize(("fraction", "held_out"), [(0.3, 3), (0.01, 1), (0.16, 2), (0.94, 9)])
def test_no_prompt_is_on_both_sides(seed, fraction, held_out):
    rows = shared_prompts()
    train, evaluation = split(rows, fraction, seed=seed)
    assert not {r.key for r in train} & {r.key for r in evaluation}
    # Of 10 prompts, not of 40 rows, which would be 12, 1, 6 and 38.
    assert len({r.key for r in evaluation}) == held_out and len(evaluation) == 4 * held_out
    assert len(train) + len(evaluation) == len(rows)
    place = {id(row): i for i, row in enumerate(rows)}
    for part in (train, evaluation):
        assert [place[id(row)] for row in part] == sorted(place[id(row)] for row in part)


def test_the_last_prompts_are_held_out_or_drawn_ones():
    rows = shared_prompts()
    # The last by first appearance: 8 and 9, though rows of 0 to 7 come after theirs.
    asked = [row.prompt[0]["content"] for row in split(rows, 0.2)[1]]
    assert asked == ["a8", "a9"] * 4
    assert {row.key for row in split(rows, 0.3, seed=0)[1]} != {row.key for row in rows[7:10]}
    drawn = [frozenset(r.key for r in split(rows, 0.3, seed=seed)[1]) for seed in range(20)]
    assert len(set(drawn)) > 10
    assert drawn[3] == frozenset(r.key for r in split(rows, 0.3, seed=3)[1])
    assert len(frozenset.union(*drawn)) == 10


def test_a_split_leaves_both_sides_something():
    rows = shared_prompts()
    assert split(rows, 0.0) == (rows, []) and split(rows, 0.0, seed=4) == (rows, [])
    assert split([], 0.0) == ([], [])
    for given_rows, fraction in ((rows, 0.96), (rows[:1], 0.1), ([], 0.1), (rows[::10], 0.5)):
        with pytest.raises(ValueError, match=r"data\.eval_fraction=.* distinct prompts"):
            split(given_rows, fraction)
    for fraction in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"data\.eval_fraction=.* has to be in \[0, 1\)"):
            split(rows, fraction)


# -------------------------------------------------------------------------------------- real data


def letters(answer):
    return sum(len(m["content"]) for m in answer)


def shorter_is_chosen(found):
    """How often whoever takes the shorter answer is right; of two as long, by half."""
    ahead = [letters(p.answers[1]) - letters(p.answers[0]) for p in found]
    return sum((d > 0) + 0.5 * (d == 0) for d in ahead) / len(ahead)


def test_a_real_set_of_dialogues_is_read_to_the_last_row(data_dir):
    found, rejected = read([f"{data_dir}/preference/hh-harmless-test.jsonl.gz"])
    assert counts(rejected) == {"two turns in a row": 9, "empty answer": 4}
    assert len(found) == 2312 - 13
    assert len({p.key for p in found}) == 2297
    assert {len(answer) for p in found for answer in p.answers} == {1}
    # All but one turn are shared: 1, 3, 5, ... of them, from the user's to the user's.
    assert {len(p.prompt) % 2 for p in found} == {1}
    assert shorter_is_chosen(found) == pytest.approx(0.554, abs=0.001)
    train, held_out = split(found, 0.1)
    assert len({p.key for p in held_out}) == 230
    assert not {p.key for p in train} & {p.key for p in held_out}


def test_a_real_set_of_pairs_is_read_to_the_last_row(data_dir):
    found, rejected = read([f"{data_dir}/preference/dpo_demo_299.json"])
    assert (len(found), rejected) == (299, [])
    assert len({p.key for p in found}) == 294
    assert sum(p.prompt[0]["role"] == "system" for p in found) == 80
    assert shorter_is_chosen(found) == pytest.approx(0.564, abs=0.001)
