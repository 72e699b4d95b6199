"""Trains a tokenizer and reports how well it does.

    python -m experiments.train_tokenizer --input='texts/*.txt' --vocab_size=8192 --output=tokenizer
    python -m experiments.train_tokenizer --kind=hf_bpe --compare --output=tokenizer

Without --input it learns from the embedded corpus. The output folder is what
`--config.tokenizer.path` and `llm_jax.tokenizers.load` take; report.md and report.json in it hold
the measurements.
"""

import importlib.util
import json
import pathlib
import time

from absl import flags

from experiments import cli

_INPUT = flags.DEFINE_list("input", [], "files, folders, globs, hf:NAME; default: embedded:docs")
_KIND = flags.DEFINE_string(
    "kind",
    "sentencepiece_bpe",
    "sentencepiece_bpe | sentencepiece_unigram | hf_bpe | hf_wordpiece | byte | char | word",
)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "tokens, special ones included")
_OUTPUT = flags.DEFINE_string("output", None, "folder to write", required=True)
_SPECIAL_TOKENS = flags.DEFINE_list("special_tokens", [], "further ones: '<|user|>,<|end|>'")
_SPLIT_DIGITS = flags.DEFINE_bool("split_digits", False, "every digit is a token")
_KEEP_INDENTATION = flags.DEFINE_bool("keep_indentation", True, "no: runs of spaces collapse")
_BYTE_FALLBACK = flags.DEFINE_bool("byte_fallback", True, "no: unseen characters are unknown")
_UNK = flags.DEFINE_bool("unk", True, "char and word: have an unknown token")
_MAX_BYTES = flags.DEFINE_integer("max_bytes", 20_000_000, "learn from a sample; 0: from all")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the sample")
_COMPARE = flags.DEFINE_bool("compare", False, "train all kinds and compare them on held-out text")
_EVAL_INPUT = flags.DEFINE_list("eval_input", [], "text to measure on, as --input")

DEFAULT_INPUT = ("embedded:docs",)
MEASURED_BYTES = 1_000_000


def main(argv: list[str]) -> None:
    del argv
    from llm_jax import tokenizers
    from llm_jax.data import documents

    def read(inputs):
        return (document.text for document in documents.read(tuple(inputs)))

    inputs = _INPUT.value or DEFAULT_INPUT
    sampling = {"max_bytes": _MAX_BYTES.value or None, "seed": _SEED.value}
    options = {
        "vocab_size": _VOCAB_SIZE.value,
        "special_tokens": _SPECIAL_TOKENS.value,
        "split_digits": _SPLIT_DIGITS.value,
        "keep_indentation": _KEEP_INDENTATION.value,
        "byte_fallback": _BYTE_FALLBACK.value,
        "unk": _UNK.value,
    }
    start = time.perf_counter()
    tokenizer = tokenizers.train(_KIND.value, read(inputs), **options, **sampling)
    seconds = time.perf_counter() - start
    tokenizer.save(_OUTPUT.value)
    print(f"{tokenizer.kind}: {tokenizer.vocab_size} tokens in {seconds:.1f} s, {_OUTPUT.value}")

    notes = []
    texts, text = None, None
    if _EVAL_INPUT.value:
        text = "".join(tokenizers.sample(read(_EVAL_INPUT.value), MEASURED_BYTES, _SEED.value))
        notes.append(f"Measured on {', '.join(_EVAL_INPUT.value)}.")
    if _COMPARE.value:
        kinds = [kind for kind in tokenizers.KINDS if not kind.startswith("hf_")]
        if importlib.util.find_spec("tokenizers"):
            kinds = list(tokenizers.KINDS)
        else:
            notes.append("Without hf_bpe and hf_wordpiece: pip install 'llm_jax[tokenizers]'.")
        if text is None:
            texts, text = tokenizers.hold_out(read(inputs), **sampling)
            notes.append("Each kind learned from 90 % of the text and is measured on the rest.")
        else:
            texts = list(tokenizers.sample(read(inputs), **sampling))
        measured = {}
        for kind in kinds:
            try:
                measured |= tokenizers.train_each([kind], texts, **options | {"unk": True})
            except ValueError as error:
                notes.append(f"Without {kind}: {error}.")
    else:
        measured = {tokenizer.kind: tokenizer}
        if text is None:
            text = "".join(tokenizers.sample(read(inputs), MEASURED_BYTES, _SEED.value))
            notes.append("Measured on a sample of the text it learned from; see --eval_input.")
    rows = tokenizers.report(measured, text)
    print("\n".join([tokenizers.render(rows), *notes]))
    _write(tokenizer, rows, notes, text, seconds)


def _write(tokenizer, rows, notes, text, seconds) -> None:
    """report.md, report.json and, for a comparison, a plot."""
    from llm_jax import report

    start = text.strip()[:400]
    shown = [tokenizer.decode([i], skip_special=False) for i in tokenizer.encode(start)]
    special = ", ".join(f"`{name}`" for name in tokenizer.special_tokens)
    summary = {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "lossless": tokenizer.lossless,
        "special_tokens": tokenizer.special_tokens,
        "options": tokenizer.options,
        "fingerprint": tokenizer.fingerprint(),
        "seconds": seconds,
        "measured_bytes": len(text.encode()),
        "notes": notes,
        "rows": rows,
    }
    facts = [
        f"- {'every' if tokenizer.lossless else 'not every'} UTF-8 text comes back byte for byte",
        f"- special tokens: {special or 'none'}",
        f"- options: {json.dumps(tokenizer.options)}",
        f"- fingerprint: `{summary['fingerprint']}`",
    ]
    blocks = [
        report.Text("\n".join(facts)),
        report.Table(rows, caption=" ".join(notes)),
        report.Code("|".join(shown), caption="The start of that text, cut into tokens"),
    ]
    if len(rows) > 1:
        bars = report.Series(
            "",
            [row["kind"] for row in rows],
            [row["bytes_per_token"] for row in rows],
            style="bars",
        )
        blocks.append(
            report.Plot("bytes_per_token", [bars], title="Compression", ylabel="bytes per token")
        )
    title = f"Tokenizer {tokenizer.kind}, {tokenizer.vocab_size:,} tokens"
    report.write_report(_OUTPUT.value, title, blocks)
    path = pathlib.Path(_OUTPUT.value) / "report.json"
    path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run_main(main)
