"""Routing collapse, and what prevents it: a small mixture of experts with each remedy and with none.

    python -m benchmarks.moe_balance --output=benchmarks/results/moe_balance.json \
        --figure=docs/figures/moe_balance.png

A byte-level decoder (2 layers, 32 wide, 8 experts, each token to one of them with the router's
probability as its weight: Switch, Fedus et al. 2021) learns the documentation that comes with
Python. Nothing favours an expert at the start: collapse is what training does, as an expert that is
chosen more learns more. Of each step the largest share of a layer's tokens that one expert gets is
recorded (0.125 is even), of a run its mean over the last 50 steps, in the worst layer. A router's
z-loss bounds its logits and balances nothing: it is recorded, not expected to help. Exits with code
1 where a run without a remedy does not collapse (above 0.8) or one with a remedy is not balanced
(below 0.3). About 8 minutes on 2 cores.
"""

import datetime
import importlib.metadata
import json
import platform
import time

import jax
import numpy as np
from absl import flags

from experiments.cli import run_main
from llm_jax import config as configs
from llm_jax import corpus, sharding
from llm_jax.train.program import build, put
from llm_jax.types import Batch

OUTPUT = flags.DEFINE_string("output", "", "JSON file to write; empty: none.")
FIGURE = flags.DEFINE_string("figure", "", "PNG file of the plot; empty: none.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Random seeds, of parameters and batches.")
STEPS = flags.DEFINE_integer("steps", 600, "Steps of each run, a multiple of 10.")

ROWS, LENGTH, LAST = 32, 32, 50
VARIANTS = {  # name -> (changes, whether it has to balance; None: for information)
    "none": ({}, False),
    "balance loss 0.02": ({"model.moe.balance_loss": 0.02}, True),
    "bias 0.01, softmax": ({"model.moe.bias_rate": 0.01}, True),
    "bias 0.01, sigmoid": ({"model.moe.bias_rate": 0.01, "model.moe.scores": "sigmoid"}, True),
    "z-loss 0.001": ({"model.moe.z_loss": 0.001}, None),
}
COLLAPSED, BALANCED = 0.8, 0.3


def config(changes: dict, seed: int, steps: int) -> configs.TrainConfig:
    """The run's frozen config."""
    cfg = configs.TrainConfig(steps=steps, batch_size=ROWS, length=LENGTH, seed=seed)
    cfg.model = configs.ModelConfig(d_model=32, n_layers=2, n_heads=4, d_ff=64, scan=False)
    configs.override(
        cfg,
        {
            "model.moe.n_experts": 8,
            "model.moe.top_k": 1,
            "model.moe.normalize": False,  # or the router of one choice would learn nothing
            "model.moe.balance_loss": 0.0,
            "model.moe.z_loss": 0.0,
            "optimizer.learning_rate": 1e-3,
            "optimizer.warmup_steps": 50,
            "optimizer.schedule": "constant",
            **changes,
        },
    )
    configs.resolve_model(cfg.model, vocab_size=256, length=LENGTH, backend="cpu")
    configs.validate(cfg)
    return configs.freeze(cfg)


def train(cfg: configs.TrainConfig, text: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """(shares of the most used expert [steps, layers], losses [steps]) of one run."""
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    rng = np.random.default_rng(cfg.seed)
    shares, losses = [], []
    with jax.set_mesh(mesh):
        program = build(cfg, mesh)
        state = program.init(jax.random.key(cfg.seed))
        for _ in range(cfg.steps):
            at = rng.integers(0, len(text) - LENGTH - 1, ROWS)
            rows = np.stack([text[a : a + LENGTH + 1] for a in at]).astype(np.int32)
            weights = np.ones((ROWS, LENGTH), np.float32)
            batch = Batch(tokens=rows[:, :-1], targets=rows[:, 1:], weights=weights)
            state, metrics = program.step(state, put(batch, mesh, 1))
            load = np.asarray(metrics["expert_load"])
            shares.append(load.max(-1) / load.sum(-1))
            losses.append(float(metrics["nll"]))
    return np.array(shares), losses


def main(argv: list[str]) -> None:
    del argv
    text = "\n".join(document for _, document in corpus.documents("topics")).encode()
    text = np.frombuffer(text, np.uint8)
    rows, curves, failed = [], {}, []
    for name, (changes, balances) in VARIANTS.items():
        for seed in map(int, SEEDS.value):
            start = time.perf_counter()
            share, losses = train(config(changes, seed, STEPS.value), text)
            worst, loss = float(share[-LAST:].mean(axis=0).max()), float(np.mean(losses[-LAST:]))
            smooth = share.max(axis=1).reshape(-1, 10).mean(axis=1)
            curves.setdefault(name, []).append(smooth)
            rows.append(
                {
                    "remedy": name,
                    "seed": seed,
                    "changes": changes,
                    "max_share": round(worst, 4),
                    "loss": round(loss, 4),
                    "max_share_every_10_steps": [round(float(s), 3) for s in smooth],
                    "seconds": round(time.perf_counter() - start, 1),
                }
            )
            print(f"{name:20} seed {seed}: largest share {worst:.3f}, loss {loss:.3f}", flush=True)
            as_expected = {None: True, True: worst < BALANCED, False: worst > COLLAPSED}[balances]
            if not as_expected:
                failed.append(f"{name} seed {seed}: {worst:.3f}")
    if OUTPUT.value:
        result = {
            "date": datetime.date.today().isoformat(),
            "device": f"{platform.machine()} ({jax.default_backend()})",
            "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "numpy")},
            "config": configs.to_dict(config({}, 0, STEPS.value)),
            "runs": rows,
        }
        with open(OUTPUT.value, "w") as f:
            json.dump(result, f, indent=1)
            f.write("\n")
    if FIGURE.value:
        plot(curves, FIGURE.value)
    if failed:
        raise ValueError(f"not as expected: {'; '.join(failed)}")


def plot(curves: dict[str, list[np.ndarray]], path: str) -> None:
    """The largest share against the step: a thin line for each seed, a thick one for their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    for i, (name, runs) in enumerate(curves.items()):
        steps = 10 * np.arange(len(runs[0])) + 5
        for run in runs:
            axes.plot(steps, run, color=f"C{i}", linewidth=0.6, alpha=0.5)
        axes.plot(steps, np.mean(runs, axis=0), color=f"C{i}", linewidth=2, label=name)
    axes.axhline(1 / 8, color="gray", linestyle=":", linewidth=1, label="even")
    axes.set(xlabel="step", ylabel="largest share of one expert", ylim=(0, 1))
    axes.set_title("8 experts: collapse without balancing, and with each remedy")
    axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    run_main(main)
