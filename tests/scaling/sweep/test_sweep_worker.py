"""Trunks and branches: a branch is the run that it stands for, and a failure stays where it is."""

import csv
import json
import math

import pytest

from llm_jax import config as configs
from llm_jax.config import EvalConfig, LogConfig, ModelConfig, OptimizerConfig, TrainConfig
from llm_jax.scaling.sweep import output as files
from llm_jax.scaling.sweep import runner, tuning, worker
from llm_jax.scaling.sweep.config import SweepConfig
from llm_jax.scaling.sweep.grid import trunks
from llm_jax.train.loop import NonFiniteError, train

TOKENS_A_STEP = 8 * 16


def config(corpus, **changes) -> SweepConfig:
    """One size, at 15 and 25 steps; they leave the trunk at 12 and 20."""
    cfg = SweepConfig(
        run=TrainConfig(
            batch_size=8,
            length=16,
            model=ModelConfig(activation="gelu", scan=False),
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3, ema_decay=0.5),
            tokenizer=configs.TokenizerConfig(kind="byte"),
            data=configs.DataConfig(inputs=(str(corpus),)),
            eval=EvalConfig(every=0, rows=16, sample_tokens=0),
            checkpoint=configs.CheckpointConfig(every=0),
            log=LogConfig(every=1, compilation_cache=""),
        ),
        sizes=((16, 1, 2),),
        tokens=(15 * TOKENS_A_STEP, 25 * TOKENS_A_STEP),
    )
    cfg.rate.rule = "fixed"
    cfg.run.mesh.data = 8
    return configs.override(cfg, changes)


def run_all(cfg, output, **options) -> list[dict]:
    """The sweep in this process, one trunk after another; the rows of its runs.csv."""
    found = trunks(cfg, runner.prepare(cfg, output))
    for trunk in found:
        worker.run_only(cfg, output, trunk.name, **options)
    runner.finish(cfg, found, output, say=lambda _: None)
    with (output / "runs.csv").open() as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module", autouse=True)
