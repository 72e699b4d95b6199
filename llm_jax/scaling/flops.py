"""How many FLOPs a token costs, by named conventions, and where they go.

Published numbers count differently, so every figure says by which convention it is meant. All of
them count a multiplication and an addition as two, a backward pass as two forward passes, and of a
layer's routed experts the ones that a token goes through.
"""

import math
from collections.abc import Callable

from llm_jax.config import ModelConfig
from llm_jax.nn.params import ParamSpec, flatten
from llm_jax.train.metrics import active_count, is_routed, train_flops_per_token
from llm_jax.types import PyTree


def six_nd(specs: PyTree, cfg: ModelConfig, length: int) -> float:
    """6 N, all parameters that a token meets, embeddings too: what papers multiply with the
    tokens (Hoffmann et al. 2022; Llama Team 2024)."""
    return 6 * active_count(specs, cfg)


def kaplan(specs: PyTree, cfg: ModelConfig, length: int) -> float:
    """6 N without embeddings (Kaplan et al. 2020)."""
    return 6 * active_count(specs, cfg, embeddings=False)


def exact(specs: PyTree, cfg: ModelConfig, length: int) -> float:
    """Every matmul, attention over the whole row."""
    return 3 * sum(forward(specs, cfg, length, causal=False).values())


def causal(specs: PyTree, cfg: ModelConfig, length: int) -> float:
    """Every matmul, attention over the keys that a token sees."""
    return 3 * sum(forward(specs, cfg, length, causal=True).values())


def hoffmann(specs: PyTree, cfg: ModelConfig, length: int) -> float:
    """Appendix F of Hoffmann et al. (2022): every matmul, attention over the whole row, 3 FLOPs
    for each of its probabilities, and the lookup of a token as a matmul with the whole table."""
    table = forward(specs, cfg, length, causal=False).get("head", 0.0)  # of the same shape
    return hoffmann_layers(specs, cfg, length) + 3 * 2 * table


def hoffmann_layers(specs: PyTree, cfg: ModelConfig, length: int) -> float:
    """The same without lookup and output head: what table A4 of that paper compares with 6 N D
    (N: `parameters.hoffmann`), though its text counts both."""
    matmuls = forward(specs, cfg, length, causal=False)
    matmuls.pop("head", None)
    return 3 * (sum(matmuls.values()) + 3 * cfg.n_heads * cfg.n_layers * length)


# Name -> FLOPs of training per token. "mfu" (Chowdhery et al. 2022) is what runs report.
CONVENTIONS: dict[str, Callable[[PyTree, ModelConfig, int], float]] = {
    "6nd": six_nd,
    "kaplan": kaplan,
    "mfu": train_flops_per_token,
    "exact": exact,
    "causal": causal,
    "hoffmann": hoffmann,
    "hoffmann_layers": hoffmann_layers,
}


def forward(specs: PyTree, cfg: ModelConfig, length: int, *, causal: bool) -> dict[str, float]:
    """FLOPs of a forward pass per token, matmul by matmul: {"attn/q": ..., "scores": ...,
    "weighted": ..., "mlp/up": ..., "head": ...}, layers summed."""
    out: dict[str, float] = {}
    table = None
    for path, spec in flatten(specs).items():
        if path == "embed/tokens":
            table = spec
        elif not path.startswith("embed/") and _is_matrix(spec):
            share = cfg.moe.top_k / cfg.moe.n_experts if is_routed(spec) else 1.0
            name = path.removeprefix("dense_").removeprefix("layers/").removesuffix("/w")
            out[name] = out.get(name, 0.0) + 2 * share * math.prod(spec.shape)
    if cfg.tied and table is not None:
        out["head"] = 2 * math.prod(table.shape)
    keys = cfg.n_layers * length
    if causal:
        full = len(cfg.global_layers) if cfg.window else cfg.n_layers
        keys = full * visible_keys(length)
        keys += (cfg.n_layers - full) * visible_keys(length, cfg.window)
    products = 2 * cfg.n_heads * cfg.head_dim * keys
    return out | {"scores": products, "weighted": products}


def visible_keys(length: int, window: int = 0) -> float:
    """Mean number of keys that a token of a causal row sees, its own among them."""
    w = min(window or length, length)
    return (w * (w + 1) / 2 + (length - w) * w) / length


def _is_matrix(spec: ParamSpec) -> bool:
    return len(spec.axes) - ("layer" in spec.axes) - is_routed(spec) >= 2
