"""Trains a grid of models for scaling laws; the same command again goes on.

    python -m experiments.sweep --config=configs/sweep_tiny.py --output=runs/sweep_tiny
    python -m experiments.sweep --config=configs/sweep_tiny.py --output=runs/sweep_tiny \\
        --input=novels/ --config.budgets='(1e11,2e11,4e11)' --dry_run
    python -m experiments.fit_scaling --input=runs/sweep_tiny --law=all --output=runs/law

OUTPUT gets runs.csv (a row for each run), curves.csv, sweep.json and the run directories.
On a cluster, --print_commands makes one command for each model and seed: experiments/launch.
"""

import shlex
import sys

from absl import flags

from experiments import cli
from llm_jax.scaling.sweep.config import SweepConfig

_CONFIG = cli.define_config(SweepConfig)
_OUTPUT = flags.DEFINE_string(
    "output", None, "folder of the sweep; made if absent, resumed if not", required=True
)
_INPUT = flags.DEFINE_list(
    "input", [], "training text: files, folders, globs, hf:NAME; replaces the recipe's data"
)
_EVAL_INPUT = flags.DEFINE_list(
    "eval_input", [], "held-out text; default: the end of the input (run.data.eval_fraction)"
)
_JOBS = flags.DEFINE_integer(
    "jobs", 0, "runs at a time; 0: one for each accelerator, or for each core", lower_bound=0
)
_RETRY_FAILED = flags.DEFINE_bool("retry_failed", False, "try runs again that ended with an error")
_ONLY = flags.DEFINE_string("only", None, "the runs of one model and seed, in this process")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "prepare the data, print the grid, and stop")
_PRINT_COMMANDS = flags.DEFINE_bool(
    "print_commands", False, "prepare the data, print a command for each --only, and stop"
)
_COLLECT = flags.DEFINE_bool("collect", False, "write runs.csv from what is there, and stop")
_JOB = cli.define_distributed()

# Flags of the sweep as a whole, which the commands of its parts do not have.
_OF_THE_WHOLE = ("jobs", "only", "dry_run", "print_commands", "collect")


def main(argv: list[str]) -> None:
    del argv
    if _CONFIG.value is None:
        raise ValueError("--config is needed, for example --config=configs/sweep_tiny.py")
    cfg = _CONFIG.value
    if _INPUT.value:
        cfg.run.data.inputs, cfg.run.data.sources = tuple(_INPUT.value), ()
    if _EVAL_INPUT.value:
        cfg.run.data.eval_inputs = tuple(_EVAL_INPUT.value)
    if _ONLY.value:
        _run_one(cfg)
        return

    from pathlib import Path

    from llm_jax.scaling.sweep import grid, runner

    output = Path(_OUTPUT.value).absolute()
    if _DRY_RUN.value or _PRINT_COMMANDS.value or _COLLECT.value:
        trunks = grid.trunks(cfg, runner.prepare(cfg, output))
        if _COLLECT.value:
            runner.finish(cfg, trunks, output)
        elif _PRINT_COMMANDS.value:
            for trunk in trunks:
                print(shlex.join(["python", *_command(trunk)]))
        else:
            print(grid.describe(cfg, trunks))
        return
    rows = runner.run_sweep(
        cfg,
        output,
        lambda trunk: [sys.executable, *_command(trunk)],
        jobs=_JOBS.value,
        retry_failed=_RETRY_FAILED.value,
    )
    if any(row["status"] != "finished" for row in rows):
        sys.exit(1)


def _run_one(cfg: SweepConfig) -> None:
    """One trunk here, perhaps on several machines."""
    from llm_jax.train import xla_flags

    xla_flags.configure(cfg.run.log)
    with _JOB():
        from llm_jax.scaling.sweep import worker

        try:
            finished = worker.run_only(
                cfg, _OUTPUT.value, _ONLY.value, retry_failed=_RETRY_FAILED.value
            )
        except worker.Busy as e:
            print(f"error: {e}", file=sys.stderr)
            sys.exit(75)
    if not finished:
        sys.exit(1)


def _command(trunk) -> list[str]:
    """This process's own flags, for one trunk."""
    kept, skip = [], False
    for arg in sys.argv[1:]:
        name = arg.lstrip("-").split("=")[0]
        if skip:
            skip = False
        elif arg.startswith("-") and name.removeprefix("no") in _OF_THE_WHOLE:
            skip = name in ("jobs", "only") and "=" not in arg
        else:
            kept.append(arg)
    return ["-m", "experiments.sweep", *kept, f"--only={trunk.name}"]


if __name__ == "__main__":
    cli.run_main(main)
