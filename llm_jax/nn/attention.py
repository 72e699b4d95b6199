"""Attention behind one dispatch, and the attention layer of a block."""

import functools
import math

import jax
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name

from llm_jax import sharding
from llm_jax.config import ModelConfig
from llm_jax.nn import cached, fused, layers, positions
from llm_jax.nn.blockwise import Mask, Shape, reference, xla
from llm_jax.nn.dense import dense_specs, read, write
from llm_jax.nn.ring import context_size, ring
from llm_jax.types import Array, PyTree

FUNCTIONS = {
    "xla": xla,
    "reference": reference,
    "ring": ring,
    "cudnn": fused.cudnn,
    "pallas": fused.pallas,
    "splash": fused.splash,
}
FUSED = {"gpu": ("cudnn", "pallas"), "tpu": ("splash",), "cpu": ()}  # what auto tries, in order
LONG = 2048  # tokens in a row past which attention that is not fused is worth a warning


def attention(q: Array, k: Array, v: Array, mask: Mask, shape: Shape, implementation: str) -> Array:
    """Softmax attention: q [B, L, H, Dh], k and v [B, S, K, Dh] -> [B, L, H, Dh].

    `implementation` is a value of `model.attention`. auto takes the ring where mesh.context cuts
    rows, else the platform's first fused kernel that can do the call, else "xla", as for every
    cached call; on an accelerator it says so once if rows are long. One asked for by name is used
    or raises ValueError.
    """
    if implementation == "auto":
        implementation = _choose(q, k, mask, shape)
    o = FUNCTIONS[implementation](q, k, v, mask, shape)
    # The ring and the fused kernels name theirs.
    return checkpoint_name(o, "attention") if implementation in ("xla", "reference") else o


