"""The grid of a sweep: which runs, how long, at which rate, with whose parameters counted how."""

import dataclasses
import json

import pytest

from llm_jax import config as configs
from llm_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from llm_jax.scaling.sweep import output as files
from llm_jax.scaling.sweep import runner
from llm_jax.scaling.sweep.config import RateConfig, SweepConfig, validate_sweep
from llm_jax.scaling.sweep.grid import describe, trunks
from llm_jax.scaling.sweep.tuning import best_rate

VOCAB = 100


def config(**changes) -> SweepConfig:
    """Three sizes by three budgets, 64 tokens a step."""
    cfg = SweepConfig(
        run=TrainConfig(
            batch_size=4,
            length=16,
            model=ModelConfig(activation="gelu"),
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        ),
        sizes=((16, 1, 2), (32, 2, 2), (64, 2, 4)),
        budgets=(2e9, 4e9, 8e9),
    )
    return configs.override(cfg, changes)


def all_points(cfg):
    return [(t, p) for t in trunks(cfg, VOCAB) for p in t.points]


@pytest.mark.parametrize("convention", ["6nd", "kaplan", "exact"])
def test_a_budget_is_met_within_half_a_step(convention):
    cfg = config(flops=convention)
    for trunk, point in all_points(cfg):
        row = files.row(cfg, trunk, point, None)
        assert row["D"] == point.steps * 64
        assert abs(row["C"] - point.budget) <= 0.5 * 64 * trunk.size.flops
        n = {"6nd": row["N"], "kaplan": row["N_non_embedding"]}.get(convention)
        # The embedding is counted by one and not by the other; attention only by the third.
        assert row["C"] == (6 * n * row["D"] if n else row["C_exact"])


def test_parameters_by_part_are_those_counted_by_hand():
    # d = 32, two layers: 12 d^2 and two norms each, a last norm, 100 rows of embedding.
    body, table = 2 * (12 * 32**2 + 2 * 32) + 32, 100 * 32
    sizes = {t.size.name: t.size for t in trunks(config(), VOCAB)}
    size = sizes["w32_l2_h2"]
    assert (size.n, size.n_non_embedding) == (body + table, body)
    assert (size.n_embedding, size.n_head) == (table, 0)
    untied = trunks(config(**{"run.model.tied": False}), VOCAB)
    size = {t.size.name: t.size for t in untied}["w32_l2_h2"]
    assert (size.n, size.n_embedding, size.n_head) == (body + 2 * table, table, table)


def test_runs_of_a_size_share_a_trunk_and_leave_it_for_the_last_fifth():
    found = trunks(config(), VOCAB)
    assert len(found) == 3 and all(len(t.points) == 3 for t in found)
    for trunk in found:
        steps = [p.steps for p in trunk.points]
        assert steps == sorted(steps)
        for p in trunk.points:
            assert p.steps - p.start == round(0.2 * p.steps)
        # Every step of the trunk once, and each decay.
        assert trunk.steps == trunk.points[-1].start + sum(p.steps - p.start for p in trunk.points)
    alone = trunks(config(branches=False), VOCAB)
    assert len(alone) == 9 and all(t.points[0].start == 0 for t in alone)
    assert {p.name for t in alone for p in t.points} == {p.name for _, p in all_points(config())}
    seeds = trunks(config(seeds=(0, 1)), VOCAB)
    assert len(seeds) == 6 and {t.seed for t in seeds} == {0, 1}
    work = [t.steps * t.size.flops_exact for t in seeds]
    assert work == sorted(work, reverse=True)  # the longest first: no core waits at the end


def test_sizes_of_a_budget_lie_in_the_window_of_tokens_per_parameter():
    ratios = {p.name: p.budget / t.size.flops / t.size.n for t, p in all_points(config())}
    window = config(min_ratio=0.2, max_ratio=25.0)
    inside = {name for name, ratio in ratios.items() if 0.2 <= ratio <= 25.0}
    assert {p.name for _, p in all_points(window)} == inside and 3 <= len(inside) < 9
    nearest = config(sizes_per_budget=1, best_ratio=2.0)
    for _, point in all_points(nearest):
        of_budget = {p.name: ratios[p.name] for _, p in all_points(config()) if p.budget == point.budget}  # fmt: skip
        assert point.name == min(of_budget, key=lambda n: max(of_budget[n] / 2, 2 / of_budget[n]))


def test_ladders_of_models():
    by_tokens = all_points(config(budgets=(), tokens=(6400, 12_800)))
    assert sorted({p.steps for _, p in by_tokens}) == [100, 200] and len(by_tokens) == 6
    by_ratio = all_points(config(budgets=(), ratios=(5,)))
    assert all(abs(p.steps * 64 / t.size.n - 5) < 32 / t.size.n for t, p in by_ratio)
    assert all(p.budget is None for _, p in by_ratio)
    generated = trunks(config(sizes=(), widths=(64, 128), aspect=32.0, head_dim=16), VOCAB)
    assert {t.size.name for t in generated} == {"w64_l2_h4", "w128_l4_h8"}


