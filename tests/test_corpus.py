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
    count = {"scrambled": 0, "looped": 0}
    for _, _, chosen, rejected in rows:
        assert chosen != rejected
        words, others = chosen.split(), rejected.split()
        assert len(words) == len(others)
        if sorted(words) == sorted(others):
            count["scrambled"] += 1
        else:
            count["looped"] += 1
            assert any(others == (words[:k] * len(words))[: len(words)] for k in (2, 3))
    share = {kind: n / len(rows) for kind, n in count.items()}
    assert share == pytest.approx({"scrambled": 0.7, "looped": 0.3}, abs=0.03)


def test_length_hardly_tells_which_answer_is_preferred():
    unit = len
    ahead = [unit(rejected) - unit(chosen) for _, _, chosen, rejected in corpus.preferences()]
    assert abs(sum(ahead) / len(ahead)) < 1  # the answers have 77 characters on average
    # Whoever takes the shorter answer, and tosses a coin for those as long, is right by half.
    right = sum((d > 0) + 0.5 * (d == 0) for d in ahead) / len(ahead)
    assert 0.45 < right < 0.55


def test_an_answer_without_another_order_is_spoiled_too(monkeypatch):
    monkeypatch.setattr(corpus, "questions", lambda: (("m.f", "What?", "no no no no"),))
    assert corpus.preferences.__wrapped__() == (("m.f", "What?", "no no no no", "no no"),)


def test_preferences_as_documents_teach_true_answers_only():
    assert list(corpus.documents("preferences")) == list(corpus.documents("questions"))


def test_unknown_name_is_an_error_that_lists_the_names():
    with pytest.raises(
        ValueError, match=r"'doc'.*docs, docstrings, preferences, questions, source, topics"
    ):
        list(corpus.documents("doc"))
