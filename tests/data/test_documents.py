"""Readers: every format gives the same text, memory stays bounded, errors name the place."""

import gzip
import json
import sys
import tracemalloc
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data import documents
from llm_jax.data.documents import Document

TEXTS = ["First document.\nTwo lines, naïve café 🙂", "Second", "Third\r\nwith CRLF"]


def write(path, content):
    if isinstance(content, str):
        content = content.encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pytest.importorskip("zstandard").compress(content)
    path.write_bytes(content)
    return str(path)


def texts(*inputs, **kwargs):
    """The documents' texts, pieces joined."""
    found = []
    for d in documents.read(inputs, **kwargs):
        if d.first:
            found.append("")
        found[-1] += d.text
    return found


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_rows_come_out_as_they_went_in(tmp_path, kind, packed):
    rows = [{"id": i, "text": t} for i, t in enumerate(TEXTS)]
    lines = "\n".join(json.dumps(r) for r in rows) + "\n\n"
    content = lines if kind == "jsonl" else json.dumps(rows, indent=2, ensure_ascii=False)
    assert texts(write(tmp_path / f"a.{kind}{packed}", content)) == TEXTS


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_a_plain_file_is_one_document_exactly(tmp_path, packed):
    assert texts(write(tmp_path / f"a.txt{packed}", "\n".join(TEXTS))) == ["\n".join(TEXTS)]


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    parquet.write_table(arrow.table({"text": TEXTS, "n": [1, 2, 3]}), path, row_group_size=2)
    assert texts(path) == TEXTS
    with pytest.raises(ValueError, match=r"a\.parquet: no key 'body'; it has 'text', 'n'"):
        texts(path, text_key="body")
    with open(path, "r+b") as f:
        f.truncate(100)
    with pytest.raises(ValueError, match=r"a\.parquet: damaged"):
        texts(path)


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.integers(min_value=1, max_value=7),
)
def test_chunks_never_split_a_character(tmp_path_factory, text, chunk):
    path = tmp_path_factory.mktemp("x") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK_BYTES", chunk)
        pieces = list(documents._plain(str(path)))
    assert "".join(p.text for p in pieces) == text.removeprefix("\ufeff")
    assert [p.first for p in pieces] == [i == 0 for i in range(len(pieces))]
    assert [p.last for p in pieces] == [i == len(pieces) - 1 for i in range(len(pieces))]


