"""Trains a language model from a recipe; the same command again resumes.

    python -m experiments.pretrain --config=configs/quickstart.py --workdir=runs/quickstart
    python -m experiments.pretrain --config=configs/shakespeare_char.py --workdir=runs/shakespeare \\
        --input=tinyshakespeare.txt --config.steps=500

On many machines the same command runs on each of them: experiments/launch, docs/run_on_a_pod.md.
"""

from absl import flags

from experiments import cli

_TRAINING = cli.Training(
    example="configs/quickstart.py",
    data="training text",
    init_from="go on from this model, with its architecture and tokenizer: a run, a Hugging Face "
    "folder, a .gguf file",
)
_PROFILE = flags.DEFINE_integer(
    "profile", 0, "profile so many steps after the first ten: WORKDIR/profile, and a table"
)


def main(argv: list[str]) -> None:
    del argv
    cfg = _TRAINING.config()
    if _PROFILE.value:
        cfg.log.profile_start = cfg.log.profile_start or 10
        cfg.log.profile_steps = _PROFILE.value

    def train(workdir: str, **options) -> dict:
        from llm_jax.scaling.plan import report_rows
        from llm_jax.train import loop

        return loop.train(cfg, workdir, compare=report_rows, **options)

    _TRAINING.run(cfg, train)


if __name__ == "__main__":
    cli.run_main(main)