def test_rates():
    def rates(**changes):
        return {t.size.n: t.size.rate for t in trunks(config(**changes), VOCAB)}

    assert set(rates(**{"rate.rule": "fixed"}).values()) == {1e-2}
    power = rates(**{"rate.reference": 1e4, "rate.exponent": 0.5})
    for n, rate in power.items():
        assert rate == pytest.approx(1e-2 * (n / 1e4) ** -0.5, rel=5e-3)
    assert set(rates(**{"rate.rule": "tuned"}).values()) == {None}
    moved = {"rate.rule": "transferred", "run.model.mup_base_width": 16}
    assert set(rates(**moved).values()) == {1e-2}
    own = trunks(config(sizes=((16, 1, 2, 3e-4),)), VOCAB)[0].size
    assert own.rate == 3e-4 and "0.0003" in own.name


def test_the_best_rate_is_the_minimum_of_a_parabola_in_its_logarithm():
    import math

    rates = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    losses = [3.0 + 0.1 * math.log(r / 5e-3) ** 2 for r in rates]
    assert best_rate(rates, losses)[0] == pytest.approx(5e-3, rel=2e-3)
    assert best_rate(rates, [*losses[:4], None])[0] == pytest.approx(5e-3, rel=2e-3)  # diverged
    rate, how = best_rate(rates, sorted(losses))
    assert rate == 1e-3 and "widen" in how  # nothing is extrapolated
    with pytest.raises(ValueError, match=r"only 2 of 5.*learning_rate"):
        best_rate(rates, [None, None, None, 3.0, 3.1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budgets": ()}, "one of budgets, tokens, ratios; there are none"),
        ({"tokens": (1e6,)}, "there are budgets and tokens"),
        ({"widths": (64,)}, "`sizes` or in `widths`"),
        ({"sizes": ((33, 2, 4),)}, r"sizes: \(33, 2, 4\).*d_model=33 is not divisible"),
        ({"sizes": ((32, 2),)}, r"sizes: \(32, 2\) is not"),
        ({"sizes": ((32, 2, 2), (32, 2, 2))}, "sizes: .* twice"),
        ({"budgets": (1e9, 1e9)}, "budgets=.* twice"),
        ({"budgets": (4e9, 4.0001e9)}, "move budgets"),
        ({"budgets": (1e6, 4e9)}, "run.optimizer.warmup_steps=5"),
        ({"min_ratio": 1e6, "max_ratio": 1e7}, "budgets: 2e[+]09 fits no size.*min_ratio=1e[+]06"),
        ({"flops": "6n"}, "flops='6n' is not one of 6nd"),
        ({"rate.rule": "best"}, "rate.rule='best'"),
        ({"rate.rule": "transferred"}, "run.model.mup_base_width"),
        ({"rate.rule": "tuned", "rate.tuning_factors": (1, 2)}, "rate.tuning_factors"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"run.steps": 0}, "steps=0"),
        ({"run.data.sources": (configs.SourceConfig(), configs.SourceConfig())}, "branches=False"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_cannot_work_is_refused_by_the_name_of_its_key(changes, words):
    cfg = config(**changes)
    with pytest.raises(ValueError, match=words):
        validate_sweep(cfg)
        trunks(cfg, VOCAB)


def test_a_config_survives_json_and_every_key_is_one_of_the_grid_or_not():
    cfg = config(**{"rate.rule": "tuned", "sizes": ((16, 1, 2, 1e-3),)})
    again = configs.from_dict(SweepConfig, json.loads(json.dumps(configs.to_dict(cfg))))
    assert configs.freeze(again) == configs.freeze(cfg)
    names = {f.name for f in dataclasses.fields(SweepConfig)}
    assert set(runner.GRID_KEYS) <= names and isinstance(cfg.rate, RateConfig)


def test_the_table_of_the_grid_names_every_run():
    cfg = config()
    text = describe(cfg, trunks(cfg, VOCAB))
    assert all(p.name in text for _, p in all_points(cfg))
    assert "9 runs in 3 processes" in text


def test_workers_share_the_machine(monkeypatch):
    def slots(kinds, jobs=0, most=9, cores=8, **env):
        monkeypatch.setattr(runner, "accelerators", lambda: [(k, k) for k in kinds])
        monkeypatch.setattr(runner.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)  # fmt: skip
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return runner.slots(cfg, jobs, most)

    cfg = config()
    assert [s.cpus for s in slots([], 2, cores=4)] == [(0, 1), (2, 3)]
    assert [s.cpus for s in slots([], 3, cores=2)] == [(0,), (1,), (0,)]
    assert len(slots([])) == 8 and len(slots([], most=3)) == 3
    four = slots(["cuda"] * 4)
    assert [s.environment["CUDA_VISIBLE_DEVICES"] for s in four] == list("0123")
    assert [s.cpus for s in four] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    shared = slots(["cuda"], 2)
    assert {s.environment["CUDA_VISIBLE_DEVICES"] for s in shared} == {"0"}
    assert {s.environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] for s in shared} == {"0.45"}
    cfg = config(devices=2)
    pairs = slots(["cuda"] * 8, CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert [s.environment["CUDA_VISIBLE_DEVICES"] for s in pairs] == ["4,5", "6,7"]
    with pytest.raises(ValueError, match="devices=2"):
        slots(["cuda"], CUDA_VISIBLE_DEVICES="0")
    assert slots(["tpu"] * 4) == [runner.Slot((), {})]
    with pytest.raises(ValueError, match="--jobs=2"):
        slots(["tpu"] * 4, 2)
    assert slots(["tpu"], 1, JAX_PLATFORMS="cpu")[0].cpus  # asked for the CPU on purpose
