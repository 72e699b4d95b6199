"""The one way both sides of a comparison are evaluated: consecutive windows over a whole text."""

import numpy as np


def consecutive_windows(ids: np.ndarray, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cuts `ids` [N] into non-overlapping windows, each predicting the N - 1 next ids once.

    `consecutive_windows([0, 1, 2, 3, 4, 5], 2)`:

        inputs   0 1 | 2 3 | 4
        targets  1 2 | 3 4 | 5

    Returns one or two pairs (inputs, targets): the full windows [W, length], and the incomplete
    last one [1, R] if there is one. Raises ValueError for a text without a full window.
    """
    ids = np.asarray(ids)
    n_full = (len(ids) - 1) // length
    if n_full < 1:
        raise ValueError(
            f"a text of {len(ids)} tokens has no full window of {length}; use a longer one"
        )
    split = n_full * length
    pairs = [(ids[:split].reshape(-1, length), ids[1 : split + 1].reshape(-1, length))]
    if split < len(ids) - 1:
        pairs.append((ids[None, split:-1], ids[None, split + 1 :]))
    return pairs


def window_losses(pairs: list, total_loss) -> dict:
    """Mean loss in nats a token over the full windows, and over all tokens.

    `total_loss(inputs, targets)` is the summed loss of a [B, L] pair of arrays, as a float.
    """
    totals, counts = [], []
    for inputs, targets in pairs:
        rows = range(0, len(inputs), 128)
        totals.append(sum(total_loss(inputs[r : r + 128], targets[r : r + 128]) for r in rows))
        counts.append(targets.size)
    return {
        "eval_loss": sum(totals) / sum(counts),
        "eval_tokens": sum(counts),
        "eval_loss_full_windows": totals[0] / counts[0],
        "eval_tokens_full_windows": counts[0],
    }