@given(
    st.lists(st.text(alphabet='aé{}[]",\\ \n', max_size=8), max_size=5),
    st.integers(min_value=1, max_value=9),
    st.sampled_from([None, 1]),
)
def test_a_json_list_is_parsed_the_same_in_any_chunks(tmp_path_factory, rows, chunk, indent):
    path = tmp_path_factory.mktemp("x") / "a.json"
    path.write_text(json.dumps([{"text": t} for t in rows], indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK_BYTES", chunk)
        assert list(documents._json_list(str(path), "text")) == rows


def test_folders_are_read_recursively_in_order_and_say_what_they_leave_out(tmp_path, caplog):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    write(tmp_path / "b" / "1.txt", "b1")
    write(tmp_path / "a.md", "a")
    write(tmp_path / "c.jsonl.gz", '{"text": "c"}\n')
    write(tmp_path / "image.png", "no")
    write(tmp_path / ".git" / "x.txt", "no")
    assert texts(str(tmp_path)) == ["a", "b1", "c"]
    assert ".png" in caplog.text
    assert texts(str(tmp_path / "**" / "*.txt")) == ["b1"]
    assert texts(str(tmp_path / "*.m?"), str(tmp_path / "b")) == ["a", "b1"]


def test_embedded():
    _, text = next(iter(documents.corpus.documents("topics")))
    first = next(documents.read(["embedded:topics"]))
    assert first == Document(text, "embedded:topics")
    with pytest.raises(ValueError, match="embedded:doc: there are"):
        documents.read(["embedded:doc"])


def test_hugging_face_names(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return iter([{"text": "x"}, {"text": ""}, {"text": "y"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for name in ("hf:org/set", "hf:org/set:en", "hf:org/set:en:test", "hf:org/set::test[:5]"):
        assert texts(name) == ["x", "y"]
    streaming = {"streaming": True}
    assert calls == [
        (("org/set", None), {"split": "train"} | streaming),
        (("org/set", "en"), {"split": "train"} | streaming),
        (("org/set", "en"), {"split": "test"} | streaming),
        (("org/set", None), {"split": "test[:5]"} | streaming),
    ]


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'llm_jax\[hf\]'"):
        texts("hf:org/set")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"a\.parquet needs .* 'llm_jax\[data\]'"):
        texts(write(tmp_path / "a.parquet", "x"))


ERRORS = {
    # file content, message
    "latin": ("a.txt", b"caf\xe9 ol\xe9", r"a\.txt: not UTF-8 at byte 3 \(0xe9"),
    "cut utf-8": ("a.txt", "caf\u00e9".encode()[:-1], r"a\.txt: not UTF-8 at byte 3"),
    "latin row": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"not UTF-8 at byte 24 \(0xe9"),
    "no key": (
        "a.jsonl",
        b'{"text": "a"}\n{"body": 1, "id": 2}',
        r":2: no key 'text'; it has 'body'",
    ),
    "no object": ("a.jsonl", b'["a"]', r":1: a row has to be an object"),
    "no text": ("a.jsonl", b'{"text": null}', r":1: 'text' is NoneType, not text"),
    "no json": ("a.jsonl", b'{"text": "a"}\n\n{"text": ', r":3: not JSON"),
    "cut list": ("a.json", b'[{"text": "a"}, {"te', r"a\.json: not JSON after row 1"),
    "no end": ("a.json", b'[{"text": "a"}, ', r"a\.json: the list does not end after row 1"),
    "cut gz": ("a.txt.gz", gzip.compress(b"x" * 9999)[:-12], r"a\.txt\.gz: damaged or cut short"),
    "no gz": ("a.txt.gz", b"plain", r"a\.txt\.gz: damaged or cut short"),
    "empty": ("a.txt", b"", r"the corpus is empty: no text in .*a\.txt"),
    "empty rows": ("a.jsonl", b'{"text": ""}\n', r"the corpus is empty"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_damaged_input_is_a_one_line_error_that_names_the_place(tmp_path, case):
    name, content, message = ERRORS[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        texts(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_truncated_zst_is_an_error(tmp_path):
    # zstandard's stream reader would end here without a word, and lose half of the corpus.
    packed = pytest.importorskip("zstandard").compress(bytes(range(256)) * 999)
    (tmp_path / "a.txt.zst").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match="damaged or cut short"):
        texts(str(tmp_path / "a.txt.zst"))


def test_missing_inputs_are_found_before_anything_is_read(tmp_path):
    there = write(tmp_path / "shakespeare.txt", "text")
    with pytest.raises(FileNotFoundError, match=r"did you mean .*shakespeare\.txt\?"):
        documents.read([there, str(tmp_path / "shakespear.txt")])
    with pytest.raises(FileNotFoundError, match=r"\*\.jsonl: no file matches"):
        documents.read([str(tmp_path / "*.jsonl")])
    with pytest.raises(ValueError, match="no input"):
        documents.read([])
    (tmp_path / "images").mkdir()
    write(tmp_path / "images" / "a.png", "x")
    with pytest.raises(
        FileNotFoundError, match=r"images: no readable text in this folder, only \.png"
    ):
        documents.read([str(tmp_path / "images")])


@given(
    st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=6),
    st.floats(min_value=0, max_value=0.99),
)
def test_the_split_is_exact_by_characters(parts, fraction):
    docs = [Document(p, "x") for p in parts]
    whole = "".join(parts)
    start = documents.held_out_start(documents.count_characters(docs), fraction)
    train, held_out = list(documents.take(docs, 0, start)), list(documents.take(docs, start))
    assert start == int(len(whole) * (1.0 - fraction))
    assert "".join(d.text for d in train) == whole[:start]
    assert "".join(d.text for d in held_out) == whole[start:]
    assert all(d.text for d in train + held_out)
    # Every document begins once and ends once, in whichever part that is.
    assert sum(d.first for d in train + held_out) == len(parts)
    assert sum(d.last for d in train + held_out) == len(parts)


def test_a_document_on_the_boundary_is_cut_there():
    docs = [Document("abcd", "x"), Document("efghij", "y")]
    assert list(documents.take(docs, 0, 6)) == [
        Document("abcd", "x"),
        Document("ef", "y", first=True, last=False),
    ]
    assert list(documents.take(docs, 6)) == [Document("ghij", "y", first=False, last=True)]
    assert list(documents.take(docs, 0, 4)) == [Document("abcd", "x")]


def test_identity_changes_with_the_file(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    before = documents.identity([path, "embedded:topics", "hf:x"])
    assert before == documents.identity([path, "embedded:topics", "hf:x"])
    write(tmp_path / "a.txt", "three")
    assert before != documents.identity([path, "embedded:topics", "hf:x"])


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.json"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    row = "x" * 999 + "\n"
    content = row * 16_000
    if "json" in name:
        rows = [json.dumps({"text": row})] * 16_000
        content = "\n".join(rows) if name == "a.jsonl" else "[" + ",".join(rows) + "]"
    path = write(tmp_path / name, content)
    del content
    tracemalloc.start()
    try:
        total = sum(len(d.text) for d in documents.read([path]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 16_000_000
    assert peak < 8_000_000
