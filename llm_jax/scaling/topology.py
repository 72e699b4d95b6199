"""Devices that need not be there: a slice of TPUs by its name, or virtual CPU devices."""

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax

from llm_jax import chips


class Topology(NamedTuple):
    """`v5p:8x8x8`, `v5p:8x8x8,slices=2` or `cpu:8`, taken apart."""

    text: str
    chip: str  # a key of chips.CHIPS
    shape: tuple[int, ...]  # chips of one slice along each dimension
    slices: int = 1

    @property
    def n_devices(self) -> int:
        """JAX devices of all slices."""
        return math.prod(self.shape) * self.slices * chips.find(self.chip).devices


def parse(text: str) -> Topology:
    """The topology that `--topology=` names.

    Raises:
      ValueError: it is not CHIP:AxBxC, or the chip is unknown or has no compiler here.
    """
    found = re.fullmatch(r"([\w-]+):(\d+(?:x\d+){0,2})(?:,slices=(\d+))?", text)
    if found is None:
        raise ValueError(
            f"--topology={text} is not CHIP:AxB[xC][,slices=N], such as v5e:16x16, v5p:8x8x8 or cpu:8"
        )
    chip = chips.find(found[1])
    if chip.name != "cpu" and not chip.aot:
        raise ValueError(
            f"--topology={text}: only TPUs and cpu can be compiled for without the device; use "
            f"--chip={chip.name} --devices=N for formulas alone"
        )
    shape = tuple(int(n) for n in found[2].split("x"))
    return Topology(text, chip.name, shape, int(found[3] or 1))


def devices(topology: Topology) -> list[jax.Device]:
    """The devices to compile for. Those of a TPU slice cannot run anything.

    Raises:
      ImportError: libtpu is not installed.
      ValueError: there is no such slice, or not as many virtual devices.
    """
    if topology.chip == "cpu":
        return _cpu(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"--topology={topology.text} needs libtpu, the TPU's compiler: pip install 'llm_jax[plan]'"
        )
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # this machine is no TPU host: ask nobody about it
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no TPU is taken: several plans may run at once
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    from jax.experimental import topologies

    name = f"{chips.find(topology.chip).aot}:{'x'.join(map(str, topology.shape))}"
    options = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chip == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as e:  # jaxlib's own error types
        raise ValueError(f"--topology={topology.text}: libtpu has no such slice: {e}") from None
    return list(found)


def _cpu(topology: Topology) -> list[jax.Device]:
    n = topology.n_devices
    try:
        jax.config.update("jax_num_cpu_devices", max(n, jax.config.jax_num_cpu_devices))
    except RuntimeError:  # JAX has started already, with as many as it has
        pass
    there = jax.devices("cpu")
    if len(there) < n:
        raise ValueError(f"--topology={topology.text}: JAX runs with {len(there)} CPU devices")
    return there[:n]
