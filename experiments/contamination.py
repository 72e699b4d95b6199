"""Asks whether an evaluation set was in a model's training data.

order    does the model prefer the order in which the set is published? (a p-value, for a whole set)
min_k    are its texts less surprising than texts that were not trained on? (--reference)
overlap  which of its items share long runs of words with a corpus? (--corpus; no model)

python -m experiments.contamination --test=order --checkpoint=runs/quickstart --input=questions.jsonl
python -m experiments.contamination --test=overlap --input=questions.jsonl --corpus=embedded:docs
"""

from absl import flags

from experiments import cli

_TEST = flags.DEFINE_enum("test", "order", ["order", "min_k", "overlap"], "what to ask")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "the model (order, min_k); as llm_jax.load")
_BASE = cli.define_base()
_INPUT = flags.DEFINE_string(
    "input", None, "evaluation set: .jsonl, .json, .parquet, or text with one item a line"
)
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "field of the rows of --input and --reference")
_CORPUS = flags.DEFINE_multi_string(
    "corpus", [], "overlap: file, folder, glob or embedded:NAME; may be repeated"
)
_CORPUS_TEXT_KEY = flags.DEFINE_string("corpus_text_key", "text", "field of the rows of --corpus")
_REFERENCE = flags.DEFINE_string(
    "reference", None, "min_k: texts of the same kind that the model cannot have seen"
)
_PERMUTATIONS = flags.DEFINE_integer(
    "permutations", 199, "order: random orders; p cannot be below 1 / (1 + this)", lower_bound=1
)
_SHARDS = flags.DEFINE_integer(
    "shards", 0, "order: runs of items, shuffled each in itself; 0: up to 10, of 4 items at least"
)
_SEPARATOR = flags.DEFINE_string("separator", "\n", "order: what stands between two items")
_LENGTH = flags.DEFINE_integer("length", 0, "tokens that the model reads at a time; 0: its own")
_K = flags.DEFINE_float("k", 0.2, "min_k: share of a text's tokens that counts, the least probable")
_NGRAM = flags.DEFINE_integer("ngram", 13, "overlap: words of a run that makes an item suspect")
_COVERAGE_NGRAM = flags.DEFINE_integer(
    "coverage_ngram", 8, "overlap: words of the runs whose share of an item is measured"
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "rows scored at a time", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "the same seed draws the same orders")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write")


def _overlap(items: list[str]) -> tuple[dict, str]:
    from llm_jax.data import documents
    from llm_jax.eval import overlap

    if not _CORPUS.value:
        raise ValueError("--test=overlap compares with --corpus=FILE; there is none")
    corpus = documents.read(_CORPUS.value, text_key=_CORPUS_TEXT_KEY.value)
    found = overlap.overlap(items, corpus, n=_NGRAM.value, coverage_n=_COVERAGE_NGRAM.value)
    result = overlap.summary(found, items)
    return result, overlap.render(result)


def _with_model(items: list[str]) -> tuple[dict, str]:
    if not _CHECKPOINT.value:
        raise ValueError(f"--test={_TEST.value} asks a model; set --checkpoint")
    if _TEST.value == "min_k" and not _REFERENCE.value:
        raise ValueError("--test=min_k compares with --reference=FILE; there is none")
    import functools

    import jax

    import llm_jax
    from llm_jax.data import progress
    from llm_jax.decode.generate import start_ids
    from llm_jax.eval import contamination, scoring

    model = llm_jax.load(_CHECKPOINT.value, base=_BASE.value)
    cfg = model.config.model
    common = {"length": _LENGTH.value or cfg.max_length, "start": start_ids(model.tokenizer)[0]}
    encode = model.tokenizer.encode
    with jax.set_mesh(model.mesh):
        if _TEST.value == "order":
            score = functools.partial(
                scoring.score_rows, model.params, cfg, batch_size=_BATCH_SIZE.value
            )
            shards = _SHARDS.value or max(min(10, len(items) // 4), 1)
            with progress.bar("orders", shards * (1 + _PERMUTATIONS.value), "order") as bar:
                found = contamination.order_test(
                    items,
                    encode,
                    score,
                    separator=_SEPARATOR.value,
                    permutations=_PERMUTATIONS.value,
                    shards=shards,
                    seed=_SEED.value,
                    progress=bar.update,
                    **common,
                )
            return contamination.order_summary(found), contamination.render_order(found)
        others = contamination.read_items(_REFERENCE.value, _TEXT_KEY.value)
        moments = functools.partial(contamination.moments, model.params, cfg)
        both = [
            contamination.membership(texts, encode, moments, k=_K.value, **common)
            for texts in (items, others)
        ]
        return contamination.compare_membership(*both, k=_K.value)


def main(argv: list[str]) -> None:
    del argv
    if not _INPUT.value:
        raise ValueError("there is no evaluation set; set --input=FILE")
    from llm_jax.eval.contamination import read_items
    from llm_jax.eval.output import write_json

    items = read_items(_INPUT.value, _TEXT_KEY.value)
    result, text = _overlap(items) if _TEST.value == "overlap" else _with_model(items)
    print(text)
    if _OUTPUT.value:
        asked = {"test": _TEST.value, "input": _INPUT.value, "checkpoint": _CHECKPOINT.value}
        asked |= {"corpus": _CORPUS.value, "reference": _REFERENCE.value, "seed": _SEED.value}
        write_json(_OUTPUT.value, asked | result)


if __name__ == "__main__":
    cli.run_main(main)
