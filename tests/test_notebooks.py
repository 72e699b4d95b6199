"""The notebooks run from top to bottom, as a user runs them."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from runs import ROOT, environment

NOTEBOOKS = sorted((ROOT / "experiments/notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path: Path, tmp_path, monkeypatch):
    for key, value in {**environment(), "STEPS": "20", "WORKDIR": str(tmp_path / "run")}.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), (
        f"{path.name} is committed with outputs"
    )
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    printed = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    assert "logits (1, " in printed and "nats" in printed
    images = [
        o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})
    ]
    assert len(images) == 2
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 20
