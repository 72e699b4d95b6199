"""What the binaries that train in a run directory share: flags, the config, and how a run is shown."""

import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from experiments import cli
from llm_jax.config import TrainConfig


class Training:
    """The flags of such a binary; made once, while its module is imported.

    Args:
      example: a recipe for it.
      data: what --input is, in words.
      init_from: what --init_from is, in words.
    """

    def __init__(self, *, example: str, data: str, init_from: str):
        self._example = example
        self._config, self._job = cli.define_config(), cli.define_distributed()
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
        """The recipe with the data and the start that the flags name."""
        cfg = self._config.value
        if cfg is None:
            raise ValueError(f"--config is needed, for example --config={self._example}")
        if self._flags["input"].value:
            cfg.data.inputs, cfg.data.sources = tuple(self._flags["input"].value), ()
        if self._flags["eval_input"].value:
            cfg.data.eval_inputs = tuple(self._flags["eval_input"].value)
        if self._flags["init_from"].value:
            from llm_jax.train import base_model

            base_model.adopt(cfg, self._flags["init_from"].value)
        return cfg

    def run(self, cfg: TrainConfig, train: Callable[..., dict[str, Any]]) -> None:
        """Joins the job, if this is one of several processes, and calls `train(workdir, **options)`
        with the options of `train.loop.train`; prints what it returns."""
        from llm_jax.train import xla_flags

        workdir, dry_run = self._flags["workdir"].value, self._flags["dry_run"].value
        xla_flags.configure(cfg.log)
        with self._job():
            from llm_jax.train import distributed

            summary = train(workdir, dry_run=dry_run, debug=self._flags["debug"].value)
            if distributed.is_main() and not dry_run:
                cli.show_run(summary, workdir)
