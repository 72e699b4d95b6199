"""Conversations from files: four layouts, and no damaged row that goes unnamed."""

import gzip
import json

import pytest

from llm_jax.data import conversations
from llm_jax.data.conversations import RULES, Malformed, counts, parse, read


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def turns(*messages):
    return {"messages": list(messages)}


# ---------------------------------------------------------------------------------------- layouts

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
# what -> row, messages
ROWS = {
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        [user("Add.\n\n1 2") | {"instruction": "Add.", "input": "1 2"}, assistant("3")],
    ),
    "alpaca, no input": (
        {"instruction": "Add.", "input": "", "output": "3"},
        [user("Add."), assistant("3")],
    ),
    "alpaca, history": (
        {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"},
        [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c"), assistant("d")],
    ),
    "completion": ({"prompt": "a", "completion": " b"}, [user("a"), assistant(" b")]),
    "completion, no prompt": ({"prompt": "", "completion": "b"}, [user(""), assistant("b")]),
    "completion, messages": (
        {"prompt": [user("a")], "completion": [assistant("b")]},
        [user("a"), assistant("b")],
    ),
    "messages": (turns(user("a"), assistant("b")), [user("a"), assistant("b")]),
    "messages, developer": (
        turns({"role": "developer", "content": "s"}, user("a"), assistant("b")),
        [{"role": "system", "content": "s"}, user("a"), assistant("b")],
    ),
    "messages, parts": (
        turns(user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), assistant("c")),
        [user("ab"), assistant("c")],
    ),
    "messages, tools": (
        {
            **turns(
                user("a"),
                assistant(None, tool_calls=CALL),
                {"role": "tool", "content": "9", "tool_call_id": "1"},
                assistant("b"),
            ),
            "tools": TOOLS,
        },
        [
            user("a"),
            assistant("", tool_calls=CALL),
            {"role": "tool", "content": "9", "tool_call_id": "1"},
            assistant("b"),
        ],
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ]
        },
        [{"role": "system", "content": "s"}, user("a"), assistant("b")],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_layout_becomes_messages(tmp_path, name):
    row, messages = ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    found, rejected = read([str(path)])
    assert rejected == []
    assert list(found[0].messages) == messages
    assert found[0].tools == (tuple(TOOLS) if "tools" in row else None)
    layout = name.partition(",")[0]
    assert list(read([str(path)], layout=layout)[0][0].messages) == messages
    other = next(x for x in conversations.LAYOUTS if x != layout)
    assert read([str(path)], layout=other)[1][0].rule == "unknown layout"


