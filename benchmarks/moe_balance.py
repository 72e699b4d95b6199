r"""Does routing collapse without balancing, and which remedy keeps it from that?

    python -m benchmarks.moe_balance --output=benchmarks/results/moe_balance.json \
        --plot=docs/figures/moe_balance.png

A small language model with 8 experts a layer, top_k = 1, learns from Python's help topics with the
ordinary train step. Each token's expert is weighted by its raw probability (Switch transformer), so
the router learns from the loss alone, and nothing of it is set by hand: what an expert is given
makes it better, which makes the router give it more. The variants are that, with the z-loss (not
meant as a remedy), with the load-balancing loss, and with the bias that moves by the load's error.

The number watched is the largest share of a layer's tokens that one expert got in a step, the mean
over WINDOW steps, of the worst layer. Balanced it is 1/8 = 0.125, collapsed 1.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import time

from absl import flags

from experiments.cli import run_main

SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "One run of each variant for each.")
VARIANTS = flags.DEFINE_list("variants", [], "Names of variants to run; empty: all.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.", required=True)
PLOT = flags.DEFINE_string("plot", "", "PNG file to write; empty: none.")
SET = flags.DEFINE_list("set", [], "KEY=VALUE changes of the config, for trying things out.")

WINDOW = 10  # steps
LAST = 50  # steps at the end that final numbers are means over
VOCABULARY = 1024
CONFIG = {
    "steps": 400,
    "batch_size": 32,
    "length": 32,
    "model.d_model": 32,
    "model.n_layers": 2,
    "model.n_heads": 4,
    "model.d_ff": 64,
    "model.scan": False,
    "model.moe.n_experts": 8,
    "model.moe.top_k": 1,
    "model.moe.normalize": False,
    "model.moe.balance_loss": 0.0,
    "model.moe.z_loss": 0.0,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 50,
}
CHANGES = {
    "none": {},
    "z_loss": {"model.moe.z_loss": 0.001},
    "balance_loss": {"model.moe.balance_loss": 0.05},
    "bias": {"model.moe.bias_rate": 0.01},
}
LABELS = {
    "none": "no balancing",
    "z_loss": "router z-loss alone",
    "balance_loss": "balance loss",
    "bias": "bias",
}


def text_ids():
    """The corpus as ids of a sentencepiece vocabulary trained on it, int32 [N]."""
    import numpy as np

    from llm_jax import corpus
    from llm_jax.tokenizers import training

    texts = [text for _, text in corpus.documents("topics")]
    tokenizer = training.train("sentencepiece_bpe", texts, vocab_size=VOCABULARY)
    return np.concatenate([np.asarray(tokenizer.encode(text), np.int32) for text in texts])


def train(ids, seed: int, changes: dict) -> dict:
    """One run: the share of the busiest expert of each layer and the loss, each step."""
    import jax
    import numpy as np

    from llm_jax import config as configs
    from llm_jax import sharding
    from llm_jax.train import program
    from llm_jax.types import Batch

    cfg = configs.override(configs.TrainConfig(seed=seed), {**CONFIG, **changes})
    configs.resolve_model(
        cfg.model, vocab_size=VOCABULARY, length=cfg.length, backend=jax.default_backend()
    )
    configs.validate(cfg)
    configs.freeze(cfg)
    B, L = cfg.batch_size, cfg.length
    rng = np.random.default_rng(seed)
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    loads, losses = [], []
    with jax.set_mesh(mesh):
        run = program.build(cfg, mesh)
        state = run.init(jax.random.key(seed))
        for _ in range(cfg.steps):
            starts = rng.integers(0, len(ids) - L, B)
            windows = np.stack([ids[s : s + L + 1] for s in starts])
            batch = Batch(
                tokens=windows[:, :-1],
                targets=windows[:, 1:],
                weights=np.ones((B, L), np.float32),
            )
            state, metrics = run.step(state, program.put(batch, mesh, 1))
            loads.append(metrics["expert_load"])
            losses.append(metrics["nll"])
        skipped = int(state.bad_steps)
    if skipped:
        raise RuntimeError(f"{skipped} steps in a row were skipped at the end: not finite")
    load_SxMxE = np.stack([np.asarray(load) for load in loads])
    share_SxM = np.max(load_SxMxE / np.sum(load_SxMxE, axis=-1, keepdims=True), axis=-1)
    return {"share": share_SxM, "loss": np.asarray([float(x) for x in losses])}


def measure(ids, variant: str, seed: int) -> dict:
    """One run's row of the report."""
    import numpy as np

    changes = {**CHANGES[variant], **dict(json_pair(s) for s in SET.value)}
    start, cpu = time.perf_counter(), time.process_time()
    result = train(ids, seed, changes)
    share, loss = result["share"], result["loss"]
    smooth = share.reshape(-1, WINDOW, share.shape[1]).mean(axis=1)
    worst = smooth.max(axis=1)
    row = {
        "variant": variant,
        "seed": seed,
        "changes": changes,
        "max_share": float(worst.max()),
        "final_max_share": float(share[-LAST:].mean(axis=0).max()),
        "final_max_share_by_layer": share[-LAST:].mean(axis=0).tolist(),
        "final_loss": float(np.mean(loss[-LAST:])),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "steps": list(range(WINDOW, len(share) + 1, WINDOW)),
        "share": [round(float(s), 4) for s in worst],
    }
    print(
        f"{variant:13} seed {seed}: largest share {row['max_share']:.2f}, at the end "
        f"{row['final_max_share']:.2f}, loss {row['final_loss']:.3f}, {row['seconds']:.0f} s",
        flush=True,
    )
    return row


