"""Conversations as batches: what is learnt, what is cut, what is left out, and in which order."""

import collections
import json
from pathlib import Path

import numpy as np
import pytest
from data.dialogues import LINE, learnt, pair, talk, train_config

from llm_jax import config as configs

# ------------------------------------------------------------------------------------------ batches


def test_a_packed_row_by_hand(made):
    data = made([pair("a", "bé"), pair("c", "d")], length=24)
    batch = data.loader(train_config(length=24, batch_size=1, steps=1)).batch(0)
    eos = data.tokenizer.eos_id
    first = [*b"u:a", eos, *b"a:b\xc3\xa9", eos]
    second = [*b"u:c", eos, *b"a:d", eos]
    assert batch.tokens[0].tolist() == [*first, *second] + [0] * 6
    assert batch.segments[0].tolist() == [1] * 10 + [2] * 8 + [0] * 6
    assert batch.positions[0].tolist() == [*range(10), *range(8)] + [0] * 6
    # "bé</s>" and "d</s>", each one place earlier; 1 where the target is the assistant's.
    where = np.flatnonzero(batch.weights[0])
    assert where.tolist() == [5, 6, 7, 8, 15, 16]
    assert batch.targets[0][where].tolist() == [*b"b\xc3\xa9", eos, *b"d", eos]
    assert batch.bytes[0][where].tolist() == [1, 1, 1, 0, 1, 0]
    assert batch.bytes[0].sum() == 4  # none where the weight is 0


@pytest.fixture(scope="module")
def mixed():
    """Fifty conversations of very different lengths."""
    rng = np.random.default_rng(0)
    return [talk(f"q{i}", "x" * int(n)) for i, n in enumerate(rng.integers(1, 100, 50))]


@pytest.mark.parametrize("packing", ["first_fit", "pad", "bucket"])
def test_an_epoch_trains_every_answer_once(made, mixed, packing):
    data = made(mixed, length=128, packing=packing)
    cfg = train_config(**{"length": 128, "data.packing": packing, "batch_size": 1})
    rows = sum(data.loader(cfg).epoch_rows.values())
    loader = data.loader(configs.override(cfg, {"steps": rows}))
    found = []
    for batch in loader:
        found += [text for text in learnt(data.tokenizer, batch)[0].split("</s>") if text]
    assert sorted(found) == sorted(row["messages"][1]["content"] for row in mixed)
    assert sum(len(t) + 1 for t in found) == data.parts()[0]["trained tokens"]


def test_bucketed_rows_are_of_like_length(made, mixed):
    bucketed, padded = (made(mixed, length=128, packing=p) for p in ("bucket", "pad"))
    cfg = train_config(**{"length": 128, "data.packing": "bucket", "batch_size": 5, "steps": 40})
    loader = bucketed.loader(cfg)
    batches = list(loader)
    lengths = [batch.tokens.shape[1] for batch in batches]
    assert set(lengths) <= {32, 64, 96, 128} and len(set(lengths)) > 2
    assert lengths[:32] != sorted(lengths[:32])  # steps are not ordered by length
    for batch in batches:
        longest = int((batch.segments > 0).sum(axis=1).max())
        assert longest <= batch.tokens.shape[1] < longest + 32  # no place is lost to a longer row
        assert {leaf.shape[1] for leaf in (batch.targets, batch.weights, batch.bytes)} == {
            batch.tokens.shape[1]
        }
    held = sum(int((batch.segments > 0).sum()) for batch in batches)
    share = held / sum(batch.tokens.size for batch in batches)
    assert loader.utilisation == {"train": pytest.approx(share)}
    # Of 32 steps the rows are those of "pad", in another order.
    others = padded.loader(configs.override(cfg, {"data.packing": "pad"}))
    assert share > 1.5 * others.utilisation["train"]

    def texts(some):
        return collections.Counter(t for b in some for t in learnt(bucketed.tokenizer, b))

    assert texts(batches[:32]) == texts(others.batch(i) for i in range(32))
    assert texts(batches[32:]) == texts(others.batch(i) for i in range(32, 40))
    for step in (0, 31, 32, 39):  # any step at any time, and from any step on
        assert same(loader.batch(step), batches[step])
        assert same(next(loader.iterate(step)), batches[step])


