"""From a sweep's config to its runs: sizes, token counts, and which of them share a trunk."""

import math
from dataclasses import dataclass

from llm_jax import config as configs
from llm_jax import models
from llm_jax.config import TrainConfig
from llm_jax.nn.params import count
from llm_jax.scaling.flops import CONVENTIONS
from llm_jax.scaling.parameters import parts
from llm_jax.scaling.sweep.config import SweepConfig


@dataclass(frozen=True)
class Size:
    """One model of the ladder.

    Attributes:
      n, n_non_embedding, n_embedding, n_head: parameters in all, and their three parts; a tied
        head is part of the embedding.
      flops, flops_exact: of training per token, by the sweep's convention and by "exact".
      rate: peak learning rate; None: to be tuned.
    """

    name: str
    d_model: int
    n_layers: int
    n_heads: int
    n: int
    n_non_embedding: int
    n_embedding: int
    n_head: int
    flops: float
    flops_exact: float
    rate: float | None


@dataclass(frozen=True)
class Point:
    """One run, that is one row of runs.csv: a size trained for so many steps.

    Attributes:
      start: step at which it leaves its trunk; 0: it has none.
      budget: FLOPs that the grid asked for; None in a ladder of models.
    """

    name: str
    steps: int
    start: int
    budget: float | None


@dataclass(frozen=True)
class Trunk:
    """What one process does: a size and a seed, and the runs that branch off on the way."""

    name: str
    size: Size
    seed: int
    points: tuple[Point, ...]  # by rising steps

    @property
    def steps(self) -> int:
        """Steps that are computed for all points together."""
        decays = sum(p.steps - p.start for p in self.points)
        return max(p.start for p in self.points) + decays


def trunks(cfg: SweepConfig, vocab_size: int) -> list[Trunk]:
    """The whole grid, the most FLOPs first.

    Raises:
      ValueError: a size that does not exist, a run too short for its schedule, a budget that no
        size fits; the message names the key.
    """
    sizes = [_size(cfg, entry, vocab_size) for entry in _ladder(cfg)]
    if len({s.name for s in sizes}) < len(sizes):
        raise ValueError(f"sizes: one of {', '.join(s.name for s in sizes)} is there twice")
    wanted: dict[str, list[tuple[int, float | None]]] = {s.name: [] for s in sizes}
    tokens_per_step = cfg.run.batch_size * cfg.run.length
    for size in sizes:
        for tokens in (*cfg.tokens, *(ratio * size.n for ratio in cfg.ratios)):
            wanted[size.name].append((round(tokens / tokens_per_step), None))
    for budget in cfg.budgets:
        for size in _sizes_of(cfg, budget, sizes):
            steps = round(budget / size.flops / tokens_per_step)
            wanted[size.name].append((steps, float(budget)))
    out = []
    for size in sizes:
        points = tuple(_point(cfg, size, *w) for w in sorted(wanted[size.name]))
        if len({p.steps for p in points}) < len(points):
            raise ValueError(
                f"{size.name}: two runs have {points[0].steps} steps; move budgets, tokens or "
                "ratios further apart"
            )
        for seed in cfg.seeds if points else ():
            name = f"{size.name}-seed{seed}"
            named = [_named(p, name) for p in points]
            if cfg.branches:
                out.append(Trunk(name, size, seed, tuple(named)))
            else:
                out += [Trunk(p.name, size, seed, (p,)) for p in named]
    return sorted(out, key=lambda t: -t.steps * t.size.flops_exact)


def describe(cfg: SweepConfig, trunks: list[Trunk]) -> str:
    """The grid as a table of text."""
    tokens_per_step = cfg.run.batch_size * cfg.run.length
    head = ("run", "N", "D", "D/N", "C", "budget", "steps", "learning rate")
    rows = [head]
    for trunk in sorted(trunks, key=lambda t: (t.size.n, t.seed)):
        for p in trunk.points:
            d, size = p.steps * tokens_per_step, trunk.size
            rows.append(
                (p.name, f"{size.n:,}", f"{d:,}", f"{d / size.n:.1f}", f"{size.flops * d:.3g}",
                 f"{p.budget:.3g}" if p.budget else "", f"{p.steps:,}",
                 f"{size.rate:g}" if size.rate else "tuned")
            )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    total = sum(t.steps * t.size.flops_exact for t in trunks) * tokens_per_step
    runs = sum(len(t.points) for t in trunks)
    return "\n".join([*lines, f"{runs} runs in {len(trunks)} processes, {total:.3g} FLOPs"])


