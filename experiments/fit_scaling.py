"""Fits scaling laws to a table of runs, with intervals: fit.json and report.md with plots.

    python -m experiments.fit_scaling --input=sweep_folder --law=all --output=DIR
    python -m experiments.fit_scaling --input=runs.csv \\
        --columns="N:Model Size,C:Training FLOP,loss:loss" --law=chinchilla3 --output=DIR
    python -m experiments.fit_scaling --input=gadre.csv --columns="N:N,D:D,loss:loss_c4_val" \\
        --where="train_set=c4_original" --law=chinchilla3 --output=DIR

Any file with a header and commas, semicolons or tabs will do. Two of N (parameters), D (tokens) and
C (FLOPs) suffice; loss is in nats per token.
"""

import sys

from absl import flags

from experiments import cli

_INPUT = flags.DEFINE_string("input", None, "CSV file of runs, or a sweep's folder with runs.csv")
_COLUMNS = flags.DEFINE_string(
    "columns",
    None,
    "columns by role, N:...,D:...,loss:... (also C, U_D or unique, budget, run); default: columns of "
    "these names",
)
_LAW = flags.DEFINE_string(
    "law", "all", "chinchilla1, chinchilla2, chinchilla3, kaplan, data_constrained, or all"
)
_WHERE = flags.DEFINE_multi_string(
    "where", [], "rows to use: column=value, also != < <= > >=; several with commas or repeated"
)
_OUTPUT = flags.DEFINE_string("output", None, "folder for fit.json, report.md and plots")
_BOOTSTRAP = flags.DEFINE_integer("bootstrap", 4000, "resamples for intervals", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "of the resamples", lower_bound=0)
_LEVEL = flags.DEFINE_float("level", 0.9, "coverage of the intervals")
_DELTA = flags.DEFINE_float("huber_delta", 1e-3, "residual of log loss from which Huber is linear")
_AT = flags.DEFINE_float("at", None, "FLOPs to give N* and D* for; default: ten times the largest")
_FACTOR = flags.DEFINE_float("flops_factor", None, "C / (N D); default: 6")
_HOLDOUT = flags.DEFINE_string(
    "holdout", "largest", "test on: largest (budget), none, a share of rows below 1, or FLOPs"
)


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise ValueError(f"{argv[1]!r}: not a flag; write --input={argv[1]}")
    for flag in (_INPUT, _OUTPUT):
        if not flag.value:
            raise ValueError(f"--{flag.name} is needed")
    if not 0 < _LEVEL.value < 1:
        raise ValueError(f"--level={_LEVEL.value}: must lie between 0 and 1")
    for flag in (_DELTA, _AT, _FACTOR):
        if flag.value is not None and not 0 < flag.value < float("inf"):
            raise ValueError(f"--{flag.name}={flag.value}: must be above 0")
    from llm_jax.scaling import fit, fit_report, runs
    from llm_jax.scaling.laws import Options

    table, source = runs.read(_INPUT.value, _COLUMNS.value, _WHERE.value, _FACTOR.value)
    options = Options(
        huber_delta=_DELTA.value,
        bootstrap=_BOOTSTRAP.value,
        seed=_SEED.value,
        level=_LEVEL.value,
        at=_AT.value,
        flops_factor=source.flops_factor,
    )
    result = fit.fit(table, source, _LAW.value, options, _HOLDOUT.value)
    print("\n".join(fit.lines(result)))
    path = fit.write_json(result, _OUTPUT.value)
    print(f"\nlaws: {path}")
    command = ["python", "-m", "experiments.fit_scaling", *sys.argv[1:]]
    print(f"report: {fit_report.write(result, _OUTPUT.value, command)}")


if __name__ == "__main__":
    cli.run_main(main)
