"""The decoder-only transformer: GPT-2, Llama and what lies between, from one config.

x = embed(tokens) (+ positions)
pre-norm:   x = x + f(norm(x))            for f = attention, mlp;  a final norm
reordered:  x = x + norm(f(x))                                     a final norm   (OLMo 2)
sandwich:   x = x + norm(f(norm(x)))                               a final norm   (Gemma 2)
post-norm:  x = norm(x + f(x))
With experts (`cfg.moe`) the MLP is a mixture of them, but for the `first_dense` layers. Layers with
and without the sliding window may alternate (`cfg.global_layers`).
"""

import math
import re

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax import sharding
from llm_jax.config import ModelConfig
from llm_jax.nn import attention, head, layers, moe, mup, positions, weights
from llm_jax.nn.dense import embed
from llm_jax.nn.params import Normal, ParamSpec, flatten, stacked, unflatten
from llm_jax.nn.stack import stack
from llm_jax.types import Array, Batch, Cache, Hidden, PyTree, Scores

# A router works in float32: in bfloat16 its bias would stop moving once it is large.
KEEPS = re.compile(r"/scale$|/router/")


def specs(cfg: ModelConfig) -> PyTree:
    """Every parameter of the model, declared."""
    D = cfg.d_model
    rows = -(-cfg.vocab_size // cfg.vocab_multiple) * cfg.vocab_multiple
    # Residual projections start smaller, so that the stream's variance does not grow with depth
    # (Radford et al. 2019).
    out_std = cfg.init_std / math.sqrt(2 * cfg.n_layers)
    tree = {"embed": {"tokens": ParamSpec((rows, D), ("vocab", "embed"), Normal(cfg.init_std))}}
    shared = {"attn": attention.specs(cfg, out_std)}
    for name in _norms(cfg):
        shared[name] = layers.norm_specs(cfg, D)
    dense = shared | {"mlp": layers.mlp_specs(cfg, out_std)}
    n_dense = _dense_layers(cfg)
    if n_dense < cfg.n_layers:
        experts = shared | {"moe": moe.specs(cfg, out_std)}
        tree["layers"] = stacked(experts, cfg.n_layers - n_dense)
        if n_dense:
            tree["dense_layers"] = stacked(dense, n_dense)
    else:
        tree["layers"] = stacked(dense, cfg.n_layers)
    if cfg.positions == "learned":
        tree["embed"]["positions"] = ParamSpec(
            (cfg.max_length, D), (None, "embed"), Normal(cfg.init_std)
        )
    if cfg.norm_position != "post":
        tree["final_norm"] = layers.norm_specs(cfg, D)
    if not cfg.tied:
        tree["head"] = {"w": ParamSpec((rows, D), ("vocab", "embed"), Normal(cfg.init_std))}
    return mup.parametrize(tree, cfg)


def hidden(
    params: PyTree,
    batch: Batch,
    cfg: ModelConfig,
    *,
    cache: Cache | None = None,
    rng: Array | None = None,
) -> Hidden:
    """The trunk: tokens [B, L] -> x [B, L, D] after the final norm.

    Without a cache rows attend within themselves; with one the tokens are written behind what it
    holds. `rng` is one key per row [B] for dropout, None in evaluation.
    """
    params = cast(params, cfg.dtype)
    B, L = batch.tokens.shape
    position_BxL, side, cache = _side(batch, cfg, cache)
    side["rng"] = rng

    with jax.named_scope("embed"):
        x = embed(params["embed"]["tokens"], batch.tokens)
        if cfg.embed_scale != 1.0:
            x = x * jnp.asarray(cfg.embed_scale, x.dtype)
        if cfg.positions == "learned":
            x = x + embed(params["embed"]["positions"], position_BxL, None)
        elif cfg.positions == "sinusoidal":
            x = x + positions.sinusoids(position_BxL, cfg.d_model).astype(x.dtype)
        x = checkpoint_name(layers.dropout(x, rng, cfg.dropout, salt=0), "embedded")

    # Shared by all rows where all rows have the same positions; it closes over no batch axis.
    shared_rope = None
    if cfg.positions == "rope":
        rope = positions.rope_tables(position_BxL, cfg)
        if position_BxL.shape[0] == B and B > 1:
            side["rope"] = rope
        else:
            shared_rope = rope

    def block(p, x, side, cache_layers, i):
        keys = (
            None
            if side["rng"] is None
            else jax.vmap(lambda k: jax.random.fold_in(k, i + 1))(side["rng"])
        )
        inner = side if shared_rope is None else {**side, "rope": shared_rope}
        post = cfg.norm_position == "post"

        def normed(name, x):
            return layers.norm(p[name], x, cfg) if name in p else x

        with jax.named_scope("attention"):
            h = x if post else normed("attn_norm", x)
            h, cache_layers = attention.layer(p["attn"], h, inner, cache_layers, i, cfg)
            h = checkpoint_name(normed("attn_out_norm", h), "attention_out")
            x = x + layers.dropout(h, keys, cfg.dropout, salt=1)
            x = normed("attn_norm", x) if post else x
        with jax.named_scope("mlp"):
            h = x if post else normed("mlp_norm", x)
            extras = {}
            if "moe" in p:
                segments = side.get("segments")
                valid = None if segments is None else segments[0] > 0
                h, extras = moe.layer(p["moe"], h, valid, cfg)
                extras["expert_load"] = _at_layer(extras["expert_load"], i - n_dense, n_sparse)
            else:
                h = layers.mlp(p["mlp"], h, cfg)
            h = checkpoint_name(normed("mlp_out_norm", h), "mlp_out")
            x = x + layers.dropout(h, keys, cfg.dropout, salt=2)
            x = normed("mlp_norm", x) if post else x
        return x, cache_layers, extras

    n_dense = _dense_layers(cfg)
    n_sparse = cfg.n_layers - n_dense
    layer_cache = cache.layers if cache is not None else None
    if "dense_layers" in params:
        x, layer_cache, _ = stack(block, params["dense_layers"], x, side, layer_cache, cfg=cfg)
    extras = {}
    if n_sparse:
        shapes = moe.extras_shapes(cfg, B) | {"expert_load": (B, n_sparse, cfg.moe.n_experts)}
        extras = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
    first = n_dense if n_sparse else 0
    x, layer_cache, extras = stack(
        block, params["layers"], x, side, layer_cache, extras, cfg=cfg, first=first
    )
    if cfg.norm_position != "post":
        x = layers.norm(params["final_norm"], x, cfg)
    x = checkpoint_name(x, "trunk")
    if cache is not None:
        cache = cache.replace(layers=layer_cache, index=cache.index + L)
    if "dropped" in extras:
        extras["dropped"] = extras["dropped"] / cfg.moe.top_k  # a share of the assignments
    extras = {n: e if n == "expert_load" else e / n_sparse for n, e in extras.items()}
    penalties = {n: extras.pop(n) for n in moe.PENALTIES if n in extras}
    return Hidden(x=x, cache=cache, penalties=penalties, stats=extras)


def scores(
    params: PyTree,
    batch: Batch,
    cfg: ModelConfig,
    *,
    cache: Cache | None = None,
    rng: Array | None = None,
    want: tuple[str, ...] = ("log_probs", "log_z", "correct"),
) -> Scores:
    """Per-token numbers at `batch.targets` [B, L]; `want` may add "entropy", "mean_log_probs"."""
    out = hidden(params, batch, cfg, cache=cache, rng=rng)
    with jax.named_scope("head"):
        terms = head.token_scores(
            head_table(params),
            _scaled(out.x, cfg),
            batch.targets,
            vocab_size=cfg.vocab_size,
            softcap=cfg.logit_softcap,
            chunk=cfg.head_chunk,
            want=want,
        )
    return Scores(**terms, penalties=out.penalties, stats=out.stats, cache=out.cache)


def logits(params: PyTree, x_BxLxD: Array, cfg: ModelConfig) -> Array:
    """Trunk output -> float32 [B, L, V]; for decoding and for tests."""
    return head.logits(
        head_table(params),
        _scaled(x_BxLxD, cfg),
        vocab_size=cfg.vocab_size,
        softcap=cfg.logit_softcap,
    )


def _scaled(x_BxLxD: Array, cfg: ModelConfig) -> Array:
    """What the head multiplies, which is smaller than its logits."""
    scale = cfg.logit_scale or 1.0
    return x_BxLxD if scale == 1.0 else x_BxLxD * jnp.asarray(scale, x_BxLxD.dtype)


def init_cache(params: PyTree, batch: Batch, cfg: ModelConfig, length: int) -> Cache:
    """An empty cache of `length` slots for the rows of `batch`."""
    B = batch.tokens.shape[0]
    shapes = attention.cache_specs(cfg, B, length)
    return Cache(
        layers={
            n: sharding.constrain(jnp.zeros(s, cfg.dtype), None, "batch", "kv_heads", None, None)
            for n, s in shapes.items()
        },
        segments=jnp.zeros((B, length), jnp.int32),
        positions=jnp.zeros((B, length), jnp.int32),
        index=jnp.int32(0),
    )


def _norms(cfg: ModelConfig) -> tuple[str, ...]:
    """The norms of a layer besides those of queries and keys."""
    match cfg.norm_position:
        case "pre" | "post":
            return ("attn_norm", "mlp_norm")
        case "reordered":
            return ("attn_out_norm", "mlp_out_norm")
        case "sandwich":
            return ("attn_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm")
    raise ValueError(f"model.norm_position={cfg.norm_position!r} is unknown")


def _dense_layers(cfg: ModelConfig) -> int:
    """Layers, from the bottom, whose MLP is dense."""
    return cfg.moe.first_dense if cfg.moe.n_experts else cfg.n_layers


def _at_layer(x_BxE: Array, i: Array, n_layers: int) -> Array:
    """[B, E] of layer i -> [B, M, E], zero elsewhere, so that sums over layers keep them apart."""
    return (jnp.arange(n_layers) == i)[None, :, None] * x_BxE[:, None, :]


def head_table(params: PyTree) -> Array:
    """The output head's table [V, D]: its own, or the embedding it is tied to."""
    return params["head"]["w"] if "head" in params else params["embed"]["tokens"]


def cast(params: PyTree, dtype: str) -> PyTree:
    """Masters -> compute type, once for all layers; norms and routers keep float32."""
    dtype = jnp.dtype(dtype)
    return unflatten(
        {
            path: leaf
            if KEEPS.search(path) or isinstance(leaf, weights.Weight) or leaf.dtype == dtype
            else leaf.astype(dtype)
            for path, leaf in flatten(params).items()
        }
    )


def _side(
    batch: Batch, cfg: ModelConfig, cache: Cache | None
) -> tuple[Array, PyTree, Cache | None]:
    """Positions [B or 1, L], what travels beside x into every block, and the cache with this
    call's segments and positions written into it."""
    B, L = batch.tokens.shape
    if cache is None:
        position = jnp.arange(L)[None] if batch.positions is None else batch.positions
        if batch.segments is None:
            return position, {}, None
        side = {"segments": (batch.segments, batch.segments)}
        if cfg.window:
            side["positions"] = (batch.positions, batch.positions)
        return position, side, None
    segments = jnp.ones((B, L), jnp.int32) if batch.segments is None else batch.segments
    position = batch.positions
    if position is None:
        position = jnp.broadcast_to(cache.index + jnp.arange(L)[None], (B, L))
    cache = cache.replace(
        segments=jax.lax.dynamic_update_slice(cache.segments, segments, (0, cache.index)),
        positions=jax.lax.dynamic_update_slice(cache.positions, position, (0, cache.index)),
    )
    side = {
        "segments": (segments, cache.segments),
        "positions": (position, cache.positions),
        "start": cache.index,
    }
    return position, side, cache
