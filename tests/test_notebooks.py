"""The notebooks run from top to bottom, as a user runs them."""

import importlib.util
import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from runs import ROOT, environment

NOTEBOOKS = sorted((ROOT / "experiments/notebooks").glob("*.ipynb"))


def run_notebook(name: str, workdir: Path, monkeypatch) -> tuple[str, int]:
    """What it prints, and how many images it shows."""
    for key, value in {**environment(), "STEPS": "20", "WORKDIR": str(workdir)}.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(ROOT / "experiments/notebooks" / name, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    images = [o for o in outputs if "image/png" in o.get("data", {})]
    return "".join(o.get("text", "") for o in outputs), len(images)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_outputs_are_committed(path: Path):
    assert not any(cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells)
    assert path.stem in ("preferences", "quickstart", "scaling", "tuning"), (
        f"{path.name} has no test here"
    )


def test_quickstart(tmp_path, monkeypatch):
    printed, images = run_notebook("quickstart.ipynb", tmp_path / "run", monkeypatch)
    assert "logits (1, " in printed and "nats" in printed
    assert images == 2
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 20


def test_scaling(tmp_path, monkeypatch):
    """The intervals hold the truth, and the plan is of the model that the law chose."""
    printed, images = run_notebook("scaling.ipynb", tmp_path / "run", monkeypatch)
    assert "chinchilla3" in printed and "chip hours" in printed and images == 2
    law = json.loads((tmp_path / "run/fit.json").read_text())["chinchilla3"]
    for name, true in {"E": 1.8, "alpha": 0.35, "beta": 0.366, "N*": 8.57e8}.items():
        low, high = law["intervals"][name]
        assert low - (high - low) < true < high + (high - low), name
    spec = importlib.util.spec_from_file_location("planned", tmp_path / "run/planned.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cfg = module.get_config()
    tokens = cfg.steps * cfg.batch_size * cfg.length
    assert tokens == pytest.approx(law["details"]["optimum"]["D*"], rel=0.05)


def test_tuning(tmp_path, monkeypatch):
    printed, images = run_notebook("tuning.ipynb", tmp_path / "run", monkeypatch)
    assert "lora   answers" in printed and "answer:" in printed
    assert printed.split("answer:")[1].split("merged:")[0].strip() in printed.split("merged:")[1]
    assert images == 1


def test_preferences(tmp_path, monkeypatch):
    printed, images = run_notebook("preferences.ipynb", tmp_path / "run", monkeypatch)
    assert (
        "pairs, 0 rejected" in printed
        and "reward: accuracy" in printed
        and "dpo: accuracy" in printed
    )
    assert "best of 4" in printed and images == 2
