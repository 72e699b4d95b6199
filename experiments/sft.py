"""Tunes a model on conversations; the same command again resumes.

    python -m experiments.sft --config=configs/sft_embedded.py --init_from=runs/quickstart \\
        --workdir=runs/sft
    python -m experiments.sft --config=configs/sft_alpaca.py --init_from=SmolLM2-135M \\
        --input=alpaca.json --workdir=runs/alpaca --config.peft.method=lora
"""

from experiments import cli

_TRAINING = cli.Training(
    example="configs/sft_embedded.py",
    data="conversations (.json, .jsonl: Alpaca, prompt / completion, messages, ShareGPT, or "
    "embedded:questions)",
    init_from="the model to tune: a run, a Hugging Face folder, a .gguf file",
)


def main(argv: list[str]) -> None:
    del argv
    cfg = _TRAINING.config()
    if not cfg.checkpoint.init_from:
        raise ValueError("--init_from is needed: the model to tune, such as a run of pretrain")
    if cfg.data.format != "dialogue":
        raise ValueError(
            f"data.format={cfg.data.format}: this binary tunes on conversations; take a recipe such "
            "as configs/sft_embedded.py, or experiments.pretrain --init_from for text"
        )

    def train(workdir: str, **options) -> dict:
        from llm_jax.train import loop

        return loop.train(cfg, workdir, **options)

    _TRAINING.run(cfg, train)


if __name__ == "__main__":
    cli.run_main(main)
