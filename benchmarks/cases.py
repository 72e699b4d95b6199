"""Cases of a benchmark as processes of their own, within a time and a memory that are given."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import record


class Clock:
    """What is left of the time for everything."""

    def __init__(self, minutes: float):
        self.minutes, self.begin = minutes, time.monotonic()

    def passed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.begin

    def left(self) -> float:
        """Seconds until the end, 0 after it."""
        return max(60 * self.minutes - self.passed(), 0.0)


def run_case(
    command: Sequence[str],
    environment: dict[str, str],
    clock: Clock,
    least: float,
    reserve: float = 0.0,
) -> dict[str, Any]:
    """The JSON on the last line of a worker's output, or {"skipped": why}.

    It is not started with fewer than `least` seconds left before the `reserve` of what follows, and
    ended when none are left; a result that it has printed by then is kept, with "cut_short": why.
    """
    left = max(clock.left() - reserve, 0.0)
    kept = f" and {reserve:.0f} s are kept for what follows" if reserve else ""
    if left < least:
        limit = f"{clock.left():.0f} s are left of --minutes={clock.minutes:g}{kept}"
        return {"skipped": f"{limit}, it needs at least {least:g} s"}
    try:
        done = subprocess.run(
            command,
            cwd=record.ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=left,
        )
    except subprocess.TimeoutExpired as e:
        why = f"it was not done after {left:.0f} s, all that --minutes left{kept}"
        so_far = (e.stdout or b"").decode(errors="replace").splitlines()  # bytes, also as text
        try:
            return json.loads(so_far[-1]) | {"cut_short": why}
        except (IndexError, ValueError, TypeError):
            return {"skipped": why}
    if done.returncode:
        tail = " | ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        return {"skipped": f"exit status {done.returncode}: {tail[-600:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def rows_to_try(rows: int, memory: float | None, reference: float) -> int:
    """Half of `rows` as often as `memory` is clearly below its half of `reference`; both in bytes."""
    share = 1.0
    while memory and rows > 1 and memory < 0.8 * reference * share:
        rows, share = rows // 2, share / 2
    return rows


def most_rows(rows: int, attempt: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """attempt(rows), with half of them as often as it returns {"out_of_memory": message}."""
    tried = []
    while True:
        result = attempt(rows)
        if "out_of_memory" not in result:
            return result | {"out_of_memory_at_rows": tried}
        tried.append(rows)
        if rows == 1:
            return {"skipped": f"out of memory with {tried} rows: {result['out_of_memory']}"}
        rows //= 2
