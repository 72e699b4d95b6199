"""The yield report: what was asked, what was kept, what was rejected by which rule, how diverse."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import report
from llm_jax.align.self_instruct import filters
from llm_jax.align.self_instruct.tasks import Task
from llm_jax.eval.output import write_json

STAGES = ("instruction", "kind", "input", "label", "labelled", "output", "next", "answer")
EXAMPLES = 10


def write(
    folder: Path,
    lines: Sequence[dict[str, Any]],
    seeds: Sequence[Task],
    kept: Sequence[Task],
    options: dict[str, Any],
    source: str,
) -> dict[str, Any]:
    """Writes report.json and report.md of the journal's `lines`; returns the content of the former."""
    counts = summarize(lines, seeds, kept) | {"options": options, "model": source}
    write_json(str(folder / "report.json"), counts)
    report.write_report(folder, "Self-Instruct", _blocks(counts, kept))
    return counts


def summarize(
    lines: Sequence[dict[str, Any]], seeds: Sequence[Task], kept: Sequence[Task]
) -> dict[str, Any]:
    """Counts of a run; every instruction that was parsed is kept or has one rejection."""
    rejected = Counter((r["stage"], r["rule"]) for line in lines for r in line["rejected"])
    by_seed = filters.Similarity([t.instruction for t in seeds])
    nearest = [by_seed.highest(t.instruction) for t in kept]
    lengths = {
        "instruction": [len(t.instruction.split()) for t in kept],
        "input": [len(t.input.split()) for t in kept if t.input],
        "output": [len(t.output.split()) for t in kept],
    }
    parsed = sum(line["parsed"] for line in lines)
    return {
        "seed_tasks": len(seeds),
        "rounds": len(lines),
        "asked": sum(line["asked"] for line in lines),
        "parsed": parsed,
        "kept": len(kept),
        "yield": len(kept) / parsed if parsed else 0.0,
        "with_input": sum(bool(t.input) for t in kept),
        "classification": sum(t.classification for t in kept),
        "rejected": [
            {"stage": stage, "rule": rule, "count": n}
            for (stage, rule), n in sorted(
                rejected.items(), key=lambda x: (STAGES.index(x[0][0]), -x[1], x[0][1])
            )
        ],
        "rouge_l_to_seeds": _histogram(nearest),
        "words": {name: _quantiles(values) for name, values in lengths.items()},
        "first_words": Counter(t.instruction.split()[0].lower() for t in kept).most_common(12),
        "different_first_words": len({t.instruction.split()[0].lower() for t in kept}),
    }


def _histogram(values: Sequence[float]) -> dict[str, int]:
    counts, edges = np.histogram(values, bins=np.linspace(0, 1, 11))
    return {f"{a:.1f}-{a + 0.1:.1f}": int(n) for a, n in zip(edges, counts, strict=False)}


def _quantiles(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    names = {"least": 0, "quarter": 0.25, "median": 0.5, "three quarters": 0.75, "most": 1}
    return {name: float(np.quantile(values, q)) for name, q in names.items()}


def _blocks(counts: dict[str, Any], kept: Sequence[Task]) -> list[report.Block]:
    names = {
        "seed_tasks": "seed tasks",
        "asked": "completions asked for instructions",
        "parsed": "instructions in them",
        "kept": "tasks kept",
        "with_input": "of them with an input",
        "classification": "of them classification",
    }
    rows = [{"what": name, "count": counts[key]} for key, name in names.items()]
    total = sum(r["count"] for r in counts["rejected"])
    blocks = [
        report.Text(
            f"Model: {counts['model'] or 'not named'}. Of {counts['parsed']} instructions "
            f"{counts['kept']} became tasks: a yield of {counts['yield']:.1%}. Kept tasks are in "
            "`kept.jsonl`, all others with their rule in `rejected.jsonl`."
        ),
        report.Table(rows),
        report.Text(
            "## Rejected\n\nAn instruction goes through the stages in this order: the instruction "
            "itself; its kind; an input and an output, or a label and then an input that fits it."
        ),
        report.Table([*counts["rejected"], {"stage": "all", "rule": "", "count": total}]),
        report.Text("## Diversity of the kept tasks"),
        report.Table(
            [{"ROUGE-L": k, "tasks": n} for k, n in counts["rouge_l_to_seeds"].items() if n],
            caption="Highest ROUGE-L F1 of an instruction with a seed task",
        ),
        report.Table(
            [{"text": k, **q} for k, q in counts["words"].items() if q], caption="Length in words"
        ),
        report.Table(
            [{"first word": w, "tasks": n} for w, n in counts["first_words"]],
            caption=f"First words of instructions, the most frequent of "
            f"{counts['different_first_words']} different ones",
        ),
        report.Text("## Examples"),
    ]
    for i, t in enumerate(kept[:EXAMPLES], start=1):
        given = f"\n\nInput: {t.input}" if t.input else ""
        blocks.append(report.Code(f"{t.instruction}{given}\n\nOutput: {t.output}", caption=f"{i}."))
    return blocks
