"""In-context learning: accuracy against the examples in the prompt and the size of the model.

Trains small decoders on sequences of examples of random functions and tests them on new functions:

python -m experiments.in_context --workdir=runs/in_context --sizes=16x1,16x2,32x2,64x2

or measures models that exist on a task of experiments.evaluate:

python -m experiments.in_context --workdir=runs/shots --checkpoint=A,B --task=boolq --input=DIR \\
    --num_shots=0,1,2,4,8 --limit=200
"""

import os

from absl import flags

from experiments import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "folder for results.json and plots/", required=True)
_SEED = flags.DEFINE_integer("seed", 0, "of initial weights, functions and examples")
_FUNCTION = flags.DEFINE_enum(
    "function",
    "lookup",
    ["lookup", "linear"],
    "what each sequence draws: a label for each word, or a linear rule on vectors of bits",
)
_SIZES = flags.DEFINE_list("sizes", ["16x1", "16x2", "32x2", "64x2"], "d_model x layers of each")
_STEPS = flags.DEFINE_integer("steps", 2000, "training steps", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 64, "sequences a step; rows at a time with --checkpoint", lower_bound=1
)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 4e-3, "peak")
_SHOTS = flags.DEFINE_integer("shots", 16, "examples before the last question", lower_bound=1)
_LABELS = flags.DEFINE_integer("labels", 4, "lookup: labels", lower_bound=2)
_WORDS = flags.DEFINE_integer("words", 16, "lookup: words", lower_bound=1)
_ACTIVE = flags.DEFINE_integer("active", 4, "lookup: words of one sequence", lower_bound=1)
_DIMENSIONS = flags.DEFINE_integer("dimensions", 5, "linear: bits of an input", lower_bound=1)
_TEST = flags.DEFINE_integer("test_sequences", 2000, "new functions to test on", lower_bound=2)
_CHECKPOINT = flags.DEFINE_list("checkpoint", [], "models to measure instead of training some")
_TASK = flags.DEFINE_string("task", "multiple_choice", "with --checkpoint: one task of evaluate")
_INPUT = flags.DEFINE_string("input", "", "with --checkpoint: its questions")
_METRIC = flags.DEFINE_string("metric", "acc", "with --checkpoint: which of its metrics")
_NUM_SHOTS = flags.DEFINE_list("num_shots", ["0", "1", "2", "4", "8"], "with --checkpoint")
_LIMIT = flags.DEFINE_integer("limit", 0, "with --checkpoint: questions at most; 0: all")


def main(argv: list[str]) -> None:
    del argv
    from llm_jax import report
    from llm_jax.eval import in_context, output

    result = _measure() if _CHECKPOINT.value else _train_all()
    output.write_json(os.path.join(_WORKDIR.value, "results.json"), result)
    for plot in in_context.plots(result):
        path = report.save_plot(plot, os.path.join(_WORKDIR.value, "plots", f"{plot.name}.png"))
        print(f"plot: {path}")
    some = [i for i, k in enumerate(result["shots"]) if k in (0, 1, 2, 4, 8, 16, 32)]
    for m in result["models"]:
        numbers = ", ".join(
            f"{result['shots'][i]}: {m['accuracy'][i]:.3f} ± {m['stderr'][i]:.3f}" for i in some
        )
        print(f"{m['name']:>12} ({m['parameters']:,} parameters)  {numbers}")
    if result.get("best"):
        best = ", ".join(f"{result['shots'][i]}: {result['best'][i]:.3f}" for i in some)
        print(f"{'possible':>12}  {best}")


def _train_all() -> dict:
    """Trains a decoder of each size and tests all of them on the same new functions."""
    import numpy as np

    from llm_jax.eval.in_context import Functions

    functions = Functions(
        kind=_FUNCTION.value,
        shots=_SHOTS.value,
        labels=_LABELS.value,
        words=_WORDS.value,
        active=_ACTIVE.value,
        dimensions=_DIMENSIONS.value,
    )
    sizes = [_size(text) for text in _SIZES.value]
    test = functions.sample(_TEST.value, np.random.default_rng([_SEED.value, 1]))
    return {
        "title": f"In-context learning of new {functions.kind} functions",
        "function": {n: getattr(functions, n) for n in functions.__dataclass_fields__},
        "steps": _STEPS.value,
        "batch_size": _BATCH_SIZE.value,
        "learning_rate": _LEARNING_RATE.value,
        "seed": _SEED.value,
        "test_sequences": _TEST.value,
        "shots": list(range(functions.shots + 1)),
        "chance": 1 / functions.n_labels,
        "best": functions.best(),
        "models": [_train(functions, *size, test) for size in sizes],
    }