@pytest.mark.parametrize("packing", ["first_fit", "bucket"])
def test_hosts_together_have_the_batch_of_one(made, mixed, packing):
    data = made(mixed, length=128, packing=packing)
    cfg = train_config(**{"length": 128, "data.packing": packing, "batch_size": 6})
    whole = data.loader(cfg)
    parts = [data.loader(cfg, blocks=(i,), block_count=3) for i in range(3)]
    for step in range(0, 20, 7):
        rows = [part.batch(step).tokens for part in parts]
        assert np.array_equal(np.concatenate(rows), whole.batch(step).tokens)


def same(a, b):
    names = ("tokens", "targets", "weights", "bytes", "segments", "positions")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


def test_order_is_the_seeds_and_the_identity_tells_what_is_learnt(made, mixed):
    cfg = train_config(length=128)
    loader = made(mixed, length=128).loader(cfg)
    again = made(mixed, length=128).loader(cfg)
    assert json.loads(json.dumps(loader.identity)) == again.identity
    assert all(same(loader.batch(i), again.batch(i)) for i in range(5))
    other = made(mixed, length=128).loader(configs.override(cfg, {"seed": 1}))
    assert not same(loader.batch(0), other.batch(0))
    # The same tokens, of which others are learnt, are other data.
    last = made(mixed, length=128, **{"dialogue.train_on": "all"}).loader(cfg)
    assert last.identity["sources"][0]["tokens"] != loader.identity["sources"][0]["tokens"]


def test_sources_mix_by_weight(made, tmp_path):
    paths = []
    for name in "ab":
        paths.append(tmp_path / f"{name}.jsonl")
        rows = [pair("q", name), pair("q", name + name)]
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = tuple(
        configs.SourceConfig(name=path.stem, inputs=(str(path),), weights=((0.0, weight),))
        for path, weight in zip(paths, (3.0, 1.0), strict=True)
    )
    data = made([], sources=sources, packing="pad", eval_fraction=0.5)
    cfg = train_config(**{"data.packing": "pad", "batch_size": 8})
    batch = data.loader(cfg).batch(0)
    answers = collections.Counter(t.removesuffix("</s>") for t in learnt(data.tokenizer, batch))
    assert answers == {"a": 6, "b": 2}
    (held_out,) = data.eval_batches(cfg)
    assert learnt(data.tokenizer, held_out)[:2] == ["aa</s>", "bb</s>"]
    assert [p["part"] for p in data.parts()] == ["train a", "eval a", "train b", "eval b"]


# ----------------------------------------------------------------------------- held out, too long


def test_the_last_conversations_are_held_out(made, tmp_path):
    rows = [pair(str(i), str(i)) for i in range(10)]
    data = made(rows, eval_fraction=0.2)
    batches = data.eval_batches(train_config())
    assert "".join(t for b in batches for t in learnt(data.tokenizer, b)) == "8</s>9</s>"
    assert [(p["part"], p["examples"]) for p in data.parts()] == [("train", 8), ("eval", 2)]
    assert made(rows).eval_batches(train_config()) is None
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(pair("x", "y")) + "\n")
    data = made(rows, eval_fraction=0.2, eval_inputs=(str(other),))
    assert [(p["part"], p["examples"]) for p in data.parts()] == [("train", 10), ("eval", 1)]
    assert (data.train_tokens, data.eval_tokens) == (80, 8)


def test_bucketed_evaluation_has_each_answer_once(made, mixed):
    data = made(mixed, length=128, packing="bucket", eval_fraction=0.5)
    batches = list(data.eval_batches(train_config(**{"length": 128, "data.packing": "bucket"})))
    found = [t.removesuffix("</s>") for b in batches for t in learnt(data.tokenizer, b) if t]
    assert sorted(found) == sorted(row["messages"][1]["content"] for row in mixed[25:])
    assert batches[0].tokens.shape[1] < batches[-1].tokens.shape[1]


