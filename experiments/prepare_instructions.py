"""Data sets of many tasks as conversations for fine-tuning, and the mixture of them.

    python -m experiments.prepare_instructions --output=instructions
    python -m experiments.prepare_instructions --input=DATA --tasks=all --output=instructions \\
        --cap=3000 --temperature=1

The first uses what Python itself holds. The second reads public data sets from the folder DATA
(llm_jax/data/task_rows.py says which files) in the phrasings of llm_jax/data/task_templates.py.
Each task becomes OUTPUT/train/TASK.jsonl and OUTPUT/held_out/TASK.jsonl; OUTPUT/mixture.json and
mixture.md hold how much of each a mixture takes. configs/sft_single_task.py and
configs/sft_multi_task.py train on them.
"""

import os

from absl import flags

from experiments import cli

_INPUT = flags.DEFINE_string("input", "", "folder of the data sets; needed by all but python_*")
_OUTPUT = flags.DEFINE_string("output", None, "folder to write", required=True)
_TASKS = flags.DEFINE_list("tasks", [], "names, or all; default: those that need no --input")
_SEED = flags.DEFINE_integer("seed", 0, "draws the phrasings, and the rows under --limit")
_LIMIT = flags.DEFINE_integer("limit", 0, "rows of each part of a task; 0: all", lower_bound=0)
_HELD_OUT = flags.DEFINE_float(
    "held_out_share",
    0.1,
    "of tasks that come in one file",
    lower_bound=0.0,
    upper_bound=1.0,
)
_CAP = flags.DEFINE_float("cap", 3000, "examples of a task that count at most; 0: all")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "1: in proportion; large: all tasks alike")


def main(argv: list[str]) -> None:
    del argv
    from llm_jax import report
    from llm_jax.data import instructions
    from llm_jax.eval import output

    names = _TASKS.value or list(instructions.EMBEDDED)
    names = list(instructions.TASKS) if names == ["all"] else names
    if files := [n for n in names if n not in instructions.EMBEDDED] if not _INPUT.value else []:
        raise ValueError(f"--tasks={files[0]} needs --input, the folder of the data sets")
    table = instructions.write(
        names,
        _INPUT.value,
        _OUTPUT.value,
        seed=_SEED.value,
        limit=_LIMIT.value,
        held_out_share=_HELD_OUT.value,
        cap=_CAP.value,
        temperature=_TEMPERATURE.value,
    )
    settings = {"cap": _CAP.value, "temperature": _TEMPERATURE.value, "seed": _SEED.value}
    output.write_json(os.path.join(_OUTPUT.value, "mixture.json"), {**settings, "tasks": table})
    path = report.write_report(
        _OUTPUT.value,
        "Mixture of instructions",
        [
            report.Table(table),
            report.Text(
                f"Rates: min(train, {_CAP.value:g})^(1/{_TEMPERATURE.value:g}), in shares "
                "(Raffel et al. 2020)."
            ),
        ],
        name="mixture.md",
    )
    print(path.read_text())


if __name__ == "__main__":
    cli.run_main(main)
