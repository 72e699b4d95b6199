"""Mixture of experts in place of a layer's MLP: the router, its penalties, and the layer.

y[t] = scale * sum over the top_k chosen e of weight[t, e] * expert_e(x[t])  +  shared(x[t])

The router works in float32. "softmax" is Mixtral's (Jiang et al. 2024, arXiv 2401.04088): softmax
over all experts, the top_k largest, made to sum to 1. "sigmoid" is DeepSeek-V3's (arXiv 2412.19437,
section 2.1.2): sigmoid scores, chosen by score + bias, weighted by score alone, and chosen among
the best groups of experts alone if there are groups. What the experts
compute is in `nn/experts.py`, how tokens reach them on other devices in `nn/dispatch.py`.

C stands for the choices of a token, top_k of them.
"""

import jax
import jax.numpy as jnp

from llm_jax import sharding
from llm_jax.config import GATED, ModelConfig, MoEConfig
from llm_jax.nn import dispatch, layers
from llm_jax.nn.params import Constant, Normal, ParamSpec
from llm_jax.types import Array, PyTree

PENALTIES = ("router_balance", "router_z", "router_bias")
STATS = ("expert_load", "router_entropy", "dropped")


def specs(cfg: ModelConfig, out_std: float) -> PyTree:
    """The parameters of one layer: "router", "experts" and, if there are any, "shared".

    Raises:
      ValueError: keys of the config that exclude each other.
    """
    moe = cfg.moe
    D, E, F = cfg.d_model, moe.n_experts, moe.d_ff or cfg.d_ff
    if cfg.mlp_bias:
        raise ValueError(
            f"model.mlp_bias=True: experts have no biases (model.moe.n_experts={E}); set it to False"
        )
    if moe.dispatch == "all_to_all" and moe.implementation != "auto":
        raise ValueError(
            f"model.moe.implementation={moe.implementation} is for model.moe.dispatch=gather; "
            "all_to_all has one batched product, so leave it at auto"
        )
    router = {"w": ParamSpec((D, E), ("embed", None), Normal(cfg.init_std))}
    if moe.bias_rate:
        router["bias"] = ParamSpec((E,), (None,), Constant(0.0))
    into = {"w": ParamSpec((E, D, F), dispatch.AXES["up"], Normal(cfg.init_std))}
    out = {"w": ParamSpec((E, F, D), dispatch.AXES["down"], Normal(out_std))}
    tree = {"router": router, "experts": {"up": into, "down": out}}
    if cfg.activation in GATED:
        tree["experts"]["gate"] = into
    if moe.n_shared:
        tree["shared"] = layers.mlp_specs(cfg, out_std, d_ff=moe.n_shared * F)
    return tree


def layer(
    p: PyTree, x_BxLxD: Array, valid_BxL: Array | None, cfg: ModelConfig
) -> tuple[Array, dict[str, Array]]:
    """[B, L, D] -> ([B, L, D], extras), where tokens that are not `valid` reach no routed expert and
    count nowhere; None: all are valid.

    `extras` are float32 sums over a row's valid tokens: the penalties of `route`, and
      expert_load     [B, E]  assignments to each expert
      router_entropy  [B]     entropy of the router's distribution, nats
      dropped         [B]     assignments beyond an expert's capacity, which nobody computed
    """
    x_BxLxD = sharding.stream(x_BxLxD)
    with jax.named_scope("router"):
        ids_BxLxC, weights_BxLxC, extras = route(p["router"], x_BxLxD, valid_BxL, cfg)
    with jax.named_scope("experts"):
        y_BxLxD, dropped_BxL = dispatch.run(p["experts"], x_BxLxD, ids_BxLxC, weights_BxLxC, cfg)
    if "shared" in p:
        with jax.named_scope("shared"):
            y_BxLxD = y_BxLxD + layers.mlp(p["shared"], x_BxLxD, cfg)
    extras["dropped"] = jnp.sum(dropped_BxL, axis=1)
    return sharding.stream(y_BxLxD), extras


def extras_shapes(cfg: ModelConfig, rows: int) -> dict[str, tuple[int, ...]]:
    """The shape of each of `layer`'s extras for `rows` rows."""
    moe = cfg.moe
    on = {"router_balance": moe.balance_loss, "router_z": moe.z_loss, "router_bias": moe.bias_rate}
    shapes = dict.fromkeys((*(n for n in PENALTIES if on[n]), *STATS), (rows,))
    return shapes | {"expert_load": (rows, moe.n_experts)}


