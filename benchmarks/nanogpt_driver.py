"""Runs nanoGPT's own training program, unmodified, and scores the model it saved.

Runs under the peer's Python (torch and numpy; nothing of ours but `benchmarks.windows`), with the
project's root as working directory:

    python -m benchmarks.nanogpt_driver --repo=DIR --data=DIR --workdir=DIR --seed=1337
        --threads=2 --steps=2000 --length=64 -- RECIPE ARGUMENTS

`--data` holds train.bin, val.bin (uint16 ids) and meta.pkl. Writes WORKDIR/result.json.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import re
import runpy
import sys
import time

import numpy as np

from benchmarks.windows import consecutive_windows, window_losses

STEP = re.compile(r"^iter (\d+): loss (\S+), time (\S+)ms", re.MULTILINE)
RANDOM_BATCHES = re.compile(r"^step (\d+): train loss (\S+), val loss (\S+)", re.MULTILINE)


def train(repo: str, recipe: list[str], seed: int, threads: int, log: pathlib.Path) -> float:
    """Runs the peer's train.py with `recipe` as its arguments; returns its seconds."""
    import torch

    torch.set_num_threads(threads)
    # train.py has no option for the seed: it calls manual_seed with a constant, once.
    manual_seed = torch.manual_seed
    torch.manual_seed = lambda _: manual_seed(seed)
    os.chdir(repo)
    sys.path.insert(0, repo)
    sys.argv = ["train.py", *recipe]
    start = time.perf_counter()
    with open(log, "w") as f, contextlib.redirect_stdout(f):
        runpy.run_path("train.py", run_name="__main__")
    return time.perf_counter() - start


def score(checkpoint: pathlib.Path, steps: int, val: np.ndarray, length: int) -> dict:
    """Losses of the saved model over the whole of `val`, and its parameter counts."""
    import torch
    from model import GPT, GPTConfig  # the peer's, from its repository

    saved = torch.load(checkpoint, weights_only=False)
    if saved["iter_num"] != steps:
        raise ValueError(f"{checkpoint} is of step {saved['iter_num']}, not {steps}")
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()

    def total_loss(inputs: np.ndarray, targets: np.ndarray) -> float:
        with torch.no_grad():
            _, mean = model(torch.from_numpy(inputs), torch.from_numpy(targets))
        return float(mean) * targets.size

    params = sum(p.numel() for p in model.parameters())
    return {
        **window_losses(consecutive_windows(val.astype(np.int64), length), total_loss),
        "params": params,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("repo", "data", "workdir"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("seed", "threads", "steps", "length"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("recipe", nargs="+")
    a = parser.parse_args()

    workdir = pathlib.Path(a.workdir).absolute()
    data = pathlib.Path(a.data).absolute()
    log = workdir / "train.log"
    recipe = [*a.recipe, f"--dataset={data}", f"--out_dir={workdir}"]
    seconds = train(str(pathlib.Path(a.repo).absolute()), recipe, a.seed, a.threads, log)

    text = log.read_text()
    step_ms = {int(step): float(ms) for step, _, ms in STEP.findall(text)}
    batches_loss = {int(step): float(val) for step, _, val in RANDOM_BATCHES.findall(text)}
    import torch

    result = {
        **score(workdir / "ckpt.pt", a.steps, np.fromfile(data / "val.bin", np.uint16), a.length),
        "random_batches_loss": batches_loss[a.steps],
        "step_seconds": [step_ms[i] / 1000 for i in range(a.steps)],
        "train_seconds": seconds,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    (workdir / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
