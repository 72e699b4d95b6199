"""experiments.prepare_instructions: what Python holds, ready for the recipes."""

import importlib.util
import json

import pytest
from runs import ROOT, run_binary

from llm_jax import config as configs
from llm_jax.data import conversations


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tasks_that_need_no_files(tmp_path):
    out = tmp_path / "instructions"
    done = run_binary("prepare_instructions", f"--output={out}", "--limit=40", "--temperature=2")
    assert done.returncode == 0, done.stderr
    assert "| python_module | python |" in done.stdout
    mixture = json.loads((out / "mixture.json").read_text())
    assert [r["rate"] for r in mixture["tasks"]] == [0.5, 0.5] and mixture["temperature"] == 2
    cfg = recipe("sft_multi_task").get_config(str(out))
    configs.validate(cfg)
    assert [s.weights for s in cfg.data.sources] == [((0.0, 0.5),), ((0.0, 0.5),)]
    single = recipe("sft_single_task").get_config(f"{out}/python_question")
    for inputs, n in [
        (cfg.data.sources[0].inputs, 40),
        (cfg.data.eval_inputs, 80),
        (single.data.sources[0].inputs, 40),
        (single.data.eval_inputs, 40),
    ]:
        found, rejected = conversations.read(list(inputs))
        assert len(found) == n and not rejected


def test_files_are_asked_for(tmp_path):
    done = run_binary("prepare_instructions", f"--output={tmp_path}", "--tasks=sst2")
    assert done.returncode == 1
    assert done.stderr.strip() == "error: --tasks=sst2 needs --input, the folder of the data sets"


@pytest.mark.parametrize("name", ["sft_multi_task", "sft_single_task"])
def test_recipes_without_a_folder(name):
    cfg = recipe(name).get_config()
    configs.validate(cfg)
    assert cfg.data.format == "dialogue"
    assert all(s.inputs[0].startswith("instructions/train/python_") for s in cfg.data.sources)
