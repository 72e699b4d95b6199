"""The launch files print commands that exist: the flags they pass are pretrain's own."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from runs import ROOT, environment

LAUNCH = ROOT / "experiments" / "launch"
FILES = sorted(p.name for p in LAUNCH.iterdir())
# A value with a space and a quote has to arrive as it was given.
ODD = "--config.name=it's a pod"


def dry_run(name: str, *args: str, **env: str) -> list[list[str]]:
    """The commands that a launch file would run, as lists of words; none of the tools exists."""
    done = subprocess.run(
        ["/bin/bash", str(LAUNCH / name), "--dry_run", *args],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [words for line in done.stdout.splitlines() if (words := shlex.split(line))]


def pretrain_args(words: list[str]) -> list[str]:
    """What comes after `-m experiments.pretrain`, also where a remote shell is to read it."""
    if "experiments.pretrain" not in words:
        [inner] = [w for w in words if "experiments.pretrain" in w]
        words = shlex.split(inner)
    rest = words[words.index("experiments.pretrain") + 1 :]
    return rest[: next((i for i, w in enumerate(rest) if w[:1] in "><&|"), len(rest))]


TRAIN = {
    "tpu_vm_pod.sh": ("train",),
    "gke_xpk.sh": ("train",),
    "slurm.sbatch": (),
}


def test_every_launch_file_is_tested_here():
    assert FILES == sorted([*TRAIN, "preferences.sh", "restart.sh", "sweep.sbatch"])


@pytest.mark.parametrize("name", FILES)
def test_the_shell_can_read_it_and_it_stops_at_errors(name):
    assert subprocess.run(["bash", "-n", str(LAUNCH / name)], capture_output=True).returncode == 0
    text = (LAUNCH / name).read_text()
    assert re.search(r"^set -euo pipefail$" if name != "restart.sh" else r"^set -uo pipefail$",
                     text, re.MULTILINE)  # fmt: skip


PARSE = """
import json, os, sys
from absl import flags
from experiments import cli, pretrain
for args in json.loads(sys.argv[1]):
    if os.fork():  # flags can be parsed once in a process
        os.wait()
        continue
    sys.argv = ["pretrain", *args]  # ml_collections looks there for overrides
    try:
        cli.check_config_flags(args)
        flags.FLAGS(sys.argv)
        cfg = pretrain._TRAINING.config()
        print(json.dumps([cfg.steps, cfg.name, flags.FLAGS.workdir]), flush=True)
    except flags.Error as e:
        print(json.dumps(str(e)), flush=True)
    os._exit(0)
