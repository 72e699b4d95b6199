"""Trains a language model from a recipe; the same command again resumes.

    python -m experiments.pretrain --config=configs/quickstart.py --workdir=runs/quickstart
    python -m experiments.pretrain --config=configs/shakespeare_char.py --workdir=runs/shakespeare \\
        --input=tinyshakespeare.txt --config.steps=500

On many machines the same command runs on each of them: experiments/launch, docs/run_on_a_pod.md.
"""

from absl import flags

from experiments import cli

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "run directory; made if absent, resumed if not", required=True
)
_INPUT = flags.DEFINE_list(
    "input", [], "training text: files, folders, globs, hf:NAME; replaces the recipe's data"
)
_EVAL_INPUT = flags.DEFINE_list(
    "eval_input", [], "held-out text; default: the last 10 % of the input"
)
_INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "go on from this model, with its architecture and tokenizer: a run, a Hugging Face folder, a "
    ".gguf file",
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "prepare the data, print what would run, and stop")
_JOB = cli.define_distributed()
_PROFILE = flags.DEFINE_integer(
    "profile", 0, "profile so many steps after the first ten: WORKDIR/profile, and a table"
)
_DEBUG = flags.DEFINE_bool("debug", False, "no jit, no scan, stop at the first NaN")


def main(argv: list[str]) -> None:
    del argv
    if _CONFIG.value is None:
        raise ValueError("--config is needed, for example --config=configs/quickstart.py")
    cfg = _CONFIG.value
    if _INPUT.value:
        cfg.data.inputs, cfg.data.sources = tuple(_INPUT.value), ()
    if _EVAL_INPUT.value:
        cfg.data.eval_inputs = tuple(_EVAL_INPUT.value)

    if _INIT_FROM.value:
        from llm_jax.train import base_model

        base_model.adopt(cfg, _INIT_FROM.value)

    if _PROFILE.value:
        cfg.log.profile_start = cfg.log.profile_start or 10
        cfg.log.profile_steps = _PROFILE.value

    from llm_jax.train import xla_flags

    xla_flags.configure(cfg.log)
    with _JOB():
        from llm_jax.scaling.plan import report_rows
        from llm_jax.train import distributed
        from llm_jax.train.loop import train

        summary = train(
            cfg,
            _WORKDIR.value,
            dry_run=_DRY_RUN.value,
            debug=_DEBUG.value,
            compare=report_rows,
        )
        if distributed.is_main() and not _DRY_RUN.value:
            cli.show_run(summary, _WORKDIR.value)


if __name__ == "__main__":
    cli.run_main(main)
