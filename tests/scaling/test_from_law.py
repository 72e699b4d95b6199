"""From a law to a model: what is read, what is refused, which shape is chosen, what is written."""

import importlib.util
import json
import math

import pytest
from jax.sharding import AbstractMesh, AxisType

from llm_jax import chips, sharding
from llm_jax import config as configs
from llm_jax.config import ModelConfig, MoEConfig, TrainConfig
from llm_jax.models import decoder
from llm_jax.models.presets import llama
from llm_jax.nn.params import count
from llm_jax.scaling import from_law, parameters, recipe, shapes
from llm_jax.scaling.assumptions import Assumptions
from llm_jax.scaling.sweep.config import SweepConfig
from llm_jax.train.program import lower

PARAMS = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.366}
OPTIMA = {"a": 0.5, "b": 0.5, "k_N": 0.1, "k_D": 1 / 0.6, "E": 1.5, "k_L": 20.0, "gamma": 0.05}
KAPLAN = {"alpha_N": 0.076, "alpha_D": 0.103, "N_c": 6.4e13, "D_c": 1.8e13}


def a_fit(params=PARAMS, *, converged=True, **more) -> dict:
    """One law of a fit.json, fitted to runs of up to 1e18 FLOPs."""
    return {
        "params": params,
        "converged": converged,
        "intervals": {"N*": [1e8, 4e8], "D*": [5e9, 9e9], "a": [0.4, 0.6]},
        "level": 0.9,
        "at": 1e19,
        "warnings": ["one seed: noise is not known"],
        "data": {"columns": {"N": "N"}, "flops_factor": 6.0, "largest_flops": 1e18},
        **more,
    }


@pytest.fixture
def write_fit(tmp_path):
    def write(laws: dict) -> str:
        path = tmp_path / "fit.json"
        path.write_text(json.dumps(laws))
        return str(path)

    return write


def answer(n=1e9, d=2e10, budget=1.2e20, counted="all") -> dict:
    """Of a law with N* and D* at this budget."""
    law = from_law.Law("law", "a paper", {"k_N": n, "a": 0.0, "k_D": d, "b": 0.0}, counted)
    return from_law.answer(law, [], budget)


def test_which_law_of_a_file(write_fit):
    path = write_fit(
        {
            "chinchilla2": a_fit(OPTIMA),
            "chinchilla3": a_fit(),
            "chinchilla1": a_fit(None, converged=False),
            "kaplan": a_fit(KAPLAN),
            "other": a_fit({"slope": 0.1}),
        }
    )
    law, others = from_law.load(path)
    assert law.name == "chinchilla3" and [x.name for x in others] == ["chinchilla2", "kaplan"]
    shown = from_law.answer(law, others, 1e20)["others"]
    assert shown[0]["loss"] == pytest.approx(1.5 + 20 * 1e20**-0.05)
    assert 1 < shown[1]["loss"] < 3
    ours, _ = from_law.load(f"{path}:kaplan")  # not the published one of that name
    assert ours.largest == 1e18
    assert not any("published" in w for w in from_law.answer(ours, [], 1e19)["warnings"])
    law, others = from_law.load(f"{path}:chinchilla2", "non_embedding")
    assert law.name == "chinchilla2" and [x.name for x in others] == ["chinchilla3", "kaplan"]
    assert from_law.optimum(law, 1e20) == (1e9, pytest.approx(1e10 / 0.6))
    assert law.counted == others[0].counted == "non_embedding" and law.largest == 1e18
    alone = write_fit({"chinchilla2": a_fit(OPTIMA)})
    assert from_law.load(alone)[0].name == "chinchilla2"


def test_a_sweeps_own_column_says_what_n_counts(write_fit):
    columns = {"data": {"columns": {"N": "N_non_embedding"}, "flops_factor": 6.0}}
    law, _ = from_law.load(write_fit({"chinchilla3": a_fit(**columns)}))
    assert law.counted == "non_embedding"
    assert law.largest is None  # not told: no threshold is made up
    assert "range unknown" in from_law.answer(law, [], 1e19)["warnings"][-1]


