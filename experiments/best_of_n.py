"""Best-of-n of a model by a judge, and how far tuned models get: score against divergence.

python -m experiments.best_of_n --checkpoint=runs/sft --judge=rule:unique_words \\
    --input=prompts.jsonl --output=DIR
python -m experiments.best_of_n --checkpoint=runs/sft --judge=runs/reward \\
    --held_out_of=runs/dpo --against=runs/dpo,runs/ipo --n=64 --output=DIR

A judge is a run with a reward head, a Hugging Face classifier with one label, or a rule: rule:shorter,
rule:longer, rule:contains:TEXT, rule:lacks:TEXT, rule:matches:REGEX, rule:ends, rule:unique_words.
DIR/answers.jsonl has all answers with their scores, as rankings that a preference run can be trained
on.
"""

import os

from absl import flags

from experiments import cli

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "the base: run directory, step folder, Hugging Face folder, .gguf or .bin file",
    required=True,
)
_BASE = cli.define_base()
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "default: the one that comes with the model")
_JUDGE = flags.DEFINE_string(
    "judge",
    None,
    "a rule, a run of reward, or a Hugging Face classifier with one label",
    required=True,
)
_INPUT = flags.DEFINE_list(
    "input",
    [],
    "prompts: conversations, preferences or rows with a prompt; files, folders, globs, hf:NAME",
)
_HELD_OUT_OF = flags.DEFINE_string(
    "held_out_of",
    None,
    "a run of reward or dpo whose held-out prompts are answered, instead of --input",
)
_AGAINST = flags.DEFINE_list("against", [], "models to compare, such as runs tuned from the base")
_PROMPTS = flags.DEFINE_integer("prompts", 100, "of the input, the first so many", lower_bound=2)
_N = flags.DEFINE_integer(
    "n", 16, "best of so many at most; one more is drawn to compare with", lower_bound=1
)
_ANSWERS = flags.DEFINE_integer(
    "answers", 4, "of each model of --against to a prompt", lower_bound=1
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "of an answer at most", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "of all answers; divergences of --against are estimated at 1 alone"
)
_SEED = flags.DEFINE_integer("seed", 0, "the same seed gives the same answers")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "answers at a time", lower_bound=1)
_OUTPUT = flags.DEFINE_string(
    "output", None, "folder for answers.jsonl, results.json and report.md", required=True
)


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise ValueError(f"{argv[1]!r}: not a flag; write --against={argv[1]}")
    if bool(_INPUT.value) == bool(_HELD_OUT_OF.value):
        raise ValueError(
            "--input (a file of prompts) or --held_out_of (a run of reward or dpo) is needed, and not both"
        )
    results = os.path.join(os.path.expanduser(_OUTPUT.value), "results.json")
    if os.path.exists(results):
        raise FileExistsError(f"{results} is there already; give another --output")
    for path in _AGAINST.value:  # hours of sampling would come before the error
        if not os.path.exists(os.path.expanduser(path)):
            raise FileNotFoundError(f"--against={path} does not exist")

    import llm_jax
    from llm_jax.align import policy_comparison, prompts, rewards
    from llm_jax.interop import peft_format
    from llm_jax.train import companion

    judge = rewards.judge(_JUDGE.value)  # a typing error shows before anything is read
    options = policy_comparison.Options(
        n=_N.value,
        answers=_ANSWERS.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        seed=_SEED.value,
        batch_size=_BATCH_SIZE.value,
    )
    for path in _AGAINST.value:
        if not peft_format.is_folder(path):
            companion.describe(path)  # a reward model, say, is no policy
    if _HELD_OUT_OF.value:
        found, rejected = prompts.held_out(_HELD_OUT_OF.value)[: _PROMPTS.value], []
    else:
        found, rejected = prompts.read(_INPUT.value, limit=_PROMPTS.value)
    left_out = f"; {len(rejected)} rows have none, first {rejected[0]}" if rejected else ""
    print(f"{len(found)} prompts{left_out}")
    model = llm_jax.load(_CHECKPOINT.value, base=_BASE.value, tokenizer=_TOKENIZER.value)
    names = [os.path.basename(os.path.normpath(path)) for path in _AGAINST.value]
    if len({*names, "base"}) <= len(names):  # one is the name of two
        names = [os.path.abspath(os.path.expanduser(path)) for path in _AGAINST.value]
    points = policy_comparison.run(
        model,
        found,
        judge,
        _OUTPUT.value,
        options=options,
        against={
            name: lambda path=path: llm_jax.load(path)
            for name, path in zip(names, _AGAINST.value, strict=True)
        },
        settings={
            "checkpoint": _CHECKPOINT.value,
            "judge": _JUDGE.value,
            "input": ",".join(_INPUT.value) or f"held out of {_HELD_OUT_OF.value}",
            "against": ",".join(_AGAINST.value),
        },
    )
    for p in points:
        kl = "         " if p.kl is None else f"KL {p.kl:6.3f}"
        wins = f"  wins {p.wins.rate:6.1%}" if p.wins else ""
        print(f"{p.name:24} {kl}  score {p.score:10.4f}  length {p.length:8.1f}{wins}")
    print(f"report: {os.path.join(_OUTPUT.value, 'report.md')}")


if __name__ == "__main__":
    cli.run_main(main)