def run_config(cfg: SweepConfig, size: Size, seed: int, rate: float) -> TrainConfig:
    """A mutable config of a run of this size; steps and schedule are still those of cfg.run."""
    run = configs.thaw(cfg.run)
    run.seed = seed
    run.model.d_model, run.model.n_layers = size.d_model, size.n_layers
    run.model.n_heads = size.n_heads
    run.optimizer.learning_rate = rate
    return run


def _ladder(cfg: SweepConfig) -> list[tuple]:
    if cfg.sizes:
        return [tuple(s) for s in cfg.sizes]
    return [(w, max(round(w / cfg.aspect), 1), max(round(w / cfg.head_dim), 1)) for w in cfg.widths]


def _size(cfg: SweepConfig, entry: tuple, vocab_size: int) -> Size:
    d_model, n_layers, n_heads, *rate = entry
    run = configs.thaw(cfg.run)
    run.model.d_model, run.model.n_layers, run.model.n_heads = d_model, n_layers, n_heads
    try:
        # The backend decides on the compute type alone, which changes no count.
        configs.resolve_model(run.model, vocab_size=vocab_size, length=run.length, backend="cpu")
        configs.validate(run)
    except ValueError as e:
        raise ValueError(f"sizes: {entry}: {e}") from None
    specs = models.family(run.model.family).specs(run.model)
    n, part = count(specs), parts(specs)
    convention, exact = (CONVENTIONS[name] for name in (cfg.flops, "exact"))
    base, rule = run.optimizer.learning_rate, cfg.rate
    if rate:
        chosen = float(rate[0])
    elif rule.rule == "tuned":
        chosen = None
    else:
        chosen = power_rate(cfg, n) if rule.rule == "power" else base
    return Size(
        # A rate of its own is part of the name: the runs of another are not taken for its.
        name=f"w{d_model}_l{n_layers}_h{n_heads}" + (f"_lr{rate[0]:g}" if rate else ""),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n=n,
        n_non_embedding=part["layers"],
        n_embedding=part["embedding"],
        n_head=part["head"],
        flops=convention(specs, run.model, run.length),
        flops_exact=exact(specs, run.model, run.length),
        rate=chosen,
    )


def power_rate(cfg: SweepConfig, n: int) -> float:
    """The learning rate of the rule "power" at n parameters, to three digits."""
    rate = cfg.run.optimizer.learning_rate * (n / cfg.rate.reference) ** -cfg.rate.exponent
    return float(f"{rate:.3g}")


def _sizes_of(cfg: SweepConfig, budget: float, sizes: list[Size]) -> list[Size]:
    """The sizes that a budget is spent on."""

    def ratio(size: Size) -> float:
        return budget / size.flops / size.n

    fitting = [s for s in sizes if cfg.min_ratio <= ratio(s) <= cfg.max_ratio]
    fitting.sort(key=lambda s: abs(math.log(ratio(s) / cfg.best_ratio)))
    if not fitting:
        shown = ", ".join(f"{s.name}: {ratio(s):.3g}" for s in sizes)
        raise ValueError(
            f"budgets: {budget:.3g} fits no size between min_ratio={cfg.min_ratio:g} and "
            f"max_ratio={cfg.max_ratio:g} tokens per parameter ({shown})"
        )
    return fitting[: cfg.sizes_per_budget or None]


def _point(cfg: SweepConfig, size: Size, steps: int, budget: float | None) -> Point:
    start, warm = 0, cfg.run.optimizer.warmup_steps
    if cfg.branches:
        start = steps - max(round(cfg.decay * steps), 1)
    if warm >= (start if cfg.branches else steps) or steps < 1 or (cfg.branches and start < 1):
        what = f"budget {budget:.3g}" if budget else f"{steps * cfg.run.batch_size} rows"
        raise ValueError(
            f"{size.name} has only {steps} steps for {what}, of which run.optimizer.warmup_steps="
            f"{warm} leave nothing at the full rate; lower it or run.batch_size, or raise the "
            "smallest of budgets, tokens or ratios"
        )
    return Point("", steps, start, budget)


def _named(point: Point, trunk: str) -> Point:
    return Point(f"{trunk}-step{point.steps}", point.steps, point.start, point.budget)