@pytest.mark.parametrize(
    ("laws", "asked", "words"),
    [
        ({"chinchilla3": a_fit(converged=False), "chinchilla2": a_fit(OPTIMA)}, "",
         "fit.json:chinchilla3 did not converge; take --law="),
        ({"chinchilla3": a_fit(None)}, "", "did not converge; refit"),
        ({"chinchilla3": a_fit(PARAMS | {"A": 0.0})}, "", "has no best size for a budget; refit"),
        ({"chinchilla3": a_fit(PARAMS | {"alpha": None})}, "", "no best size"),
        ({"kaplan": a_fit({"N_c": 1e13})}, "", "no best size"),
        ({"chinchilla3": a_fit()}, ":chinchila3", "did you mean .*fit.json:chinchilla3"),
        ({"chinchilla3": 3}, "", "not a fit.json"),
        ([1, 2], "", "not a fit.json"),
    ],
    ids=str,
)  # fmt: skip
def test_laws_that_are_no_answer_are_refused(write_fit, laws, asked, words):
    with pytest.raises(ValueError, match=words) as error:
        from_law.load(write_fit(laws) + asked)
    assert "\n" not in str(error.value)


def test_neither_a_file_nor_a_published_law():
    with pytest.raises(FileNotFoundError, match="did you mean hoffmann3"):
        from_law.load("hofmann3")


def test_intervals_belong_to_their_flops_and_far_is_called_far(write_fit):
    law, _ = from_law.load(write_fit({"chinchilla3": a_fit()}))
    at = from_law.answer(law, [], 1e19)
    assert at["intervals"] == {"N*": [1e8, 4e8], "D*": [5e9, 9e9]}
    assert at["warnings"] == ["one seed: noise is not known"]
    elsewhere = from_law.answer(law, [], 2e19)
    assert elsewhere["intervals"] == {} and "--at=2e+19" in elsewhere["warnings"][1]
    far = from_law.answer(law, [], 1.1e20)["warnings"][-1]  # 100 times 1e18 is the limit
    assert far.startswith("far extrapolation: 110 times")
    assert not any("far" in w for w in from_law.answer(law, [], 0.9e20)["warnings"])


def test_what_a_law_says_is_the_least_loss_for_the_money():
    law, others = from_law.load("besiroglu")
    said = from_law.answer(law, others, 1e21)
    n, d = said["N*"], said["D*"]
    assert 6 * n * d == pytest.approx(1e21)
    assert all(said["loss"] < from_law.loss(law, n * f, d / f) for f in (0.9, 1.1))
    kaplan = next(x for x in said["others"] if x["law"] == "kaplan")
    assert kaplan["N*"] == pytest.approx(7.77e9, rel=0.001) and kaplan["loss"] is None
    law, _ = from_law.load("kaplan")
    assert "6 N* D* is 1.81 times" in from_law.answer(law, [], 1e21)["warnings"][-1]


def test_budgets_in_flops_and_hours():
    a = Assumptions(chips.find("h100"), {"goodput": 0.5})
    assert from_law.budget("1e21", a, 8) == (1e21, "flag")
    flops, words = from_law.budget("24h", a, 8)
    assert flops == pytest.approx(24 * 3600 * 8 * 989e12 * 0.4 * 0.5)
    assert words == "24 h of 8 h100 at 40% of their peak"
    v3 = Assumptions(chips.find("v3"), {"mfu": 0.5})  # two devices a chip
    assert from_law.budget("1h", v3, 8)[0] == pytest.approx(3600 * 4 * 123e12 * 0.5)
    for wrong in ("", "h", "-1", "nan", "inf", "0", "1d", "1e21 h x"):
        with pytest.raises(ValueError, match="--budget="):
            from_law.budget(wrong, a, 8)


