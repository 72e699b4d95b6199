"""What a plan takes for granted: every number with its unit and where it comes from."""

from collections.abc import Mapping
from typing import NamedTuple

from llm_jax.chips import GB, Chip


class Assumption(NamedTuple):
    """One number that a plan depends on and that nobody has measured for it."""

    value: float
    unit: str
    source: str  # "flag", or the table or convention it comes from


class Default(NamedTuple):
    """A default that does not depend on the chip."""

    value: float
    unit: str
    why: str


# Each has a flag of the same name.
OF_THE_CHIP = {
    "peak_flops": "FLOP/s a chip",
    "hbm_gb": "GB a chip",
    "bandwidth": "GB/s of a chip's memory",
    "link_bandwidth": "GB/s out of a chip over its fast links",
    "slow_bandwidth": "GB/s out of a chip over the network",
    "domain": "chips that fast links connect",
    "efficiency": "of the peak while computing",
    "price": "$ a chip and hour",
    "power_kw": "kW a chip",
}
DEFAULTS = {
    "reserve": Default(0.06, "of the memory kept free", "runtime, fragmentation, kernels' scratch"),
    "goodput": Default(1.0, "of the time is training", "no restarts, no evaluation, no stragglers"),
    "pue": Default(1.1, "kWh drawn a kWh computed", "large operators report 1.1, the mean is 1.56"),
    "carbon": Default(0.37, "kg CO2e a kWh", "mean of the US grid (EPA eGRID 2022)"),
    "staff": Default(0.0, "people", "left out unless asked for"),
    "staff_cost": Default(500_000.0, "$ a person and year", "left out unless asked for"),
    "staff_years": Default(1.0, "years", "left out unless asked for"),
}
FROM_FLAGS_ONLY = {"mfu": "model FLOPs of the peak; replaces the roofline"}
FLAGS = (*OF_THE_CHIP, *DEFAULTS, *FROM_FLAGS_ONLY)


class Assumptions(Mapping):
    """name -> value; `table` says where each comes from.

    `given` holds what flags replace. Raises ValueError for a name that is none, or a value that
    cannot be.
    """

    def __init__(self, chip: Chip, given: Mapping[str, float | None] | None = None):
        given = {name: float(v) for name, v in (given or {}).items() if v is not None}
        if unknown := set(given) - set(FLAGS):
            raise ValueError(f"no assumption is called {sorted(unknown)[0]}; there are {FLAGS}")
        for name, value in given.items():
            if value < 0 or (value == 0 and name in ("peak_flops", "bandwidth", "mfu", "goodput")):
                raise ValueError(f"--{name}={value:g} has to be positive")
            if value > 1 and name in ("efficiency", "reserve", "goodput", "mfu"):
                raise ValueError(f"--{name}={value:g} is a share, at most 1")
        of_chip = {
            "peak_flops": chip.peak_flops,
            "hbm_gb": chip.hbm_bytes / GB,
            "bandwidth": chip.hbm_bandwidth / GB,
            "link_bandwidth": chip.link_bandwidth / GB,
            "slow_bandwidth": chip.slow_bandwidth / GB,
            "domain": chip.domain,
            "efficiency": chip.efficiency,
            "price": chip.price,
            "power_kw": chip.power_kw,
        }
        self.chip, self.table = chip, {}
        for name, unit in OF_THE_CHIP.items():
            self.table[name] = Assumption(float(of_chip[name]), unit, f"chips.py, {chip.name}")
        for name, (value, unit, why) in DEFAULTS.items():
            self.table[name] = Assumption(value, unit, f"default: {why}")
        for name, value in given.items():
            unit = FROM_FLAGS_ONLY.get(name) or self.table[name].unit
            self.table[name] = Assumption(value, unit, "flag")

    def __getitem__(self, name: str) -> float:
        return self.table[name].value

    def __iter__(self):
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def to_json(self) -> dict[str, dict]:
        """{name: {"value", "unit", "source"}}."""
        return {name: x._asdict() for name, x in self.table.items()}
