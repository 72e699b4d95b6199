"""Shards hold exactly the tokens of the documents, whole or not at all."""

import json
import os
import threading

import numpy as np
import pytest

from llm_jax import tokenizers
from llm_jax.data import encoding, shards
from llm_jax.data.documents import Document

DOCS = [Document(f"Document {i}: naïve\n" * (i % 7 + 1), f"file {i}") for i in range(60)]


class Alphabet:
    """A tokenizer of bytes that this test controls."""

    kind, bos_id, eos_id, unk_id = "alphabet", 256, 257, ord("?")

    def __init__(self, vocab_size=258, shift=0, fail_at=None):
        self.vocab_size, self.shift, self.fail_at, self.calls = vocab_size, shift, fail_at, 0

    def encode(self, text):
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) + self.shift for t in texts]

    def fingerprint(self):
        return f"alphabet {self.vocab_size} {self.shift}"


def expected(docs, eos, bos=()):
    return [[*bos, *d.text.encode(), *eos] for d in docs]


def contents(tokens):
    ids = tokens.take(np.arange(tokens.total)).tolist()
    return [ids[a:b] for a, b in zip(tokens.offsets, tokens.offsets[1:])]


def snapshot(directory):
    found = {}
    for name in sorted(os.listdir(directory)):
        with open(os.path.join(directory, name), "rb") as f:
            found[name] = f.read()
    manifest = json.loads(found.pop("manifest.json"))
    del manifest["seconds"]
    return found, manifest


@pytest.mark.parametrize("vocab_size", [258, 70000])
@pytest.mark.parametrize("shard_bytes", [256, 1 << 20])
@pytest.mark.parametrize("bos", [False, True])
def test_the_shards_are_the_documents(tmp_path, vocab_size, shard_bytes, bos):
    tokenizer, path = Alphabet(vocab_size), str(tmp_path / "x")
    made = shards.prepare(
        iter(DOCS), tokenizer, path, add_bos=bos, add_eos=True, shard_bytes=shard_bytes
    )
    tokens = shards.open_(path, tokenizer=tokenizer.fingerprint())
    assert tokens.shards[0].dtype == (np.uint16 if vocab_size == 258 else np.uint32)
    assert contents(tokens) == expected(DOCS, [257], [256] if bos else [])
    assert (len(tokens.shards) > 10) == (shard_bytes == 256)
    assert made.tokens == tokens.total and made.documents == len(DOCS)
    assert made.characters == sum(len(d.text) for d in DOCS)
    assert made.bytes == sum(len(d.text.encode()) for d in DOCS) > made.characters
    assert not os.path.exists(path + ".partial")


def test_a_cut_document_has_no_end_token_where_it_was_cut(tmp_path):
    docs = [Document("ab", "x", False, True), Document("c", "y"), Document("d", "z", True, False)]
    shards.prepare(docs, Alphabet(), str(tmp_path / "x"), add_bos=True, add_eos=True)
    a, b, c, d = b"abcd"
    assert contents(shards.open_(str(tmp_path / "x"))) == [[a, b, 257], [256, c, 257], [256, d]]


def test_a_full_last_shard_leaves_no_empty_one(tmp_path):
    path = str(tmp_path / "x")
    shards.prepare([Document("abcd", "x")], Alphabet(), path, add_eos=False, shard_bytes=4)
    assert sorted(os.listdir(path)) == [
        "documents.bin", "manifest.json", "tokens-00000.bin", "tokens-00001.bin"
    ]  # fmt: skip
    assert contents(shards.open_(path)) == [list(b"abcd")]


def test_unknown_tokens_are_counted(tmp_path):
    made = shards.prepare([Document("a?b??", "x")], Alphabet(), str(tmp_path / "x"))
    assert made.unknown == 3


def refuse():
    raise AssertionError("the documents were read although nothing has changed")
    yield


def test_shards_are_reused_only_if_nothing_has_changed(tmp_path, caplog):
    path, tokenizer = str(tmp_path / "x"), Alphabet()
    first = shards.prepare(DOCS, tokenizer, path, identity=["a", 1])
    assert shards.prepare(refuse(), tokenizer, path, identity=("a", 1)) == first
    assert "rebuilding" not in caplog.text
    changes = [
        (tokenizer, {"identity": ["a", 2]}, "the text"),
        (tokenizer, {"identity": None}, "the text"),
        (tokenizer, {"identity": ["a", 1], "add_bos": True}, "add_bos"),
        (Alphabet(300), {"identity": ["a", 1]}, "tokenizer, vocab_size"),
    ]
    for other, options, reason in changes:
        shards.prepare(DOCS, tokenizer, path, identity=["a", 1])
        caplog.clear()
        shards.prepare(DOCS[:2], other, path, **options)
        assert f"rebuilding the token shards; changed: {reason}" in caplog.text
        assert shards.open_(path).documents == 2
    assert sorted(os.listdir(tmp_path)) == [".x.lock", "x"]