LONG = [talk("a" * 9, "b" * 9, "c" * 9, "d" * 9), talk("e", "f"), talk("g" * 99, "h")]


@pytest.mark.parametrize(
    ("rule", "answers", "counts"),
    [
        # The rows have 48, 8 and 107 tokens (three of a turn are its role, colon and end).
        ("cut", ["b" * 9 + "</s>ddd", "f</s>"], {"cut": 2, "untrained": 1}),
        ("oldest", ["d" * 9 + "</s>", "f</s>"], {"shortened": 1, "cut": 1, "untrained": 1}),
        ("drop", ["f</s>"], {"dropped": 2}),
    ],
)
def test_what_is_too_long(made, rule, answers, counts):
    data = made(LONG, length=41, packing="pad", **{"dialogue.too_long": rule})
    cfg = train_config(**{"length": 41, "data.packing": "pad", "batch_size": len(answers)})
    configs.override(cfg, {"data.shuffle": False, "steps": 1})
    assert learnt(data.tokenizer, data.loader(cfg).batch(0)) == answers
    (part,) = data.parts()
    names = ("cut", "shortened", "dropped", "untrained")
    assert {n: part[n] for n in names if part[n]} == counts
    assert part["examples"] == len(answers)
    listed = [json.loads(r) for r in Path(data.directory, "rejected.jsonl").open()]
    lines = [1, 3] if rule == "drop" else [3]
    assert [row["line"] for row in listed] == lines and part["rejected"] == 0
    assert {row["rule"] for row in listed} == {"too long" if rule == "drop" else "untrained"}


def test_the_systems_turn_stays_when_the_oldest_go(made):
    data = made(LONG[:1], length=41, **{"dialogue.too_long": "oldest", "dialogue.system": "S"})
    batch = data.loader(train_config(length=41, batch_size=1, steps=1)).batch(0)
    text = data.tokenizer.decode(batch.tokens[0][batch.segments[0] > 0], skip_special=False)
    assert text == f"s:S</s>u:{'c' * 9}</s>a:{'d' * 9}</s>"


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            [talk("g" * 99, "h")],
            {},
            r"in 1 no token of the assistant is left within --config.length",
        ),
        (
            [talk("g" * 99, "h")],
            {"dialogue.too_long": "drop"},
            r"1 are longer than --config.length=64",
        ),
        (
            [pair("a", "")],
            {},
            r"all of its 1 rows are malformed \(1 empty answer\), .*rows.jsonl:1",
        ),
        ([{}, []], {}, r"malformed \(1 unknown layout, 1 no answer\)"),
        (
            [pair("a", ""), pair("a", "b"), {}],
            {"eval_fraction": 0.1},
            r"1 of its rows are held out \(lower data.eval_fraction\), the other 2 are malformed "
            r"\(1 empty answer, 1 unknown layout\), the first .*rows.jsonl:1",
        ),
        ([pair("a", "b")], {"eval_fraction": 0.1}, r"all .* held out; lower data.eval_fraction"),
    ],
)
def test_data_of_which_nothing_is_learnt_are_an_error(made, rows, changes, message):
    with pytest.raises(
        ValueError, match="no token of the train data would be trained: .*" + message
    ):
        made(rows, **changes)


# ---------------------------------------------------------------------------------------- malformed


def test_malformed_rows_are_left_out_and_written_down(made, tmp_path, caplog):
    rows = [pair("a", "b"), pair("a", ""), talk("a", "b", "c"), {"text": "x"}, pair("c", "d")]
    data = made(rows)
    (part,) = data.parts()
    assert (part["examples"], part["rejected"]) == (3, 2)
    listed = [json.loads(r) for r in (tmp_path / "run/data/rejected.jsonl").open()]
    source = str(tmp_path / "rows.jsonl")
    assert [(r["file"], r["line"], r["rule"]) for r in listed] == [
        (source, 2, "empty answer"),
        (source, 4, "unknown layout"),
    ]
    assert "2 malformed rows are left out (1 empty answer, 1 unknown layout)" in caplog.text
    assert f"{source}:2: empty answer" in caplog.text


