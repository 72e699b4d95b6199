"""The decoder-only transformer: GPT-2, Llama and what lies between, from one config.

x = embed(tokens) (+ positions)
pre-norm:   x = x + f(norm(x))            for f = attention, mlp;  a final norm
reordered:  x = x + norm(f(x))                                     a final norm   (OLMo 2)
sandwich:   x = x + norm(f(norm(x)))                               a final norm   (Gemma 2)
post-norm:  x = norm(x + f(x))
With experts (`cfg.moe`) the MLP is a mixture of them, but for the `first_dense` layers. Layers with
and without the sliding window may alternate (`cfg.global_layers`). A tree with a "prefix"
(`prefix_of`) has trained keys and values in front of every document.
"""

import math
import re

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax import sharding
from llm_jax.config import ModelConfig
from llm_jax.models import heads
from llm_jax.nn import attention, cached, distill_head, head, layers, moe, mup, positions, weights
from llm_jax.nn.blockwise import EVERYONE
from llm_jax.nn.dense import embed
from llm_jax.nn.params import Normal, ParamSpec, flatten, stacked, unflatten
from llm_jax.nn.stack import stack
from llm_jax.types import Array, Batch, Cache, Hidden, PyTree, Scores

# A router works in float32: in bfloat16 its bias would stop moving once it is large.
KEEPS = re.compile(r"/scale$|/router/|^reward/")
NOISE = 1 << 30  # folded into a row's key; layers fold in their number


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
    if not cfg.tied and cfg.head == "lm":
        tree["head"] = {"w": ParamSpec((rows, D), ("vocab", "embed"), Normal(cfg.init_std))}
    return {**mup.parametrize(tree, cfg), **heads.specs(cfg)}


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
    holds. `rng` is one key per row [B] for dropout, None in evaluation. A "prefix" in the tree
    (`prefix_of`) stands in front of every document, whose own positions start behind it.

    Raises:
      ValueError: more tokens than a learned position table has room for behind the prefix.
    """
    params = cast(params, cfg.dtype)
    position_BxL, side, cache = _side(batch, cfg, cache, prefix_length(params))
    with jax.named_scope("embed"):
        x = embed(params["embed"]["tokens"], batch.tokens).astype(cfg.dtype)
    if "prefix" in params and cache is None:
        params = _in_layers(params, prefix_of(params, cfg))
    return _trunk(params, x, position_BxL, side, cache, rng, cfg)


def _trunk(
    params: PyTree,
    x_BxLxD: Array,
    position_BxL: Array,
    side: PyTree,
    cache: Cache | None,
    rng: Array | None,
    cfg: ModelConfig,
) -> Hidden:
    """Rows of the embedding table [B, L, D] -> the trunk's output; see `_side` for the rest."""
    x, (B, L, _) = x_BxLxD, x_BxLxD.shape
    side = {**side, "rng": rng}
    segments_BxL = side["segments"][0] if "segments" in side else None
    with jax.named_scope("embed"):
        if cfg.embed_scale != 1.0:
            x = x * jnp.asarray(cfg.embed_scale, x.dtype)
        if cfg.positions == "learned":
            x = x + embed(params["embed"]["positions"], position_BxL, None).astype(x.dtype)
        elif cfg.positions == "sinusoidal":
            x = x + positions.sinusoids(position_BxL, cfg.d_model).astype(x.dtype)
        x = _noisy(x, segments_BxL, rng, cfg.embed_noise)
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
        p = weights.seeded(p, keys)
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
    """Per-token numbers at `batch.targets` [B, L]; `want` may add "entropy", "mean_log_probs", and
    "candidate_log_probs", those of `batch.candidates` [B, L, n], which takes "log_z" too."""
    out = hidden(params, batch, cfg, cache=cache, rng=rng)
    with jax.named_scope("head"):
        side = head_side(params, out.x, cfg)
        terms = head.token_scores(
            side.table_VxD,
            side.x_BxLxD,
            batch.targets,
            vocab_size=cfg.vocab_size,
            softcap=cfg.logit_softcap,
            chunk=cfg.head_chunk,
            want=tuple(name for name in want if name != "candidate_log_probs"),
        )
        if "candidate_log_probs" in want:
            logits_BxLxn = distill_head.candidate_logits(side, batch.candidates)
            terms["candidate_log_probs"] = logits_BxLxn - terms["log_z"][..., None]
    return Scores(**terms, penalties=out.penalties, stats=out.stats, cache=out.cache)