@pytest.mark.parametrize("fail_at", [9, 10, 11, 12])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path, monkeypatch, caplog, fail_at
):
    monkeypatch.setattr(encoding.batches, "__defaults__", (300,))
    whole, cut, once = str(tmp_path / "whole"), str(tmp_path / "cut"), Alphabet()
    shards.prepare(iter(DOCS), once, whole, identity=1, shard_bytes=2000)
    with pytest.raises(KeyboardInterrupt):
        shards.prepare(iter(DOCS), Alphabet(fail_at=fail_at), cut, identity=1, shard_bytes=2000)
    assert not os.path.exists(cut)  # half a folder is not there at all
    again = Alphabet()
    shards.prepare(iter(DOCS), again, cut, identity=1, shard_bytes=2000)
    assert "going on after" in caplog.text
    assert again.calls < once.calls
    assert snapshot(cut) == snapshot(whole)


def test_an_interrupted_run_of_other_text_starts_over(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding.batches, "__defaults__", (300,))
    path = str(tmp_path / "x")
    with pytest.raises(KeyboardInterrupt):
        shards.prepare(iter(DOCS), Alphabet(fail_at=12), path, identity=1, shard_bytes=1000)
    shards.prepare(iter(DOCS[::-1]), Alphabet(), path, identity=2, shard_bytes=1000)
    assert contents(shards.open_(path)) == expected(DOCS[::-1], [257])


def test_a_failed_rebuild_leaves_the_old_shards(tmp_path):
    path = str(tmp_path / "x")
    shards.prepare(DOCS, Alphabet(), path, identity=1)
    with pytest.raises(KeyboardInterrupt):
        shards.prepare(DOCS, Alphabet(fail_at=4), path, identity=2)
    assert contents(shards.open_(path)) == expected(DOCS, [257])


def test_two_writers_wait_for_each_other(tmp_path):
    path, made = str(tmp_path / "x"), []

    def work():
        made.append(shards.prepare(iter(DOCS), Alphabet(), path, identity=1, shard_bytes=100))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(made) == 3 and made[0] == made[1] == made[2]
    assert contents(shards.open_(path)) == expected(DOCS, [257])


def damage_byte(path):
    with open(path, "r+b") as f:
        f.seek(8)
        byte = f.read(1)[0]
        f.seek(8)
        f.write(bytes([byte ^ 1]))


def cut_short(path):
    os.truncate(path, os.path.getsize(path) - 2)


def put_large_id(path):
    with open(path, "r+b") as f:
        f.seek(20)
        f.write(np.array([258], "<u2").tobytes())


@pytest.mark.parametrize(
    "file, damage, message",
    [
        (
            "tokens-00001.bin",
            damage_byte,
            r"tokens-00001\.bin: damaged, its hash .*; delete .* again",
        ),
        ("tokens-00000.bin", cut_short, r"tokens-00000\.bin: damaged, 98 bytes instead of 100"),
        (
            "tokens-00002.bin",
            put_large_id,
            r"tokens-00002\.bin: token id 258 at position 10 is outs",
        ),
        ("documents.bin", damage_byte, r"documents\.bin: damaged, its hash"),
        ("tokens-00003.bin", os.remove, r"tokens-00003\.bin: this shard is gone; delete"),
        ("manifest.json", cut_short, r"manifest\.json: damaged"),
        ("manifest.json", os.remove, r"manifest\.json: no token shards here"),
    ],
)
def test_damage_is_named(tmp_path, file, damage, message):
    path = str(tmp_path / "x")
    shards.prepare(DOCS, Alphabet(), path, shard_bytes=100)
    damage(os.path.join(path, file))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        shards.open_(path)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_is_an_error(tmp_path):
    shards.prepare(DOCS, Alphabet(), str(tmp_path / "x"))
    with pytest.raises(ValueError, match=r"x: made with tokenizer alphabet 258, not other"):
        shards.open_(str(tmp_path / "x"), tokenizer="other")


@pytest.mark.parametrize(
    "docs, tokenizer, options, message",
    [
        (DOCS, Alphabet(258, shift=200), {}, "makes ids from 210 to 395, outside its vocabulary"),
        ([], Alphabet(), {}, "no token in this part"),
        (
            [Document("\ud800", "rows.jsonl")],
            Alphabet(),
            {},
            r"rows\.jsonl: .* lone surrogate U\+D800",
        ),
    ],
)
def test_what_cannot_be_tokenised_is_a_one_line_error(tmp_path, docs, tokenizer, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        shards.prepare(docs, tokenizer, str(tmp_path / "x"), **options)
    assert "\n" not in str(caught.value)
    assert not os.path.exists(tmp_path / "x")


def test_a_missing_special_token_is_an_error(tmp_path):
    tokenizer = tokenizers.train("char", ["ab"])
    with pytest.raises(
        ValueError, match=r"char tokenizer has no eos token; set data.add_eos=False"
    ):
        shards.prepare(DOCS, tokenizer, str(tmp_path / "x"))
