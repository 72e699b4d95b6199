"""The real train step, compiled for devices that need not be there, and what the compiler says of it."""

import resource
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax

from llm_jax import sharding
from llm_jax.config import TrainConfig
from llm_jax.train import program


class Compiled(NamedTuple):
    """What one device needs, bytes, as the compiler has laid it out."""

    argument_bytes: int  # state and batch
    temp_bytes: int  # as allocated, gaps between buffers included
    live_bytes: int | None  # of them at the same time, where the compiler tells (TPUs)
    output_bytes: int
    alias_bytes: int  # of the output, written over donated arguments
    compile_seconds: float
    host_peak_bytes: int  # of this process, so far

    @property
    def total_bytes(self) -> int:
        """Everything that is in a device's memory at once."""
        return self.argument_bytes + self.temp_bytes + self.output_bytes - self.alias_bytes


def compile_step(cfg: TrainConfig, devices: Sequence[jax.Device]) -> Compiled:
    """Compiles the train step of a frozen config for its mesh over `devices`.

    Raises:
      ValueError: the compiler says that the step does not fit in a device's memory.
    """
    begin = time.perf_counter()
    mesh = sharding.make_mesh(cfg.mesh, devices)
    # Not set_mesh: on the devices of a slice that is not there, no array can be made.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        built = program.build(cfg, mesh)
        state, batch = program.abstract_state(built), program.abstract_batch(cfg, mesh)
        lowered = built.step.lower(state, batch)
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        first = str(e).split("\n")[0]
        raise ValueError(
            f"the compiler finds no room for this step ({first}); use more devices, "
            "model.remat=full or a larger accumulation"
        ) from None
    live = None
    if devices[0].platform == "tpu":
        live = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    return Compiled(
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        live_bytes=live,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        compile_seconds=time.perf_counter() - begin,
        # Kilobytes on Linux, bytes on a Mac.
        host_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    )
