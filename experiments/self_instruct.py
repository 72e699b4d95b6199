"""Self-Instruct: instructions and answers that a model writes itself, from a few seed tasks.

python -m experiments.self_instruct --checkpoint=model.gguf --output=DIR --target=100
python -m experiments.self_instruct --checkpoint=runs/quickstart --input=seeds.jsonl --output=DIR

The same command goes on where it was stopped. DIR/kept.jsonl is what instruction tuning reads.
"""

from absl import flags

from experiments import cli

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "run directory, step folder, Hugging Face folder, .gguf or .bin file",
    required=True,
)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "default: the one that comes with the model")
_INPUT = flags.DEFINE_string(
    "input",
    "",
    "seed tasks, a JSONL file: instruction, input, output, classification, follow_up; default: "
    "twenty of our own",
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "folder for the tasks, the rejected ones and the report", required=True
)
_TARGET = flags.DEFINE_integer("target", 100, "tasks to keep", lower_bound=1)
_LIMIT = flags.DEFINE_integer(
    "limit", 0, "completions to ask for instructions at most; 0: until the target", lower_bound=0
)
_TURNS = flags.DEFINE_integer(
    "turns", 0, "kept tasks that get a second turn (conversations.jsonl)", lower_bound=0
)
_STYLE = flags.DEFINE_enum(
    "style",
    "auto",
    ["auto", "base", "chat"],
    "prompts for a base model, or in the tokenizer's chat template; auto: chat if there is one",
)
_SEED = flags.DEFINE_integer("seed", 0, "of the examples in prompts and of sampling")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "completions at a time", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "of instructions and inputs; 0: greedy")
_ANSWER_TEMPERATURE = flags.DEFINE_float("answer_temperature", 0.3, "of answers; 0: greedy")
_TOP_K = flags.DEFINE_integer("top_k", 0, "keep the k most probable tokens; 0: all")
_TOP_P = flags.DEFINE_float("top_p", 0.95, "keep the most probable tokens up to this probability")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "keep tokens with this share of the highest; 0: all")
_REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "1: none")
_MAX_SIMILARITY = flags.DEFINE_float(
    "max_similarity", 0.7, "ROUGE-L with a task that is there from which on an instruction goes"
)
_INSTRUCTION_TOKENS = flags.DEFINE_integer("instruction_tokens", 64, "of an instruction at most")
_INPUT_TOKENS = flags.DEFINE_integer("input_tokens", 64, "of an input at most")
_OUTPUT_TOKENS = flags.DEFINE_integer("output_tokens", 192, "of an answer at most")


def main(argv: list[str]) -> None:
    del argv
    import llm_jax
    from llm_jax.align import self_instruct
    from llm_jax.align.self_instruct import tasks, turns
    from llm_jax.nn.params import fingerprint

    seeds = tasks.read_tasks(_INPUT.value or tasks.SEED_TASKS)
    options = self_instruct.Options(
        style=_STYLE.value,
        seed=_SEED.value,
        batch_size=_BATCH_SIZE.value,
        temperature=_TEMPERATURE.value,
        answer_temperature=_ANSWER_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_p=_MIN_P.value,
        repetition_penalty=_REPETITION_PENALTY.value,
        max_similarity=_MAX_SIMILARITY.value,
        instruction_tokens=_INSTRUCTION_TOKENS.value,
        input_tokens=_INPUT_TOKENS.value,
        output_tokens=_OUTPUT_TOKENS.value,
    )
    model = llm_jax.load(_CHECKPOINT.value, tokenizer=_TOKENIZER.value)
    counts = self_instruct.run(
        model,
        seeds,
        _OUTPUT.value,
        target=_TARGET.value,
        limit=_LIMIT.value,
        options=options,
        source=f"{model.config.name} {fingerprint(model.params)}",
    )
    print(
        f"{counts['kept']} of {counts['parsed']} instructions were kept ({counts['yield']:.1%}); see "
        f"{_OUTPUT.value}/report.md"
    )
    if _TURNS.value:
        kept = self_instruct.kept_tasks(_OUTPUT.value)[: _TURNS.value]
        second = turns.write_turns(model, kept, seeds, _OUTPUT.value, options)
        print(f"{second['kept']} of {second['asked']} tasks got a second turn")


if __name__ == "__main__":
    cli.run_main(main)
