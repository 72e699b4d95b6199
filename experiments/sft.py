"""Tunes a model on conversations; the same command again resumes.

    python -m experiments.sft --config=configs/sft_embedded.py --init_from=runs/quickstart \\
        --workdir=runs/sft
    python -m experiments.sft --config=configs/sft_alpaca.py --init_from=SmolLM2-135M \\
        --input=alpaca.json --workdir=runs/alpaca --config.peft.method=lora
"""

from absl import flags

from experiments import cli

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "run directory; made if absent, resumed if not", required=True
)
_INIT_FROM = flags.DEFINE_string(
    "init_from", None, "the model to tune: a run, a Hugging Face folder, a .gguf file"
)
_INPUT = flags.DEFINE_list(
    "input",
    [],
    "conversations (.json, .jsonl: Alpaca, prompt / completion, messages, ShareGPT): files, folders, "
    "globs, hf:NAME, embedded:questions; replaces the recipe's data",
)
_EVAL_INPUT = flags.DEFINE_list(
    "eval_input", [], "held-out conversations; default: the last 10 % of the input"
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "prepare the data, print what would run, and stop")
_JOB = cli.define_distributed()
_DEBUG = flags.DEFINE_bool("debug", False, "no jit, no scan, stop at the first NaN")


def main(argv: list[str]) -> None:
    del argv
    cfg = _CONFIG.value
    if cfg is None:
        raise ValueError("--config is needed, for example --config=configs/sft_embedded.py")
    if _INPUT.value:
        cfg.data.inputs, cfg.data.sources = tuple(_INPUT.value), ()
    if _EVAL_INPUT.value:
        cfg.data.eval_inputs = tuple(_EVAL_INPUT.value)

    from llm_jax.train import base_model, xla_flags

    if _INIT_FROM.value:
        base_model.adopt(cfg, _INIT_FROM.value)
    elif not cfg.checkpoint.init_from:
        raise ValueError("--init_from is needed: the model to tune, such as a run of pretrain")

    xla_flags.configure(cfg.log)
    with _JOB():
        from llm_jax.train import distributed
        from llm_jax.train.loop import train

        summary = train(cfg, _WORKDIR.value, dry_run=_DRY_RUN.value, debug=_DEBUG.value)
        if distributed.is_main() and not _DRY_RUN.value:
            cli.show_run(summary, _WORKDIR.value)


if __name__ == "__main__":
    cli.run_main(main)