@pytest.mark.parametrize(
    ("n", "within"), [(1e6, 0.07), (2e7, 0.07), (1.2e8, 0.03), (1e9, 0.01), (7e10, 0.01), (1e12, 0.01)]
)  # fmt: skip
@pytest.mark.parametrize("counted", ["all", "non_embedding", "estimate"])
def test_shapes_have_the_size_asked_for(n, within, counted):
    vocab = 1024 if n < 1e8 else 32_000
    model, has = shapes.nearest(llama(), n, counted, vocab)
    resolved = configs.thaw(model)
    configs.resolve_model(resolved, vocab_size=vocab, length=2048, backend="tpu")
    assert has == parameters.CONVENTIONS[counted](decoder.specs(resolved), resolved)
    assert abs(has / n - 1) < within
    assert (
        resolved.head_dim in (32, 64, 128) and resolved.head_dim * resolved.n_heads == model.d_model
    )
    assert model.d_ff % (64 if model.d_model >= 256 else 16) == 0 and model.d_model % 32 == 0
    if model.d_model >= 2048:
        assert model.d_model % 256 == 0 and model.d_ff % 256 == 0
    aspect = model.d_model / model.n_layers
    assert 40 <= aspect <= 128 or (model.d_model < 320 and 2 <= model.n_layers <= 8)


def test_what_counts_decides_the_model():
    """At 50M with 32,000 entries, twice 512 x 32,000 of them are tables of a llama."""
    small, has = shapes.nearest(llama(), 5e7, "all", 32_000)
    large, has_more = shapes.nearest(llama(), 5e7, "non_embedding", 32_000)
    assert has == pytest.approx(5e7, rel=0.1) and has_more == pytest.approx(5e7, rel=0.05)
    configs.resolve_model(large, vocab_size=32_000, length=2048, backend="tpu")
    assert count(decoder.specs(large)) > 1.7 * has
    assert large.d_model > small.d_model


def test_proportions_of_the_base_stay():
    base = ModelConfig(
        d_model=1024, n_heads=16, kv_heads=4, d_ff=2048, n_layers=8,
        moe=MoEConfig(n_experts=4, top_k=1, d_ff=512),
    )  # fmt: skip
    model, _ = shapes.nearest(base, 3e9, "active", 32_000)
    assert model.n_heads == 4 * model.kv_heads
    assert model.d_ff / model.d_model == pytest.approx(2, rel=0.1)
    assert model.moe.d_ff / model.d_model == pytest.approx(0.5, rel=0.2)
    assert base.n_layers == 8 and base.kv_heads == 4


def test_a_vocabulary_larger_than_the_model():
    with pytest.raises(ValueError, match="--vocab_size") as error:
        shapes.nearest(llama(), 2e6, "all", 32_000)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--count=some"):
        shapes.nearest(llama(), 2e6, "some", 32_000)


@pytest.mark.parametrize(("c", "tokens", "rate"), [(8.4e22, 9.4e6, 4.2e-4), (8e23, 18.9e6, 3.2e-4)])
def test_batch_and_learning_rate_are_those_of_deepseek_7b_and_67b(c, tokens, rate):
    """Their table 2, rows of 4,096."""
    said = answer(7e9, 2e12, c)
    cfg = recipe.train_config(recipe.base(32_000), said, 64)
    assert cfg.batch_size * cfg.length == pytest.approx(tokens, rel=0.07)
    assert cfg.optimizer.learning_rate == pytest.approx(rate, rel=0.03)
    assert cfg.batch_size % 64 == 0 and not any("batch" in w for w in said["warnings"])


def test_the_model_that_there_is_costs_the_budget():
    """Tokens follow the model: with D* tokens the 3 % that it is larger would be spent besides."""
    said = answer(5e6, 4e8, 1.2e16)
    base = recipe.base(1024)
    base.length = 64
    cfg = recipe.train_config(base, said, 2)
    n = said["model"]["params"]
    assert n != 5e6 and 6 * n * said["model"]["tokens"] == pytest.approx(1.2e16, rel=0.001)
    o = cfg.optimizer
    assert o.warmup_steps == pytest.approx(n / (cfg.batch_size * 64), abs=1)
    assert o.warmup_steps < cfg.steps / 10
    assert o.final_learning_rate == pytest.approx(o.learning_rate / 10, rel=0.01)


