"""On-policy preference optimisation: sample, judge, optimise, repeat.

    python -m experiments.align --config=configs/dpo_embedded.py --init_from=runs/sft \\
        --judge=runs/reward --input=embedded:preferences --workdir=runs/align --rounds=3
    python -m experiments.align --config=configs/dpo_smollm2.py --init_from=SmolLM2-135M-Instruct.gguf \\
        --judge=rule:shorter --input=prompts.jsonl --workdir=runs/align
"""

from absl import flags

from experiments import cli

_TRAINING = cli.Training(
    example="configs/dpo_embedded.py",
    data="prompts: preferences, conversations (up to their last answer), or rows with a prompt",
    init_from="the model of the start: a run of sft, a Hugging Face folder, a .gguf file",
)
_JUDGE = flags.DEFINE_string(
    "judge",
    None,
    "a run of experiments.reward, a Hugging Face classifier with one label, or rule:NAME "
    "(llm_jax/align/judges.py)",
    required=True,
)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "how often; more may follow later", lower_bound=1)
_PROMPTS = flags.DEFINE_integer("prompts", 64, "prompts of a round", lower_bound=1)
_ANSWERS = flags.DEFINE_integer("answers", 4, "answers drawn to each", lower_bound=2)
_HELD_OUT = flags.DEFINE_integer("held_out", 32, "prompts that are only judged", lower_bound=1)
_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "of an answer", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "of the answers that are learned from")
_PENALTY = flags.DEFINE_float(
    "missing_end_penalty", 0.0, "off the score of an answer that --max_new_tokens cut off"
)
_REFERENCE = flags.DEFINE_enum(
    "reference", "start", ["start", "previous"], "what a round's policy is held to"
)


def main(argv: list[str]) -> None:
    del argv
    cfg = _TRAINING.config()
    inputs = tuple(cfg.data.inputs)

    def train(workdir: str, *, dry_run: bool, debug: bool) -> dict:
        from llm_jax.align import on_policy, prompts, rewards

        if debug:
            raise ValueError("--debug is for a single run; use it with experiments.dpo")
        options = on_policy.Options(
            rounds=_ROUNDS.value,
            prompts=_PROMPTS.value,
            answers=_ANSWERS.value,
            held_out=_HELD_OUT.value,
            max_new_tokens=_TOKENS.value,
            temperature=_TEMPERATURE.value,
            missing_end_penalty=_PENALTY.value,
            reference=_REFERENCE.value,
            seed=cfg.seed,
        )
        found, _ = prompts.read(inputs)
        if dry_run:
            print(f"{len(found)} prompts; {options}")
            return {}
        judge = rewards.judge(_JUDGE.value)
        done = on_policy.run(cfg, judge, found, workdir, options, judged_by=_JUDGE.value)
        return done["rounds"][-1]

    _TRAINING.run(cfg, train)


if __name__ == "__main__":
    cli.run_main(main)
