"""How often nominal 90 % intervals of Chinchilla's third approach hold the truth.

    python -m benchmarks.coverage [--sweeps=200] [--first_seed=0] [--output=benchmarks/results/coverage.json]

Simulates IsoFLOP sweeps from a known law with noise, fits each, and counts, for every parameter and
for N* at ten times the largest budget, the intervals that hold the true value: as they are given,
and as plain percentiles, without the correction of `bootstrap.spread_scale`. With 200 sweeps a share
of 90 % has a standard error of 2.1 %.
"""

import argparse
import dataclasses
import time
from typing import Any

import numpy as np

from benchmarks import record
from llm_jax.scaling.laws import bootstrap, chinchilla, frontier, powers, search
from llm_jax.scaling.runs import Runs

TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
BLOCK = 50  # sweeps in one batch
# budgets, sizes of each, noise of log loss, its distribution
CASES = [
    (5, 8, 0.005, "gauss"),
    (5, 10, 0.003, "gauss"),
    (5, 9, 0.01, "gauss"),
    (5, 9, 0.005, "student t, 3 degrees"),
    (5, 9, 0.0005, "gauss"),
    (4, 6, 0.005, "gauss"),
    (6, 40, 0.005, "gauss"),
    (5, 9, 0.003, "one in ten 5 times as noisy"),
]


def sweep(budgets: int, sizes: int, noise: float, kind: str, seed: int) -> Runs:
    """Budgets from 6e18 to 3e21 FLOPs, sizes from an eighth to eight times the best."""
    c = np.repeat(np.geomspace(6e18, 3e21, budgets), sizes)
    best, _ = frontier.optimal(TRUTH, c)
    n = best * np.tile(np.geomspace(1 / 8, 8, sizes), budgets)
    d = c / (6 * n)
    rng = np.random.default_rng(seed)
    z = {
        "gauss": lambda: rng.standard_normal(len(c)),
        "student t, 3 degrees": lambda: rng.standard_t(3, len(c)) / np.sqrt(3),
        "one in ten 5 times as noisy": lambda: (
            rng.standard_normal(len(c)) * np.where(rng.random(len(c)) < 0.1, 5, 1)
        ),
    }[kind]()
    loss = frontier.loss_at(TRUTH, n, d) * np.exp(noise * z)
    return Runs(n=n, d=d, c=c, loss=loss, budget=np.repeat(np.arange(budgets), sizes))


def fit_all(
    table: list[Runs], resamples: int, delta: float = 1e-3
) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray], float]]:
    """What `chinchilla.fit(runs, Options(bootstrap=resamples, seed=i))` does to sweep i of a table of
    one design, all in one batch and from the truth: (samples, plain samples, scale) of each."""
    rows = powers.Powers.of(np.stack([table[0].n, table[0].d]), table[0].loss)
    log_loss = np.log([runs.loss for runs in table])
    truth = np.array([*np.log([TRUTH[k] for k in "EAB"]), TRUTH["alpha"], TRUTH["beta"]])
    truth[1:3] -= truth[3:] * rows.centre
    rows = dataclasses.replace(rows, log_loss=log_loss)
    theta = search.refit(rows.problem, np.ones_like(log_loss), truth, delta).theta
    weights = [bootstrap.resample(runs, resamples, seed) for seed, runs in enumerate(table)]
    rows = dataclasses.replace(rows, log_loss=np.repeat(log_loss, resamples, axis=0))
    found = search.refit(
        rows.problem, np.concatenate(weights), np.repeat(theta, resamples, axis=0), delta
    )
    fits = []
    value, _, _ = rows.problem.law(theta)
    for i, runs in enumerate(table):
        resampled = found.theta[i * resamples : (i + 1) * resamples]
        scale = bootstrap.spread_scale(runs, value[i] - log_loss[i], len(truth), delta)
        moved = bootstrap.scaled(theta[i], resampled, scale, rows.problem)
        fits.append((chinchilla.named(rows, moved), chinchilla.named(rows, resampled), scale))
    return fits


def measure(
    case: tuple[int, int, float, str], sweeps: int, resamples: int, first_seed: int = 0
) -> dict[str, Any]:
    """The shares of one case."""
    start = time.perf_counter()
    table = [sweep(*case, first_seed + i) for i in range(sweeps)]
    at = 10 * table[0].c.max()
    truth = TRUTH | dict(zip("ab", frontier.exponents(TRUTH), strict=True))
    truth["N*"] = frontier.optimal(TRUTH, at)[0]
    held: list[list[list[bool]]] = [[], []]
    scales = []
    for block in range(0, sweeps, BLOCK):
        for *both, scale in fit_all(table[block : block + BLOCK], resamples):
            scales.append(scale)
            for inside, samples in zip(held, both, strict=True):
                samples = samples | {"N*": frontier.optimal(samples, at)[0]}
                limits = bootstrap.percentiles(samples, 0.9)
                inside.append([limits[k][0] <= truth[k] <= limits[k][1] for k in truth])
    shares = [dict(zip(truth, map(float, np.mean(x, 0)), strict=True)) for x in held]
    budgets, sizes, noise, kind = case
    return {
        "budgets": budgets,
        "sizes": sizes,
        "noise": noise,
        "distribution": kind,
        "sweeps": sweeps,
        "resamples": resamples,
        "coverage": shares[0],
        "coverage_plain_percentiles": shares[1],
        "spread_scale": float(np.mean(scales)),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=400)
    parser.add_argument("--first_seed", type=int, default=0, help="of the simulated sweeps")
    parser.add_argument("--output", help="where to write the table as JSON")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for i, case in enumerate(CASES):
        rows.append(
            measure(case, args.sweeps, args.resamples, first_seed=args.first_seed + 10_000 * i)
        )
        row = rows[-1]
        print(f"{row['budgets']} x {row['sizes']}, {row['noise']:.2%} {row['distribution']}:")
        for name in ("coverage", "coverage_plain_percentiles"):
            print(f"  {name:27s}", *(f"{k} {v:.3f}" for k, v in row[name].items()), flush=True)
        if args.output:
            record.save(
                record.header(("numpy", "scipy"))
                | {"level": 0.9, "first_seed": args.first_seed, "cases": rows},
                args.output,
            )


if __name__ == "__main__":
    main()