def head_side(params: PyTree, x_BxLxD: Array, cfg: ModelConfig) -> distill_head.Side:
    """What the output head makes logits of, for heads that compare two models."""
    return distill_head.Side(head_table(params), _scaled(x_BxLxD, cfg), cfg.logit_softcap)


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
    """A cache with `length` empty slots for the rows of `batch`, behind those of a prefix."""
    B, n = batch.tokens.shape[0], prefix_length(params)
    if n:
        return _prefilled(prefix_of(params, cfg), _empty_cache(B, cfg, n + length), cfg)
    return _empty_cache(B, cfg, length)


def _empty_cache(B: int, cfg: ModelConfig, length: int, *, plain: bool = False) -> Cache:
    """`plain`: in the compute type, whatever `cfg.cache_dtype` says."""
    own = plain or cfg.cache_dtype == "auto"
    shapes = attention.cache_specs(cfg, B, length)
    return Cache(
        layers=cached.empty(shapes, cfg.dtype if own else cfg.cache_dtype),
        segments=jnp.zeros((B, length), jnp.int32),
        positions=jnp.zeros((B, length), jnp.int32),
        index=jnp.int32(0),
    )


def prefix_length(params: PyTree) -> int:
    """Slots that the tree's prefix takes in front of every document; 0 without one."""
    return jax.tree.leaves(params["prefix"])[0].shape[-2] if "prefix" in params else 0


def room(params: PyTree, cfg: ModelConfig) -> int:
    """Tokens of a document that fit into the model's context, behind the tree's prefix."""
    return cfg.max_length - prefix_length(params)


def prefix_of(params: PyTree, cfg: ModelConfig) -> PyTree:
    """Keys (rotated) and values {"k", "v"} [M, n, K * Dh] of the tree's prefix.

    A trained prefix (Li & Liang 2021) is these arrays. A soft prompt (Lester et al. 2021) is
    "embeddings" [n, D] in place of n rows of the embedding table; as no token in front of them
    changes them, one pass over them alone serves all rows. Both are differentiable.
    """
    if "k" in params["prefix"]:
        return params["prefix"]
    params = cast(params, cfg.dtype)
    x_nxD = params["prefix"]["embeddings"]
    n, mesh = x_nxD.shape[0], sharding.ambient_mesh()
    # The same for all: a row for each piece that a mesh cuts a batch into.
    B = 1 if mesh is None else math.prod(mesh.shape[a] for a in sharding.RULES["batch"])
    batch = Batch(tokens=jnp.zeros((B, n), jnp.int32))
    position_BxL, side, cache = _side(batch, cfg, _empty_cache(B, cfg, n, plain=True))
    x_BxLxD = jnp.broadcast_to(x_nxD[None], (B, *x_nxD.shape))
    cache = _trunk(params, x_BxLxD, position_BxL, side, cache, None, cfg).cache
    flat = (cfg.n_layers, n, cfg.kv_heads * cfg.head_dim)
    return {
        name: x_MxBxKxnxDh[:, 0].swapaxes(1, 2).reshape(flat)
        for name, x_MxBxKxnxDh in cache.layers.items()
    }