def test_malformed_rows_can_be_fatal(made, tmp_path):
    rows = [pair("a", "b"), pair("a", "")]
    with pytest.raises(ValueError, match=r"1 malformed rows \(1 empty answer\), .*rows.jsonl:2: "):
        made(rows, **{"dialogue.malformed": "fail"})
    assert (tmp_path / "run/data/rejected.jsonl").read_text().count("\n") == 1
    made(rows[:1], **{"dialogue.malformed": "fail"})


def test_what_a_template_refuses_is_counted_as_well(made, tmp_path):
    system = {"messages": [{"role": "system", "content": "s"}, *talk("a", "b")["messages"]]}
    twice = {"messages": [*system["messages"], {"role": "system", "content": "s"}]}
    rows = [pair("a", "b"), twice]
    data = made(rows, **{"dialogue.template": "llama2"})
    assert data.parts()[0]["rejected"] == 1
    (listed,) = [json.loads(r) for r in (tmp_path / "run/data/rejected.jsonl").open()]
    assert (listed["line"], listed["rule"]) == (2, "refused by the template")
    with pytest.raises(ValueError, match="1 refused by the template"):
        made(rows, **{"dialogue.template": "llama2", "dialogue.malformed": "fail"})


def test_a_row_that_is_nested_too_deeply_to_render_is_counted_as_well(made, tmp_path):
    path = tmp_path / "deep.jinja"
    path.write_text(
        "{% macro inner(x) %}{{ inner(x) if x == 'deep' }}{% endmacro %}"
        "{{ inner(messages[0].content) }}" + LINE
    )
    trained = configs.TokenizerConfig(kind="sentencepiece_bpe", vocab_size=275)
    rows = [pair("deep", "b"), pair("to be or not", "to be or to be")]
    made(rows, tokenizer=trained, **{"dialogue.template": str(path)})
    (listed,) = [json.loads(r) for r in (tmp_path / "run/data/rejected.jsonl").open()]
    assert (listed["line"], listed["rule"]) == (1, "refused by the template")
    assert "recursion" in listed["detail"]


# --------------------------------------------------------------------------------- packing, replay


def test_a_packing_that_cuts_conversations_is_an_error(made):
    with pytest.raises(
        ValueError, match=r"data.packing=split cuts .*; use first_fit, pad or bucket"
    ):
        made([pair("a", "b")], packing="split")


def test_replayed_text_is_trained_whole_and_keeps_its_share(made, tmp_path):
    rows = [pair(f"q{i}", f"a{i}") for i in range(40)]
    (tmp_path / "text.txt").write_text("wxyz" * 100)
    (tmp_path / "rows.jsonl").write_text("")
    sources = (
        configs.SourceConfig(
            name="talk", inputs=(str(tmp_path / "rows.jsonl"),), weights=((0.0, 3.0),)
        ),
        configs.SourceConfig(name="text", inputs=(str(tmp_path / "text.txt"),), text=True),
    )
    data = made(rows, length=32, sources=sources, inputs=(), eval_fraction=0.1, packing="pad")
    talks, text = data.train
    # The last tenth of the text is left out, as a run on text would hold it out.
    assert text.tokens.total == 360 and text.tokens.trained.all()
    assert data.evaluation.documents == 4, "no text among the held-out conversations"
    loader = data.loader(train_config(**{"data.packing": "pad", "length": 32, "batch_size": 8}))
    batch = loader.batch(0)
    written = learnt(data.tokenizer, batch)
    assert sum(set(t) <= set("wxyz") for t in written) == 2, "a quarter of 8 rows"
    assert data.parts()[-1] == {
        "part": "train text (text)", "examples": 12, "tokens": 360, "trained tokens": 360,
    }  # fmt: skip
    assert talks.tokens.documents == 36