def test_a_named_layout_is_used_whatever_other_keys_a_row_has(tmp_path):
    both = [user("a"), assistant("b")]
    rows = [
        {"prompt": "a", "completion": "b", "messages": [user("x")]},
        {"instruction": "", "prompt": "", "completion": "b"},
        {"instruction": "", "prompt": [user("a")], "completion": [assistant("b")]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, rejected = read([str(path)], layout="completion")
    assert rejected == []
    assert [list(c.messages) for c in found] == [both, [user(""), assistant("b")], both]
    # Of another layout the same rows are malformed, an empty instruction too.
    path.write_text(json.dumps({**rows[1], "output": "b"}) + "\n")
    assert [r.rule for r in read([str(path)], layout="alpaca")[1]] == ["empty question"]
    assert [r.rule for r in read([str(path)])[1]] == ["empty question"]
    (row,) = read([str(path)], layout="sharegpt")[1]
    assert row.detail.endswith("'completion', 'output', not those of sharegpt")


def test_lists_lines_packed_files_and_folders_hold_the_same_rows(tmp_path):
    rows = [row for row, _ in ROWS.values()]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.jsonl").write_text("\ufeff" + lines.replace("\n", "\n\n"))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "notes.txt").write_text("not a conversation")
    found, rejected = read([str(tmp_path)])
    assert rejected == []
    size = len(rows)
    assert [c.messages for c in found] == [c.messages for c in found[:size]] * 3
    # The number of the record in a list, of the line (half of them are blank here) elsewhere.
    assert [c.line for c in found[:size]] == list(range(1, size + 1))
    assert [c.line for c in found[size : 2 * size]] == list(range(1, 2 * size, 2))
    assert [c.source for c in found[::size]] == [
        str(tmp_path / name) for name in ("a.json", "b.jsonl", "c.jsonl.gz")
    ]


def test_embedded_questions_are_conversations():
    found, rejected = read(["embedded:questions"])
    assert rejected == [] and len(found) > 3000
    question, answer = found[0].messages
    assert question["role"] == "user" and "`" in question["content"]
    assert answer["role"] == "assistant" and answer["content"]


# ---------------------------------------------------------------------------------- damaged files

GOOD = json.dumps(turns(user("a"), assistant("b"))).encode()
# rule -> lines that break it
BROKEN = {
    "invalid UTF-8": [GOOD.replace(b'"a"', b'"\xff\xfe"'), b"\xc3"],
    "not JSON": [GOOD[:-3], b"{'messages': []}", b"[" * 100_000, b'{"id": ' + b"9" * 5000 + b"}"],
    "unknown layout": [b'{"text": "a"}', b"{}", b'{"prompt": "a"}'],
    "wrong type": [
        b"3",
        b'"text"',
        b'{"messages": "a"}',
        b'{"messages": ["a"]}',
        json.dumps(turns(user(3), assistant("b"))).encode(),
        json.dumps(turns(user(None), assistant("b"))).encode(),
        json.dumps(turns(user([{"type": "image"}]), assistant("b"))).encode(),
        b'{"instruction": ["a"], "output": "b"}',
        b'{"instruction": "a", "output": null}',
        b'{"instruction": "a", "output": "b", "history": [["a"]]}',
        b'{"prompt": "a", "completion": 3}',
        json.dumps({**turns(user("a"), assistant("b")), "tools": "f"}).encode(),
    ],
    "lone surrogate": [GOOD.replace(b'"a"', b'"\\ud83d"'), GOOD.replace(b'"b"', b'"\\udc80"')],
    "missing role": [
        b'{"messages": [{"content": "a"}]}',
        b'{"conversations": [{"value": "a"}, {"from": "gpt", "value": "b"}]}',
    ],
    "unknown role": [
        json.dumps(turns({"role": "moderator", "content": "a"}, assistant("b"))).encode(),
        json.dumps(turns({"role": ["user"], "content": "a"}, assistant("b"))).encode(),
    ],
    "two turns in a row": [
        json.dumps(turns(user("a"), user("b"), assistant("c"))).encode(),
        json.dumps(turns(user("a"), assistant("b"), assistant("c"))).encode(),
        json.dumps(
            turns(user("a"), {"role": "system", "content": "s"}, user("b"), assistant("c"))
        ).encode(),
    ],
    "assistant first": [
        json.dumps(turns(assistant("a"), user("b"), assistant("c"))).encode(),
        json.dumps(turns({"role": "system", "content": "s"}, assistant("c"))).encode(),
    ],
    "no answer": [
        json.dumps(turns(user("a"))).encode(),
        b'{"messages": []}',
        b'{"instruction": "a"}',
    ],
    "empty answer": [
        json.dumps(turns(user("a"), assistant(" \n"))).encode(),
        json.dumps(turns(user("a"), assistant(""), user("b"), assistant("c"))).encode(),
        b'{"instruction": "a", "output": ""}',
        b'{"prompt": "a", "completion": ""}',
    ],
    "empty question": [
        json.dumps(turns(user(" "), assistant("b"))).encode(),
        b'{"instruction": "", "input": "", "output": "b"}',
    ],
    "long turn": [
        json.dumps(turns(user("a" * 1_000_000), assistant("b"))).encode(),
        json.dumps(turns(user("a"), assistant("b" * 1_000_000))).encode(),
    ],
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A file in which every broken line stands between two good ones, and what it should be."""
    lines, expected = [GOOD], []
    for rule, broken in BROKEN.items():
        for line in broken:
            lines += [line, GOOD]
            expected.append((len(lines) - 1, rule))
    path = tmp_path_factory.mktemp("damaged") / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path), expected, len(lines)


def test_every_damaged_line_is_named_with_its_rule_and_number(damaged):
    path, expected, lines = damaged
    found, rejected = read([path])
    assert [(r.line, r.rule) for r in rejected] == expected
    assert {r.source for r in rejected} == {path}
    # Nothing is lost: the lines around a damaged one are all there, also after bytes that are no
    # text, and every line is either a conversation or named.
    assert [c.line for c in found] == list(range(1, lines + 1, 2))
    assert len(found) + len(rejected) == lines
    assert counts(rejected) == {rule: len(broken) for rule, broken in BROKEN.items()}


def test_there_is_a_damaged_row_for_every_rule():
    of_rendering = {
        "refused by the template", "refused by the tokenizer", "unwritten", "too long", "untrained",
    }  # fmt: skip
    of_preferences = {"no prompt", "one answer", "equal answers", "unranked", "contradiction"}
    assert set(BROKEN) == set(RULES) - of_rendering - of_preferences


def test_what_is_said_of_a_row_is_one_short_line(damaged):
    for row in read([damaged[0]])[1]:
        assert str(row).startswith(f"{row.source}:{row.line}: {row.rule}: ")
        assert "\n" not in str(row) and len(row.detail) <= 200


def test_a_list_loses_its_damaged_rows_alone(tmp_path):
    rows = [GOOD, GOOD.replace(b'"a"', b'"\xff"'), GOOD, GOOD.replace(b'"a"', b'""'), GOOD]
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + b",".join(rows) + b"]")
    found, rejected = read([str(path)])
    assert [c.line for c in found] == [1, 3, 5]
    assert [(r.line, r.rule) for r in rejected] == [(2, "invalid UTF-8"), (4, "empty question")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.json", b"[\n" + GOOD + b",\n{", r"cut.json:3: not JSON .*; the list is damaged"),
        ("deep.json", b"[" * 100_000, r"deep.json: not JSON \(.*recursion.* is damaged$"),
        ("long.json", b"[" + b"9" * 5000 + b"]", r"long.json: not JSON \(.* limit .* is damaged$"),
        ("lines.json", GOOD + b"\n" + GOOD, r"lines.json: one row a line.*; rename it to .jsonl$"),
        ("twice.json", GOOD + b" " + GOOD, r"twice.json:1: not JSON .*; the list is damaged"),
        ("empty.jsonl", b"\n\n", "no conversation in .*empty.jsonl: no rows"),
        ("rows.csv", b"a,b", r"rows.csv: conversations are in .json, .jsonl, .* files"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read([str(path)])


def test_a_text_is_no_conversation():
    with pytest.raises(ValueError, match=r"embedded:docs: a text.*embedded:questions"):
        read(["embedded:docs"])


def test_a_long_turn_is_a_matter_of_the_limit():
    row = turns(user("a" * 11), assistant("b"))
    assert parse(row)[0] == row["messages"]
    with pytest.raises(Malformed, match="long turn: turn 1 has 11 characters"):
        conversations.check(row["messages"], 10, allow_empty_question=False)
    conversations.check(row["messages"], 11, allow_empty_question=False)


def test_real_files_are_read_to_the_last_row(data_dir):
    alpaca, rejected = read([f"{data_dir}/sft/alpaca_2000.json"])
    assert (len(alpaca), rejected) == (2000, [])
    lima, rejected = read([f"{data_dir}/sft/lima_1029.json"])
    assert (len(lima), rejected) == (1029, [])
    assert sum(len(c.messages) > 2 for c in lima) == 29
