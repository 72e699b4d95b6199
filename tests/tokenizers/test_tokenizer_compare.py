"""The comparison of kinds on one text."""

import pytest

from llm_jax import tokenizers


def test_the_numbers_by_hand():
    text = "one two one\n"
    rows = tokenizers.report(
        {
            "byte": tokenizers.train("byte", []),
            "word": tokenizers.train("word", ["one two\n"]),  # " one" is unknown
        },
        text,
    )
    assert [row["kind"] for row in rows] == ["byte", "word"]
    assert rows[0]["bytes_per_token"] == 1
    assert rows[0]["tokens_per_word"] == 12 / 3
    assert rows[0]["unknown_rate"] == 0
    assert rows[0]["round_trip"]
    assert rows[1]["bytes_per_token"] == 12 / 4
    assert rows[1]["tokens_per_word"] == 4 / 3
    assert rows[1]["unknown_rate"] == 1 / 4
    assert not rows[1]["round_trip"]
    assert all(row["megabytes_per_second"] > 0 for row in rows)


def test_all_kinds_on_real_text(trained, wikitext):
    rows = {row["kind"]: row for row in tokenizers.report(trained, wikitext[:200_000])}
    for kind, row in rows.items():
        assert row["vocab_size"] == trained[kind].vocab_size
        assert row["round_trip"] or not trained[kind].lossless
    assert 1 < rows["sentencepiece_unigram"]["bytes_per_token"] < 4
    assert rows["hf_bpe"]["bytes_per_token"] > 1.5 * rows["byte"]["bytes_per_token"]
    assert rows["word"]["unknown_rate"] > rows["hf_wordpiece"]["unknown_rate"] > 0


def test_a_table_has_a_line_for_each(trained):
    byte = trained["byte"]
    rows = tokenizers.report([byte, byte], "a few words")
    assert [row["kind"] for row in rows] == ["byte", "byte (2)"]
    lines = tokenizers.render(rows, "Title").splitlines()
    assert lines[:2] == ["## Title", ""]
    assert len(lines) == 6
    assert len({len(line) for line in lines[2:]}) == 1
    assert lines[4].split("|")[1].strip() == "byte"
    assert tokenizers.report(byte, "a few words")[0]["kind"] == "byte"


def test_text_without_a_word_is_an_error(trained):
    with pytest.raises(ValueError, match="no word"):
        tokenizers.report(trained["byte"], " \n")
