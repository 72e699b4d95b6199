"""Does the learning rate of a narrow model serve a wide one? muP beside the standard way.

    python -m experiments.transfer --config=configs/transfer_tiny.py --workdir=runs/transfer \\
        --widths=64,128,256,512
    python -m experiments.transfer --config=configs/transfer_tiny.py --workdir=runs/check \\
        --coordinate_check --widths=64,128,256,512

The first looks for the best learning rate at each width; run again, it goes on from what is in
WORKDIR/outcomes.jsonl. The second shows how far activations move in the first steps. Both write
results.json and report.md with a plot.
"""

import os

from absl import flags

from experiments import cli

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder for outcomes and report", required=True)
_INPUT = flags.DEFINE_list("input", [], "training text; replaces the recipe's data")
_WIDTHS = flags.DEFINE_list(
    "widths", ["64", "128", "256"], "model.d_model of each; the recipe's is muP's base"
)
_PARAMETRIZATIONS = flags.DEFINE_list(
    "parametrizations", ["mup", "standard"], "mup, standard or both"
)
_SEEDS = flags.DEFINE_integer("seeds", 1, "runs of each learning rate", lower_bound=1)
_POINTS = flags.DEFINE_integer("points", 5, "learning rates to try, at least", lower_bound=3)
_CHECK = flags.DEFINE_bool("coordinate_check", False, "activations of the first steps instead")
_CHECK_STEPS = flags.DEFINE_integer("check_steps", 8, "steps of it", lower_bound=1)


def main(argv: list[str]) -> None:
    del argv
    base = _CONFIG.value
    if base is None:
        raise ValueError("--config is needed, for example --config=configs/transfer_tiny.py")
    if not all(w.isdigit() and int(w) for w in _WIDTHS.value) or len(_WIDTHS.value) < 2:
        raise ValueError(f"--widths={','.join(_WIDTHS.value)}: expected two or more: 64,128,256")
    if _INPUT.value:
        base.data.inputs, base.data.sources = tuple(_INPUT.value), ()

    from llm_jax.data.prepare import prepare_corpus
    from llm_jax.eval import output
    from llm_jax.scaling import transfer, transfer_report

    os.makedirs(_WORKDIR.value, exist_ok=True)
    widths = sorted({int(w) for w in _WIDTHS.value})
    corpus = prepare_corpus(base.data, base.tokenizer, _WORKDIR.value)
    if corpus.evaluation is None:
        raise ValueError("held-out text is needed: set --config.data.eval_fraction above 0")
    for width in widths:
        for parametrization in _PARAMETRIZATIONS.value:  # errors come before the first run
            transfer.at_width(base, width, parametrization, vocab_size=corpus.tokenizer.vocab_size)
    if _CHECK.value:
        rows = transfer.coordinate_check(
            base, corpus, widths, steps=_CHECK_STEPS.value, seeds=_SEEDS.value
        )
        result = {"kind": "coordinate_check", "rows": rows}
    else:
        outcomes = transfer.Outcomes(_WORKDIR.value, base)
        transfer.search_all(
            base,
            corpus,
            outcomes,
            widths=widths,
            parametrizations=_PARAMETRIZATIONS.value,
            seeds=_SEEDS.value,
            points=_POINTS.value,
        )
        result = {"kind": "transfer", "outcomes": outcomes.to_json()}
    output.write_json(os.path.join(_WORKDIR.value, "results.json"), result)
    print("\n".join(transfer_report.lines(result)))
    print(f"report: {transfer_report.write(_WORKDIR.value, result)}")


if __name__ == "__main__":
    cli.run_main(main)
