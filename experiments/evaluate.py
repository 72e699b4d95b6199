"""Evaluates a model: perplexity, multiple choice, last words and answers it writes.

python -m experiments.evaluate --checkpoint=runs/quickstart --task=perplexity --limit=20
python -m experiments.evaluate --checkpoint=model.gguf --task=arc_easy,boolq --input=DIR \\
    --output=results.json --items=items.jsonl
python -m experiments.evaluate --compare=items_a.jsonl,items_b.jsonl
"""

from absl import flags

from experiments import cli

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "run directory, step folder, Hugging Face folder, .gguf or .bin file"
)
_BASE = cli.define_base()
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "default: the one that comes with the model")
_TASK = flags.DEFINE_list(
    "task",
    ["perplexity"],
    "perplexity, mmlu, arc (arc_easy, arc_challenge), boolq, piqa, winogrande, hellaswag, lambada, "
    "truthfulqa (_mc1, _mc2), gsm8k; multiple_choice and generation for your own files",
)
_INPUT = flags.DEFINE_string(
    "input", "", "file, folder of files or hf:NAME[:config][:split]; perplexity: any text"
)
_FEWSHOT_INPUT = flags.DEFINE_string(
    "fewshot_input", "", "the same with worked examples; default: beside the input, or in it"
)
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "worked examples in a prompt; default: the task's", lower_bound=0
)
_SCORING = flags.DEFINE_enum(
    "scoring",
    None,
    ["answers", "letters"],
    "score whole answers, or the letters of listed ones; default: the task's",
)
_LIMIT = flags.DEFINE_integer(
    "limit", 0, "questions (of each MMLU subject) or texts at most; 0: all", lower_bound=0
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "rows at a time", lower_bound=1)
_WINDOW = flags.DEFINE_integer(
    "window", None, "tokens the model sees at most; default: its max_length", lower_bound=1
)
_STRIDE = flags.DEFINE_integer(
    "stride", None, "perplexity: new tokens a window; default: the window", lower_bound=1
)
_SEED = flags.DEFINE_integer(
    "seed", 1234, "of the worked examples; the default is lm-evaluation-harness' own"
)
_CHAT = flags.DEFINE_bool("apply_chat_template", False, "ask through the tokenizer's template")
_MULTITURN = flags.DEFINE_bool(
    "multiturn", False, "with the chat template: worked examples are turns of the dialogue"
)
_PMI = flags.DEFINE_bool("pmi", False, "also acc_pmi: answers scored with and without the question")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 0, "generation: 0: the task's", lower_bound=0
)
_STOP = flags.DEFINE_multi_string("stop", [], "generation: string that ends an answer; repeatable")
_EXTRACT = flags.DEFINE_list(
    "extract", [], "generation: strict, flexible, letter, first_line, exact; default: the task's"
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the results")
_ITEMS = flags.DEFINE_string("items", None, "JSON lines file for each question's scores")
_COMPARE = flags.DEFINE_list(
    "compare", [], "A,B: two --items files of the same questions; nothing is evaluated"
)


def main(argv: list[str]) -> None:
    del argv
    import contextlib
    import json

    from llm_jax.eval import output

    if _COMPARE.value:
        from llm_jax.eval import comparison

        if len(_COMPARE.value) != 2:
            raise ValueError(f"--compare takes two files, A,B, not {len(_COMPARE.value)}")
        records = [comparison.read_records(path) for path in _COMPARE.value]
        found = comparison.compare(*records, seed=_SEED.value)
        if _OUTPUT.value:
            output.write_json(_OUTPUT.value, {"files": _COMPARE.value, "tasks": found})
        print(comparison.table(found))
        return
    if not _CHECKPOINT.value:
        raise ValueError("--checkpoint names no model")

    import jax

    import llm_jax
    from llm_jax.config import MeshConfig
    from llm_jax.data.progress import bar
    from llm_jax.eval import run

    run.expand(_TASK.value)  # a typing error shows before the model is loaded
    model = llm_jax.load(
        _CHECKPOINT.value, base=_BASE.value, tokenizer=_TOKENIZER.value, mesh=MeshConfig()
    )
    options = run.Options(
        input=_INPUT.value,
        fewshot_input=_FEWSHOT_INPUT.value,
        num_fewshot=_NUM_FEWSHOT.value,
        scoring=_SCORING.value or "",
        limit=_LIMIT.value,
        batch_size=_BATCH_SIZE.value,
        window=_WINDOW.value,
        stride=_STRIDE.value,
        seed=_SEED.value,
        apply_chat_template=_CHAT.value,
        multiturn=_MULTITURN.value,
        pmi=_PMI.value,
        add_bos=model.config.data.add_bos,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        stop=tuple(_STOP.value),
        extract=tuple(_EXTRACT.value),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(model.mesh))
        record = None
        if _ITEMS.value:
            file = stack.enter_context(output.replacing(_ITEMS.value))
            record = lambda found: file.write(json.dumps(found) + "\n")  # noqa: E731
        bars = stack.enter_context(contextlib.ExitStack())

        def progress(task: str, n: int | None):
            bars.close()  # that of the task before
            return bars.enter_context(bar(task, n, "request")).update

        results = run.evaluate_tasks(
            model.params,
            model.config.model,
            model.tokenizer,
            _TASK.value,
            options,
            record=record,
            progress=progress,
        )
    if _OUTPUT.value:
        output.write_json(
            _OUTPUT.value,
            {"model": _CHECKPOINT.value, "llm_jax": llm_jax.__version__, "tasks": results},
        )
    print(run.table(results))


if __name__ == "__main__":
    cli.run_main(main)
