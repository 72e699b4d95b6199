"""Why reward models are learned from pairs and not from rankings: counts, annotators' noise, losses.

    python -m experiments.rankings --workdir=runs/rankings

Rankings and pairs are made up, by annotators whose noise is known; a linear reward is learned from
them with the project's objectives and tested on true pairs. No data or model is needed. It takes two
to three minutes on two cores, and less than one with --seeds=3 --comparisons=60,120. The end is
WORKDIR/results.json, with all numbers, and WORKDIR/report.md: what holds of each claim, accuracy
against cost (plots/accuracy.png), and where the balance tips.
"""

from absl import flags

from experiments import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "folder for results and report", required=True)
_ANSWERS = flags.DEFINE_list("answers", ["4", "8"], "to a prompt; the usual number first")
_COMPARISONS = flags.DEFINE_list(
    "comparisons", ["120", "240", "480", "960"], "budgets: what annotators may compare in total"
)
_NOISE = flags.DEFINE_list(
    "noise", ["0.5", "1", "2"], "of annotators, in standard deviations of the true reward"
)
_CARELESS = flags.DEFINE_list(
    "careless", ["0.2", "0.5"], "shares of annotations that are random; at the lowest noise"
)
_FATIGUE = flags.DEFINE_list(
    "fatigue", ["0.25", "0.5", "1"], "at n answers noise is (n / 2)^fatigue times as large"
)
_FEATURES = flags.DEFINE_integer("features", 16, "of an answer", lower_bound=1)
_NONLINEAR = flags.DEFINE_float(
    "nonlinear", 0.0, "share of the true reward's variance that the learned one cannot explain"
)
_TEST = flags.DEFINE_integer("test_pairs", 4000, "true pairs of the test", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 20, "runs of each", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "of the first run", lower_bound=0)


def _numbers(holder: flags.FlagHolder, kind: type) -> tuple:
    try:
        return tuple(kind(v) for v in holder.value)
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"--{holder.name}={','.join(holder.value)}: expected {what}") from None


def main(argv: list[str]) -> None:
    del argv
    numbers = {
        "answers": _numbers(_ANSWERS, int),
        "comparisons": _numbers(_COMPARISONS, int),
        "noise": _numbers(_NOISE, float),
        "careless": _numbers(_CARELESS, float),
        "fatigue": _numbers(_FATIGUE, float),
    }

    from llm_jax.align.rankings import experiment, findings, report

    settings = experiment.Experiment(
        **numbers,
        features=_FEATURES.value,
        nonlinear=_NONLINEAR.value,
        test_pairs=_TEST.value,
        seeds=_SEEDS.value,
        seed=_SEED.value,
    )
    result = experiment.run(settings, log=lambda line: print(line, flush=True))
    path = report.write(_WORKDIR.value, result)
    print("\n".join(line.replace("**", "") for line in findings.lines(result)))
    print(f"report: {path}")


if __name__ == "__main__":
    cli.run_main(main)
