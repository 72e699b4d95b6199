"""Templates and tokenizers of conversations: whose they are, what they refuse, what ends an answer."""

import datetime
import json

import pytest
from data.dialogues import LINE, learnt, pair, train_config

from llm_jax import config as configs
from llm_jax import tokenizers
from llm_jax.tokenizers.chat_formats import FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_a_trained_tokenizer_has_the_formats_tokens(made, tmp_path, name):
    data = made([pair("a", "b")], length=256, **{"dialogue.template": name})
    tokenizer = data.tokenizer
    assert set(FORMATS[name].special_tokens) <= set(tokenizer.special_tokens)
    ids = data.prompt("Hi")
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )
    assert ids == expected
    # What ends an answer is known by its id.
    ends = {
        tokenizer.special_tokens[n] for n in FORMATS[name].stop if n in tokenizer.special_tokens
    }
    assert set(data.end_tokens) == ends and tokenizer.eos_id not in data.end_tokens
    kept = tokenizers.load(tmp_path / "run/data/tokenizer")
    assert kept.fingerprint() == tokenizer.fingerprint() and kept.chat_template


def test_a_tokenizer_without_the_formats_tokens_reads_them_as_text(made, tmp_path, caplog):
    tokenizers.train("byte", []).save(tmp_path / "bytes")
    given = configs.TokenizerConfig(path=str(tmp_path / "bytes"))
    caplog.set_level("INFO")
    data = made([pair("a", "b")], tokenizer=given, **{"dialogue.template": "chatml"})
    assert "no special token <|im_start|>, <|im_end|>" in caplog.text
    assert data.end_tokens == () and data.stop == ("<|im_end|>",)
    batch = data.loader(train_config(batch_size=1)).batch(0)
    assert learnt(data.tokenizer, batch) == ["b<|im_end|>"]


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize(
    ("ending", "ends", "stop"),
    [
        ("</end>\\n", [], ("</end>",)),
        (" #\\n\\n", [], ("#",)),
        ("\\n\\n", [], ()),
        ("", [], ()),
        ("<|stop|>\\n", ["<|stop|>"], ()),
        (".<|stop|>\\n</end>", ["<|stop|>"], ()),
        ("</s>", [], ()),  # the tokenizer's own end needs no mention
    ],
)
def test_what_ends_an_answer_is_an_id_or_a_string(made, tmp_path, train_on, ending, ends, stop):
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content + '" + ending + "' }}{% endfor %}"
    )
    given = configs.TokenizerConfig(kind="byte", special_tokens=("<|stop|>",))
    changes = {"dialogue.template": str(path), "dialogue.train_on": train_on}
    data = made([pair("a", "b")], tokenizer=given, **changes)
    assert data.end_tokens == tuple(data.tokenizer.special_tokens[name] for name in ends)
    assert data.stop == stop


def test_the_tokenizers_own_template_is_the_default(made, tmp_path):
    own = tokenizers.train("byte", [])
    own.chat_template = LINE.replace(":", "=")
    own.save(tmp_path / "own")
    given = configs.TokenizerConfig(path=str(tmp_path / "own"))
    data = made([pair("a", "b")], tokenizer=given, **{"dialogue.template": ""})
    assert data.tokenizer.decode(data.prompt("Hi")) == "u=Hi"
    own.chat_template = None
    own.save(tmp_path / "none")
    given = configs.TokenizerConfig(path=str(tmp_path / "none"))
    with pytest.raises(
        ValueError, match=r"none has no chat template; name one in data.dialogue.te"
    ):
        made([pair("a", "b")], tokenizer=given, **{"dialogue.template": ""})
    with pytest.raises(
        FileNotFoundError, match=r"template=chatlm: neither a file nor one of chatml"
    ):
        made([pair("a", "b")], **{"dialogue.template": "chatlm"})