def json_pair(text: str) -> tuple[str, object]:
    """ "model.d_model=64" -> ("model.d_model", 64)."""
    name, _, value = text.partition("=")
    return name, json.loads(value)


def summarise(rows: list[dict]) -> dict:
    """The range over seeds of each variant's numbers."""
    out = {}
    for variant in dict.fromkeys(r["variant"] for r in rows):
        mine = [r for r in rows if r["variant"] == variant]
        out[variant] = {
            key: [round(min(r[key] for r in mine), 4), round(max(r[key] for r in mine), 4)]
            for key in ("max_share", "final_max_share", "final_loss")
        }
    return out


def draw(rows: list[dict], path: str) -> None:
    """Largest share against step: strong lines for means, thin ones for seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from llm_jax.report import PALETTE

    figure, axes = plt.subplots(figsize=(7.2, 3.8), dpi=110)
    for color, variant in zip(PALETTE, dict.fromkeys(r["variant"] for r in rows), strict=False):
        mine = [r for r in rows if r["variant"] == variant]
        for row in mine:
            axes.plot(row["steps"], row["share"], color=color, linewidth=0.7, alpha=0.5)
        mean = np.mean([r["share"] for r in mine], axis=0)
        axes.plot(mine[0]["steps"], mean, color=color, linewidth=2, label=LABELS[variant])
    axes.axhline(1 / CONFIG["model.moe.n_experts"], color="#666666", linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="share of the busiest expert", ylim=(0, 1.02), xlim=(0, None))
    axes.set_title("Largest share of a layer's tokens that one of 8 experts gets", fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="center right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main(_) -> None:
    names = VARIANTS.value or list(CHANGES)
    if unknown := set(names) - set(CHANGES):
        raise ValueError(f"--variants={','.join(unknown)}: there are {', '.join(CHANGES)}")
    ids = text_ids()
    rows = [measure(ids, variant, int(seed)) for seed in SEEDS.value for variant in names]
    rows.sort(key=lambda r: (list(CHANGES).index(r["variant"]), r["seed"]))
    packages = ("jax", "jaxlib", "numpy", "optax", "sentencepiece")
    report = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "device": {"cores": len(os.sched_getaffinity(0)), "platform": platform.machine()},
        "config": {
            **CONFIG,
            "vocabulary": VOCABULARY,
            "tokens": len(ids),
            "window": WINDOW,
            "last": LAST,
        },
        "summary": summarise(rows),
        "runs": rows,
    }
    output = pathlib.Path(OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    if PLOT.value:
        draw(rows, PLOT.value)


if __name__ == "__main__":
    run_main(main)
