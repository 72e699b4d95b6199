"""Runs tasks of lm-evaluation-harness (`lm_eval`, extra `eval`) on a model.

python -m experiments.harness --checkpoint=runs/quickstart --tasks=arc_easy,boolq --num_fewshot=5
python -m experiments.harness --checkpoint=model.gguf --tasks=mine --include_path=DIR --output=F.json

lm_eval fetches its tasks' data from the Hugging Face hub; task files of your own (--include_path)
that name local data need no network, with HF_DATASETS_OFFLINE=1 nothing asks for one.
"""

from absl import flags

from experiments import cli

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "run directory, step folder, Hugging Face folder, .gguf or .bin file",
    required=True,
)
_BASE = cli.define_base()
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "default: the one that comes with the model")
_TASKS = flags.DEFINE_list("tasks", None, "names of tasks, groups or tags", required=True)
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "folder of task files of your own")
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "worked examples in a prompt; default: the task's", lower_bound=0
)
_LIMIT = flags.DEFINE_integer("limit", 0, "items of each task at most; 0: all", lower_bound=0)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "rows at a time", lower_bound=1)
_WINDOW = flags.DEFINE_integer(
    "window", None, "tokens the model sees at most; default: its max_length", lower_bound=1
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 256, "generation: where the task does not say", lower_bound=1
)
_ADD_BOS = flags.DEFINE_bool(
    "add_bos", None, "texts begin with the begin token; default: as the model was trained"
)
_CHAT = flags.DEFINE_bool("apply_chat_template", False, "ask through the tokenizer's template")
_MULTITURN = flags.DEFINE_bool(
    "multiturn", True, "with the chat template: worked examples are turns of the dialogue"
)
_SYSTEM = flags.DEFINE_string("system_instruction", None, "begins every prompt")
_SEED = flags.DEFINE_integer("seed", 1234, "of the worked examples and of tasks that sample")
_SAMPLES = flags.DEFINE_bool("log_samples", True, "each item's prompt and scores go to --output")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the results")


def main(argv: list[str]) -> None:
    del argv
    import llm_jax
    from llm_jax.config import MeshConfig
    from llm_jax.eval import (
        harness,  # before the model: it needs the extra
        output,
    )

    model = llm_jax.load(
        _CHECKPOINT.value, base=_BASE.value, tokenizer=_TOKENIZER.value, mesh=MeshConfig()
    )
    results = harness.evaluate(
        model,
        _TASKS.value,
        include_path=_INCLUDE_PATH.value,
        options={
            "batch_size": _BATCH_SIZE.value,
            "max_length": _WINDOW.value,
            "max_gen_toks": _MAX_NEW_TOKENS.value,
            "add_bos_token": _ADD_BOS.value,
            "seed": _SEED.value,
        },
        num_fewshot=_NUM_FEWSHOT.value,
        limit=_LIMIT.value or None,
        apply_chat_template=_CHAT.value,
        fewshot_as_multiturn=_CHAT.value and _MULTITURN.value,
        system_instruction=_SYSTEM.value,
        fewshot_random_seed=_SEED.value,
        log_samples=_SAMPLES.value,
        random_seed=_SEED.value,
    )
    if _OUTPUT.value:
        output.write_json(_OUTPUT.value, {"checkpoint": _CHECKPOINT.value, **results})
    from lm_eval.utils import make_table

    print(make_table(results))


if __name__ == "__main__":
    cli.run_main(main)
