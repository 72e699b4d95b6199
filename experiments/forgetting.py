"""What a model forgets when it is tuned on instructions, and which remedy helps.

    python -m experiments.forgetting --base=runs/forgetting_base --workdir=runs/forgetting
    python -m experiments.forgetting --base=runs/novels --input=DATA/text/novels \\
        --data=DATA --tasks=en_de,sst2,cola,winogrande,stsb,wnut,en_fr,python_module \\
        --unseen=arc_easy,piqa --workdir=runs/forgetting

The base model is the run in --base; if none is there yet it is trained now, as --config says (5
million parameters), on --input. The first uses what Python itself holds, text and tasks; the second
reads real text, and data sets from DATA (llm_jax/data/task_rows.py says which files). Each run is
kept in WORKDIR/results.json; the same command goes on where it was stopped. The end is
WORKDIR/report.md: a table, a plot of forgetting against gain, curves, and the winner by rule.
"""

from absl import flags

from experiments import cli

_CONFIG = cli.define_config(default="configs/forgetting_base.py")
_BASE = flags.DEFINE_string("base", None, "run directory of the base model", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder for results and report", required=True)
_INPUT = flags.DEFINE_list("input", [], "text of a new base model; replaces the recipe's")
_DATA = flags.DEFINE_string("data", "", "folder of the data sets; needed by all but python_*")
_TASKS = flags.DEFINE_list(
    "tasks", ["python_question", "python_module"], "tuned on; the first is the target"
)
_UNSEEN = flags.DEFINE_list("unseen", [], "tasks that are never tuned on")
_REMEDIES = flags.DEFINE_list("remedies", [], "names; default: all")
_EXAMPLES = flags.DEFINE_list("examples", ["64", "256", "1024"], "numbers of examples")
_COUNTS = flags.DEFINE_list(
    "task_counts", [], "numbers of tasks that share the most examples; default: 1, 2, 4, ... all"
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each", lower_bound=1)
_EPOCHS = flags.DEFINE_integer("epochs", 1, "how often each example is seen", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 96, "tokens a row; longer examples are left out")
_RATE = flags.DEFINE_float("learning_rate", 5e-4, "of full tuning")
_TEST = flags.DEFINE_integer("test_examples", 128, "held-out examples of the target", lower_bound=4)


def main(argv: list[str]) -> None:
    del argv
    recipe = _CONFIG.value
    if _INPUT.value:
        recipe.data.inputs, recipe.data.sources = tuple(_INPUT.value), ()
    numbers = {"examples": _EXAMPLES.value, "task_counts": _COUNTS.value}
    for name, values in numbers.items():
        if not all(v.isdigit() and int(v) for v in values):
            raise ValueError(f"--{name}={','.join(values)}: expected numbers such as 64,256")
    if not _EXAMPLES.value:
        raise ValueError("--examples is empty")
    n = len(_TASKS.value)
    counts = tuple(map(int, _COUNTS.value)) or tuple(c for c in (1, 2, 4, 8, 16) if c <= n)

    from llm_jax.align import forgetting, forgetting_report

    lab = forgetting.Lab(
        tasks=tuple(_TASKS.value),
        unseen=tuple(_UNSEEN.value),
        data=_DATA.value,
        remedies=tuple(_REMEDIES.value) or tuple(forgetting.REMEDIES),
        examples=tuple(sorted({int(v) for v in _EXAMPLES.value})),
        counts=counts,
        seeds=_SEEDS.value,
        epochs=_EPOCHS.value,
        length=_LENGTH.value,
        learning_rate=_RATE.value,
        test_examples=_TEST.value,
    )
    forgetting.check(lab)
    base = forgetting.load_base(_BASE.value, recipe)
    result = forgetting.run(lab, base, _WORKDIR.value)
    print("\n".join(forgetting_report.lines(result)))
    print(f"report: {forgetting_report.write(_WORKDIR.value, result)}")


if __name__ == "__main__":
    cli.run_main(main)
