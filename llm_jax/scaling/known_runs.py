"""Published training runs, for a sense of proportion and as a check of the arithmetic."""

from typing import NamedTuple

from llm_jax.scaling import cost
from llm_jax.scaling.printout import count, size


class KnownRun(NamedTuple):
    """What a paper says of its run; assumptions that it names replace the table's."""

    name: str
    params: float
    tokens: float
    chip: str
    devices: int
    assumptions: dict[str, float]  # those the paper gives, and mfu
    source: str


KNOWN_RUNS = (
    KnownRun(
        "Llama 3 405B", 405e9, 15.6e12, "h100", 16_000,
        {"mfu": 0.41, "price": 2.0, "power_kw": 0.7, "pue": 1.0, "carbon": 0.22},
        "Llama Team 2024 (arXiv 2407.21783): 3.8e25 FLOPs, 16K H100, 38 to 43 % MFU",
    ),
    KnownRun(
        "Chinchilla 67B", 67e9, 1.5e12, "v4", 4096, {"mfu": 0.5},
        "Hoffmann et al. 2022 (arXiv 2203.15556), table 3: 5.76e23 FLOPs; it ran as 70B on TPU v3 "
        "and v4, their number and the utilisation are assumed",
    ),
    KnownRun(
        "GPT-3 175B", 175e9, 300e9, "v100", 10_000, {"mfu": 0.25},
        "Brown et al. 2020 (arXiv 2005.14165): 3.14e23 FLOPs on V100; their number and the "
        "utilisation are assumed",
    ),
)  # fmt: skip


def plans(given: dict[str, float | None]) -> dict[str, dict]:
    """name -> the run's plan; `given` assumptions replace those of every run."""
    given = {name: v for name, v in given.items() if v is not None}
    return {
        run.name: cost.from_totals(
            run.params, run.tokens, run.chip, run.devices, run.assumptions | given
        )
        | {"source": run.source}
        for run in KNOWN_RUNS
    }


def table(results: dict[str, dict]) -> list[str]:
    """A Markdown table, and where the runs' numbers come from."""
    head = (
        "run", "tokens", "FLOPs (6ND)", "weights", "checkpoint", "chips", "MFU", "days",
        "chip hours", "cost", "CO2e", "over 1e26",
    )  # fmt: skip
    rows = [head, ("---",) * len(head)]
    for name, r in results.items():
        rows.append(
            (
                name,
                count(r["tokens"]),
                f"{r['flops_6nd']:.2e}",
                size(r["weights_fp32_bytes"]),
                size(r["checkpoint_bytes"]),
                f"{r['chips']:,} {r['chip']}",
                f"{r['assumptions']['mfu']['value']:.0%}",
                f"{r['days']:,.0f}",
                count(r["device_hours"]),
                f"${r['cost'] / 1e6:,.1f}M",
                f"{r['co2e_kg'] / 1e3:,.0f} t",
                "yes" if r["over_reporting_threshold"] else "no",
            )
        )
    out = ["| " + line + " |" for line in (" | ".join(row) for row in rows)]
    return out + [""] + [f"{name}: {r['source']}" for name, r in results.items()]