def _size(text: str) -> tuple[int, int]:
    d_model, _, layers = text.partition("x")
    if not (d_model.isdigit() and layers.isdigit()) or int(d_model) % 8 or int(layers) < 1:
        raise ValueError(f"--sizes={text!r}: expected WIDTHxLAYERS with a width in eights: 64x2")
    return int(d_model), int(layers)


def _train(functions, d_model: int, n_layers: int, test) -> dict:
    """One decoder through the train step of every run; its accuracy on `test`."""
    import jax
    import numpy as np

    from llm_jax import config as configs
    from llm_jax.eval.in_context import accuracy_by_shots
    from llm_jax.nn.params import count
    from llm_jax.train import in_memory

    cfg = configs.TrainConfig(
        name=f"{d_model}x{n_layers}",
        seed=_SEED.value,
        steps=_STEPS.value,
        batch_size=_BATCH_SIZE.value,
        length=functions.length,
    )
    cfg.model.d_model, cfg.model.n_layers = d_model, n_layers
    cfg.model.n_heads = max(d_model // 16, 1)
    cfg.model.scan = False
    cfg.model.init_std = d_model**-0.5  # with 0.02 models this narrow take long to begin
    cfg.optimizer.learning_rate = _LEARNING_RATE.value
    cfg.optimizer.warmup_steps = min(100, _STEPS.value // 5)
    cfg.optimizer.weight_decay = 0.0
    configs.resolve_model(
        cfg.model,
        vocab_size=functions.vocab_size,
        length=functions.length,
        backend=jax.default_backend(),
    )
    configs.validate(cfg)
    configs.freeze(cfg)

    def batch(step: int):
        # A stream of its own for each step, none of which is the test's.
        return functions.sample(cfg.batch_size, np.random.default_rng([cfg.seed, 0, step]))

    trained = in_memory.train(cfg, batch)
    with jax.set_mesh(trained.program.mesh):
        accuracy = accuracy_by_shots(trained.params, cfg.model, functions, test)
    n = len(test.tokens)
    return {
        "name": f"{d_model}x{n_layers}",
        "parameters": count(trained.program.specs),
        "accuracy": accuracy.tolist(),
        "stderr": np.sqrt(accuracy * (1 - accuracy) / (n - 1)).tolist(),
        "final_loss": float(trained.losses[-1]),
    }


def _measure() -> dict:
    """Accuracy of models that exist against the number of worked examples."""
    import jax

    import llm_jax
    from llm_jax.eval.in_context import task_by_shots
    from llm_jax.eval.run import Options

    if not all(k.isdigit() for k in _NUM_SHOTS.value):
        raise ValueError(f"--num_shots={','.join(_NUM_SHOTS.value)}: expected numbers: 0,1,2,4")
    shots = sorted({int(k) for k in _NUM_SHOTS.value})
    found = []
    for path in _CHECKPOINT.value:
        model = llm_jax.load(path)
        options = Options(
            input=_INPUT.value,
            limit=_LIMIT.value,
            batch_size=_BATCH_SIZE.value,
            seed=_SEED.value,
            add_bos=model.config.data.add_bos,
        )
        with jax.set_mesh(model.mesh):
            accuracy, stderr = task_by_shots(
                model.params,
                model.config.model,
                model.tokenizer,
                _TASK.value,
                shots,
                options,
                metric=_METRIC.value,
            )
        found.append(
            {
                "name": os.path.basename(os.path.normpath(path)),
                "checkpoint": path,
                "parameters": sum(x.size for x in jax.tree.leaves(model.params)),
                "accuracy": accuracy,
                "stderr": stderr,
            }
        )
    return {
        "title": f"{_TASK.value} against worked examples",
        "task": _TASK.value,
        "input": _INPUT.value,
        "limit": _LIMIT.value,
        "seed": _SEED.value,
        "metric": _METRIC.value,
        "shots": shots,
        "models": found,
    }


if __name__ == "__main__":
    cli.run_main(main)
