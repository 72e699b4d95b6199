"""The binary `experiments.plan`: what it writes, its one-line errors, and libtpu where there is one."""

import importlib.util
import json
import re
import runpy

import pytest
from runs import flags_of, run_binary, start

from llm_jax.scaling import topology

SMOKE = "--config=configs/smoke.py"


def test_a_compiled_plan(tmp_path):
    """The step of a tiny recipe for eight virtual devices, compiled as a user would."""
    path = tmp_path / "plan.json"
    done = run_binary(
        "plan", SMOKE, "--topology=cpu:8", "--config.mesh.fsdp=2", "--config.model.n_layers=2",
        "--price=3", f"--output={path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads(path.read_text())
    assert plan["mesh"] == {"data": 4, "fsdp": 2} and plan["compile_seconds"] > 0
    assert plan["predicted_argument_bytes"] == pytest.approx(plan["argument_bytes"], rel=0.02)
    assert 0.4 < plan["predicted_temp_bytes"] / plan["temp_bytes"] < 2.5
    assert plan["total_bytes"] < 1.1 * (plan["argument_bytes"] + plan["temp_bytes"])
    assert plan["assumptions"]["price"] == {
        "value": 3.0, "unit": "$ a chip and hour", "source": "flag",
    }  # fmt: skip
    for words in ("arguments, compiled", "temporaries, predicted", "fits", "price", "CO2e"):
        assert words in done.stdout, words


def test_formulas_alone_and_the_search(tmp_path):
    path = tmp_path / "plan.json"
    done = run_binary(
        "plan", "--config=configs/llama2_7b.py", "--chip=h100", "--devices=64", "--search",
        "--top=3", f"--output={path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads(path.read_text())
    assert plan["params"] == 6_738_415_616 and plan["argument_bytes"] is None
    found = plan["search"]
    assert len(found) == 3 and found[0]["mesh"] == plan["mesh"] and found[0]["fits"]
    assert plan["step_seconds"] == found[0]["step_seconds"] <= found[1]["step_seconds"]
    assert 0.3 < plan["mfu"] < 0.6  # published runs on this chip: 0.46 to 0.53


def test_llama_3_405b_from_its_recipe(tmp_path):
    """The paper's 3.8e25 FLOPs, and 26 million hours at the utilisation that it reports."""
    path = tmp_path / "plan.json"
    done = run_binary(
        "plan", "--config=configs/llama3_405b.py", "--chip=h100", "--devices=16384", "--mfu=0.41",
        "--convention=6nd", "--pue=1", "--carbon=0.22", "--staff=50", f"--output={path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads(path.read_text())
    assert plan["flops_6nd"] == pytest.approx(3.8e25, rel=0.01)
    assert plan["device_hours"] == pytest.approx(26e6, rel=0.01)
    assert plan["cost"] == pytest.approx(52e6, rel=0.01) and plan["staff_cost"] == 25e6
    assert plan["co2e_kg"] == pytest.approx(4e6, rel=0.01) and plan["fits"]
    assert plan["checkpoint_bytes"] == pytest.approx(4.9e12, rel=0.01)


def test_without_a_recipe():
    done = run_binary("plan", "--known_runs")
    assert done.returncode == 0 and "| Llama 3 405B | 15.60T | 3.79e+25 |" in done.stdout
    done = run_binary("plan", "--params=175e9", "--tokens=300e9", "--chip=v100", "--devices=10000")
    assert done.returncode == 0 and "3.15e+23" in done.stdout
    assert re.search(r"mfu +0\.4 .*default", done.stdout)


def test_from_a_law_to_a_recipe_that_runs(tmp_path, corpus):
    """A fit.json, its model planned, and the recipe in the hands of pretrain."""
    law = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.366}
    fit = {"params": law, "converged": True, "at": 1e14, "level": 0.9, "warnings": []}
    fit |= {"intervals": {"N*": [4e5, 9e5], "D*": [2e7, 4e7]}}
    fit |= {"details": {"held_out": {"mean_error_percent": 1.25}}}
    (tmp_path / "fit.json").write_text(json.dumps({"chinchilla3": fit}))
    recipe, output = tmp_path / "planned.py", tmp_path / "plan.json"
    done = run_binary(
        "plan", "--budget=1e14", f"--law={tmp_path}/fit.json", SMOKE, "--chip=cpu", "--devices=1",
        "--count=with_head", f"--recipe={recipe}", f"--output={output}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads(output.read_text())
    assert plan["law"]["counted"] == "with_head"  # here all: the head is tied
    said, model = plan["law"], plan["law"]["model"]
    # (alpha A / (beta B))^(1 / (alpha + beta)) (C / 6)^(beta / (alpha + beta))
    assert said["N*"] == pytest.approx(734_369, rel=1e-5)
    assert model["params"] == plan["params"] == pytest.approx(said["N*"], rel=0.07)
    assert plan["tokens"] == model["tokens"] == pytest.approx(1e14 / 6 / model["params"], rel=0.01)
    assert plan["flops_6nd"] == pytest.approx(1e14, rel=0.01)
    for words in (
        "N* from 400,000 to 900,000 at 90%",
        "1.2 % off",
        "learning rate",
        "a step takes",
    ):
        assert words in done.stdout, words
    done = run_binary(
        "pretrain", f"--config={recipe}", f"--workdir={tmp_path}/run", f"--input={corpus}", "--dry_run"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{plan['params']:,}" in done.stdout


def test_hours_a_published_law_and_the_search(tmp_path):
    recipe, output = tmp_path / "planned.py", tmp_path / "plan.json"
    done = run_binary(
        "plan", "--budget=24h", "--law=hoffmann3", "--chip=h100", "--devices=8", "--mfu=0.4",
        "--convention=6nd", "--search", "--top=2", f"--recipe={recipe}", f"--output={output}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Spent at the utilisation that the budget was counted with, it takes the day.
    assert re.search(r"^time +24\.0 hours", done.stdout, re.MULTILINE), done.stdout
    assert "hoffmann3 <" in done.stdout and re.search(r"^kaplan +\d", done.stdout, re.MULTILINE)
    found = json.loads(output.read_text())["search"][0]
    cfg = runpy.run_path(str(recipe))["get_config"]()  # as it was found, not as first thought of
    assert {axis: getattr(cfg.mesh, axis) for axis in found["mesh"]} == found["mesh"]
    assert (cfg.accumulation, cfg.model.remat) == (found["accumulation"], found["remat"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--config is needed"),
        (["--budget=1e20", "--chip=h100", "--devices=8"], "--budget and --law go together"),
        (
            ["--budget=1e20", "--law=fit.json", "--chip=h100", "--devices=8"],
            "--law=fit.json: no such",
        ),
        ([SMOKE, "--chip=h100", "--devices=8", "--recipe=x.py"], "--recipe is for --budget"),
        ([SMOKE], "--topology=v5e:16x16 or --chip=h100 --devices=8"),
        ([SMOKE, "--chip=h10", "--devices=8"], "did you mean 'h100'"),
        ([SMOKE, "--topology=cpu:8", "--config.mesh.tensor=3"], "mesh.tensor=3"),
        ([SMOKE, "--chip=h100", "--devices=8", "--config.mesh.data=4"], "8 devices"),
        ([SMOKE, "--chip=h100", "--devices=8", "--reserve=1.5"], "--reserve=1.5"),
        (["--params=1e9", "--chip=h100", "--devices=8"], "--tokens"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_one_line_errors(args, words):
    done = run_binary("plan", *args)
    assert done.returncode == 1 and words in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_libtpu_missing_is_one_line(monkeypatch):
    """Also where it is installed: the search for it is made to find nothing."""
    find = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "libtpu" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    with pytest.raises(ImportError, match=r"pip install 'llm_jax\[plan\]'") as error:
        topology.devices(topology.parse("v5e:2x4"))
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu (extra plan) is not installed"
)
@pytest.mark.parametrize(
    ("recipe", "topology", "changes", "theirs"),
    [
        ("llama2_7b", "v5e:16x16", {"batch_size": 512, "length": 2048}, 0.32 + 2.66),
        ("llama2_70b", "v5p:8x8x8", {"batch_size": 512}, 1.62 + 9.85),
        ("mixtral_8x7b", "v5p:4x4x8", {"batch_size": 128}, 4.38 + 7.98),
    ],
)
def test_pods_of_tpus(tmp_path, recipe, topology, changes, theirs):
    """No more memory a chip than MaxText 0.2.5 needs (GB), and near what the formulas say."""
    path = tmp_path / "plan.json"
    process = start(
        "plan", f"--config=configs/{recipe}.py", f"--topology={topology}", f"--output={path}",
        "--config.data.isolate_documents=False", *flags_of(changes),
    )  # fmt: skip
    _, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, errors
    plan = json.loads(path.read_text())
    assert plan["argument_bytes"] + plan["temp_bytes"] < theirs * 1e9
    assert plan["predicted_argument_bytes"] == pytest.approx(plan["argument_bytes"], rel=0.02)
    assert plan["predicted_temp_bytes"] == pytest.approx(plan["temp_bytes"], rel=0.25)
    assert plan["fits"] and plan["host_peak_bytes"] < 4e9
