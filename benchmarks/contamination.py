"""Power of the order test: its p-value against copies of the data set and size of the model.

    python -m benchmarks.contamination --output=benchmarks/results/contamination.json \
        --figure=docs/figures/contamination.png

Decoders of three sizes read half of Python's docstrings once. Into that text whole data sets were
planted, each as 1, 3, 10 or 30 copies in its canonical order, every copy a document of its own at a
random place. A data set is 40 short sentences in an order drawn at random, so that none is more
natural than another. For every set `eval.contamination.order_test` gives the exact p of 149 random
orders (inside 4 shards; of clean sets 49) and that of the t-test over the shards.

Two kinds of clean sets stand beside them: sets that no model read, and sets of which a model read
30 copies, each in another order. Their p-values have to be uniform (Kolmogorov-Smirnov, which is
a little too strict with p-values in steps of 1/50).

Exits with code 1 where the median p of 10 copies or more is not below 0.01 in the largest model, or
where the p-values of clean sets are not uniform (KS p < 0.01). The file is written after every
model, so that a run that is stopped keeps what it measured. 16 minutes on 2 cores that
other work shared.
"""

import re
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags
from scipy import stats

from benchmarks import record
from experiments.cli import run_main
from llm_jax import config as configs
from llm_jax import corpus, sharding, tokenizers
from llm_jax.decode.generate import start_ids
from llm_jax.eval.contamination import order_test
from llm_jax.eval.scoring import score_rows
from llm_jax.train.program import build, put
from llm_jax.types import Batch, PyTree

