"""What every binary shares: the --config flag, the flags of a training run and of a job, and user
errors as one line."""

import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

from absl import app, flags, logging

from llm_jax.config import Config, TrainConfig, unknown_key

AUTO_MESH = re.compile(r"^(--?config\.(?:run\.)?mesh)=auto$")
_CONFIG_CLASSES: dict[str, type] = {}  # of the config flags that a binary has defined
MENDABLE = (ValueError, OSError, ImportError)  # by the user, who gets one line


def define_config(cls: type = TrainConfig, name: str = "config", default: str | None = None) -> Any:
    """Defines `--config=FILE` with typed `--config.x.y=value` overrides; returns the flag holder."""
    from ml_collections import config_flags

    _CONFIG_CLASSES[name] = cls
    holder = config_flags.DEFINE_config_file(
        name,
        default,
        f"recipe whose get_config() returns a {cls.__name__}; --{name}.KEY=VALUE overrides",
    )
    # Listed by --help of the binary that asked for it, not of this module.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    return holder


def define_base() -> Any:
    """Defines `--base`, beside a flag that may name an adapter; returns the flag holder."""
    holder = flags.DEFINE_string(
        "base", None, "the model that an adapter belongs to; default: the one that it names"
    )
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["base"])
    return holder


def define_distributed() -> Callable[[], AbstractContextManager]:
    """Defines the flags of a job of several processes.

    Returns a function: `with job():` joins the job, before anything touches a device, and on the
    way out tells the other processes how this one ended (llm_jax/train/distributed.py).
    """
    holders = {
        "mode": flags.DEFINE_enum(
            "distributed",
            "auto",
            ["auto", "on", "off"],
            "auto: several processes if the flags below, JAX_COORDINATOR_ADDRESS, Slurm, Open MPI, "
            "a TPU pod or a Kubernetes Job say so; on: an error if none does; off: never",
        ),
        "coordinator_address": flags.DEFINE_string(
            "coordinator_address", None, "HOST:PORT of process 0 (JAX_COORDINATOR_ADDRESS)"
        ),
        "num_processes": flags.DEFINE_integer(
            "num_processes", None, "processes of the job (JAX_NUM_PROCESSES)", lower_bound=1
        ),
        "process_id": flags.DEFINE_integer(
            "process_id", None, "number of this one, from 0 (JAX_PROCESS_ID)", lower_bound=0
        ),
        "timeout": flags.DEFINE_integer(
            "coordinator_timeout", 300, "seconds to wait for all processes", lower_bound=1
        ),
        "peer_timeout": flags.DEFINE_integer(
            "peer_timeout",
            30,
            "seconds without a sign of life after which a process counts as dead",
            lower_bound=2,
        ),
    }
    for holder in holders.values():  # listed by --help of the binary, not of this module
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[holder.name])

    def job() -> AbstractContextManager:
        from llm_jax.train import distributed

        return distributed.job(report, **{name: h.value for name, h in holders.items()})

    return job


class Training:
    """The flags of such a binary; made once, while its module is imported.

    Args:
      example: a recipe for it.
      data: what --input is, in words.
      init_from: what --init_from is, in words.
    """

    def __init__(self, *, example: str, data: str, init_from: str):
        self._example = example
        self._config, self._job = define_config(), define_distributed()
        self._flags = {
            "workdir": flags.DEFINE_string(
                "workdir", None, "run directory; made if absent, resumed if not", required=True
            ),
            "input": flags.DEFINE_list(
                "input", [], f"{data}: files, folders, globs, hf:NAME; replaces the recipe's data"
            ),
            "eval_input": flags.DEFINE_list(
                "eval_input", [], "the same, held out; default: the last 10 % of the input"
            ),
            "init_from": flags.DEFINE_string("init_from", None, init_from),
            "dry_run": flags.DEFINE_bool(
                "dry_run", False, "prepare the data, print what would run, and stop"
            ),
            "debug": flags.DEFINE_bool("debug", False, "no jit, no scan, stop at the first NaN"),
        }
        for name in self._flags:  # listed by --help of the binary, not of this module
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def config(self) -> TrainConfig:
        """The recipe with the data that the flags name, and the name of where it starts."""
        cfg = self._config.value
        if cfg is None:
            raise ValueError(f"--config is needed, for example --config={self._example}")
        if self._flags["input"].value:
            cfg.data.inputs, cfg.data.sources = tuple(self._flags["input"].value), ()
        if self._flags["eval_input"].value:
            cfg.data.eval_inputs = tuple(self._flags["eval_input"].value)
        if self._flags["init_from"].value:
            cfg.checkpoint.init_from = self._flags["init_from"].value
        if "steps" in (asked := self._asked()):
            if "epochs" in asked and cfg.epochs:
                raise ValueError("--config.steps and --config.epochs both say how long; drop one")
            cfg.epochs = 0.0  # of the recipe
        return cfg

    def _asked(self) -> list[str]:
        """Keys of the recipe that a flag has set."""
        from ml_collections import config_flags

        return list(config_flags.get_override_values(flags.FLAGS["config"]))

    def run(self, cfg: TrainConfig, train: Callable[..., dict[str, Any]]) -> None:
        """Joins the job, if this is one of several processes, makes the recipe go on from what
        --init_from names, and calls `train(workdir, **options)` with the options of
        `train.loop.train`; prints what it returns."""
        from llm_jax.train import xla_flags

        workdir, dry_run = self._flags["workdir"].value, self._flags["dry_run"].value
        xla_flags.configure(cfg.log)
        with self._job():  # before anything touches a device, such as reading a checkpoint
            from llm_jax.train import base_model, distributed

            if self._flags["init_from"].value:
                base_model.adopt(cfg, self._flags["init_from"].value, self._asked())
            summary = train(workdir, dry_run=dry_run, debug=self._flags["debug"].value)
            if distributed.is_main() and not dry_run:
                show_run(summary, workdir)


