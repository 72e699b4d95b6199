"""The learning rate of a size, tuned: short runs at a few rates, and a parabola through them."""

import json
from collections.abc import Callable
from pathlib import Path

from llm_jax.data.shards import lock
from llm_jax.scaling.learning_rates import best_index, parabola_minimum
from llm_jax.scaling.sweep import output as files
from llm_jax.scaling.sweep.config import SweepConfig
from llm_jax.scaling.sweep.grid import Trunk, power_rate
from llm_jax.train.loop import NonFiniteError, train


def tune(cfg: SweepConfig, trunk: Trunk, output: Path, make_config: Callable) -> float:
    """The tuned rate of a trunk's size, from OUTPUT/tuning/SIZE/rate.json or made now.

    All seeds of a size share it. A rate that diverges counts as infinitely bad.

    Raises:
      ValueError: fewer than three rates gave a loss.
    """
    size = trunk.size
    folder = output / "tuning" / size.name
    with lock(str(folder)):
        done = folder / "rate.json"
        if done.exists():
            return json.loads(done.read_text())["rate"]
        base = power_rate(cfg, size.n)
        tried = []
        for factor in sorted(cfg.rate.tuning_factors):
            rate = float(f"{base * factor:.3g}")
            run = make_config(cfg, size, min(cfg.seeds), rate, output)
            tokens_per_step = run.batch_size * run.length
            shortest = min(p.steps for p in trunk.points)
            run.steps = round(cfg.rate.tuning_tokens / tokens_per_step) or shortest
            run.name, run.optimizer.schedule = f"{size.name} rate {rate:g}", "wsd"
            run.optimizer.decay_steps = max(round(cfg.decay * run.steps), 1)
            try:
                loss = train(run, folder / f"{rate:g}")["eval_loss"]
            except NonFiniteError:
                loss = None
            tried.append({"rate": rate, "loss": loss})
        best, how = best_rate([t["rate"] for t in tried], [t["loss"] for t in tried])
        result = {"rate": best, "how": how, "tried": tried}
        files.write_atomically(done, json.dumps(result, indent=2) + "\n")
        print(f"{size.name}: learning rate {best:g}, {how}", flush=True)
        return best


def best_rate(rates: list[float], losses: list[float | None]) -> tuple[float, str]:
    """(rate, how it was found): the minimum of the parabola in log rate through the lowest loss and
    its two neighbours, or the lowest itself at the end of the grid.

    Raises:
      ValueError: fewer than three of the rates have a loss.
    """
    found = sorted((r, v) for r, v in zip(rates, losses, strict=True) if v is not None)
    if len(found) < 3:
        raise ValueError(
            f"rate.tuning_factors: only {len(found)} of {len(rates)} learning rates gave a finite "
            "loss; lower run.optimizer.learning_rate"
        )
    rates, losses = zip(*found, strict=True)
    i, inside = best_index(losses)
    if not inside:
        end = "lowest" if i == 0 else "highest"
        return rates[i], f"the {end} rate was the best; widen rate.tuning_factors"
    return float(f"{parabola_minimum(rates, losses):.3g}"), "minimum of the parabola"
