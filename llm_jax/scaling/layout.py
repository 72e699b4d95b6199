"""What one device of a mesh has to do with a batch and with a layer: the sizes all formulas share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from llm_jax import sharding
from llm_jax.config import GATED, ModelConfig, TrainConfig
from llm_jax.nn import pipeline
from llm_jax.nn.params import ParamSpec
from llm_jax.scaling.assumptions import Assumptions


@dataclass(frozen=True)
class Layout:
    """Sizes on one device. A pass is one micro-batch's way through the model."""

    axes: Mapping[str, int]  # of the mesh
    rows: int  # of a pass
    length: int  # of a row, on this device
    layers: int  # of this device's stages
    passes: int  # in a step
    micro: int  # micro-batches of the pipeline in a pass
    turns: int  # that each takes through the stages
    itemsize: int  # bytes of the compute type

    @property
    def tokens(self) -> int:
        """Of a pass, where heads and the MLP are cut and the length is not."""
        return self.rows * self.length

    @property
    def stream(self) -> int:
        """Tokens of the residual stream, whose length is cut along "tensor" too."""
        t = self.axes["tensor"]
        return self.tokens if self.length % t else self.tokens // t

    @property
    def bubble(self) -> float:
        """Share of the time in which a pipeline's stage waits."""
        return pipeline.bubble(self.micro, self.axes["stage"], self.turns)


def lay_out(cfg: TrainConfig, mesh: Mesh | AbstractMesh) -> Layout:
    """The layout of a frozen config on a mesh that divides it (`sharding.check_divisible`)."""
    axes = dict(mesh.shape)
    shards = math.prod(axes[a] for a in sharding.RULES["batch"])
    rows = cfg.batch_size // cfg.accumulation
    micro = 1
    if axes["stage"] > 1:
        micro = pipeline.microbatches(cfg.model, rows, shards, axes["stage"])
    return Layout(
        axes=axes,
        rows=rows // shards,
        length=cfg.length // axes["context"],
        layers=cfg.model.n_layers // axes["stage"],
        passes=cfg.accumulation,
        micro=micro,
        turns=cfg.model.pipeline_turns,
        itemsize=jnp.dtype(cfg.model.dtype).itemsize,
    )


def abstract_mesh(cfg: TrainConfig, n_devices: int) -> AbstractMesh:
    """The config's mesh over devices that nobody has.

    Raises:
      ValueError: its axes do not multiply to the number of devices.
    """
    shape = sharding.mesh_shape(cfg.mesh, n_devices)
    return AbstractMesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def fast_group(a: Assumptions, n_devices: int, slices: int) -> int:
    """Devices that fast links join: a slice, a machine, or as many as there are."""
    return int(min(n_devices / slices, a["domain"] * a.chip.devices))


def gathered(spec: ParamSpec, mesh: Mesh | AbstractMesh) -> float:
    """Elements of a parameter that a device computes with, once fsdp has gathered them; of one
    stacked over layers, those of all of the device's layers."""
    whole = [None if axis in ("embed", "expert_embed") else axis for axis in spec.axes]
    cut = sharding.partition_spec(whole, mesh)
    axes = [a for entry in cut if entry for a in (entry if isinstance(entry, tuple) else (entry,))]
    return math.prod(spec.shape) / math.prod(mesh.shape[a] for a in axes)


def layer_widths(m: ModelConfig) -> dict[str, float]:
    """Widths of a layer's parts that a token goes through: "heads" H Dh, "kv" K Dh, "mlp" (the
    MLP's, or the chosen experts' and the shared ones' together), "gates" (matrices into it)."""
    moe = m.moe
    return {
        "heads": m.n_heads * m.head_dim,
        "kv": m.kv_heads * m.head_dim,
        "mlp": (moe.top_k + moe.n_shared) * moe.d_ff if moe.n_experts else m.d_ff,
        "gates": 2 if m.activation in GATED else 1,
    }