def _choose(q: Array, k: Array, mask: Mask, shape: Shape) -> str:
    if mask.cached:
        return "xla"
    if context_size() > 1:
        return "ring"
    names = FUSED.get(sharding.platform(), ())
    reasons = {name: fused.refuses(name, q, k, mask, shape) for name in names}
    if able := [name for name, reason in reasons.items() if not reason]:
        return able[0]
    if reasons and q.shape[1] > LONG:
        _warn(q.shape[1], "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    return "xla"


@functools.cache  # once for all layers and traces
def _warn(length: int, reasons: str) -> None:
    logging.warning(
        "model.attention=auto uses no fused kernel for rows of %d tokens, which costs time and "
        "memory (%s)",
        length,
        reasons,
    )


# The layer -----------------------------------------------------------------------------------


def specs(cfg: ModelConfig, out_std: float) -> PyTree:
    """Projections q, k, v, o and, with qk_norm, a norm for q and one for k."""
    D, H, K, Dh = cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.head_dim
    tree = {
        "q": dense_specs(D, H * Dh, ("embed", "heads"), cfg.init_std, cfg.qkv_bias),
        "k": dense_specs(D, K * Dh, ("embed", "kv_heads"), cfg.init_std, cfg.qkv_bias),
        "v": dense_specs(D, K * Dh, ("embed", "kv_heads"), cfg.init_std, cfg.qkv_bias),
        "o": dense_specs(H * Dh, D, ("heads", "embed"), out_std, cfg.out_bias),
    }
    if cfg.qk_norm:
        whole = cfg.qk_norm_over == "all"
        tree["q_norm"] = layers.norm_specs(cfg, H * Dh if whole else Dh)
        tree["k_norm"] = layers.norm_specs(cfg, K * Dh if whole else Dh)
    return tree


def layer(
    p: PyTree, x_BxLxD: Array, side: PyTree, cache: PyTree | None, i: Array | int, cfg: ModelConfig
):
    """Self-attention of layer `i`: (x [B, L, D], cache layers) -> the same.

    `side` holds the rotary tables (`positions.rope_tables`), and segments and positions of queries
    and keys; `cache` the keys and values, stacked [M, B, K, S, Dh] or a queue of layers
    (nn/cached), written at slot side["start"]. Without a cache p may have a "prefix": "k" and "v"
    [n, K * Dh] in front of each row.
    """
    B, L, _ = x_BxLxD.shape
    H, K, Dh = cfg.n_heads, cfg.kv_heads, cfg.head_dim
    q, k, v = read([p["q"], p["k"], p["v"]], x_BxLxD, ["heads", "kv_heads", "kv_heads"])
    if cfg.qk_norm and cfg.qk_norm_over == "all":
        q, k = layers.norm(p["q_norm"], q, cfg), layers.norm(p["k_norm"], k, cfg)
    q, k, v = q.reshape(B, L, H, Dh), k.reshape(B, L, K, Dh), v.reshape(B, L, K, Dh)
    if cfg.qk_norm and cfg.qk_norm_over == "head":
        q, k = layers.norm(p["q_norm"], q, cfg), layers.norm(p["k_norm"], k, cfg)
    local = _is_local(i, cfg)
    if side.get("rope") is not None:
        table = _at_kind(side["rope"], local)
        q, k = positions.rotate(q, table, cfg), positions.rotate(k, table, cfg)
    scale = cfg.attention_scale or 1 / math.sqrt(Dh)
    shape = Shape(True, 0, cfg.attention_softcap, scale, cfg.attention_block)
    if cache is None:
        mask = Mask(side.get("segments"), side.get("positions"), parents=side.get("parents"))
        if "prefix" in p:
            k, v = _behind(p["prefix"]["k"], k), _behind(p["prefix"]["v"], v)
            mask = mask._replace(start=k.shape[1] - L)
        attend = functools.partial(attention, implementation=cfg.attention)
    else:  # no kernel does these calls: a run that names one for training can still draw samples
        k, v, cache = cached.append(k, v, cache, side["start"], i)
        mask = Mask(side["segments"], side["positions"], side["start"])
        if cfg.attention != "reference" and L <= cfg.attention_block:
            attend = cached.attend
        else:
            k, v = (x.reshape(B, K, -1, Dh).transpose(0, 2, 1, 3) for x in (k, v))
            name = "reference" if cfg.attention == "reference" else "xla"
            attend = functools.partial(attention, implementation=name)
    # Which keys a kernel may leave out is part of its program, so there is one for each kind.
    kinds = [lambda w=w: attend(q, k, v, mask, shape._replace(window=w)) for w in (0, cfg.window)]
    if isinstance(local, bool):
        o = kinds[local]()
    else:
        o = jax.lax.cond(local, kinds[1], kinds[0])
    return write(p["o"], o.reshape(B, L, H * Dh), "heads"), cache


def _behind(prefix_nxKDh: Array, x_BxLxKxDh: Array) -> Array:
    """Keys or values [B, n + L, K, Dh] of rows behind a prefix."""
    B, _, K, Dh = x_BxLxKxDh.shape
    prefix_1xnxKxDh = prefix_nxKDh.reshape(1, -1, K, Dh).astype(x_BxLxKxDh.dtype)
    before = jnp.broadcast_to(prefix_1xnxKxDh, (B, *prefix_1xnxKxDh.shape[1:]))
    return jnp.concatenate([before, x_BxLxKxDh], axis=1)


def _is_local(i: Array | int, cfg: ModelConfig) -> Array | bool:
    """Whether layer `i` has the window; known while tracing where all layers are alike or `i` is."""
    if not (cfg.window and cfg.global_layers):
        return bool(cfg.window)
    if isinstance(i, int):
        return i not in cfg.global_layers
    return ~jnp.any(i == jnp.array(cfg.global_layers))


def _at_kind(tables: tuple[PyTree, ...], local: Array | bool) -> PyTree:
    """The rotary table of a layer: the last of one or two for layers with a window."""
    if isinstance(local, bool) or len(tables) == 1:
        return tables[-1 if local is True else 0]
    return jax.tree.map(lambda everywhere, near: jnp.where(local, near, everywhere), *tables)


def cache_specs(cfg: ModelConfig, rows: int, length: int) -> PyTree:
    """Shape of the stacked keys and values, each [M, B, K, S, Dh]."""
    shape = (cfg.n_layers, rows, cfg.kv_heads, length, cfg.head_dim)
    return {"k": shape, "v": shape}
