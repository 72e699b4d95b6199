"""Prompts from files: one of each, from rows of every kind, and every row that has none named."""

import json

import pytest

from llm_jax.align import prompts


def user(text):
    return {"role": "user", "content": text}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


def test_each_prompt_once_in_order(tmp_path):
    answer = {"role": "assistant", "content": "x"}
    inputs = write(
        tmp_path / "rows.jsonl",
        {"prompt": "a"},
        {"prompt": "b", "chosen": "x", "rejected": "y"},
        {"prompt": [user("a")]},
        {"messages": [user("c"), answer, user("d"), answer]},
        {"chosen": "\n\nHuman: e\n\nAssistant: x", "rejected": "\n\nHuman: e\n\nAssistant: y"},
        {"prompt": "f", "completion": "x", "label": True},
    )
    found, rejected = prompts.read(inputs)
    assert rejected == []
    said = [[m["content"] for m in prompt] for prompt in found]
    assert said == [["a"], ["b"], ["c", "x", "d"], ["e"], ["f"]]
    assert prompts.read(inputs, limit=2)[0] == found[:2]


def test_rows_without_one_are_named(tmp_path):
    rows = {
        "two turns in a row": {"prompt": [user("a"), user("b")]},
        "lone surrogate": {"prompt": "\ud83d"},
        "no prompt": {"prompt": " "},
        "tools": {
            "prompt": "a",
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        },
        "unknown layout": {"text": "a"},
    }
    inputs = write(tmp_path / "rows.jsonl", {"prompt": "good"}, *rows.values())
    found, rejected = prompts.read(inputs)
    assert len(found) == 1
    assert [(r.line, r.rule) for r in rejected] == list(enumerate(rows, 2))
    with pytest.raises(ValueError, match=r"no prompt in .*two turns in a row.* \(--input\)"):
        prompts.read(write(tmp_path / "bad.jsonl", *rows.values()))
