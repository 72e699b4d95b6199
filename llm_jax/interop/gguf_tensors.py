"""The tensors of a GGUF file under Hugging Face's names and in Hugging Face's layout.

Blocks of quantised numbers never cross a row, so a few rows can be read and dequantised alone.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from llm_jax.interop.row_source import Tensor, read_bytes

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MLP = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_SHARED_EXPERTS = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}
_GEMMA = {
    **_ATTENTION,
    **_MLP,
    **_AFTER,
    "attn_norm": "input_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
}
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
# llama.cpp's name of an architecture -> the tensors of a layer, its name and theirs.
LAYER_NAMES = {
    "llama": {**_ATTENTION, **_NORMS, **_MLP, **_MIXTRAL},
    "qwen2": {**_ATTENTION, **_NORMS, **_MLP},
    "qwen3": {**_ATTENTION, **_QK_NORM, **_NORMS, **_MLP},
    "qwen3moe": {**_ATTENTION, **_QK_NORM, **_NORMS, **_EXPERTS},
    "gemma2": _GEMMA,
    "gemma3": {**_GEMMA, **_QK_NORM},
    "olmo2": {**_ATTENTION, **_QK_NORM, **_AFTER, **_MLP},
    "olmoe": {**_ATTENTION, **_QK_NORM, **_NORMS, **_EXPERTS},
    "glm4moe": {
        **_ATTENTION,
        **_QK_NORM,
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        **_MLP,
        **_EXPERTS,
        **_SHARED_EXPERTS,
    },
    "gpt2": _GPT2,
}
_TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")


def table(
    tensors: Sequence[Any], architecture: str, config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Hugging Face's name -> tensor, from those that `gguf.GGUFReader` found.

    Raises ValueError for a name that the architecture does not have, and for a type that cannot be
    dequantised.
    """
    found: dict[str, Tensor] = {}
    for entry in tensors:
        if entry.name == "rope_freqs.weight":  # read into the config
            continue
        layer, stem = _split(entry.name)
        if architecture == "glm4moe" and (layer or 0) >= config["num_hidden_layers"]:
            continue  # layers that predict a token further on, which Hugging Face drops as well
        names = LAYER_NAMES[architecture]
        if layer is None:
            names = _GPT2_TOP if architecture == "gpt2" else _TOP
        name, dot, suffix = stem.rpartition(".")
        target = names.get(stem) or (names.get(name) and names[name] + dot + suffix)
        if target is None:
            raise ValueError(f"unknown tensor {entry.name!r} in a {architecture} model")
        if layer is not None:
            prefix = "transformer.h" if architecture == "gpt2" else "model.layers"
            target = f"{prefix}.{layer}.{target}"
        for name, tensor in _tensors(target, entry, architecture, config):
            if name in found:
                raise ValueError(f"two tensors for {name!r}")
            found[name] = tensor
    return found


def _split(name: str) -> tuple[int | None, str]:
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


def _tensors(
    target: str, entry: Any, architecture: str, config: Mapping[str, Any]
) -> list[tuple[str, Tensor]]:
    """The tensor under its name, or one for each expert of a merged one [E, rows, columns]."""
    _check_type(entry)
    shape = tuple(int(n) for n in reversed(entry.shape))
    experts, shape = (shape[0], shape[1:]) if "{}" in target else (1, shape)
    columns = shape[-1] if len(shape) > 1 else 1
    rows = math.prod(shape) // columns
    row_bytes = int(entry.n_bytes) // (experts * rows)
    stem = _split(entry.name)[1]
    is_qk = architecture == "llama" and stem.startswith(("attn_q.", "attn_k."))
    transposed = architecture == "gpt2" and stem in _TRANSPOSED
    return [
        (
            target.format(expert),
            Tensor(
                shape=shape[::-1] if transposed else shape,
                rows=rows,
                columns=columns,
                decode=functools.partial(
                    _dequantise,
                    offset=int(entry.data_offset) + expert * rows * row_bytes,
                    row_bytes=row_bytes,
                    kind=entry.tensor_type,
                ),
                head_dim=config["head_dim"] if is_qk else 0,
                transposed=transposed,
                # llama.cpp multiplies by the weight where Gemma multiplies by 1 + weight.
                added=float(architecture.startswith("gemma") and stem.endswith("norm.weight")),
            ),
        )
        for expert in range(experts)
    ]


def _dequantise(
    file: BinaryIO, start: int, stop: int, *, offset: int, row_bytes: int, kind: Any
) -> np.ndarray:
    import gguf

    stored = read_bytes(file, offset + start * row_bytes, (stop - start) * row_bytes)
    rows = gguf.quants.dequantize(stored.reshape(stop - start, row_bytes), kind)
    return rows.reshape(stop - start, -1)


def _check_type(entry: Any) -> None:
    import gguf

    type_size = gguf.GGML_QUANT_SIZES[entry.tensor_type][1]
    try:
        gguf.quants.dequantize(np.zeros((1, type_size), np.uint8), entry.tensor_type)
    except NotImplementedError:
        raise ValueError(
            f"{entry.name} has the type {entry.tensor_type.name}, which the gguf package "
            "cannot dequantise"
        ) from None
