"""The embedded corpora: deterministic, free of duplicates, and fair to split at the end."""

import os
import subprocess
import sys

import pytest

from llm_jax import corpus


def test_every_corpus_has_about_the_promised_size():
    size = {n: sum(len(text) for _, text in corpus.documents(n)) for n in corpus.NAMES}
    assert 0.4e6 < size["topics"] < 0.7e6
    assert 1.2e6 < size["docstrings"] < 2.5e6
    assert 6e6 < size["source"] < 20e6
    assert 0.95 * (size["topics"] + size["docstrings"]) < size["docs"]


def test_no_document_of_docs_comes_twice():
    texts = [" ".join(text.lower().split()) for _, text in corpus.documents("docs")]
    assert len(set(texts)) == len(texts)
    assert all(texts)


def test_docs_mix_their_parts_evenly():
    # In file order, the last tenth would be one topic of Python's packages only.
    names = [name for name, _ in corpus.documents("docs")]
    last = names[-len(names) // 10 :]
    whole_share = sum(n.startswith("tkinter.") for n in names) / len(names)
    last_share = sum(n.startswith("tkinter.") for n in last) / len(last)
    assert whole_share > 0.01
    assert 0.5 < last_share / whole_share < 2
    assert any(n.startswith("topics.") for n in last)
    assert any(n.startswith("topics.") for n in names[: len(names) // 10])


def test_documents_are_what_they_are_named_after():
    docs = dict(corpus.documents("docstrings"))
    assert docs["textwrap.dedent"].startswith("Remove any common leading whitespace")
    assert dict(corpus.documents("topics"))["topics.lambda"].startswith("Lambdas")
    source = dict(corpus.documents("source"))
    assert "def dedent" in source["textwrap"]
    assert not any(name.startswith(("test.", "idlelib")) for name in source)


def test_another_process_gets_the_same_documents():
    # Sets and hashes of strings differ between processes; the order must not depend on them.
    code = (
        "import hashlib; from llm_jax import corpus; "
        "found = [*corpus.documents('docs'), *corpus.preferences()]; "
        "print(hashlib.sha256(repr(found).encode()).hexdigest())"
    )
    digests = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert digests[0] == digests[1] and len(digests[0]) > 60


def test_questions_share_neither_an_object_nor_an_answer():
    names, asked, answers = zip(*corpus.questions(), strict=True)
    assert 3000 < len(names) == len(set(names))
    assert len({" ".join(a.lower().split()) for a in answers}) == len(answers)
    assert all(f"`{name}`" in question for name, question in zip(names, asked, strict=True))
    # Several phrasings, about equally often in both parts.
    phrasings = [q.replace(f"`{n}`", "X") for n, q in zip(names, asked, strict=True)]
    for part in (phrasings[:-500], phrasings[-500:]):
        share = [part.count(p) / len(part) for p in set(phrasings)]
        assert len(share) == 8 and 0.05 < min(share) and max(share) < 0.25
    answer = dict(zip(names, answers, strict=True))["textwrap.dedent"]
    assert answer == "Remove any common leading whitespace from every line in `text`."


def test_preferences_are_the_questions_with_an_answer_that_is_spoiled():
    rows = corpus.preferences()
    assert [row[:3] for row in rows] == list(corpus.questions())
    assert corpus.preferences() is rows
    answers = {answer for _, _, answer in corpus.questions()}
    count, ahead = {"scrambled": 0, "another": 0, "replaced": 0}, []
    for _, _, chosen, rejected in rows:
        assert chosen != rejected
        words, others = chosen.split(), rejected.split()
        if sorted(words) == sorted(others):
            count["scrambled"] += 1
        elif rejected in answers:
            count["another"] += 1
            ahead.append(abs(len(chosen) - len(rejected)))
        else:
            count["replaced"] += 1
            changed = sum(a != b for a, b in zip(words, others, strict=True))
            assert changed == max(1, round(len(words) / 3))
    assert sorted(ahead)[len(ahead) // 2] <= 2  # of any other answer: 30 characters
    share = {kind: n / len(rows) for kind, n in count.items()}
    assert share == pytest.approx({"scrambled": 0.6, "another": 0.15, "replaced": 0.25}, abs=0.02)


@pytest.mark.parametrize("unit", [len, lambda text: len(text.split())], ids=["characters", "words"])
def test_length_does_not_tell_which_answer_is_preferred(unit):
    ahead = [unit(rejected) - unit(chosen) for _, _, chosen, rejected in corpus.preferences()]
    assert abs(sum(ahead) / len(ahead)) < 1  # the answers have 77 characters on average
    # Whoever takes the shorter answer, and tosses a coin for those as long, is right by half.
    right = sum((d > 0) + 0.5 * (d == 0) for d in ahead) / len(ahead)
    assert 0.48 < right < 0.52


def test_the_last_preferences_share_hardly_an_answer_with_the_rest():
    # Another question's answer out of all of them would make it a hundred.
    rows = corpus.preferences()
    cut = len(rows) * 9 // 10
    before = {answer for row in rows[:cut] for answer in row[2:]}
    assert sum(answer in before for row in rows[cut:] for answer in row[2:]) < 20


@pytest.mark.parametrize("size", [2, 3, 256, 257])
def test_every_answer_finds_another_one_of_its_length(monkeypatch, size):
    # 257 questions: were they cut into blocks of 256, the last would have no neighbour but itself.
    answers = ["no no no no", *(f"it does {'x' * i} well" for i in range(1, size))]
    found = tuple((f"m.f{i}", "What?", answer) for i, answer in enumerate(answers))
    monkeypatch.setattr(corpus, "questions", lambda: found)
    rows = corpus.preferences.__wrapped__()
    assert len(rows) == size
    # The first answer has no other order, yet a spoiled one.
    assert all(rejected and rejected != chosen for _, _, chosen, rejected in rows)


def test_preferences_as_documents_teach_true_answers_only():
    assert list(corpus.documents("preferences")) == list(corpus.documents("questions"))


def test_unknown_name_is_an_error_that_lists_the_names():
    with pytest.raises(
        ValueError, match=r"'doc'.*docs, docstrings, preferences, questions, source, topics"
    ):
        list(corpus.documents("doc"))
