"""Stop strings on the device: an automaton over bytes, walked one token at a time.

A stop string can begin in one token and end in another, and can be tokenised in many ways. So an
Aho-Corasick automaton over bytes is built from the strings, and for each token its transition is
worked out once: the device then needs one table lookup per token.
"""

from collections.abc import Sequence

import numpy as np


def byte_automaton(strings: Sequence[bytes]) -> tuple[np.ndarray, int]:
    """Transitions int32 [states, 256] from state 0, and the accepting state, which is never left."""
    children: list[dict[int, int]] = [{}]
    accepting = set()
    for string in strings:
        state = 0
        for byte in string:
            if byte not in children[state]:
                children.append({})
                children[state][byte] = len(children) - 1
            state = children[state][byte]
        accepting.add(state)
    n = len(children)
    table = np.zeros((n, 256), np.int32)
    failure = [0] * n
    queue = [0]
    for state in queue:  # breadth first: a state's failure is shorter, so it is done already
        if failure[state] in accepting:
            accepting.add(state)
        for byte in range(256):
            fallback = table[failure[state], byte] if state else 0
            child = children[state].get(byte)
            table[state, byte] = fallback if child is None else child
            if child is not None:
                failure[child] = fallback
                queue.append(child)
    accept = n
    table = np.concatenate([table, np.full((1, 256), accept, np.int32)])
    table[np.isin(table, sorted(accepting))] = accept
    return table, accept


def token_automaton(strings: Sequence[str], token_bytes: Sequence[bytes]) -> tuple[np.ndarray, int]:
    """Transitions int32 [states, V] when a whole token is read, and the accepting state.

    Raises:
      ValueError: an empty stop string.
    """
    if any(not s for s in strings):
        raise ValueError("--stop: an empty stop string would stop at once; leave it out")
    table, accept = byte_automaton([s.encode() for s in strings])
    lengths = np.array([len(b) for b in token_bytes])
    padded = np.zeros((len(token_bytes), max(lengths.max(initial=0), 1)), np.uint8)
    for row, b in zip(padded, token_bytes, strict=True):
        row[: len(b)] = np.frombuffer(b, np.uint8)
    states = np.repeat(np.arange(len(table), dtype=np.int32)[:, None], len(token_bytes), axis=1)
    for j in range(padded.shape[1]):
        reads = lengths > j
        states[:, reads] = table[states[:, reads], padded[reads, j][None, :]]
    return states, accept
