"""Trains a reward model on preferences; the same command again resumes.

    python -m experiments.reward --config=configs/reward_embedded.py --init_from=runs/sft \\
        --workdir=runs/reward
    python -m experiments.reward --config=configs/reward_hh.py --init_from=SmolLM2-135M-Instruct \\
        --input=hh-harmless.jsonl.gz --workdir=runs/reward --config.reward.backbone=features
"""

from experiments import cli

_TRAINING = cli.Training(
    example="configs/reward_embedded.py",
    data="preferences (.json, .jsonl: prompt / chosen / rejected, HH dialogues, messages, rankings, "
    "ratings, or embedded:preferences)",
    init_from="the model whose backbone it has: a run, a Hugging Face folder, a .gguf file",
)


def main(argv: list[str]) -> None:
    del argv
    cfg = _TRAINING.config()

    def train(workdir: str, **options) -> dict:
        if cfg.reward.backbone == "features":
            from llm_jax.align.reward import probe

            return probe.train(cfg, workdir, **options)
        from llm_jax.align.reward import training

        return training.train(cfg, workdir, **options)

    cfg.model.head = "reward"
    _TRAINING.run(cfg, train)


if __name__ == "__main__":
    cli.run_main(main)
