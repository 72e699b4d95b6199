"""What is in a prepared corpus, as numbers."""

import numpy as np

from llm_jax.data import packing
from llm_jax.data.tokens import Tokens


def summarise(tokens: Tokens, length: int) -> dict:
    """JSON-ready numbers about a tokenised text on disk.

    Keys: `documents`, `characters`, `bytes`, `tokens`, `bytes_per_token`, `unknown_rate` (share of
    the tokens), `tokens_per_document` (median), `tokens_per_second` (of tokenising), and
    `utilisation`: for each packing the share of places in rows of `length` that hold a token.
    """
    m = tokens.manifest
    used = {"split": min(tokens.total / length, 1.0)}
    for kind in ("first_fit", "pad"):
        used[kind] = packing.make_plan(tokens, kind, length).utilisation
    return {
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


def share_by_length(tokens: Tokens, points: int = 60) -> tuple[list[int], list[float]]:
    """Lengths on a logarithmic grid, and the share of the tokens in documents up to that long."""
    size_D = np.sort(np.diff(tokens.offsets))
    share_D = np.cumsum(size_D) / size_D.sum()
    at = np.unique(np.geomspace(1, size_D[-1] + 1, points).round().astype(np.int64))
    below = np.searchsorted(size_D, at, "right")
    return at.tolist(), np.where(below > 0, share_D[below - 1], 0.0).tolist()