OUTPUT = flags.DEFINE_string("output", "", "JSON file to write; empty: none.")
FIGURE = flags.DEFINE_string("figure", "", "PNG file of the plot; empty: none.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "Random seeds, of sets, texts and parameters.")
TOY = flags.DEFINE_bool("toy", False, "Sizes that take seconds and find nothing.")

ROWS, LENGTH, VOCABULARY = 8, 64, 4096
ITEMS, SHARDS = 40, 4  # of a data set
COPIES = (1, 3, 10, 30)
SHUFFLED = -30  # so many copies, each in another order
SIZES = {"2 x 32": (2, 32, 1e-2), "2 x 64": (2, 64, 1e-2), "2 x 128": (2, 128, 6e-3)}
FOUND = 0.01


def sentences(texts: list[str]) -> list[str]:
    """Short paragraphs, each once."""
    paragraphs = (" ".join(p.split()) for text in texts for p in re.split(r"\n\s*\n", text))
    return list(dict.fromkeys(p for p in paragraphs if 20 <= len(p) <= 50))


def draw(pool: list[str], numbers: dict[int, int], rng) -> dict[int, list[list[str]]]:
    """copies -> as many data sets as `numbers` says. Planted ones share no sentence with any other;
    of clean ones it is only the order that has to be independent."""
    left, sets = [pool[n] for n in rng.permutation(len(pool))], {}
    for copies in sorted(numbers, key=lambda copies: copies == 0):
        sets[copies] = []
        for _ in range(numbers[copies]):
            items = [left[n] for n in rng.permutation(len(left))[:ITEMS]]
            sets[copies].append(items)
            if copies:
                left = [text for text in left if text not in items]
    return sets


def plant(background: list[str], sets: dict[int, list[list[str]]], rng) -> list[str]:
    """All documents in random order, with so many copies of each set among them."""
    documents = list(background)
    for copies, group in sets.items():
        for items in group:
            for _ in range(abs(copies)):
                order = rng.permutation(ITEMS) if copies == SHUFFLED else range(ITEMS)
                documents.append("".join(items[n] + "\n" for n in order))
    return [documents[n] for n in rng.permutation(len(documents))]


def config(size: str, steps: int, vocab_size: int, seed: int) -> configs.TrainConfig:
    """The run's frozen config."""
    layers, width, rate = SIZES[size]
    cfg = configs.TrainConfig(steps=steps, batch_size=ROWS, length=LENGTH, seed=seed)
    cfg.model = configs.ModelConfig(
        d_model=width, n_layers=layers, n_heads=4, scan=False, vocab_size=vocab_size
    )
    cfg.optimizer = configs.OptimizerConfig(
        name="muon", learning_rate=rate, warmup_steps=max(steps // 20, 1)
    )
    configs.resolve_model(cfg.model, vocab_size=vocab_size, length=LENGTH, backend="cpu")
    configs.validate(cfg)
    return configs.freeze(cfg)


def train(cfg: configs.TrainConfig, ids: np.ndarray, mesh) -> tuple[PyTree, float]:
    """(parameters, mean loss of the last tenth) after one pass over the ids, rows at random."""
    rng = np.random.default_rng(cfg.seed)
    starts = rng.permutation(cfg.steps * ROWS).reshape(cfg.steps, ROWS) * LENGTH
    program = build(cfg, mesh)
    state, losses = program.init(jax.random.key(cfg.seed)), []
    weights = np.ones((ROWS, LENGTH), np.float32)
    for at in starts:
        rows = np.stack([ids[a : a + LENGTH + 1] for a in at]).astype(np.int32)
        batch = Batch(tokens=rows[:, :-1], targets=rows[:, 1:], weights=weights)
        state, metrics = program.step(state, put(batch, mesh, 1))
        losses.append(metrics["nll"])
    return program.params(state), float(np.mean(losses[-max(len(losses) // 10, 1) :]))


def measure(size: str, seed: int, toy: bool) -> Iterator[dict]:
    """One model: a row for each of its data sets."""
    numbers = {0: 2 if toy else 18, SHUFFLED: 1 if toy else 2} | dict.fromkeys(
        COPIES, 1 if toy else 3
    )
    texts = [text for _, text in corpus.documents("docs")]
    # Models agree in part on which order is more probable: each gets sets of its own.
    rng = np.random.default_rng([seed, list(SIZES).index(size)])
    cut = len(texts) * 3 // 4  # sentences come from the last quarter, the rest is read
    sets = draw(sentences(texts[cut:]), numbers, rng)
    planted = {copies: group for copies, group in sets.items() if copies}
    tokenizer = tokenizers.train("sentencepiece_bpe", texts[:cut], vocab_size=VOCABULARY)
    documents = plant(texts[: cut // (200 if toy else 2)], planted, rng)
    ids = np.concatenate([[*tokenizer.encode(text), tokenizer.eos_id] for text in documents])
    steps = 4 if toy else (len(ids) - 1) // (ROWS * LENGTH)
    cfg = config(size, steps, tokenizer.vocab_size, seed)
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        begin = time.perf_counter()
        params, loss = train(cfg, ids, mesh)
        print(
            f"{size}, seed {seed}: {steps} steps, {len(ids)} tokens, loss {loss:.3f}, "
            f"{time.perf_counter() - begin:.0f} s",
            flush=True,
        )
        for copies, group in sets.items():
            for number, items in enumerate(group):
                found = order_test(
                    items,
                    tokenizer.encode,
                    lambda rows: score_rows(params, cfg.model, rows, batch_size=64),
                    length=LENGTH,
                    stride=LENGTH,
                    start=start_ids(tokenizer)[0],
                    permutations=9 if toy else 149 if copies > 0 else 49,
                    shards=SHARDS,
                    seed=number,
                )
                yield {
                    "size": size,
                    "seed": seed,
                    "copies": copies,
                    "p_value": found.p_value,
                    "t_p_value": found.t_p_value,
                    "advantage_nats": found.advantage,
                    "tokens": found.tokens,
                    "loss": loss,
                }


def summary(rows: list[dict]) -> dict:
    """Power and medians for each size and number of copies; uniformity of clean p-values."""
    power = []
    for size in dict.fromkeys(r["size"] for r in rows):
        for copies in COPIES:
            these = [r for r in rows if (r["size"], r["copies"]) == (size, copies)]
            power.append(
                {
                    "size": size,
                    "copies": copies,
                    "sets": len(these),
                    "power": float(np.mean([r["p_value"] < FOUND for r in these])),
                    "t_power": float(np.mean([r["t_p_value"] < FOUND for r in these])),
                    "p_value": float(np.median([r["p_value"] for r in these])),
                    "advantage_nats": float(np.mean([r["advantage_nats"] for r in these])),
                }
            )
    clean = {}
    for name, copies in (("never read", 0), ("read in other orders", SHUFFLED)):
        for key in ("p_value", "t_p_value"):
            values = [r[key] for r in rows if r["copies"] == copies]
            clean[f"{name}, {key}"] = {
                "sets": len(values),
                "ks_p_value": float(stats.kstest(values, "uniform").pvalue),
                "below_0.05": float(np.mean(np.array(values) < 0.05)),
            }
    return {"power": power, "clean": clean}


def missed(found: dict) -> list[str]:
    """What is not as it has to be."""
    largest = list(SIZES)[-1]
    lines = [
        f"{p['copies']} copies in {p['size']}: median p {p['p_value']:.3f}"
        for p in found["power"]
        if p["size"] == largest and p["copies"] >= 10 and not p["p_value"] < FOUND
    ]
    lines += [
        f"{name}: not uniform, KS p {c['ks_p_value']:.4f} over {c['sets']} sets"
        for name, c in found["clean"].items()
        if c["ks_p_value"] < 0.01
    ]
    return lines


def main(argv: list[str]) -> None:
    del argv
    begin = time.perf_counter()
    seeds = [int(seed) for seed in SEEDS.value][: 1 if TOY.value else None]
    sizes = list(SIZES)[: 1 if TOY.value else None]
    rows: list[dict] = []
    for seed in seeds:
        for size in sizes:
            rows += measure(size, seed, TOY.value)
            found = summary(rows)
            if OUTPUT.value:
                seconds = round(time.perf_counter() - begin)
                result = record.header(("jax", "jaxlib", "scipy")) | {"seconds": seconds}
                result |= {"config": configs.to_dict(config("2 x 64", 550, VOCABULARY, 0))}
                record.save(result | found | {"rows": rows}, OUTPUT.value)
    print(f"{'size':10}{'copies':>8}{'sets':>6}{'median p':>10}{'p < 0.01':>10}{'nats':>8}")
    for p in found["power"]:
        print(
            f"{p['size']:10}{p['copies']:8}{p['sets']:6}{p['p_value']:10.3f}{p['power']:10.2f}"
            f"{p['advantage_nats']:8.1f}"
        )
    for name, c in found["clean"].items():
        print(f"{name}: {c['sets']} sets, KS p {c['ks_p_value']:.3f}, {c['below_0.05']:.3f} < 0.05")
    if FIGURE.value:
        plot(rows, found, FIGURE.value)
    if not TOY.value and missed(found):
        raise ValueError(f"not as expected: {'; '.join(missed(found))}")


def plot(rows: list[dict], found: dict, path: str) -> None:
    """Left: p against copies, a dot for each set; right: the p-values of clean sets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.6))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, size in enumerate(dict.fromkeys(r["size"] for r in rows)):
        these = [p for p in found["power"] if p["size"] == size]
        line = [p["p_value"] for p in these]
        left.plot(COPIES, line, color=f"C{i}", linewidth=2, marker="o", label=size)
        dots = [r for r in rows if r["size"] == size and r["copies"] in COPIES]
        left.scatter(
            [r["copies"] * (1 + 0.08 * (i - 1)) for r in dots],
            [r["p_value"] for r in dots],
            color=f"C{i}",
            s=10,
            alpha=0.45,
        )
    left.axhline(FOUND, color="gray", linestyle=":", linewidth=1, label="p = 0.01")
    left.set(xscale="log", yscale="log", xlabel="copies in the training text", ylabel="p")
    left.set_xticks(COPIES, map(str, COPIES), minor=False)
    left.minorticks_off()
    left.set_title("Planted: median p, by layers x width", fontsize=10)
    left.legend(fontsize=8)
    for i, (name, copies) in enumerate((("never read", 0), ("read in other orders", SHUFFLED))):
        values = np.sort([r["p_value"] for r in rows if r["copies"] == copies])
        share = np.arange(1, len(values) + 1) / len(values)
        right.step(values, share, where="post", color=f"C{i + 4}", label=f"{name} ({len(values)})")
    right.plot([0, 1], [0, 1], color="gray", linestyle=":", linewidth=1, label="uniform")
    right.set(xlabel="p", ylabel="share of sets with at most this p", xlim=(0, 1), ylim=(0, 1))
    right.set_title("Clean sets", fontsize=10)
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    run_main(main)
