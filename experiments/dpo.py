"""Optimises a model directly on preferences (DPO and its kin); the same command again resumes.

    python -m experiments.dpo --config=configs/dpo_embedded.py --init_from=runs/sft \\
        --workdir=runs/dpo
    python -m experiments.dpo --config=configs/dpo_smollm2.py --init_from=SmolLM2-135M-Instruct \\
        --input=hh-harmless.jsonl.gz --workdir=runs/dpo --config.dpo.loss=ipo
"""

from experiments import cli

_TRAINING = cli.Training(
    example="configs/dpo_embedded.py",
    data="preferences (.json, .jsonl: prompt / chosen / rejected, HH dialogues, messages, rankings; "
    "single answers with labels for dpo.loss=kto; or embedded:preferences)",
    init_from="the model to optimise: a run of sft, a Hugging Face folder, a .gguf file",
)


def main(argv: list[str]) -> None:
    del argv
    cfg = _TRAINING.config()

    def train(workdir: str, **options) -> dict:
        from llm_jax.align.direct import training

        return training.train(cfg, workdir, **options)

    _TRAINING.run(cfg, train)


if __name__ == "__main__":
    cli.run_main(main)
