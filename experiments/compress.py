"""Makes a model smaller in many ways and reports quality against bytes and against tokens/s.

python -m experiments.compress --checkpoint=runs/quickstart --output=runs/compressed
python -m experiments.compress --checkpoint=model.gguf --scheme=int8-channel,nf4-64,prune-50 \\
    --input=test.txt --window=1024 --limit_tokens=8192 --output=DIR

Schemes: bfloat16; int8-row, int8-channel, int8-tensor; nf4-64, int4-64, int3-128 (any block, with or
without -double); prune-50, prune-50-global, prune-2:4; and with --train_steps: retrain-50,
gradual-50, movement-50. float32 is always measured. Each measurement is in DIR/results.json as soon
as it is made: the same command goes on where it stopped, and one with other schemes (and the same
--train flags) adds them.
"""

import os
import shlex
import sys

from absl import flags

from experiments import cli

DEFAULT = "runs/quickstart"
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", DEFAULT, "run directory, step folder, Hugging Face folder, .gguf or .bin file"
)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "default: the one that comes with the model")
_SCHEME = flags.DEFINE_list(
    "scheme",
    ["bfloat16", "int8-channel", "int8-tensor", "nf4-64", "nf4-64-double", "int4-64", "prune-50"],
    "what to compare, by name; see above",
)
_TARGETS = flags.DEFINE_string("targets", None, "pattern of the matrices' paths; default: layers'")
_INPUT = flags.DEFINE_string("input", "", "text for perplexity; default: embedded, held out")
_WINDOW = flags.DEFINE_integer(
    "window", None, "tokens the model sees at most; default: its max_length", lower_bound=1
)
_LIMIT = flags.DEFINE_integer("limit_tokens", 0, "of --input; 0: all", lower_bound=0)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "windows at a time", lower_bound=1)
_KV_CACHE = flags.DEFINE_enum(
    "kv_cache", "auto", ["auto", "int8"], "int8: each scheme also with keys and values as int8"
)
_DECODE = flags.DEFINE_integer(
    "decode_tokens", 32, "decoded for the speed; 0: it is not measured", lower_bound=0
)
_TRAIN_INPUT = flags.DEFINE_string(
    "train_input", "", "text that pruned models are trained on; default: embedded"
)
_TRAIN_STEPS = flags.DEFINE_integer("train_steps", 0, "steps of that training", lower_bound=0)
_TRAIN_LENGTH = flags.DEFINE_integer("train_length", 128, "tokens a row of it", lower_bound=1)
_TRAIN_BATCH = flags.DEFINE_integer("train_batch_size", 8, "rows a step of it", lower_bound=1)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-4, "of it, at its peak", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "of its batches")
_SAVE = flags.DEFINE_bool("save", False, "write models of plain arrays into --output/SCHEME")
_OUTPUT = flags.DEFINE_string("output", None, "folder for results.json, report.md and plots")


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise ValueError(f"{argv[1]!r}: not a flag; write --checkpoint={argv[1]}")
    if not _OUTPUT.value:
        raise ValueError("--output is needed: a folder for the report")
    if _CHECKPOINT.value == DEFAULT and not os.path.exists(DEFAULT):
        raise FileNotFoundError(
            f"--checkpoint={DEFAULT} does not exist; make it with python -m experiments.pretrain "
            f"--config=configs/quickstart.py --workdir={DEFAULT}"
        )

    import llm_jax
    from llm_jax.api import Model
    from llm_jax.compression import frontier, schemes
    from llm_jax.config import check_pattern
    from llm_jax.eval import texts
    from llm_jax.peft.quantization import LINEAR

    for name in _SCHEME.value:  # a typing error shows before the model is loaded
        schemes.check(name, bool(_TRAIN_STEPS.value))
    check_pattern("--targets", _TARGETS.value or LINEAR)
    model = llm_jax.load(_CHECKPOINT.value, tokenizer=_TOKENIZER.value)
    if model.trained is not None:
        model = model.merged()
    found = texts.held_out(_INPUT.value, model.tokenizer, _LIMIT.value)
    training = None
    if _TRAIN_STEPS.value:
        training = schemes.Training(
            ids=texts.training_ids(_TRAIN_INPUT.value, model.tokenizer),
            steps=_TRAIN_STEPS.value,
            batch_size=_TRAIN_BATCH.value,
            length=_TRAIN_LENGTH.value,
            learning_rate=_LEARNING_RATE.value,
            seed=_SEED.value,
        )
    options = frontier.Options(
        texts=found.texts,
        source=found.source,
        window=_WINDOW.value,
        batch_size=_BATCH_SIZE.value,
        decode_tokens=_DECODE.value,
        int8_cache=_KV_CACHE.value == "int8",
        targets=_TARGETS.value or LINEAR,
        training=training,
    )
    title = os.path.basename(os.path.normpath(_CHECKPOINT.value))
    kept = frontier.kept_in(_OUTPUT.value, title, model.params, options)
    print(f"{found.source}: {found.tokens:,} tokens")

    def folder_of(scheme: str) -> str:
        return os.path.join(_OUTPUT.value, scheme.replace(":", "of"))

    def done(point: frontier.Point, compressed: schemes.Compressed) -> None:
        speed = point.tokens_per_second
        print(
            f"{point.scheme:24} {point.nbytes / 1e6:10.2f} MB  perplexity {point.perplexity:10.4f}"
            + ("" if speed is None else f"  {speed:8.1f} tokens/s"),
            flush=True,
        )
        if not _SAVE.value or point.scheme in ("float32",) or frontier.CACHED in point.scheme:
            return
        if not compressed.plain:
            print(f"  {point.scheme} is not saved: checkpoints hold plain arrays")
            return
        folder = folder_of(point.scheme)
        Model(model.config, compressed.params, model.tokenizer, model.mesh).save(folder)
        print(f"  saved: {folder}")

    again = [n for n in _SCHEME.value if _SAVE.value and not os.path.exists(folder_of(n))]
    points = frontier.measure(
        _SCHEME.value,
        model.config,
        model.params,
        model.tokenizer,
        options,
        kept=kept,
        again=again,
        done=done,
    )
    command = ["python", "-m", "experiments.compress", *map(shlex.quote, sys.argv[1:])]
    print(f"report: {frontier.write(points, _OUTPUT.value, kept.settings, command)}")


if __name__ == "__main__":
    cli.run_main(main)