def route(
    p: PyTree, x_BxLxD: Array, valid_BxL: Array | None, cfg: ModelConfig
) -> tuple[Array, Array, dict[str, Array]]:
    """(ids [B, L, C], weights [B, L, C], extras) of the experts that each token goes to.

    A token that is not valid has id E, "no expert", and weight 0. The penalties among the extras:

      router_balance  tokens * E * sum_e f_e P_e, with f_e the expert's share of the row's
                      assignments and P_e its mean probability in the row: the form of the Switch
                      transformer (Fedus et al. 2021, equation 4), each row by itself as in
                      DeepSeek-V3 (equation 17), so that it is a sum over rows. A balanced row
                      has 1 a token, one that sends all to the same top_k has up to E / top_k.
      router_z        sum of logsumexp(logits)^2 (Zoph et al. 2022, equation 5)
      router_bias     0; its gradient with respect to bias_e is the load of e above the mean, which
                      makes the bias of DeepSeek-V3 one more parameter of the optimizer: it moves
                      against the sign of that gradient.
    """
    moe, E, C = cfg.moe, cfg.moe.n_experts, cfg.moe.top_k
    w_DxE = sharding.constrain(p["w"], None, None).astype(jnp.float32)
    logits_BxLxE = jnp.einsum(
        "bld,de->ble", x_BxLxD.astype(jnp.float32), w_DxE, precision=jax.lax.Precision.HIGHEST
    )
    if moe.scores == "softmax":
        scores_BxLxE = probs_BxLxE = jax.nn.softmax(logits_BxLxE, axis=-1)
    else:
        scores_BxLxE = jax.nn.sigmoid(logits_BxLxE)
        probs_BxLxE = scores_BxLxE / jnp.sum(scores_BxLxE, axis=-1, keepdims=True)

    rank_by = (
        scores_BxLxE + p["bias"].astype(jnp.float32)[None, None, :] if "bias" in p else scores_BxLxE
    )
    ids_BxLxC = _top_k(_in_best_groups(jax.lax.stop_gradient(rank_by), moe), C)
    chosen_BxLxCxE = ids_BxLxC[..., None] == jnp.arange(E)[None, None, None, :]
    weights_BxLxC = jnp.sum(jnp.where(chosen_BxLxCxE, scores_BxLxE[:, :, None, :], 0.0), axis=-1)
    if moe.normalize:
        total = jnp.sum(weights_BxLxC, axis=-1, keepdims=True)
        weights_BxLxC = weights_BxLxC / jnp.maximum(total, 1e-20)
    weights_BxLxC = weights_BxLxC * moe.scale

    counts_BxL = jnp.ones(x_BxLxD.shape[:2], jnp.float32)
    if valid_BxL is not None:
        counts_BxL = valid_BxL.astype(jnp.float32)
        ids_BxLxC = jnp.where(valid_BxL[:, :, None], ids_BxLxC, E)
        weights_BxLxC = jnp.where(valid_BxL[:, :, None], weights_BxLxC, 0.0)

    def over_row(x_BxLxX):
        return jnp.sum(x_BxLxX * counts_BxL[:, :, None], axis=1)

    tokens_B = jnp.sum(counts_BxL, axis=1)
    load_BxE = over_row(jnp.sum(chosen_BxLxCxE, axis=2, dtype=jnp.float32))
    extras = {}
    if moe.balance_loss:
        aligned_B = jnp.sum(load_BxE * over_row(probs_BxLxE), axis=1)
        extras["router_balance"] = E / C * aligned_B / jnp.maximum(tokens_B, 1.0)
    if moe.z_loss:
        log_z_BxL = jax.nn.logsumexp(logits_BxLxE, axis=-1)
        extras["router_z"] = jnp.sum(jnp.square(log_z_BxL) * counts_BxL, axis=1)
    if moe.bias_rate:
        bias_E = p["bias"].astype(jnp.float32)
        excess_BxE = load_BxE - jnp.mean(load_BxE, axis=1, keepdims=True)
        extras["router_bias"] = excess_BxE @ (bias_E - jax.lax.stop_gradient(bias_E))
    extras["expert_load"] = load_BxE
    log_probs = jnp.log(jnp.maximum(jax.lax.stop_gradient(probs_BxLxE), 1e-30))
    entropy_BxL = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    extras["router_entropy"] = jnp.sum(entropy_BxL * counts_BxL, axis=1)
    return ids_BxLxC, weights_BxLxC, extras


def _in_best_groups(scores_BxLxE: Array, moe: MoEConfig) -> Array:
    """The scores with -inf outside each token's `top_groups` best groups; a group is as good as its
    two best experts together (DeepSeek-V3, section 2.1.2)."""
    if not moe.groups:
        return scores_BxLxE
    B, L, E = scores_BxLxE.shape
    grouped = scores_BxLxE.reshape(B, L, moe.groups, E // moe.groups)
    best = jnp.max(grouped, axis=-1)
    first = jnp.argmax(grouped, axis=-1)[..., None] == jnp.arange(E // moe.groups)[None, None, None]
    second = jnp.max(jnp.where(first, -jnp.inf, grouped), axis=-1)
    groups = _top_k(best + second, moe.top_groups)
    kept = jnp.any(groups[..., None] == jnp.arange(moe.groups)[None, None, None], axis=2)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(B, L, E)


def _top_k(scores_BxLxE: Array, k: int) -> Array:
    """Indices [B, L, k] of the largest scores, the first of equals. Unlike `lax.top_k` this is a few
    reductions, which no partitioner gathers the tokens for."""
    E = scores_BxLxE.shape[-1]
    picked = []
    for _ in range(k):
        best_BxL = jnp.argmax(scores_BxLxE, axis=-1).astype(jnp.int32)
        picked.append(best_BxL)
        taken = best_BxL[..., None] == jnp.arange(E)[None, None, :]
        scores_BxLxE = jnp.where(taken, -jnp.inf, scores_BxLxE)
    return jnp.stack(picked, axis=-1)
