"""Time and exactness of Chinchilla's third approach: a point fit, 4,000 resamples, the reference.

    python -m benchmarks.scaling_fit [--output=benchmarks/results/scaling_fit.json]

240 simulated runs, scattered over sizes and tokens as in the figures of Hoffmann et al. 2022. The
reference is L-BFGS from several starts of that paper's grid and around our optimum.
"""

import argparse
import time

import numpy as np

from benchmarks import record
from llm_jax.scaling.laws import Options, bootstrap, chinchilla, multistart, powers, search
from llm_jax.scaling.runs import Runs

DELTA = 1e-3


def simulated(n_rows: int = 240) -> Runs:
    rng = np.random.default_rng(0)
    n = np.exp(rng.uniform(np.log(5e7), np.log(1e10), n_rows))
    d = np.clip(20 * n * np.exp(1.2 * rng.standard_normal(n_rows)), 3e8, 1e12)
    loss = (1.82 + 480 / n**0.35 + 2100 / d**0.37) * np.exp(0.005 * rng.standard_normal(n_rows))
    return Runs(n=n, d=d, c=6 * n * d, loss=loss)


def compare(runs: Runs, resamples: int, starts: int) -> dict[str, float]:
    """How far our objectives are above the best of ours and the reference's."""
    rows = powers.Powers.of(np.stack([runs.n, runs.d]), runs.loss)
    point = search.point_fit(rows.problem, rows.starts(DELTA), DELTA)
    weights = bootstrap.resample(runs, resamples, seed=0)
    ours = search.refit(rows.problem, weights, point.theta, DELTA)
    grid = multistart.starts()
    rng = np.random.default_rng(0)
    above = []
    for row, objective, theta in zip(weights, ours.objective, ours.theta, strict=True):
        e, size, alpha = (x[0] for x in rows.natural(theta[None]))
        centre = np.array([np.log(e), *np.log(size), *alpha])
        near = centre + rng.standard_normal((starts, 5)) * [0.05, 0.5, 0.5, 0.05, 0.05]
        far = grid[rng.choice(len(grid), starts)]
        _, found = multistart.minimise(runs, DELTA, np.concatenate([near, far]), row)
        above.append(objective - found.min())
    return {
        "resamples": resamples,
        "starts": 2 * starts,
        "share_within_1e-9": float(np.mean(np.array(above) <= 1e-9)),
        "furthest_above": float(np.max(above)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bootstrap", type=int, default=4000)
    parser.add_argument("--compared", type=int, default=20, help="resamples given to the reference")
    parser.add_argument("--starts", type=int, default=3, help="near our optimum, and as many far")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", help="where to write the figures as JSON")
    args = parser.parse_args()
    runs, times = simulated(), {"point": [], "bootstrap": [], "cpu": []}
    chinchilla.fit(runs, Options(bootstrap=0))
    for _ in range(args.repeats):
        cpu = time.process_time()
        fit = chinchilla.fit(runs, Options(bootstrap=args.bootstrap))
        times["cpu"].append(time.process_time() - cpu)
        times["point"].append(fit.seconds)
        times["bootstrap"].append(fit.bootstrap_seconds)
    result = record.header(("numpy", "scipy")) | {
        "rows": len(runs),
        "resamples": args.bootstrap,
        "point_seconds": record.spread(times["point"]),
        "bootstrap_seconds": record.spread(times["bootstrap"]),
        "cpu_seconds_of_both": record.spread(times["cpu"]),
        "converged": fit.converged,
        "starts_at_optimum": fit.starts_at_optimum,
        "bootstrap_converged": fit.details["bootstrap_converged"],
        "against_reference": compare(runs, args.compared, args.starts),
    }
    for name in ("point_seconds", "bootstrap_seconds", "cpu_seconds_of_both"):
        print(f"{name}: median {result[name]['median']:.3f}, range {result[name]['range']}")
    print(result["against_reference"])
    if args.output:
        record.save(result, args.output)


if __name__ == "__main__":
    main()
