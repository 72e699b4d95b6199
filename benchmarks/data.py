r"""Speed of the loader, of tokenizers and of packing, and memory of preparing and loading text.

    python -m benchmarks.data --output=benchmarks/results/data.json

speed: the loader in one process, all leaves of a Batch (bytes included), rows in random order out
of a memory-mapped corpus with documents of 500 tokens on average; median over repeats, and the
range. tokenizers, packing: processes that have one core. Each kind of tokenizer learns 4,096 ids
from 2 MB of the embedded corpus and encodes them; packing makes rows from batches of row numbers,
and plans a million documents of 500 tokens.
memory: text of the embedded corpus over and over in one file, tokenised into bytes, then 1,000
shuffled batches. What counts is the process's own memory (RssAnon); pages of mapped shards
(RssFile) belong to the page cache, and the system takes them back when it needs them. Linux only.
About 6 minutes on 2 cores, and 6 GB of disk in the temporary folder for the 2,000 MB of text.
"""

import os
import tempfile

from absl import flags

from benchmarks import record
from benchmarks.data_worker import (
    CORPUS_TOKENS,
    DOCUMENT_TOKENS,
    SHAPES,
    VOCAB_SIZE,
    measure_memory,
    measure_packing,
    measure_speeds,
    measure_tokenizers,
)
from experiments.cli import run_main

ALL_PARTS = ("speed", "memory", "tokenizers", "packing")
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write; none: only print.")
PARTS = flags.DEFINE_list("parts", list(ALL_PARTS), f"Parts to run, of {', '.join(ALL_PARTS)}.")
MEGABYTES = flags.DEFINE_list("megabytes", ["100", "1000", "2000"], "Sizes of the text.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each speed.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 1.0, "Length of each measurement.")
KINDS = flags.DEFINE_list("kinds", [], "Tokenizers to measure; none: all that there are.")
TOY = flags.DEFINE_bool("toy", False, "Tiny sizes, in seconds: does it run?")

TOKENIZER_MEGABYTES, TOKENIZER_VOCAB, PLANNED_DOCUMENTS = 2.0, 4096, 1_000_000


def table(result: dict) -> str:
    """The result as text."""
    lines = []
    for r in result["speed"]:
        isolated = "isolated" if r["isolate_documents"] else "joined"
        lines.append(
            f"{r['packing']:9} {isolated:8} {r['length']:5} x {r['batch_size']:<4} {r['how']:9}"
            f"{r['million_tokens_per_second']:8.1f} M tokens/s "
            f"({r['lowest']:.1f} to {r['highest']:.1f})"
        )
    for r in result["tokenizers"]:
        lines.append(
            f"{r['kind']:22} {r['megabytes_per_second']:8.1f} MB/s "
            f"({r['lowest']:.1f} to {r['highest']:.1f}), {r['million_tokens_per_second']:.2f} M "
            f"tokens/s, learnt {r['vocab_size']:,} ids in {r['train_seconds']:.1f} s; one core"
        )
    for r in result["packing"]:
        plan = "" if r["plan_seconds"] is None else f", plan in {r['plan_seconds']:.2f} s"
        lines.append(
            f"{r['packing']:9} {r['million_tokens_per_second']:8.1f} M tokens/s "
            f"({r['lowest']:.1f} to {r['highest']:.1f}){plan}; one core"
        )
    for r in result["memory"]:
        lines.append(
            f"{r['megabytes']:6,} MB of text: prepare {r['prepare']['RssAnon']:.0f} MB in "
            f"{r['prepare']['seconds']:.0f} s, load {r['load']['RssAnon']:.0f} MB "
            f"(+ {r['load']['RssFile']:.0f} MB of mapped files)"
        )
    return "\n".join(lines)


def main(_) -> None:
    from llm_jax.tokenizers import KINDS as EVERY_KIND

    kinds = KINDS.value or list(EVERY_KIND)
    for flag, given, known in (("parts", PARTS.value, ALL_PARTS), ("kinds", kinds, EVERY_KIND)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"--{flag}={','.join(unknown)}: there are {', '.join(known)}")
    repeats, seconds, megabytes = REPEATS.value, SECONDS.value, [int(m) for m in MEGABYTES.value]
    corpus_tokens, shapes, batches = CORPUS_TOKENS, SHAPES, 1000
    learnt, vocab_size, documents = TOKENIZER_MEGABYTES, TOKENIZER_VOCAB, PLANNED_DOCUMENTS
    if TOY.value:
        repeats, seconds, megabytes = 1, 0.01, [1]
        corpus_tokens, shapes, batches = 1_000_000, SHAPES[:1], 10
        learnt, vocab_size, documents = 0.1, 512, 1000
    result = record.header(("numpy", "grain", "jax")) | {
        "config": {
            "corpus_tokens": corpus_tokens,
            "document_tokens": DOCUMENT_TOKENS,
            "vocab_size": VOCAB_SIZE,
            "repeats": repeats,
            "seconds": seconds,
            "toy": TOY.value,
        },
        **{part: [] for part in ALL_PARTS},
    }
    with tempfile.TemporaryDirectory() as folder:
        if "speed" in PARTS.value:
            result["speed"] = measure_speeds(repeats, seconds, folder, corpus_tokens, shapes)
        if "tokenizers" in PARTS.value:
            result["tokenizers"] = measure_tokenizers(kinds, learnt, vocab_size)
        if "packing" in PARTS.value:
            result["packing"] = measure_packing(documents, seconds, folder, corpus_tokens)
        for size in megabytes if "memory" in PARTS.value else []:
            inner = os.path.join(folder, str(size))
            os.makedirs(inner)
            result["memory"].append(measure_memory(size, inner, batches))
    print(table(result))
    if OUTPUT.value:
        record.save(result, OUTPUT.value)


if __name__ == "__main__":
    run_main(main)
