"""A pseudo-random permutation of 0..n-1 that is computed, not stored."""

import numpy as np

ROUNDS = 6
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64's


def permute(indices_N: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where each index of 0..size-1 goes, int64 [N]; another permutation for another `key`.

    A Feistel network permutes the numbers below the next power of four, whatever its round function
    is; a result that is not below `size` goes through it again until it is ("cycle walking", Black
    & Rogaway, Ciphers with arbitrary finite domains, 2002), which keeps it a permutation. Memory
    does not depend on `size`, and all indices are done at once.
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    keys = np.random.SeedSequence([key, size]).generate_state(ROUNDS, np.uint64)
    mask = np.uint64((1 << int(half)) - 1)
    found = np.asarray(indices_N).astype(np.uint64)
    todo = np.arange(len(found))
    while len(todo):
        x = found[todo]
        left, right = x >> half, x & mask
        for round_key in keys:
            left, right = right, left ^ (_hash(right ^ round_key) & mask)
        x = (left << half) | right
        found[todo] = x
        todo = todo[x >= size]
    return found.astype(np.int64)


def _hash(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al., 2014): every input bit changes every output bit."""
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return x ^ (x >> np.uint64(31))
