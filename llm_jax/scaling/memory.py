"""Bytes that one device needs while it takes a step, by kind, by formula.

What a compiler allocates follows from what has to live at the same time. The state and the batch
are there throughout. What the backward pass starts from (`model.remat`) lives from a layer's
forward pass to its backward pass, gradients from then on; the weights that fsdp gathers, a layer's
inner activations and the head's logits come and go. The peak is the largest of three moments.
`docs/plan.md` has how close this comes to what compilers allocate.
"""

from typing import NamedTuple

from jax.sharding import AbstractMesh

from llm_jax.config import TrainConfig
from llm_jax.nn import experts, head
from llm_jax.nn.params import flatten
from llm_jax.scaling.layout import Layout, gathered, lay_out, layer_widths
from llm_jax.scaling.state import specs_of, state_bytes

# What lives at each of the moments that can be the peak.
IN_A_LAYER = (
    "compute copies", "kept activations", "gradients", "gathered weights", "layer", "pipeline",
)  # fmt: skip
MOMENTS = {
    "an MLP's backward pass": (*IN_A_LAYER, "MLP", "dispatch", "whole gradients"),
    "attention's backward pass": (*IN_A_LAYER, "attention"),
    "the output head": ("compute copies", "kept activations", "logits"),
    "the update": ("gradients", "update"),
}


# Compilers allocate more than lives at a time: gaps between buffers and copies. Shares of what lives,
# measured (docs/plan.md); what a TPU keeps of all layers is one buffer and adds none.
GAPS = {"cpu": 0.3}
GAPS_DEFAULT = 0.25


class Memory(NamedTuple):
    """Bytes on one device."""

    arguments: dict[str, int]  # kind -> bytes; there before the step and after it
    temporaries: dict[str, float]  # kind -> bytes; not all at the same time
    platform: str

    def at(self, moment: str) -> float:
        """Temporaries that live at one of MOMENTS."""
        return sum(self.temporaries[kind] for kind in MOMENTS[moment])

    @property
    def peak(self) -> str:
        """The moment when most is needed."""
        return max(MOMENTS, key=self.at)

    @property
    def argument_bytes(self) -> int:
        """All arguments."""
        return sum(self.arguments.values())

    @property
    def gaps(self) -> float:
        """What is allocated on top at the peak."""
        lives = self.at(self.peak)
        if self.platform != "cpu" and "kept activations" in MOMENTS[self.peak]:
            lives -= self.temporaries["kept activations"]
        return GAPS.get(self.platform, GAPS_DEFAULT) * lives

    @property
    def temp_bytes(self) -> int:
        """Temporaries at the peak, as a compiler allocates them."""
        return round(self.at(self.peak) + self.gaps)


def predict(cfg: TrainConfig, mesh: AbstractMesh, platform: str) -> Memory:
    """The memory of a train step of a frozen config on one device of `platform`."""
    lay, arguments = lay_out(cfg, mesh), state_bytes(cfg, mesh)
    c = lay.itemsize
    held = arguments["parameters"] / 4  # elements of this device
    # A layer's matrices, in their whole width.
    layer = [s for s in flatten(specs_of(cfg.model)).values() if s.axes[0] == "layer"]
    whole = sorted(gathered(s, mesh) / lay.layers * c for s in layer)
    cut = mesh.shape["fsdp"] * mesh.shape["expert"] > 1
    # A pipeline's stages keep what goes through them in bubbles, too.
    kept = kept_activations(cfg, lay) * lay.layers / (1 - lay.bubble)
    return Memory(
        arguments,
        {
            "compute copies": held * c if c < 4 else 0,
            "kept activations": kept,
            "gradients": held * (c + 4 * (cfg.accumulation > 1)),
            "gathered weights": sum(whole) if cut else 0,
            "whole gradients": sum(whole[-2:]),  # before they are summed over devices
            **{kind: n / lay.micro for kind, n in working_set(cfg, lay).items()},
            "dispatch": _dispatch(cfg, lay, platform) / lay.micro,
            "pipeline": 4 * lay.stream * cfg.model.d_model * c if lay.micro > 1 else 0,
            "logits": _logits(cfg, lay, platform),
            "update": held * 4,
        },
        platform,
    )