def no_reports():
    """Nothing here looks at the plots of single runs, which take longer than the runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_jax.train.summary.write_report", lambda *args: None)
        yield


@pytest.fixture(scope="module")
def swept(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("sweep")
    return output, run_all(config(corpus), output)


def test_a_branch_is_the_run_that_one_process_would_have_made(corpus, swept, tmp_path):
    """Equal to the last bit: the copied state lacks nothing (moments, step, moving average), the
    batches go on, and the rate falls over the same steps."""
    _, rows = swept
    for row, steps in zip(rows, (15, 25), strict=True):
        alone = configs.thaw(config(corpus).run)
        alone.model.d_model, alone.model.n_layers, alone.model.n_heads = 16, 1, 2
        alone.steps, alone.optimizer.schedule = steps, "wsd"
        alone.optimizer.decay_steps = steps // 5
        summary = train(alone, tmp_path / str(steps))
        assert int(row["steps"]) == steps and int(row["D"]) == steps * TOKENS_A_STEP
        assert float(row["loss"]) == summary["eval_loss"]
        assert float(row["bits_per_byte"]) == summary["bits_per_byte"]
        assert float(row["C"]) == pytest.approx(6 * int(row["N"]) * int(row["D"]))


def test_what_a_sweep_leaves(corpus, swept):
    output, rows = swept
    assert tuple(rows[0]) == files.COLUMNS
    assert [r["status"] for r in rows] == ["finished"] * 2 and not any(r["error"] for r in rows)
    assert not list(output.glob("runs/*/*/checkpoints/*"))  # disk is given back
    with (output / "curves.csv").open() as f:
        curve = list(csv.DictReader(f))
    assert tuple(curve[0]) == files.CURVE_COLUMNS
    steps = [int(p["step"]) for p in curve]
    assert steps[0] > 3 and steps[-1] == 20 and steps == sorted(set(steps))
    assert all(int(p["D"]) == int(p["step"]) * TOKENS_A_STEP for p in curve)
    lines = (output / "runs" / curve[0]["run"] / "trunk" / "metrics.jsonl").read_text().splitlines()
    losses = {json.loads(line)["step"]: json.loads(line)["loss"] for line in lines}
    # The last tenth of 20 steps.
    assert float(curve[-1]["loss"]) == pytest.approx((losses[19] + losses[20]) / 2)
    described = json.loads((output / "sweep.json").read_text())
    assert described["environment"]["versions"]["jax"] and described["config"]["decay"] == 0.2
    # Again: nothing is trained, the table is the same.
    before = (output / "runs.csv").read_text()
    assert run_all(config(corpus), output) == rows and (output / "runs.csv").read_text() == before


def test_another_config_is_refused_and_a_larger_grid_is_not(corpus, swept):
    """A run that is added later leaves a trunk that has long passed it; the others stay."""
    output, rows = swept
    with pytest.raises(ValueError, match=r"run.optimizer.b2=0.9 \(was 0.95\).*another folder"):
        runner.prepare(config(corpus, **{"run.optimizer.b2": 0.9}), output)
    curves = (output / "curves.csv").read_text()
    larger = config(corpus, tokens=tuple(n * TOKENS_A_STEP for n in (20, 15, 25)))
    first, added, last = run_all(larger, output)
    assert [first, last] == rows and (output / "curves.csv").read_text() == curves
    assert float(first["loss"]) > float(added["loss"]) > float(last["loss"])
    assert not list(output.glob("runs/*/trunk-*"))


def test_a_run_that_diverges_is_recorded_and_the_others_finish(corpus, tmp_path):
    changes = {
        "sizes": ((16, 1, 2, 1e38), (16, 1, 2)),
        "tokens": (15 * TOKENS_A_STEP,),
        "run.optimizer.max_bad_steps": 2,
    }
    lost, good = rows = run_all(config(corpus, **changes), tmp_path)
    assert (lost["status"], good["status"]) == ("failed", "finished") and good["loss"]
    assert "non-finite" in lost["error"] and not lost["loss"] and lost["learning_rate"] == "1e+38"
    result = next(tmp_path.glob("runs/*lr*/*/result.json"))
    written = result.stat().st_mtime_ns
    assert run_all(config(corpus, **changes), tmp_path) == rows
    assert result.stat().st_mtime_ns == written  # not tried again unless that is asked for


def test_a_tuned_rate_is_recorded_and_used(corpus, tmp_path, monkeypatch):
    """The best of the rates that were tried, between which the losses here lie on a parabola."""
    tried = []

    def short_run(run, folder):
        tried.append((run.optimizer.learning_rate, run.steps, run.optimizer.schedule))
        if run.optimizer.learning_rate > 0.5:
            raise NonFiniteError("non-finite steps")
        return {"eval_loss": 3 + math.log(run.optimizer.learning_rate / 2e-2) ** 2}

    monkeypatch.setattr(tuning, "train", short_run)
    cfg = config(corpus, tokens=(15 * TOKENS_A_STEP,), branches=False)
    cfg.rate.rule, cfg.rate.exponent = "tuned", 0.0
    cfg.rate.tuning_factors = (0.1, 1.0, 10.0, 100.0)
    (row,) = run_all(cfg, tmp_path)
    assert tried == [(rate, 15, "wsd") for rate in (1e-3, 1e-2, 0.1, 1.0)]
    tuned = json.loads(next(tmp_path.glob("tuning/*/rate.json")).read_text())
    assert [t["loss"] is None for t in tuned["tried"]] == [False, False, False, True]
    assert tuned["rate"] == pytest.approx(2e-2, rel=2e-3)
    assert float(row["learning_rate"]) == tuned["rate"] and row["status"] == "finished"
    # A run on its own, with the schedule of the config.
    saved = json.loads(next(tmp_path.glob("runs/*/*/config.json")).read_text())["optimizer"]
    assert saved["schedule"] == "cosine" and saved["learning_rate"] == tuned["rate"]


def test_an_error_while_tuning_is_not_taken_for_divergence(corpus, tmp_path, monkeypatch):
    def short_run(run, folder):
        raise ValueError("the disk is full")

    monkeypatch.setattr(tuning, "train", short_run)
    cfg = config(corpus, tokens=(15 * TOKENS_A_STEP,), branches=False)
    cfg.rate.rule = "tuned"
    (row,) = run_all(cfg, tmp_path)
    assert row["status"] == "failed" and "the disk is full" in row["error"]


def test_one_process_a_trunk(corpus, tmp_path):
    cfg = config(corpus)
    (trunk,) = trunks(cfg, runner.prepare(cfg, tmp_path))
    with worker._alone(files.trunk_folder(tmp_path, trunk)):
        with pytest.raises(worker.Busy):
            worker.run_only(config(corpus), tmp_path, trunk.name)
    with pytest.raises(ValueError, match=f"--only=w16.*did you mean {trunk.name}"):
        worker.run_only(config(corpus), tmp_path, trunk.name[:-1])