def test_large_batches_go_in_micro_batches_and_small_ones_are_named():
    cfg = recipe.train_config(recipe.base(32_000), answer(7e9, 1.4e11, 6e21), 8)
    assert cfg.batch_size // 8 // cfg.accumulation * cfg.length * cfg.model.d_model <= recipe.MICRO
    assert cfg.accumulation > 1 and cfg.batch_size % (8 * cfg.accumulation) == 0
    assert cfg.model.remat == "full"
    said = answer(1e9, 2e10, 1.2e20)
    cfg = recipe.train_config(recipe.base(32_000), said, 4096)
    assert cfg.batch_size == 4096 and cfg.accumulation == 1
    assert any(w.startswith("batch: 4096 rows") for w in said["warnings"])
    with pytest.raises(ValueError, match=r"pays for \d steps"):
        recipe.train_config(recipe.base(1024), answer(1e6, 1e6, 6e12), 64)


def test_under_mup_the_learning_rate_is_the_bases():
    base = recipe.base(32_000)
    base.model.mup_base_width = 256
    base.optimizer.learning_rate = 0.01
    said = answer()
    assert recipe.train_config(base, said, 8).optimizer.learning_rate == 0.01
    assert said["model"]["learning_rate_rule"] == "muP, from width 256"


@pytest.mark.parametrize(("branches", "schedule"), [(True, "wsd"), (False, "linear")])
def test_a_sweeps_recipe_is_what_its_runs_have_in_common(branches, schedule):
    run = TrainConfig(length=64)
    run.optimizer.schedule, run.optimizer.final_learning_rate = "linear", 0.0
    start = recipe.of_sweep(SweepConfig(name="s", run=run, branches=branches))
    assert (start.length, start.optimizer.schedule) == (64, schedule)
    cfg = recipe.train_config(start, answer(1e8, 2e9, 1.2e18), 1)
    assert cfg.optimizer.final_learning_rate == 0.0 and cfg.optimizer.schedule == schedule


def load_recipe(path) -> TrainConfig:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "python -m experiments.pretrain --config=" in module.__doc__
    return module.get_config()


def test_the_recipe_says_the_same_and_lowers(tmp_path):
    base = TrainConfig(length=64, model=ModelConfig(n_heads=4, kv_heads=2, tied=False))
    base.tokenizer.kind = "byte"
    base.data.sources = (
        configs.SourceConfig(name="a", inputs=("x.txt",), weights=((0.0, 1.0), (1.0, 2.0))),
    )
    base.optimizer.schedule = "wsd"
    base.model.moe.balance_loss = 0.5
    said = answer(1e6, 2e7, 1.2e14)
    cfg = recipe.train_config(base, said, 8)
    path = tmp_path / "planned.py"
    recipe.write(path, cfg, said)
    read = load_recipe(path)
    assert read.name == "planned"
    cfg.name = "planned"
    assert configs.to_dict(read) == configs.to_dict(cfg)
    assert list(tmp_path.iterdir()) == [path]
    configs.resolve_model(read.model, vocab_size=259, length=read.length, backend="cpu")
    configs.validate(read)
    shape = sharding.mesh_shape(read.mesh, 8)
    mesh = AbstractMesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    lower(configs.freeze(read), mesh)
    m = said["model"]
    assert count(decoder.specs(read.model)) == m["params"]
    assert math.isclose(m["tokens"], read.steps * read.batch_size * read.length)


@pytest.mark.parametrize("name", ["planned.json", "1b.py", "my-plan.py", "nowhere/planned.py"])
def test_recipes_have_a_name_that_can_be_imported(tmp_path, name):
    with pytest.raises((ValueError, FileNotFoundError), match="--recipe="):
        recipe.checked(tmp_path / name)
