"""How long a step takes: what has to be computed, moved through memory and sent, over the speeds.

    step = max(computation + memory traffic, hidden communication) + exposed communication

Computation is the model's matmuls and what is computed a second time (`model.remat`, attention's
backward pass); memory traffic is what happens between them. A pipeline's bubble stretches both.
Communication of data, fsdp and context runs beside them; that of tensor, expert and stage waits.
How many bytes are sent, `llm_jax.mesh.estimate` says.
"""

import math
from typing import NamedTuple

from jax.sharding import AbstractMesh

from llm_jax import mesh as meshes
from llm_jax import sharding
from llm_jax.chips import GB
from llm_jax.config import TrainConfig
from llm_jax.nn.params import count, flatten
from llm_jax.scaling import flops
from llm_jax.scaling.assumptions import Assumptions
from llm_jax.scaling.layout import Layout, fast_group, gathered, lay_out, layer_widths
from llm_jax.scaling.state import specs_of, state_bytes

EXPOSED = ("tensor", "expert", "stage")


class Times(NamedTuple):
    """Seconds of a step, part by part."""

    compute: float  # with the bubble
    memory: float
    sent: dict[str, float]  # bytes by mesh axis that a device receives
    links: dict[str, float]  # seconds of them
    bubble: float  # share of `compute`

    @property
    def hidden(self) -> float:
        """Communication beside the computation."""
        return sum(t for axis, t in self.links.items() if axis not in EXPOSED)

    @property
    def exposed(self) -> float:
        """Communication that the computation waits for."""
        return sum(t for axis, t in self.links.items() if axis in EXPOSED)

    @property
    def step(self) -> float:
        """The whole step."""
        return max(self.compute + self.memory, self.hidden) + self.exposed

    @property
    def bound(self) -> str:
        """What the step waits for most."""
        parts = {
            "computation": self.compute,
            "memory traffic": self.memory,
            **{f"mesh.{axis}": t for axis, t in self.links.items()},
        }
        return max(parts, key=parts.get)


def estimate(cfg: TrainConfig, mesh: AbstractMesh, a: Assumptions, slices: int = 1) -> Times:
    """Times of a step of a frozen config on a mesh of so many slices (groups of fast links)."""
    specs, lay = specs_of(cfg.model), lay_out(cfg, mesh)
    chip, n = a.chip, mesh.size
    tokens = cfg.batch_size * cfg.length
    peak = a["peak_flops"] / chip.devices * a["efficiency"]
    compute = hardware_flops(cfg) * tokens / n / peak / (1 - lay.bubble)
    traffic = memory_traffic(cfg, mesh, lay)
    group = fast_group(a, n, slices)
    machine = meshes.Machine(n, a["hbm_gb"] * GB, group)
    sent = meshes.estimate(cfg, dict(mesh.shape), count(specs), machine).sent
    outer = sharding.crossing(dict(mesh.shape), machine.groups)
    links = {}
    for axis, size in mesh.shape.items():
        fast = (
            a["link_bandwidth"] * GB / chip.devices * _share(size // outer[axis], group, chip.torus)
        )
        # Every device of a group fetches its share over its own slow link.
        slow = a["slow_bandwidth"] * GB / chip.devices * size / outer[axis]
        links[axis] = sent[axis] / (fast if outer[axis] == 1 else min(fast, slow))
    moved = traffic / (a["bandwidth"] * GB / chip.devices) / (1 - lay.bubble)
    return Times(compute, moved, sent, links, lay.bubble)


def _share(size: int, group: int, torus: int) -> float:
    """Share of a chip's links that an axis of `size` devices uses: of a torus as many dimensions
    as its size takes, of a switch all."""
    if not torus or group == 1 or size == 1:
        return 1.0
    return max(1, round(torus * math.log(size) / math.log(group))) / torus


def hardware_flops(cfg: TrainConfig) -> float:
    """FLOPs per token that are really computed: with what `model.remat` and the attention's
    backward pass compute a second time."""
    m = cfg.model
    parts = flops.forward(specs_of(m), m, cfg.length, causal=True)
    scores = parts["scores"] + parts["weighted"]
    head = parts["head"]
    layers = sum(parts.values()) - scores - head
    blocks = cfg.length > m.attention_block
    again = {"none": 0.0, "dots": scores, "attention": layers, "full": layers + scores}[m.remat]
    # The head's logits and blocks of attention probabilities are never kept.
    return 3 * (layers + scores + head) + again + head + (0.5 * scores if blocks else 0.0)


def memory_traffic(cfg: TrainConfig, mesh: AbstractMesh, lay: Layout) -> float:
    """Bytes through one device's memory: weights in every pass, what every layer reads and writes,
    and the optimizer's update."""
    m = cfg.model
    state = state_bytes(cfg, mesh)
    t = lay.axes["tensor"]
    weights = sum(gathered(s, mesh) for s in flatten(specs_of(m)).values())
    passes = 4 if m.remat in ("full", "attention") else 3
    w = layer_widths(m)
    inner = 2 * w["heads"] + 2 * w["kv"] + (w["gates"] + 1) * w["mlp"]
    per_token = lay.layers * (6 * m.d_model + 2 * inner / t)
    update = 2 * (state["parameters"] + state["optimizer"]) + 2 * state["parameters"]
    return lay.passes * lay.itemsize * passes * (weights + lay.tokens * per_token) + update