def _sizes(cfg: TrainConfig, lay: Layout) -> dict[str, float]:
    """Bytes of one array of each kind that a pass has in a layer."""
    m, c, t = cfg.model, lay.itemsize, lay.axes["tensor"]
    widths = layer_widths(m)
    out = {name: lay.tokens * widths[name] / t * c for name in ("heads", "kv", "mlp")}
    whole_rows = cfg.length <= m.attention_block and lay.axes["context"] == 1
    return out | {
        "stream": lay.stream * m.d_model * c,
        "gates": widths["gates"],
        # Probabilities; longer rows go through in pairs of blocks that nobody keeps.
        "scores": lay.tokens * m.n_heads / t * cfg.length * c if whole_rows else 0,
    }


def kept_activations(cfg: TrainConfig, lay: Layout) -> float:
    """Bytes that `model.remat` keeps of a layer for its backward pass."""
    x = _sizes(cfg, lay)
    match cfg.model.remat:
        case "full":
            return x["stream"]
        case "attention":
            return x["stream"] + x["heads"]
        case "dots":
            return 3 * x["stream"] + x["heads"] + 2 * x["kv"] + x["gates"] * x["mlp"]
    # Norms and residual sums in float32; every gate and its product, twice each.
    norms = 6 * x["stream"] / lay.itemsize * 4
    return norms + 3 * x["heads"] + 2 * x["kv"] + (2 * x["gates"] + 1) * x["mlp"] + x["scores"]


def working_set(cfg: TrainConfig, lay: Layout) -> dict[str, float]:
    """Bytes of the layer whose backward pass runs: of the residual stream and what is computed a
    second time ("layer"), and what its two halves need on top."""
    m, x, t = cfg.model, _sizes(cfg, lay), lay.axes["tensor"]
    again = 2 * (2 * x["heads"] + 2 * x["kv"]) + x["scores"] if m.remat != "none" else 0
    # "tensor" gathers the stream's length before the layer's parts and cuts their gradients after.
    stream = 3 * x["stream"] if t == 1 else 4 * lay.tokens * m.d_model * lay.itemsize
    block = min(m.attention_block, lay.length)
    pair = lay.rows * m.n_heads / t * block * block * 4
    return {
        "layer": again + stream + lay.tokens * m.d_model * 4,
        "MLP": (x["gates"] + 1) * x["mlp"] if not m.moe.n_experts else 0,
        "attention": 2 * x["heads"] / lay.itemsize * 4 + max(pair, x["scores"] / lay.itemsize * 4),
    }


def _logits(cfg: TrainConfig, lay: Layout, platform: str) -> float:
    """The fused head: a chunk's logits and their gradient in float32, the gathered rows of the
    table and their gradient, and the gradient of x in float32."""
    m, t = cfg.model, lay.axes["tensor"]
    vocab = -(-m.vocab_size // m.vocab_multiple) * m.vocab_multiple / t
    budget = head.CHUNK_LOGITS.get(platform, head.CHUNK_LOGITS_DEFAULT)
    size = min(m.head_chunk or max(head.MIN_CHUNK, budget / lay.tokens), vocab)
    return 2 * lay.tokens * size * 4 + size * m.d_model * 6 + lay.tokens * m.d_model * 8


def _dispatch(cfg: TrainConfig, lay: Layout, platform: str) -> float:
    """What a mixture's backward pass holds: the tokens that come to this device and the gradients of
    their outputs, a row for every assignment, one expert's gradient and a block's hidden layer in
    float32."""
    m, moe = cfg.model, cfg.model.moe
    if not moe.n_experts:
        return 0.0
    e, t = lay.axes["expert"], lay.axes["tensor"]
    c, matrices = lay.itemsize, layer_widths(m)["gates"] + 1
    one_expert = matrices * m.d_model * moe.d_ff / t
    tokens = min(moe.chunk or lay.tokens, lay.tokens)
    # A scan over chunks adds its gradients up in float32, of all experts of this device.
    adding = 2 * 4 * one_expert * moe.n_experts / e if moe.chunk else 0
    if moe.dispatch == "all_to_all":
        rows = moe.capacity_factor * tokens * moe.top_k
        return adding + rows * (4 * m.d_model * c + matrices * moe.d_ff / t * (4 + c))
    group = tokens * e
    block = min(experts.BLOCK.get(platform, experts.BLOCK_DEFAULT), group)
    hidden = 2 * matrices * block * moe.d_ff / t * 4
    rows = (5 * group + group * moe.top_k) * m.d_model * c
    return adding + rows + 4 * one_expert + hidden
