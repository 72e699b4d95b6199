"""Tokenises text into shards that training reads, with a report.

  python -m experiments.prepare_data --input=corpus.txt --vocab_size=8192 --output=prepared
  python -m experiments.pretrain --config=configs/quickstart.py --input=prepared --workdir=runs/mine

OUTPUT gets tokenizer/, train/, eval/, report.md and report.json.
"""

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
    from llm_jax.data.summary import write_report

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
    result = write_report(prepare_in(_OUTPUT.value, data, tokenizer), _LENGTH.value)
    for part in result["parts"]:
        print(
            f"{part['part']}: {part['documents']:,} documents, {part['tokens']:,} tokens, "
            f"{part['bytes_per_token']:.3f} bytes a token, {part['unknown_rate']:.2%} unknown"
        )
    print(f"report: {_OUTPUT.value}/report.md")


if __name__ == "__main__":
    cli.run_main(main)
