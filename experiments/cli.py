"""What every binary shares: the --config flag, and user errors as one line."""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from absl import app, flags, logging

from llm_jax.config import Config, TrainConfig, unknown_key


def define_config(cls: type = TrainConfig, name: str = "config", default: str | None = None) -> Any:
    """Defines `--config=FILE` with typed `--config.x.y=value` overrides; returns the flag holder."""
    from ml_collections import config_flags

    holder = config_flags.DEFINE_config_file(
        name,
        default,
        f"recipe whose get_config() returns a {cls.__name__}; --{name}.KEY=VALUE overrides",
    )
    # Listed by --help of the binary that asked for it, not of this module.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    return holder


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


def run_main(main: Callable[[list[str]], Any]) -> None:
    """`absl.app.run` whose user errors are one line on stderr and exit code 1.

    What a user can mend comes as ValueError, OSError, ImportError or a flag error; anything else
    is a defect of ours and keeps its traceback, and so does everything under LLM_JAX_TRACEBACK=1.
    """

    def one_line(error: BaseException) -> None:
        if os.environ.get("LLM_JAX_TRACEBACK"):
            raise error
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)

    def parse(argv: list[str]) -> list[str]:
        try:
            if "config" in flags.FLAGS:
                check_config_flags(argv[1:])
            rest = flags.FLAGS(argv)
            if not flags.FLAGS["verbosity"].present:
                logging.set_verbosity(logging.WARNING)  # libraries log every step of theirs as INFO
            return rest
        except (ValueError, OSError, AttributeError, KeyError, TypeError, flags.Error) as e:
            one_line(e)

    def guarded(argv: list[str]) -> Any:
        try:
            return main(argv)
        except (ValueError, OSError, ImportError) as e:
            one_line(e)

    app.run(guarded, flags_parser=parse)