"""


def test_what_they_pass_are_flags_of_pretrain():
    """A flag that was renamed, or a recipe that is gone, fails here."""
    passed = []
    for name, verb in TRAIN.items():
        commands = dry_run(name, *verb, "--config.steps=7", ODD)
        [words] = [w for w in commands if any("experiments.pretrain" in x for x in w)]
        passed.append(pretrain_args(words))
        assert passed[-1][-2:] == ["--config.steps=7", ODD]
    renamed = [a.replace("--workdir", "--work_dir") for a in passed[0]]
    done = subprocess.run(
        [sys.executable, "-c", PARSE, json.dumps([*passed, renamed])],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *parsed, refused = map(json.loads, done.stdout.splitlines())
    assert [p[:2] for p in parsed] == [[7, "it's a pod"]] * len(TRAIN)
    assert all("runs/" in p[2] for p in parsed)
    assert "work_dir" in refused  # the check does notice


def test_a_sweep_is_an_array_or_a_workload_for_each_line(tmp_path):
    """As `experiments.sweep --print_commands` writes them (tests/test_sweep.py runs such a line)."""
    odd = "--input=it's one/*.txt"
    words = [["python", "-m", "experiments.sweep", odd, f"--only=w{n}-seed0"] for n in (1, 2)]
    commands = tmp_path / "commands.txt"
    commands.write_text("".join(shlex.join(w) + "\n" for w in words))
    [task] = dry_run("sweep.sbatch", str(commands), SLURM_ARRAY_TASK_ID="2", PYTHON="/p/python")
    assert task[0] == "srun" and task[-5:] == ["/p/python", *words[1][1:]]
    workloads = dry_run("gke_xpk.sh", "sweep", str(commands), WORKLOAD="s", NUM_SLICES="2")
    assert len(workloads) == 2
    for n, (created, wanted) in enumerate(zip(workloads, words, strict=True), start=1):
        assert {f"--workload=s-{n}", "--num-slices=2"} <= set(created)
        [inner] = [w for w in created if w.startswith("--command=")]
        assert shlex.split(inner)[-6:] == ["exec", *wanted]
    beyond = subprocess.run(
        ["bash", str(LAUNCH / "sweep.sbatch"), "--dry_run", str(commands)],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "3"},
        capture_output=True,
        text=True,
    )
    assert beyond.returncode == 1 and "no command in line 3" in beyond.stderr


def test_environment_variables_are_the_parameters():
    [create] = dry_run("tpu_vm_pod.sh", "create", ACCELERATOR="v5p-64", SPOT="1", ZONE="z", TPU="t")
    assert create[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "t"]
    assert {"--zone=z", "--accelerator-type=v5p-64", "--version=v2-alpha-tpuv5", "--spot"} == set(
        create[6:]
    )
    [train] = dry_run("gke_xpk.sh", "train", NUM_SLICES="4", MOUNT="/data", WORKLOAD="w")
    assert {"--num-slices=4", "--restart-on-exit-codes=70", "--workload=w"} <= set(train)
    assert "--workdir=/data/w" in pretrain_args(train)
    # One task per node: jax would take one GPU of eight.
    (devices,), srun = dry_run("slurm.sbatch", SLURM_NTASKS_PER_NODE="1", SLURM_GPUS_ON_NODE="4")
    assert devices == "JAX_LOCAL_DEVICE_IDS=0,1,2,3" and srun[0] == "srun"
    (devices,), _ = dry_run("slurm.sbatch", SLURM_NTASKS_PER_NODE="4", SLURM_GPUS_ON_NODE="4")
    assert devices == "JAX_LOCAL_DEVICE_IDS="


def test_a_verb_is_needed_and_help_lists_them():
    for name in ("tpu_vm_pod.sh", "gke_xpk.sh"):
        done = subprocess.run(["bash", str(LAUNCH / name)], capture_output=True, text=True)
        assert done.returncode == 2 and "train     starts or resumes" in done.stderr


def test_restart_repeats_what_a_scheduler_would():
    """70 (watchdog, lost process) is tried again; an error and a stop are final."""
    code = 'n=$(cat "$0" 2>/dev/null || echo 0); echo $((n + 1)) > "$0"; exit "$1"'
    for wanted, tries in ((70, 3), (137, 3), (0, 1), (1, 1), (143, 1)):
        counter = f"{os.environ['LLM_JAX_TEST_CACHE']}/tries-{wanted}"
        done = subprocess.run(
            ["bash", str(LAUNCH / "restart.sh"), "bash", "-c", code, counter, str(wanted)],
            env={**os.environ, "MAX_RESTARTS": "2", "RESTART_SECONDS": "0"},
            capture_output=True,
            text=True,
        )
        with open(counter) as f:
            assert (done.returncode, int(f.read())) == (wanted, tries)


def test_the_page_names_what_exists():
    """Files, flags and config keys of docs/run_on_a_pod.md."""
    page = (ROOT / "docs" / "run_on_a_pod.md").read_text()
    for path in re.findall(r"`?((?:experiments|configs|llm_jax)/[\w/.]+\w)", page):
        assert (ROOT / path).exists(), path
    source = (ROOT / "experiments" / "cli.py").read_text()
    for flag in re.findall(r"`--(\w+)", page):
        assert f'"{flag}"' in source + (ROOT / "experiments" / "pretrain.py").read_text(), flag
    from llm_jax import config as configs

    for key in re.findall(r"`((?:log|checkpoint|data|mesh|eval)\.\w+)", page):
        configs.get(configs.TrainConfig(), key)
