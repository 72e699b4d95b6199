"""Rows in words: every phrasing can be filled, answers are right, held-out rows stay held out."""

import json
import string
from pathlib import Path

import pytest

from llm_jax.data import conversations, instructions
from llm_jax.data.instructions import HELD_OUT, TASKS, TRAIN, phrase, split
from llm_jax.data.task_rows import Row

SST2 = "sentence\tlabel\n" + "".join(
    f"film {i} is fine \t1\nfilm {i} is bad \t0\n" for i in range(30)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small files in the layout of the data sets."""
    root = tmp_path_factory.mktemp("data")
    files = {
        # "film 0 is bad" is held out, and stands in the training file too.
        "glue/SST-2/train.tsv": SST2 + 'film 1 is fine \t1\nan "odd quote \t1\n',
        "glue/SST-2/dev.tsv": "sentence\tlabel\nfilm 0 is bad \t0\nit 's new \t1\n",
        "glue/MRPC/train.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
        + "".join(f"{i % 2}\t1\t2\tone {i}\ttwo {i}\n" for i in range(40)),
        "glue/MRPC/dev.tsv": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tx\ty\n",
        "ner/wnut17train.conll": "Ada\tB-person\nLovelace\tI-person\nin\tO\nNew\tB-location\n"
        "York\tI-location\n\nno\tO\nname\tO\n\n",
        "ner/emerging.dev.conll": "a\tO\nb\tO\n",
        "gsm8k/train.jsonl": json.dumps(
            {"question": "1+2?", "answer": "It is 1+2=<<1+2=3>>3.\n#### 3"}
        ),
        "gsm8k/test.jsonl": json.dumps({"question": "q", "answer": "s\n#### 1,000"}),
        "eval/winogrande.jsonl": "\n".join(
            json.dumps({"context_options": pair, "continuation": "left.", "gold": 1})
            for pair in (
                ["Mark met Mary so Mark", "Mark met Mary so Mary"],
                ["He took the pen", "He took the pencil"],
            )
        ),
        "eval/boolq.jsonl": "".join(
            json.dumps(
                {
                    "query": f"Passage: text {i // 4}\nwith lines\nQuestion: is it {i}?",
                    "choices": ["no", "yes"],
                    "gold": i % 2,
                }
            )
            + "\n"
            for i in range(200)
        ),
        "sft/lima_1029.json": json.dumps(
            [
                {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]},
                {"instruction": "x", "input": "y", "output": "z"},
                {"instruction": "x", "input": "y", "output": ""},
            ]
        ),
    }  # fmt: skip
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def rows(name, folder):
    return list(TASKS[name].rows(Path(folder)))


def test_each_task_has_several_phrasings_and_each_names_only_fields():
    known = {
        "sst2": {"text"},
        "winogrande": {"text"},
        "boolq": {"passage", "question"},
        "en_de": {"source"},
        "mrpc": {"first", "second"},
    }
    for name, task in TASKS.items():
        if name in ("alpaca", "lima"):
            assert not task.templates
            continue
        assert 4 <= len(task.templates) <= 10, name
        assert len({t.ask for t in task.templates}) == len(task.templates), name
        for t in task.templates:
            used = {
                field
                for text in (t.ask, t.answer)
                for _, field, _, _ in string.Formatter().parse(text)
                if field is not None
            }
            assert used <= known.get(name, used) | {"answer", "options"}
            # The answer would stand in the question.
            assert t.reverse or "{answer}" not in t.ask, (name, t)
            assert not t.letters or "{options}" in t.ask, (name, t)
    reversed_ = [name for name, task in TASKS.items() if any(t.reverse for t in task.templates)]
    assert len(reversed_) >= 10


def test_the_example_of_the_docstring():
    row = Row({"text": "a joy"}, ("negative", "positive"), 1)
    number = next(n for n in range(99) if phrase("sst2", row, n, 0).template == 2)
    made = phrase("sst2", row, number, 0).to_json()
    assert made.pop("id").startswith("sst2-")
    assert made == {
        "task": "sst2",
        "template": 2,
        "messages": [
            {"role": "user", "content": "Review: a joy\nSentiment:"},
            {"role": "assistant", "content": "positive"},
        ],
        "choices": ["negative", "positive"],
        "answer": 1,
    }


def test_labels_and_letters_keep_the_right_choice():
    row = Row({"question": "2 and 2?"}, ("three", "four", "five"), 1)
    seen = {}
    for number in range(200):
        made = phrase("arc_easy", row, number, 7)
        template = TASKS["arc_easy"].templates[made.template]
        answer = made.messages[-1]["content"]
        if template.reverse:
            assert not made.choices and "four" in made.messages[0]["content"]
            continue
        assert made.choices[made.answer] == answer
        if template.letters:
            assert answer == "B" and "B. four" in made.messages[0]["content"]
        seen[made.template] = answer
    assert len(seen) == 7  # every phrasing but the reversed one is drawn
    # The words of "does it contain an error?" are the other way round.
    wrong = Row({"text": "me goes"}, ("no", "yes"), 0)
    said = {
        m.messages[0]["content"]: m.messages[-1]["content"]
        for m in (phrase("cola", wrong, n, 0) for n in range(100))
    }
    assert said["Sentence: me goes\nDoes it contain a grammatical error?"] == "yes"
    assert said["Is this sentence good English?\nme goes"] == "no"


def test_what_is_no_paraphrase_is_not_asked_for_as_one():
    for gold in (0, 1):
        row = Row({"first": "a", "second": "b"}, ("no", "yes"), gold)
        asked = {phrase("mrpc", row, n, 0).messages[0]["content"] for n in range(200)}
        assert ("Say this in other words: a" in asked) == bool(gold)


def test_phrasings_are_drawn_by_seed_and_number():
    row = Row({"text": "a joy"}, ("negative", "positive"), 1)
    draw = [[phrase("sst2", row, n, seed).template for n in range(300)] for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]
    counts = [draw[0].count(t) for t in range(9)]
    assert min(counts) > 15  # 33 each, give or take
    assert not any(
        TASKS["sst2"].templates[phrase("sst2", row, n, 0, reversed_too=False).template].reverse
        for n in range(100)
    )


def test_held_out_rows_are_nowhere_in_training(folder):
    found, repeated = instructions.examples("sst2", folder)
    train, held_out = ({e.id for e in found[p]} for p in (TRAIN, HELD_OUT))
    assert len(train) == 60 and len(held_out) == 2 and not train & held_out
    assert repeated == 2  # one that stands twice, one that is held out
    assert not any("film 0 is bad" in m["content"] for e in found[TRAIN] for m in e.messages)
    assert any('an "odd quote' in m["content"] for e in found[TRAIN] for m in e.messages)


def test_groups_are_never_cut(folder):
    parts, _ = split("boolq", rows("boolq", folder), 0.3)
    passages = [{r.fields["passage"] for r in parts[p]} for p in (TRAIN, HELD_OUT)]
    assert not passages[0] & passages[1]
    assert 5 <= len(passages[1]) <= 25 and len(passages[0]) + len(passages[1]) == 50
    assert rows("boolq", folder)[0].fields == {
        "passage": "text 0\nwith lines", "question": "is it 0?",
    }  # fmt: skip
    # A row more changes no other row's side.
    more, _ = split("boolq", [Row({"passage": "p", "question": "q"}), *rows("boolq", folder)], 0.3)
    assert {r.fields["question"] for r in parts[HELD_OUT]} <= {
        r.fields["question"] for r in more[HELD_OUT]
    }


def test_readers(folder):
    twin, longer = rows("winogrande", folder)
    assert longer.fields["text"] == "He took the _ left." and longer.choices == ("pen", "pencil")
    # Cut where the names begin to differ, the text would be "Mark met Mary so Mar_".
    assert twin.fields["text"] == "Mark met Mary so _ left." and twin.choices == ("Mark", "Mary")
    named, none, _ = rows("wnut", folder)
    assert named.fields["answer"] == "person: Ada Lovelace; location: New York"
    assert none.fields == {"text": "no name", "answer": "none"}
    assert rows("gsm8k", folder)[0].fields["answer"] == "It is 1+2=3.\nThe answer is 3."
    chat, one = rows("lima", folder)  # the row without an answer is no conversation
    assert [m["content"] for m in chat.messages] == ["a", "b", "c", "d"]
    assert one.messages[0]["content"] == "x\n\ny"


def test_python_tasks_hold_out_the_same_objects():
    questions, modules = (
        split(n, TASKS[n].rows(None)) for n in ("python_question", "python_module")
    )
    held = {r.fields["answer"] for r in questions[0][HELD_OUT]}
    trained = {r.fields["text"] for r in modules[0][TRAIN]}
    assert held and not held & trained  # one task's test would be the other's training
    row = modules[0][TRAIN][0]
    assert len(set(row.choices)) == 4 and row.choices[row.gold] not in row.fields["text"].lower()


def test_written_files_are_read_as_conversations(folder, tmp_path):
    table = instructions.write(
        ["sst2", "boolq", "gsm8k"], folder, tmp_path, limit=20, cap=10, temperature=1.0
    )
    assert [r["train"] for r in table] == [20, 20, 1] and [r["capped"] for r in table] == [
        10,
        10,
        1,
    ]
    assert [r["rate"] for r in table] == pytest.approx([10 / 21, 10 / 21, 1 / 21])
    found, rejected = conversations.read([str(tmp_path / "train")])
    assert len(found) == 41 and not rejected
    again = tmp_path / "again"
    instructions.write(["sst2", "boolq", "gsm8k"], folder, again, limit=20)
    for path in sorted((tmp_path / "train").iterdir()):
        assert path.read_bytes() == (again / "train" / path.name).read_bytes()


def test_errors_name_what_to_change(folder, tmp_path):
    with pytest.raises(ValueError, match="no task is named 'sst3'"):
        instructions.examples("sst3", folder)
    with pytest.raises(FileNotFoundError, match=r"RTE/train.tsv: no such file; --input is"):
        instructions.examples("rte", folder)
    with pytest.raises(ValueError, match="boolq: no row for the held_out part"):
        instructions.write(["boolq"], folder, tmp_path, held_out_share=0.0)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("name", [n for n in TASKS if n not in ("sst2", "en_fr", "en_de")])
def test_real_data(name, data_dir):
    """Every task of the folder, a few rows: nothing unfilled, both parts there."""
    found, _ = instructions.examples(name, data_dir, limit=50)
    assert all(found[part] for part in (TRAIN, HELD_OUT))
    assert not {e.id for e in found[TRAIN]} & {e.id for e in found[HELD_OUT]}
    for e in found[TRAIN] + found[HELD_OUT]:
        assert all(m["content"].strip() for m in e.messages)
        assert not e.choices or e.choices[e.answer] == e.messages[-1]["content"]
