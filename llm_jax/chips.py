"""The one table of accelerators: what a utilisation figure, a plan and a bill are computed from.

Speeds and sizes are the vendors' (dense, without sparsity). Prices, powers and efficiencies are
assumptions: every plan lists the ones it used, and a flag replaces each.
"""

import difflib
from dataclasses import dataclass

GIB = 2**30
GB = 1e9
TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator as it is rented. Numbers are of the whole chip, of which JAX may see several
    `devices`."""

    name: str
    kinds: tuple[str, ...]  # parts of a jax `device_kind` that mean this chip
    peak_flops: float  # dense bfloat16 FLOP/s
    hbm_bytes: float
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s out of the chip over its fast links (NVLink, ICI), all together
    slow_bandwidth: float  # bytes/s of its share of the network behind them
    domain: int  # chips that the fast links connect
    power_kw: float  # at work, without a share of the host
    price: float  # US dollars an hour
    # Share of the peak that large models' steps reach while they compute, recomputation counted.
    efficiency: float
    torus: int = 0  # dimensions of the torus that the fast links make; 0: a switch
    devices: int = 1  # jax devices of one chip
    aot: str = ""  # libtpu's name of the platform, to compile for it without having it

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu", as jax calls it."""
        return "cpu" if self.name == "cpu" else "tpu" if self.kinds[0].startswith("TPU") else "gpu"


