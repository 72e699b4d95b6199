"""The commands of the README do what it says; its Python runs; its files exist."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from runs import ROOT, environment

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder like a fresh clone, with some documents of the user's."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "docs").mkdir()
    for n in range(40):
        text = f"# Page {n}\n" + "".join(
            f"Line {i} of page {n}: {i * n % 97} apples, {i} pears.\n" for i in range(80)
        )
        (folder / "docs" / f"page{n}.md").write_text(text)
    return folder


def test_commands_run_in_order(folder):
    commands = [c for b in blocks("bash") for c in b.splitlines() if c.startswith("python")]
    assert len(commands) >= 6
    for command in commands:
        # The first commands of all exactly as a user's.
        first = "runs/smoke" in command
        env = environment(optimized=first)
        args = [sys.executable, *shlex.split(command)[1:]]
        if "experiments.pretrain" in command:  # fewer steps; everything else as it stands
            args += ["--config.steps=8", "--config.eval.rows=16", "--config.checkpoint.every=4"]
        if "experiments.sft" in command:  # the model that was trained above stands for the demo's
            args = [a.replace("runs/quickstart", "runs/smoke") for a in args]
            args += ["--config.steps=8", "--config.optimizer.warmup_steps=0"]
            args += ["--config.eval.rows=16", "--config.eval.sample_tokens=8"]
        # The script of tests/test_preference_chain.py runs these three.
        if "experiments.reward" in command or "experiments.dpo" in command:
            args += ["--dry_run"]
        if "experiments.best_of_n" in command:
            runs = ("--judge", "--against", "--held_out_of")
            args = [a for a in args if not a.startswith(runs)]
            args += ["--judge=rule:ends", "--input=embedded:preferences"]
            args += ["--prompts=2", "--n=2", "--max_new_tokens=8"]
        if "experiments.sweep" in command:  # half an hour; its grid, and a table that it would make
            args += ["--dry_run"]
        done = subprocess.run(
            args, cwd=folder, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        if "experiments.sweep" in command:
            shutil.copy(ROOT / "docs/sweep_tiny/runs.csv", folder / "runs/sweep")


def test_python_runs(folder):
    code = "\n".join(blocks("python")) + "\nprint(len(model.log_probs(['Hello'])[0]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "5", done.stderr


def test_files_and_verbs_exist():
    for verb in re.findall(r"`experiments\.(\w+)`", README):
        assert (ROOT / "experiments" / f"{verb}.py").exists(), verb
    there = {p.stem for p in (ROOT / "experiments").glob("*.py")} - {"__init__", "cli"}
    assert there == set(re.findall(r"^\| `experiments\.(\w+)`", README, re.M))
    recipes = set(re.findall(r"`(\w+)`", README.split("## Recipes")[1].split("\n## ")[0])) - {
        "configs"
    }
    assert recipes == {p.stem for p in (ROOT / "configs").glob("*.py")} - {"__init__"}
    for target in ("demo", "test"):
        done = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, env=os.environ
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "path", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_flags_in_the_documentation_exist(path):
    """Of every command that is shown, also those that are too long to run here."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / path).read_text())
    shared = (ROOT / "experiments" / "cli.py").read_text()
    for kind, name, rest in re.findall(r"python -m (experiments|benchmarks)\.(\w+)([^\n`]*)", text):
        source = (ROOT / kind / f"{name}.py").read_text() + shared
        for flag in re.findall(r"(?<!\S)--(?:no)?(\w+)", rest):
            if flag != "config":
                assert f'"{flag}"' in source, f"{path}: {kind}.{name} has no --{flag}"