def check_config_flags(argv: Sequence[str], cls: type = TrainConfig, name: str = "config") -> None:
    """Checks `--config` and its overrides before ml_collections sees them.

    Raises:
      ValueError: an override that no dataclass declares; the message names the nearest key.
      FileNotFoundError: a recipe that does not exist; the message names the nearest file.
    """
    for i, arg in enumerate(argv):
        if not arg.startswith("-"):
            continue
        key, _, value = arg.lstrip("-").partition("=")
        if key == name:
            value = (value or " ".join(argv[i + 1 : i + 2])).split(":")[0]
            if value and not os.path.isfile(value):
                folder = os.path.dirname(value) or "."
                there = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
                near = difflib.get_close_matches(os.path.basename(value), there, n=1)
                hint = f"; did you mean {os.path.join(folder, near[0])}?" if near else ""
                raise FileNotFoundError(f"--{name}={value}: no such file{hint}")
        elif key.startswith(f"{name}."):
            holder, where = cls, f"--{name}"
            for part in key[len(name) + 1 :].split("[")[0].split("."):
                known = {f.name: f.type for f in fields(holder)} if holder else {}
                if part not in known:
                    raise ValueError(unknown_key(where, part, list(known)))
                kind = known[part]
                holder = kind if isinstance(kind, type) and issubclass(kind, Config) else None
                where = f"{where}.{part}"


def show_run(summary: dict, workdir: str) -> None:
    """Prints a run's last sample, its numbers, and where the report is."""
    samples = os.path.join(workdir, "samples.jsonl")
    if os.path.exists(samples):
        with open(samples) as f:
            *_, last = f
        sample = json.loads(last)
        print(f"\nsample after step {sample['step']}:\n{sample['prompt']}{sample['text']}\n")
    for key, value in summary.items():
        if value is not None:
            print(f"{key:22} {value:,.4f}" if isinstance(value, float) else f"{key:22} {value}")
    print(f"report: {os.path.join(workdir, 'report.md')}")


def report(error: BaseException) -> None:
    """Prints an error on stderr: one line where a user can mend it, else its traceback."""
    if os.environ.get("LLM_JAX_TRACEBACK") or not isinstance(error, MENDABLE):
        traceback.print_exception(error)
    else:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


def _prepare_host() -> None:
    """What has to be set before jax starts its threads."""
    from llm_jax.train import accelerators, host_memory

    if os.environ.get("JAX_PLATFORMS") == "cpu" or not accelerators.accelerators():
        host_memory.keep()


def run_main(main: Callable[[list[str]], Any]) -> None:
    """`absl.app.run` whose user errors are one line on stderr and exit code 1.

    What a user can mend comes as one of MENDABLE or a flag error; anything else is a defect of
    ours and keeps its traceback, and so does everything under LLM_JAX_TRACEBACK=1.
    """

    def one_line(error: BaseException) -> None:
        if os.environ.get("LLM_JAX_TRACEBACK"):
            raise error
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)

    def parse(argv: list[str]) -> list[str]:
        try:
            argv = [AUTO_MESH.sub(r"\1.auto=True", arg) for arg in argv]
            for name, cls in _CONFIG_CLASSES.items():
                check_config_flags(argv[1:], cls, name)
            rest = flags.FLAGS(argv)
            if not flags.FLAGS["verbosity"].present:
                logging.set_verbosity(logging.WARNING)  # libraries log every step of theirs as INFO
            return rest
        except (ValueError, OSError, AttributeError, KeyError, TypeError, flags.Error) as e:
            one_line(e)

    def guarded(argv: list[str]) -> Any:
        try:
            _prepare_host()
            return main(argv)
        except MENDABLE as e:
            one_line(e)

    app.run(guarded, flags_parser=parse)
