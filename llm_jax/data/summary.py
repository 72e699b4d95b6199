"""What is in a prepared corpus, as numbers and as a report."""

import json
import os
from collections.abc import Sequence

import numpy as np

from llm_jax import report
from llm_jax.data import packing
from llm_jax.data.prepare import Corpus
from llm_jax.data.tokens import Tokens


def summarise(parts: Sequence[tuple[str, Tokens]], length: int) -> list[dict]:
    """One JSON-ready dict for each named part of a corpus.

    Keys: `part`, `documents`, `characters`, `bytes`, `tokens`, `bytes_per_token`, `unknown_rate`
    (share of the tokens), `tokens_per_document` (median), `tokens_per_second` (of tokenising), and
    `utilisation`: for each packing the share of places in rows of `length` that hold a token.
    """
    return [_summary(name, tokens, length) for name, tokens in parts]


def _summary(name: str, tokens: Tokens, length: int) -> dict:
    m = tokens.manifest
    rows = max((tokens.total - 1) // length, 0)
    used = {"split": 1.0 if rows else tokens.total / length}
    used |= {
        kind: packing.make_plan(tokens, kind, length).utilisation for kind in ("first_fit", "pad")
    }
    return {
        "part": name,
        "documents": m.documents,
        "characters": m.characters,
        "bytes": m.bytes,
        "tokens": m.tokens,
        "bytes_per_token": m.bytes / m.tokens,
        "unknown_rate": m.unknown / m.tokens,
        "tokens_per_document": float(np.median(np.diff(tokens.offsets))),
        "tokens_per_second": m.tokens / max(m.seconds, 1e-3),
        "utilisation": used,
    }


def write_report(corpus: Corpus, length: int) -> dict:
    """Writes report.md, its plot and report.json into the corpus's folder; returns the latter."""
    parts = [(c.name, c.tokens) for c in corpus.train]
    if corpus.evaluation is not None:
        parts.append(("eval", corpus.evaluation))
    rows = summarise(parts, length)
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
    used = [{"part": r["part"]} | r["utilisation"] for r in rows]
    lossless = "gives every text back" if tokenizer.lossless else "does not give every text back"
    blocks = [
        report.Text(
            f"Tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} ids, {lossless}. Train with "
            f"`python -m experiments.pretrain --input={corpus.directory}`."
        ),
        report.Table([{k: v for k, v in r.items() if k != "utilisation"} for r in rows]),
        report.Table(used, caption=f"Share of places in rows of {length:,} tokens that are filled"),
        report.Plot(
            "document_lengths",
            [_lengths(name, tokens) for name, tokens in parts],
            title="Length of documents",
            xlabel="tokens",
            ylabel="share of the tokens in shorter documents",
            xscale="log",
            vlines=[report.Mark(length, "one row")],
        ),
    ]
    report.write_report(corpus.directory, "Prepared data", blocks)
    return result


def _lengths(name: str, tokens: Tokens, points: int = 60) -> report.Series:
    size_D = np.sort(np.diff(tokens.offsets))
    share_D = np.cumsum(size_D) / size_D.sum()
    at = np.unique(np.geomspace(1, size_D[-1] + 1, points).round().astype(np.int64))
    below = np.searchsorted(size_D, at, "right")
    y = np.where(below > 0, share_D[below - 1], 0.0)
    return report.Series(name, at.tolist(), y.tolist())