# Speeds, sizes and links. TPUs: cloud.google.com/tpu/docs, a page for each version (links: half
# of the bidirectional figure; network: the NICs of a host over its chips). NVIDIA: the data sheets
# (SXM versions; links: half of NVLink's figure, or PCIe's; network: 400 Gbit/s InfiniBand a GPU
# where machines of eight are sold with it, else 100 Gbit/s).
#
# Powers. NVIDIA: the data sheets' maximum. TPU v2 to v4: the mean that Google's documentation
# gives; later ones are not published, and these are estimates.
#
# Prices. TPU: Google's list price on demand in the US, 2025. GPUs: what specialised clouds asked
# for an hour in 2025; large clouds ask two to three times as much, reservations half.
#
# Efficiencies. From published utilisation: H100 46-53 % model FLOPs without recomputing matmuls
# (llm-foundry, JAX-Toolbox); v5p 70 %, v5e 67 %, v6e 46 % with some (MaxText). Others by analogy.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="h100", kinds=("H100",), peak_flops=989 * TERA, hbm_bytes=80 * GIB,
            hbm_bandwidth=3350 * GB, link_bandwidth=450 * GB, slow_bandwidth=50 * GB, domain=8,
            power_kw=0.7, price=2.0, efficiency=0.53,
        ),
        Chip(
            name="h200", kinds=("H200", "GH200"), peak_flops=989 * TERA, hbm_bytes=140 * GIB,
            hbm_bandwidth=4800 * GB, link_bandwidth=450 * GB, slow_bandwidth=50 * GB, domain=8,
            power_kw=0.7, price=2.8, efficiency=0.53,
        ),
        Chip(
            name="b200", kinds=("B200", "GB200"), peak_flops=2250 * TERA, hbm_bytes=180 * GIB,
            hbm_bandwidth=8000 * GB, link_bandwidth=900 * GB, slow_bandwidth=50 * GB, domain=8,
            power_kw=1.0, price=4.5, efficiency=0.45,
        ),
        Chip(
            name="a100-80", kinds=("A100-SXM4-80GB", "A100 80GB", "A100-SXM-80GB"),
            peak_flops=312 * TERA, hbm_bytes=80 * GIB, hbm_bandwidth=2039 * GB,
            link_bandwidth=300 * GB, slow_bandwidth=25 * GB, domain=8, power_kw=0.4, price=1.4,
            efficiency=0.6,
        ),
        Chip(
            name="a100-40", kinds=("A100",), peak_flops=312 * TERA, hbm_bytes=40 * GIB,
            hbm_bandwidth=1555 * GB, link_bandwidth=300 * GB, slow_bandwidth=25 * GB, domain=8,
            power_kw=0.4, price=1.2, efficiency=0.6,
        ),
        Chip(
            name="l40s", kinds=("L40S",), peak_flops=362 * TERA, hbm_bytes=48 * GIB,
            hbm_bandwidth=864 * GB, link_bandwidth=32 * GB, slow_bandwidth=12.5 * GB, domain=8,
            power_kw=0.35, price=0.9, efficiency=0.5,
        ),
        Chip(
            name="rtx4090", kinds=("RTX 4090",), peak_flops=165 * TERA, hbm_bytes=24 * GIB,
            hbm_bandwidth=1008 * GB, link_bandwidth=32 * GB, slow_bandwidth=1.25 * GB, domain=8,
            power_kw=0.45, price=0.4, efficiency=0.6,
        ),
        Chip(
            name="v100", kinds=("V100",), peak_flops=125 * TERA, hbm_bytes=32 * GIB,
            hbm_bandwidth=900 * GB, link_bandwidth=150 * GB, slow_bandwidth=12.5 * GB, domain=8,
            power_kw=0.3, price=0.6, efficiency=0.5,
        ),
        Chip(
            name="t4", kinds=("T4",), peak_flops=65 * TERA, hbm_bytes=16 * GIB,
            hbm_bandwidth=320 * GB, link_bandwidth=16 * GB, slow_bandwidth=3 * GB, domain=4,
            power_kw=0.07, price=0.35, efficiency=0.4,
        ),
        Chip(
            name="ironwood", kinds=("TPU7x", "TPU v7"), peak_flops=2307 * TERA,
            hbm_bytes=192 * GIB, hbm_bandwidth=7380 * GB, link_bandwidth=600 * GB,
            slow_bandwidth=12.5 * GB, domain=9216, power_kw=0.85, price=12.0, efficiency=0.6,
            torus=3, devices=2, aot="tpu7x",
        ),
        Chip(
            name="v6e", kinds=("TPU v6 lite", "TPU v6e"), peak_flops=918 * TERA,
            hbm_bytes=32 * GIB, hbm_bandwidth=1638 * GB, link_bandwidth=400 * GB,
            slow_bandwidth=12.5 * GB, domain=256, power_kw=0.3, price=2.7, efficiency=0.6,
            torus=2, aot="v6e",
        ),
        Chip(
            name="v5p", kinds=("TPU v5p", "TPU v5"), peak_flops=459 * TERA, hbm_bytes=95 * GIB,
            hbm_bandwidth=2765 * GB, link_bandwidth=600 * GB, slow_bandwidth=6.25 * GB,
            domain=8960, power_kw=0.45, price=4.2, efficiency=0.9, torus=3, aot="v5p",
        ),
        Chip(
            name="v5e", kinds=("TPU v5 lite", "TPU v5e"), peak_flops=197 * TERA,
            hbm_bytes=16 * GIB, hbm_bandwidth=819 * GB, link_bandwidth=200 * GB,
            slow_bandwidth=3.125 * GB, domain=256, power_kw=0.2, price=1.2, efficiency=0.9,
            torus=2, aot="v5e",
        ),
        Chip(
            name="v4", kinds=("TPU v4",), peak_flops=275 * TERA, hbm_bytes=32 * GIB,
            hbm_bandwidth=1228 * GB, link_bandwidth=300 * GB, slow_bandwidth=6.25 * GB,
            domain=4096, power_kw=0.17, price=3.22, efficiency=0.8, torus=3, aot="v4",
        ),
        Chip(
            name="v3", kinds=("TPU v3",), peak_flops=123 * TERA, hbm_bytes=32 * GIB,
            hbm_bandwidth=900 * GB, link_bandwidth=140 * GB, slow_bandwidth=3.125 * GB,
            domain=1024, power_kw=0.22, price=2.0, efficiency=0.6, torus=2, devices=2,
        ),
        Chip(
            name="v2", kinds=("TPU v2",), peak_flops=46 * TERA, hbm_bytes=16 * GIB,
            hbm_bandwidth=700 * GB, link_bandwidth=125 * GB, slow_bandwidth=3.125 * GB,
            domain=256, power_kw=0.2, price=1.1, efficiency=0.6, torus=2, devices=2,
        ),
        # One core of a server with AVX-512 and its share of the memory, float32.
        Chip(
            name="cpu", kinds=("cpu",), peak_flops=0.2 * TERA, hbm_bytes=8 * GIB,
            hbm_bandwidth=10 * GB, link_bandwidth=5 * GB, slow_bandwidth=1.25 * GB, domain=64,
            power_kw=0.01, price=0.05, efficiency=0.5,
        ),
    )
}  # fmt: skip


def find(name: str) -> Chip:
    """The chip of that name.

    Raises:
      ValueError: there is none; the message names the nearest.
    """
    if name not in CHIPS:
        near = difflib.get_close_matches(name.lower(), CHIPS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"no chip {name!r} is known{hint} there are {', '.join(CHIPS)}")
    return CHIPS[name]


def by_kind(device_kind: str) -> Chip | None:
    """The chip that a jax `device_kind` names ("NVIDIA H100 80GB HBM3", "TPU v5 lite"); else None."""
    kind = device_kind.lower()
    found = [(len(k), chip) for chip in CHIPS.values() for k in chip.kinds if k.lower() in kind]
    return max(found, key=lambda pair: pair[0])[1] if found else None