def _prefilled(prefix: PyTree, cache: Cache, cfg: ModelConfig) -> Cache:
    """An empty cache -> one that starts with a prefix, which all documents see."""
    n, (B, S) = prefix["k"].shape[1], cache.segments.shape
    heads = (B, n, cfg.kv_heads, cfg.head_dim)

    def write(i: Array, layers: PyTree) -> PyTree:
        k, v = (jnp.broadcast_to(prefix[m][i].reshape(1, *heads[1:]), heads) for m in "kv")
        return cached.append(k, v, layers, 0, i)[2]

    slot_S = jnp.arange(S)
    return cache.replace(
        layers=jax.lax.fori_loop(0, cfg.n_layers, write, cache.layers),
        segments=jnp.broadcast_to(jnp.where(slot_S < n, EVERYONE, 0)[None], (B, S)),
        positions=jnp.broadcast_to(jnp.where(slot_S < n, slot_S, 0)[None], (B, S)),
        index=cache.index + n,
    )


def _in_layers(params: PyTree, prefix: PyTree) -> PyTree:
    """The tree with each layer's part of the prefix beside its attention."""
    first = 0
    for name in ("dense_layers", "layers"):
        if name in params:
            end = first + jax.tree.leaves(params[name])[0].shape[0]
            own = {m: x[first:end] for m, x in prefix.items()}
            attn = {**params[name]["attn"], "prefix": own}
            params = {**params, name: {**params[name], "attn": attn}}
            first = end
    return params


def _noisy(x_BxLxD: Array, segments_BxL: Array | None, keys_B: Array | None, alpha: float) -> Array:
    """Embeddings with uniform noise of at most alpha / sqrt(L * D) in training, L the tokens of the
    document that a token belongs to (NEFTune, Jain et al. 2023)."""
    if keys_B is None or alpha == 0.0:
        return x_BxLxD
    B, L, D = x_BxLxD.shape
    if segments_BxL is None:
        length_BxL = jnp.full((B, L), L)
    else:
        same = segments_BxL[:, :, None] == segments_BxL[:, None, :]
        length_BxL = jnp.sum(same, axis=-1)
    noise = jax.vmap(
        lambda key: jax.random.uniform(jax.random.fold_in(key, NOISE), (L, D), minval=-1.0)
    )(keys_B)
    size = alpha / jnp.sqrt(length_BxL * D)
    return x_BxLxD + (size[:, :, None] * noise).astype(x_BxLxD.dtype)


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
    if heads.REWARD in params:
        raise ValueError("a reward model judges texts and writes none; give a language model")
    table = params["head"]["w"] if "head" in params else params["embed"]["tokens"]
    return table.dequantize(jnp.float32) if isinstance(table, weights.Weight) else table


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
    batch: Batch, cfg: ModelConfig, cache: Cache | None, n: int = 0
) -> tuple[Array, PyTree, Cache | None]:
    """Positions [B or 1, L], what travels beside x into every block, and the cache with this
    call's segments and positions written into it. The batch's own positions start behind the n of
    a prefix."""
    B, L = batch.tokens.shape
    position = batch.positions
    if position is not None and n:
        position = position + n
    if cache is None:
        if position is None:
            position = jnp.arange(n, n + L)[None]
            if n and cfg.positions == "learned" and n + L > cfg.max_length:
                raise ValueError(
                    f"{L} tokens behind peft.tokens={n} do not fit model.max_length={cfg.max_length}, "
                    "the learned positions; lower one"
                )
        if batch.segments is None:
            return position, {}, None

        def after_prefix(x_BxL: Array, before_n: Array) -> Array:
            before_Bxn = jnp.broadcast_to(before_n[None], (B, n))
            return jnp.concatenate([before_Bxn, x_BxL], axis=1) if n else x_BxL

        everyone_n = jnp.full((n,), EVERYONE)
        side = {"segments": (batch.segments, after_prefix(batch.segments, everyone_n))}
        if batch.parents is not None:
            side["parents"] = batch.parents
        if cfg.window:
            side["positions"] = (position, after_prefix(position, jnp.arange(n)))
        return position, side, None
    segments = jnp.ones((B, L), jnp.int32) if batch.segments is None else batch.segments
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
