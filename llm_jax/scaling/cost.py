"""What a run costs: hours, money, electricity, carbon dioxide, and what it weighs on disk."""

from llm_jax import chips
from llm_jax.scaling.assumptions import FROM_FLAGS_ONLY, Assumption, Assumptions

# Training operations from which developers have to report to an authority.
THRESHOLDS = {
    1e26: "US Executive Order 14110, section 4.2(b) (2023, rescinded in 2025); California SB 53",
    1e25: "EU AI Act, article 51: presumed systemic risk",
}
REPORTING = 1e26


def bill(seconds: float, n_chips: int, a: Assumptions) -> dict[str, float]:
    """Cost of `seconds` of training on `n_chips` chips."""
    wall = seconds / a["goodput"]
    hours = wall * n_chips / 3600
    kwh = hours * a["power_kw"] * a["pue"]
    staff = a["staff"] * a["staff_cost"] * a["staff_years"]
    return {
        "days": wall / 86_400,
        "device_hours": hours,
        "cost": hours * a["price"],
        "staff_cost": staff,
        "cost_with_staff": hours * a["price"] + staff,
        "kwh": kwh,
        "co2e_kg": kwh * a["carbon"],
    }


def reporting(flops: float) -> dict:
    """Whether a run of so many training FLOPs has to be reported, and under which rules."""
    return {
        "reporting_threshold": REPORTING,
        "over_reporting_threshold": flops >= REPORTING,
        "reporting_rules": [f"{t:.0e}: {rule}" for t, rule in THRESHOLDS.items() if flops >= t],
    }


def weights(params: float) -> dict[str, float]:
    """Bytes of float32 weights, and of a checkpoint with both of AdamW's moments."""
    return {"weights_fp32_bytes": 4 * params, "checkpoint_bytes": 12 * params}


# What a run known by its size alone depends on.
USED = ("peak_flops", "mfu", "goodput", "price", "power_kw", "pue", "carbon")
STAFF = ("staff", "staff_cost", "staff_years")


def from_totals(
    params: float, tokens: float | None, chip: str | None, n_chips: int | None, given: dict
) -> dict:
    """The plan of a run known by its size alone: 6 N D FLOPs at a utilisation "mfu" of the peak.

    Raises:
      ValueError: something is missing, or the chip is unknown.
    """
    for flag, value in (("tokens", tokens), ("chip", chip), ("devices", n_chips)):
        if value is None:
            raise ValueError(f"--params needs --{flag} beside it")
    if not (params > 0 and tokens > 0 and n_chips > 0):
        raise ValueError(f"--params={params:g} --tokens={tokens:g} have to be positive")
    a = Assumptions(chips.find(chip), given)
    if "mfu" not in a:
        a.table["mfu"] = Assumption(
            0.4, FROM_FLAGS_ONLY["mfu"], "default: papers report 0.3 to 0.5"
        )
    flops = 6 * params * tokens
    seconds = flops / (n_chips * a["peak_flops"] * a["mfu"])
    used = USED + (STAFF if a["staff"] else ())
    return {
        "params": params,
        "tokens": tokens,
        "tokens_per_param": tokens / params,
        "flops_6nd": flops,
        "chip": chip,
        "chips": n_chips,
        **weights(params),
        **bill(seconds, n_chips, a),
        **reporting(flops),
        "assumptions": {name: x for name, x in a.to_json().items() if name in used},
    }
