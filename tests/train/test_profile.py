"""The profiler window: where a step's time went, by part of the model."""

import gzip
import json

import pytest
from runs import run_config

from llm_jax.train import profile
from llm_jax.train.loop import train

HLO = """
  %dot.1 = f32[8,8] dot(%a, %b), metadata={op_name="jit(train_step)/jvp(mlp)/dot_general"}
  ROOT %fusion.2 = f32[8] fusion(%c), metadata={op_name="jit(train_step)/transpose(jvp(attention))/mul"}
  %copy.3 = f32[8] copy(%c)
"""


def write_trace(folder, events):
    (folder / "plugins").mkdir()
    with gzip.open(folder / "plugins" / "host.trace.json.gz", "wt") as f:
        json.dump({"traceEvents": events}, f)


def event(operation, microseconds):
    return {"ph": "X", "dur": microseconds, "args": {"hlo_op": operation}}


def test_time_by_part_pass_and_kind(tmp_path):
    events = [event("dot.1", 3000), event("dot.1", 3000), event("fusion.2", 1500)]
    # A loop's own event covers those of its body: counted, it would halve every share.
    events += [event("copy.3", 500), event("while.9", 9000), {"ph": "M", "name": "process_name"}]
    write_trace(tmp_path, events)
    rows = profile.summarise(tmp_path, HLO, steps=2)
    assert [tuple(r) for r in rows] == [
        ("mlp", "forward", "matmul", 3.0, 0.75),
        ("attention", "backward", "other", 0.75, 0.1875),
        ("rest", "", "copies", 0.25, 0.0625),
    ]
    assert "| mlp | forward | matmul | 3.00 | 75.0% |" in profile.table(rows)


def test_no_trace_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no trace"):
        profile.summarise(tmp_path, HLO, steps=1)
    write_trace(tmp_path, [])
    with pytest.raises(ValueError, match="names no operation"):
        profile.summarise(tmp_path, HLO, steps=1)


def test_a_run_profiles_its_window(corpus, tmp_path, capsys):
    cfg = run_config(corpus, **{"log.profile_start": 2, "log.profile_steps": 2})
    train(cfg, tmp_path)
    text = (tmp_path / "profile" / "summary.md").read_text()
    for part in ("attention", "mlp", "head"):
        assert f"| {part} | forward | matmul |" in text
        assert f"| {part} | backward | matmul |" in text
    assert "profile of 2 steps" in capsys.readouterr().out
