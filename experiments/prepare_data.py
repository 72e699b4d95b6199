"""Tokenises text into shards that training reads, with a report.

  python -m experiments.prepare_data --input=corpus.txt --vocab_size=8192 --output=prepared
  python -m experiments.pretrain --config=configs/quickstart.py --input=prepared --workdir=runs/mine

OUTPUT gets tokenizer/, train/, eval/, report.md and report.json.
"""

import json
import os
from typing import Any

from absl import flags

from experiments import cli

_INPUT = flags.DEFINE_list(
    "input",
    ["embedded:docs"],
    "files (.txt, .jsonl, .json, .parquet, also .gz and .zst), folders, globs, "
    "hf:NAME[:config][:split], embedded:docs|docstrings|source|topics",
)
_EVAL_INPUT = flags.DEFINE_list("eval_input", [], "held-out text; default: the end of --input")
_EVAL_FRACTION = flags.DEFINE_float(
    "eval_fraction", 0.1, "share of the characters held out", lower_bound=0.0, upper_bound=0.99
)
_OUTPUT = flags.DEFINE_string("output", None, "folder to write", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "tokenizer to use; empty: train one")
_KIND = flags.DEFINE_string("kind", "sentencepiece_bpe", "kind of tokenizer to train")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "its vocabulary, special tokens included")
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "field of rows that holds the text")
_ADD_BOS = flags.DEFINE_bool("add_bos", False, "begin token before each document")
_ADD_EOS = flags.DEFINE_bool("add_eos", True, "end token after each document")
_LENGTH = flags.DEFINE_integer("length", 1024, "tokens a row, for the report", lower_bound=1)


def main(argv: list[str]) -> None:
    del argv
    from llm_jax.config import DataConfig, TokenizerConfig
    from llm_jax.data.prepare import prepare_in

    data = DataConfig(
        inputs=tuple(_INPUT.value),
        eval_inputs=tuple(_EVAL_INPUT.value),
        eval_fraction=_EVAL_FRACTION.value,
        text_key=_TEXT_KEY.value,
        add_bos=_ADD_BOS.value,
        add_eos=_ADD_EOS.value,
    )
    tokenizer = TokenizerConfig(
        path=_TOKENIZER.value, kind=_KIND.value, vocab_size=_VOCAB_SIZE.value
    )
    corpus = prepare_in(_OUTPUT.value, data, tokenizer)
    result = write_report(corpus, _LENGTH.value)
    for part in result["parts"]:
        print(
            f"{part['part']}: {part['documents']:,} documents, {part['tokens']:,} tokens, "
            f"{part['bytes_per_token']:.3f} bytes a token, {part['unknown_rate']:.2%} unknown"
        )
    print(f"report: {os.path.join(corpus.directory, 'report.md')}")


def write_report(corpus: Any, length: int) -> dict:
    """Writes report.md, its plot and report.json into the corpus's folder; returns the latter."""
    from llm_jax import report
    from llm_jax.data.summary import share_by_length, summarise

    parts = [(c.name, c.tokens) for c in corpus.train]
    if corpus.evaluation is not None:
        parts.append(("eval", corpus.evaluation))
    rows = [{"part": name} | summarise(tokens, length) for name, tokens in parts]
    tokenizer = corpus.tokenizer
    result = {
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "lossless": tokenizer.lossless,
            "fingerprint": tokenizer.fingerprint(),
        },
        "length": length,
        "parts": rows,
    }
    with open(os.path.join(corpus.directory, "report.json"), "w") as f:
        json.dump(result, f, indent=1)
        f.write("\n")
    lossless = "gives every text back" if tokenizer.lossless else "does not give every text back"
    blocks = [
        report.Text(
            f"Tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} ids, {lossless}. Train with "
            f"`python -m experiments.pretrain --input={corpus.directory}`."
        ),
        report.Table([{k: v for k, v in row.items() if k != "utilisation"} for row in rows]),
        report.Table(
            [{"part": row["part"]} | row["utilisation"] for row in rows],
            caption=f"Share of the places in rows of {length:,} tokens that hold one, by packing",
        ),
        report.Plot(
            "document_lengths",
            [report.Series(name, *share_by_length(tokens)) for name, tokens in parts],
            title="Length of documents",
            xlabel="tokens",
            ylabel="share of the tokens in documents up to that",
            xscale="log",
            vlines=[report.Mark(length, "one row")],
        ),
    ]
    report.write_report(corpus.directory, "Prepared data", blocks)
    return result


if __name__ == "__main__":
    cli.run_main(main)
