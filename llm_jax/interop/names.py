"""Which tensor of theirs is which parameter of ours: one explicit table an architecture.

A table's keys are our parameters' paths, its values Hugging Face's names with {i} for the layer and
{e} for the expert. From it follow the `Part`s: where each of their tensors lies within ours.
"""

from collections.abc import Mapping
from typing import NamedTuple

from llm_jax.config import ModelConfig
from llm_jax.nn.params import ParamSpec, flatten
from llm_jax.types import PyTree

_ATTENTION = {
    **{f"attn/{n}/w": f"self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"attn/{n}/bias": f"self_attn.{n}_proj.bias" for n in "qkvo"},
    "attn/q_norm/scale": "self_attn.q_norm.weight",
    "attn/k_norm/scale": "self_attn.k_norm.weight",
}
_MLP = {
    **{f"mlp/{n}/w": f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
    **{f"mlp/{n}/bias": f"mlp.{n}_proj.bias" for n in ("gate", "up", "down")},
}
_EXPERTS = {
    f"moe/experts/{n}/w": f"mlp.experts.{{e}}.{n}_proj.weight" for n in ("gate", "up", "down")
}
_NORMS = {
    "pre": {
        "attn_norm/scale": "input_layernorm.weight",
        "mlp_norm/scale": "post_attention_layernorm.weight",
    },
    "reordered": {
        "attn_out_norm/scale": "post_attention_layernorm.weight",
        "mlp_out_norm/scale": "post_feedforward_layernorm.weight",
    },
    "sandwich": {
        "attn_norm/scale": "input_layernorm.weight",
        "attn_out_norm/scale": "post_attention_layernorm.weight",
        "mlp_norm/scale": "pre_feedforward_layernorm.weight",
        "mlp_out_norm/scale": "post_feedforward_layernorm.weight",
    },
}
_DENSE = _ATTENTION | _MLP | _NORMS["pre"]
_GEMMA = _ATTENTION | _MLP | _NORMS["sandwich"]
_ROUTED = _DENSE | _EXPERTS | {"moe/router/w": "mlp.gate.weight"}

# Names within a layer, "model.layers.{i}." in front of them.
LAYERS: dict[str, Mapping[str, str]] = {
    "llama": _DENSE,
    "mistral": _DENSE,
    "qwen2": _DENSE,
    "qwen3": _DENSE,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": _ATTENTION | _MLP | _NORMS["reordered"],
    "olmoe": _ROUTED,
    "qwen3_moe": _ROUTED,
    "glm4_moe": {
        **_ROUTED,
        "moe/router/bias": "mlp.gate.e_score_correction_bias",
        **{f"moe/shared/{n}/w": f"mlp.shared_experts.{n}_proj.weight" for n in ("gate", "up", "down")},
    },
    "mixtral": {
        **_DENSE,
        "moe/router/w": "block_sparse_moe.gate.weight",
        "moe/experts/gate/w": "block_sparse_moe.experts.{e}.w1.weight",
        "moe/experts/down/w": "block_sparse_moe.experts.{e}.w2.weight",
        "moe/experts/up/w": "block_sparse_moe.experts.{e}.w3.weight",
    },
    "gpt2": {
        "attn_norm/scale": "ln_1.weight",
        "attn_norm/bias": "ln_1.bias",
        # One matrix [D, 3 D] for queries, keys and values; "#n" is its n-th third.
        **{f"attn/{n}/w": f"attn.c_attn.weight#{j}" for j, n in enumerate("qkv")},
        **{f"attn/{n}/bias": f"attn.c_attn.bias#{j}" for j, n in enumerate("qkv")},
        "attn/o/w": "attn.c_proj.weight",
        "attn/o/bias": "attn.c_proj.bias",
        "mlp_norm/scale": "ln_2.weight",
        "mlp_norm/bias": "ln_2.bias",
        "mlp/up/w": "mlp.c_fc.weight",
        "mlp/up/bias": "mlp.c_fc.bias",
        "mlp/down/w": "mlp.c_proj.weight",
        "mlp/down/bias": "mlp.c_proj.bias",
    },
}  # fmt: skip
_OUTSIDE = {
    "embed/tokens": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/w": "lm_head.weight",
}
OUTSIDE: dict[str, Mapping[str, str]] = {
    "gpt2": {
        "embed/tokens": "transformer.wte.weight",
        "embed/positions": "transformer.wpe.weight",
        "final_norm/scale": "transformer.ln_f.weight",
        "final_norm/bias": "transformer.ln_f.bias",
        "head/w": "lm_head.weight",
    }
}
LAYER_PREFIX = {"gpt2": "transformer.h.{i}."}
# A reward's weights [D] are the row of a classifier's [1, D]; its other numbers are ours alone, and 0
# where theirs come in.
REWARD = {"reward/w": "score.weight"}
OURS = ("reward/bias", "reward/length")
# Tables are rows in both; GPT-2 keeps its matrices as we do, [in, out].
UPRIGHT = ("embed/tokens", "embed/positions", "head/w")
THIRDS = 3
# Tensors that some files hold and no model reads: masks and tables that are computed.
UNUSED = (r"\.rotary_emb\.inv_freq$", r"(^|\.)h\.\d+\.attn\.(masked_)?bias$")


class Part(NamedTuple):
    """A tensor of theirs, or a piece of it, within one of our parameters."""

    name: str  # their tensor
    shape: tuple[int, ...]  # its whole shape
    offset: tuple[int, ...]  # where the piece starts in it
    path: str  # our parameter
    index: tuple[int, ...]  # layer and expert in it
    size: tuple[int, ...]  # the piece's shape, in our order of axes
    transposed: bool  # theirs is [out, in]


def parts(kind: str, specs: PyTree, cfg: ModelConfig) -> list[Part]:
    """Every tensor of an architecture, for all our parameters.

    Raises:
      ValueError: a parameter that the architecture has no name for.
    """
    outside = OUTSIDE.get(kind, _OUTSIDE) | REWARD
    prefix = LAYER_PREFIX.get(kind, "model.layers.{i}.")
    out = []
    for path, spec in flatten(specs).items():
        if path in OURS:
            continue
        stack, _, inner = path.partition("/")
        name = outside.get(path)
        if stack in ("layers", "dense_layers"):
            name = LAYERS[kind].get(inner)
            name = None if name is None else prefix + name
        if name is None:
            raise ValueError(f"{kind} has no tensor for the parameter {path!r}")
        below = cfg.moe.first_dense if stack == "layers" and cfg.moe.n_experts else 0
        out += _of(path, spec, name, kind, below, cfg.vocab_size)
    return out


def _of(
    path: str, spec: ParamSpec, name: str, kind: str, below: int, vocab_size: int
) -> list[Part]:
    lead = [n for n, axis in zip(spec.shape, spec.axes, strict=True) if axis in ("layer", "expert")]
    size = tuple(spec.shape[len(lead) :])
    if "vocab" in spec.axes:  # rows past the vocabulary are ours alone
        size = (vocab_size, *size[1:])
    transposed = len(size) == 2 and path not in UPRIGHT and kind != "gpt2"
    shape = size[::-1] if transposed else size
    if path in REWARD:
        shape = (1, *size)
    name, _, third = name.partition("#")
    offset = [0] * len(shape)
    if third:
        offset[-1] = int(third) * shape[-1]
        shape = (*shape[:-1], THIRDS * shape[-1])
    indices = [()]
    for n in lead:
        indices = [(*index, j) for index in indices for j in range(n)]
    return [
        Part(
            name=name.format(
                i=index[0] + below if index else "", e=index[1] if len(index) > 1 else ""
            ),
            shape=shape,
            offset=tuple(offset),
            path=path,
            index=index,
            size=size,
            transposed=transposed,
        )
        for index in indices
    ]
