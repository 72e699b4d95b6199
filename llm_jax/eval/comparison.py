"""Two models on the same questions: paired comparison of the records that evaluations leave."""

import json
import os
from collections import defaultdict

from llm_jax.eval.uncertainty import paired_bootstrap


def read_records(path: str) -> list[dict]:
    """The records of an evaluation (`--items`), one JSON object a line.

    Raises:
      FileNotFoundError, ValueError: no such file, or one that is not made of such records.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--compare: {path}: no such file")
    records = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                records.append({k: record[k] for k in ("task", "index", "id", "group", "metrics")})
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{path}:{number}: not a record that --items wrote (--compare)"
                ) from None
    return records


def compare(
    first: list[dict], second: list[dict], *, samples: int = 10_000, seed: int = 0
) -> dict[str, dict]:
    """Task -> n and metrics {name: {first, second, difference, stderr, low, high, p_value}}.

    The interval [low, high] of first - second holds 95 % (`uncertainty.paired_bootstrap`).

    Raises:
      ValueError: records of other tasks or questions than the second's, or of a single one.
    """
    tasks = [_by_task(records) for records in (first, second)]
    if list(tasks[0]) != list(tasks[1]):
        raise ValueError(
            f"--compare: tasks {', '.join(tasks[0])} against {', '.join(tasks[1])}; both runs need "
            "the same --task"
        )
    out = {}
    for task, a in tasks[0].items():
        b = tasks[1][task]
        if [r["id"] for r in a] != [r["id"] for r in b]:
            raise ValueError(
                f"--compare: {task} was run on other questions ({len(a)} and {len(b)}); both runs "
                "need the same --input and --limit"
            )
        out[task] = {"n": len(a), "metrics": {}}
        for metric in a[0]["metrics"]:
            if metric not in b[0]["metrics"]:
                continue
            values = [[r["metrics"][metric] for r in records] for records in (a, b)]
            found = paired_bootstrap(*values, samples=samples, seed=seed)
            out[task]["metrics"][metric] = {
                "first": sum(values[0]) / len(a),
                "second": sum(values[1]) / len(b),
                "difference": found.difference,
                "stderr": found.standard_error,
                "low": found.low,
                "high": found.high,
                "p_value": found.p_value,
            }
    return out


def table(compared: dict[str, dict]) -> str:
    """The comparison as lines of text."""
    lines = ["first - second, with its 95 % interval and the p-value of no difference"]
    for task, result in compared.items():
        for metric, m in result["metrics"].items():
            lines.append(
                f"{task} {metric} (n {result['n']}): {m['first']:.4f} - {m['second']:.4f} = "
                f"{m['difference']:+.4f} [{m['low']:+.4f}, {m['high']:+.4f}], p {m['p_value']:.4f}"
            )
    return "\n".join(lines)


def _by_task(records: list[dict]) -> dict[str, list[dict]]:
    found = defaultdict(list)
    for record in records:
        found[record["task"]].append(record)
    return {task: sorted(rs, key=lambda r: r["index"]) for task, rs in sorted(found.items())}
