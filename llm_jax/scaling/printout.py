"""A plan as text for a terminal."""

from collections.abc import Iterable
from typing import Any

from llm_jax.scaling.plan import Plan

COUNTS = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"))


def count(n: float) -> str:
    """1.23T; small numbers as they are."""
    for size, letter in COUNTS[-3:]:
        if n >= size:
            return f"{n / size:,.2f}{letter}"
    return f"{n:,.0f}"


def size(n: float) -> str:
    """Bytes in decimal units."""
    for unit, letter in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if n >= unit:
            return f"{n / unit:,.2f} {letter}"
    return f"{n:,.0f} B"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, name in ((86_400, "days"), (3600, "hours"), (60, "minutes"), (1, "s")):
        if seconds >= 2 * unit or (unit == 1 and seconds >= 1):
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds * 1e3:,.1f} ms"


def mesh(axes: dict[str, int]) -> str:
    """fsdp=8 tensor=4"""
    return " ".join(f"{axis}={n}" for axis, n in axes.items() if n > 1) or "one device"


def columns(rows: Iterable[tuple[str, ...]], indent: str = "") -> list[str]:
    """Rows of text with their columns aligned, the first to the left."""
    rows = [tuple(str(cell) for cell in row) for row in rows]
    n = max(len(row) for row in rows)
    rows = [row + ("",) * (n - len(row)) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(n)]
    return [
        indent + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def lines(p: Plan) -> list[str]:
    """The whole plan."""
    where = f"{p['devices']:,} {p['chip']}" + (f" in {p['slices']} slices" * (p["slices"] > 1))
    active = "" if p["params_active"] == p["params"] else f"{count(p['params_active'])} active, "
    out = [f"{p['name']} on {where}: {mesh(p['mesh'])}, remat {p['remat']}", ""]
    out += columns(
        [
            (
                "parameters",
                count(p["params"]),
                f"{active}{count(p['params_non_embedding'])} without embeddings",
            ),
            ("weights, float32", size(p["weights_fp32_bytes"])),
            ("checkpoint", size(p["checkpoint_bytes"]), "with both moments"),
            ("tokens a step", f"{p['tokens_per_step']:,}", f"{p['steps']:,.0f} steps"),
            ("tokens", count(p["tokens"])),
            ("FLOPs", f"{p['flops']:.3g}", f"6ND {p['flops_6nd']:.3g}"),
            ("FLOPs a step", f"{p['flops_per_step']:.3g}", "every matmul, no recomputation"),
        ]
    )
    out += ["", "memory of a device"]
    out += columns(_memory_rows(p), "  ")
    shares = p["seconds"]
    out += ["", f"a step takes {duration(p['step_seconds'])}, bound by {p['bound_by']}"]
    out += columns(
        [(what, duration(s)) for what, s in shares.items()]
        + [
            (f"  mesh.{a}", duration(x["seconds"]), size(x["bytes"]))
            for a, x in p["collectives"].items()
        ]
        + ([("pipeline idle", f"{p['bubble']:.0%}")] if p["bubble"] else []),
        "  ",
    )
    out += [""]
    out += columns(
        [
            ("MFU", f"{p['mfu']:.1%}"),
            (
                "tokens a second",
                f"{p['tokens_per_second']:,.0f}",
                f"{count(p['tokens_per_day'])} a day",
            ),
            *bill(p),
        ]
    )
    out += ["", "assumptions"] + columns(assumptions(p), "  ")
    return out + [f"note: {note}" for note in p["notes"] + p["reporting_rules"]]


def _memory_rows(p: Plan) -> list[tuple[str, ...]]:
    rows = [(kind, size(n)) for kind, n in p["bytes"].items() if n >= 1e6]
    rows += [
        ("arguments, predicted", size(p["predicted_argument_bytes"])),
        ("temporaries, predicted", size(p["predicted_temp_bytes"]), f"peak: {p['peak']}"),
    ]
    if p["temp_bytes"] is not None:
        seconds, host = p["compile_seconds"], p["host_peak_bytes"]
        live = f"{size(p['live_temp_bytes'])} at a time" if p["live_temp_bytes"] else ""
        rows += [
            ("arguments, compiled", size(p["argument_bytes"])),
            ("temporaries, compiled", size(p["temp_bytes"]), live),
            ("compilation", duration(seconds), f"{size(host)} of this machine's memory"),
        ]
    if "kv_cache_bytes" in p:
        rows.append(("keys and values for decoding", size(p["kv_cache_bytes"])))
    verdict = "fits" if p["fits"] else "DOES NOT FIT"
    return [*rows, (verdict, size(p["total_bytes"]), f"of {size(p['usable_bytes'])} usable")]


def bill(p: Plan) -> list[tuple[str, ...]]:
    """The rows about time and money."""
    rows = [
        ("time", duration(p["days"] * 86_400)),
        ("chip hours", f"{p['device_hours']:,.0f}"),
        ("cost", f"${p['cost']:,.0f}"),
    ]
    if p["staff_cost"]:
        rows.append(("staff", f"${p['staff_cost']:,.0f}", f"${p['cost_with_staff']:,.0f} together"))
    over = f"{'over' if p['over_reporting_threshold'] else 'below'} {p['reporting_threshold']:.0e} FLOPs"
    return [
        *rows,
        ("electricity", f"{p['kwh']:,.0f} kWh"),
        ("CO2e", f"{p['co2e_kg'] / 1e3:,.1f} t"),
        ("reporting", over),
    ]


def assumptions(p: Plan) -> list[tuple[str, ...]]:
    """One row for each assumption."""
    return [
        (name, f"{x['value']:,.6g}", x["unit"], x["source"]) for name, x in p["assumptions"].items()
    ]


def totals(p: Plan) -> list[str]:
    """A plan from parameters and tokens alone."""
    out = [f"{count(p['params'])} parameters on {p['chips']:,} {p['chip']}", ""]
    out += columns(
        [
            ("tokens", count(p["tokens"]), f"{p['tokens_per_param']:,.1f} a parameter"),
            ("FLOPs", f"{p['flops_6nd']:.3g}", "6ND"),
            ("weights, float32", size(p["weights_fp32_bytes"])),
            ("checkpoint", size(p["checkpoint_bytes"]), "with both moments"),
            *bill(p),
        ]
    )
    return [*out, "", "assumptions", *columns(assumptions(p), "  ")]


def law(answer: dict[str, Any]) -> list[str]:
    """What a law says of a budget (`from_law.answer`), the other laws, and the model that follows."""
    where = "" if answer["budget_from"] == "flag" else f", {answer['budget_from']}"
    out = [f"{answer['law']} ({answer['source']}) at {answer['budget']:.4g} FLOPs{where}", ""]
    rows = [("", "N*", "D*", "D*/N*", "loss", "N counts")]
    for x in ({**answer, "law": answer["law"] + " <"}, *answer["others"]):
        nats = "" if x["loss"] is None else f"{x['loss']:.4f}"
        rows.append(
            (x["law"], count(x["N*"]), count(x["D*"]), f"{x['D*/N*']:,.1f}", nats, x["counted"])
        )
    out += columns(rows)
    for name, (low, high) in answer["intervals"].items():
        out.append(f"{name} from {count(low)} to {count(high)} at {answer['level']:.0%}")
    if (error := answer["held_out_error_percent"]) is not None:
        out.append(f"runs held out of the fit were predicted {error:.2g} % off on average")
    m = answer["model"]
    out += ["", *columns(
        [
            ("model", f"{count(m['params'])} {m['counted']}", f"{m['params'] / answer['N*'] - 1:+.1%} of N*"),
            ("shape", f"{m['n_layers']} layers, {m['d_model']:,} wide",
             f"{m['n_heads']} heads on {m['kv_heads']} of keys, MLP {m['d_ff']:,}, "
             f"vocabulary {m['vocab_size']:,}"),
            ("tokens", count(m["tokens"]), f"{m['steps']:,} steps, {m['warmup_steps']:,} of warm-up"),
            ("batch", f"{count(m['batch_tokens'])} tokens",
             f"{m['batch_size']:,} rows of {m['length']:,}"
             + f" in {m['accumulation']} micro-batches" * (m["accumulation"] > 1)
             + f"; {m['batch_rule']}"),
            ("learning rate", f"{m['learning_rate']:g}", m["learning_rate_rule"]),
        ]
    )]  # fmt: skip
    return out + [f"warning: {w}" for w in answer["warnings"]]