def test_a_template_file_is_utf_8_with_or_without_a_mark_at_its_start(made, tmp_path):
    path = tmp_path / "own.jinja"
    name = {"dialogue.template": str(path)}
    path.write_text("é" + LINE, encoding="utf-8-sig")
    data = made([pair("a", "b")], **name)
    assert data.tokenizer.decode(data.prompt("Hi")) == "éu:Hi"
    for content, message in (
        ("é".encode("latin-1"), "'utf-8' codec can't decode byte 0xe9 .*"),
        (b"\n{% for m in messages %}", "chat template, line 2: Unexpected end of template.*"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^data.dialogue.template={path}: {message}$"):
            made([pair("a", "b")], **name)


@pytest.mark.parametrize(
    "answer", ["", "{% if false %}{% generation %}{% endgeneration %}{% endif %}"]
)
@pytest.mark.parametrize("too_long", ["cut", "oldest"])
def test_a_template_that_writes_no_answer_is_said_to_be_one(made, tmp_path, answer, too_long):
    path = tmp_path / "asks.jinja"
    path.write_text(
        "{% for m in messages if m.role == 'user' %}" + answer + "{{ m.content }}{% endfor %}"
    )
    rows = [pair("a", "b"), pair("c" * 99, "d")]
    with pytest.raises(ValueError, match=r"in 2 the template writes none of .*words") as e:
        made(rows, **{"dialogue.template": str(path), "dialogue.too_long": too_long})
    assert "raise the length" not in str(e.value) and "\n" not in str(e.value)
    listed = [json.loads(r) for r in (tmp_path / "run/data/rejected.jsonl").open()]
    assert [row["rule"] for row in listed] == ["unwritten"] * 2


def test_a_run_that_goes_on_another_day_has_the_same_data(made, tmp_path, monkeypatch):
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %b') }} " + LINE)
    trained = configs.TokenizerConfig(kind="sentencepiece_bpe", vocab_size=290)
    rows = [pair(f"question {i}", f"answer {i}") for i in range(9)]
    clock = {}

    class Clock(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2024, 2, clock["day"])

    def on(day, workdir="run", writer=True):
        clock["day"] = day
        template = {"dialogue.template": str(tmp_path / "dated.jinja")}
        return made(rows, tokenizer=trained, workdir=workdir, writer=writer, **template)

    monkeypatch.setattr(datetime, "datetime", Clock)
    first = on(28)
    for later in (on(29), on(29, writer=False)):
        assert later.tokenizer.fingerprint() == first.tokenizer.fingerprint()
        assert later.loader(train_config()).identity == first.loader(train_config()).identity
        assert later.tokenizer.decode(later.prompt("Hi")) == "28 Feb u:Hi"
    other = on(29, workdir="other")
    assert other.loader(train_config()).identity != first.loader(train_config()).identity
    # A chat takes place today.
    asked = [{"role": "user", "content": "Hi"}]
    assert first.tokenizer.apply_chat_template(asked, tokenize=False) == "29 Feb u:Hi</s>"
    (tmp_path / "run/data/rendered_on.txt").write_text("yesterday")
    with pytest.raises(
        ValueError, match=r"rendered_on.txt: 'yesterday' is no date like 2024-12-31"
    ):
        on(29)


def test_another_process_has_the_same_data(made):
    rows = [pair(f"question {i}", f"answer {i}" * (i % 3 + 1)) for i in range(20)]
    trained = configs.TokenizerConfig(kind="sentencepiece_bpe", vocab_size=330)
    changes = {"dialogue.template": "zephyr", "eval_fraction": 0.2, "length": 128}
    first = made(rows, tokenizer=trained, **changes)
    other = made(rows, tokenizer=trained, writer=False, **changes)
    cfg = train_config(length=128)
    assert other.tokenizer.fingerprint() == first.tokenizer.fingerprint()
    assert other.loader(cfg).identity == first.loader(cfg).identity
    assert other.parts() == first.parts()
