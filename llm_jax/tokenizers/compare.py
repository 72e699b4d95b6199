"""How well tokenizers do on a text, as rows and as a Markdown table."""

import time
from collections.abc import Mapping, Sequence

from llm_jax.tokenizers.base import Tokenizer

COLUMNS = {
    "kind": "kind",
    "vocab_size": "vocabulary",
    "bytes_per_token": "bytes / token",
    "tokens_per_word": "tokens / word",
    "unknown_rate": "unknown",
    "megabytes_per_second": "encode MB/s",
    "round_trip": "round trip",
}


def report(
    tokenizers: Tokenizer | Sequence[Tokenizer] | Mapping[str, Tokenizer], text: str
) -> list[dict]:
    """Measures each tokenizer on `text`; a mapping gives the names, else the kind is the name.

    A row has `kind`, `vocab_size`, `bytes_per_token`, `tokens_per_word` (fertility; a word is what
    stands between white space), `unknown_rate` (share of the tokens), `megabytes_per_second` (wall
    time of encoding the text in lines as one batch) and `round_trip` (the text comes back).

    Raises ValueError for a text without a word.
    """
    if isinstance(tokenizers, Tokenizer):
        tokenizers = [tokenizers]
    if not isinstance(tokenizers, Mapping):
        tokenizers = dict(_numbered(tokenizers))
    words, size = len(text.split()), len(text.encode())
    if not words:
        raise ValueError("the text to compare tokenizers on has no word; change --eval_input")
    lines = text.splitlines(keepends=True)
    rows = []
    for name, tokenizer in tokenizers.items():
        tokenizer.encode_batch(lines[:2])  # what a library sets up once is not counted
        start = time.perf_counter()
        tokenizer.encode_batch(lines)
        seconds = time.perf_counter() - start
        ids = tokenizer.encode_batch([text])[0]
        unknown = 0 if tokenizer.unk_id is None else int((ids == tokenizer.unk_id).sum())
        rows.append(
            {
                "kind": name,
                "vocab_size": tokenizer.vocab_size,
                "bytes_per_token": size / max(len(ids), 1),
                "tokens_per_word": len(ids) / words,
                "unknown_rate": unknown / max(len(ids), 1),
                "megabytes_per_second": size / 1e6 / max(seconds, 1e-9),
                "round_trip": tokenizer.decode(ids) == text,
            }
        )
    return rows


def render(rows: Sequence[Mapping], title: str = "") -> str:
    """The rows as a Markdown table, under `title` if there is one."""
    formats = {
        "bytes_per_token": "{:.3f}",
        "tokens_per_word": "{:.3f}",
        "unknown_rate": "{:.3%}",
        "megabytes_per_second": "{:.1f}",
    }
    cells = [list(COLUMNS.values())]
    for row in rows:
        shown = {**row, "round_trip": "yes" if row["round_trip"] else "no"}
        cells.append([formats.get(key, "{}").format(shown[key]) for key in COLUMNS])
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    numeric = [key not in ("kind", "round_trip") for key in COLUMNS]

    def write(line: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width - 1) + ":" if right else "-" * width
        for width, right in zip(widths, numeric, strict=True)
    ]
    lines = [write(cells[0]), write(rule), *map(write, cells[1:])]
    return "\n".join([f"## {title}", ""] * bool(title) + lines) + "\n"


def _numbered(tokenizers: Sequence[Tokenizer]) -> list[tuple[str, Tokenizer]]:
    """Names for a table: the kind, with a number where a kind appears again."""
    seen: dict[str, int] = {}
    named = []
    for tokenizer in tokenizers:
        seen[tokenizer.kind] = seen.get(tokenizer.kind, 0) + 1
        again = f" ({seen[tokenizer.kind]})" if seen[tokenizer.kind] > 1 else ""
        named.append((tokenizer.kind + again, tokenizer))
    return named
