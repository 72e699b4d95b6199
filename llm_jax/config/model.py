"""The architecture of a model, and what follows from the rest of it.

No `Literal` and no postponed annotations in this file: ml_collections reads the types at run time.
"""

import math
from dataclasses import field

from llm_jax.config.base import Config, settings

GATED = ("swiglu", "geglu")


@settings
class MoEConfig(Config):
    """Mixture of experts in place of each layer's MLP (llm_jax/nn/moe.py)."""

    n_experts: int = 0  # routed experts a layer; 0: a dense MLP
    top_k: int = 2  # routed experts a token goes through
    d_ff: int = 0  # inner width of one routed expert; 0: model.d_ff
    n_shared: int = 0  # experts on every token's path, as one MLP of n_shared * d_ff
    scores: str = "softmax"  # softmax (over all, then the chosen: Mixtral) | sigmoid (DeepSeek-V3)
    normalize: bool = True  # the weights of a token's chosen experts sum to 1
    groups: int = 0  # experts in so many groups, of which a token chooses top_groups; 0: no groups
    top_groups: int = 0
    first_dense: int = 0  # so many layers at the bottom keep a dense MLP of model.d_ff
    scale: float = 1.0  # times what the routed experts add up to
    balance_loss: float = 0.01  # scale of the load-balancing loss; 0: off
    z_loss: float = 0.001  # scale of the router's z-loss; 0: off
    # Balancing without a loss: each step moves the bias that only the choice sees by this much,
    # towards experts that got less than their share (DeepSeek-V3: 0.001); 0: no bias.
    bias_rate: float = 0.0
    implementation: str = "auto"  # auto | ragged (lax.ragged_dot) | blocks (for CPUs) | dense
    dispatch: str = "gather"  # over mesh.expert: gather (dropless) | all_to_all (with a capacity)
    capacity_factor: float = 1.25  # all_to_all: rows an expert takes, times its fair share
    chunk: int = 0  # tokens of a device dispatched at a time; 0: all of them


@settings
class ModelConfig(Config):
    """Architecture. 0 means "follows from the rest" where the comment says from what."""

    family: str = "decoder"  # a key of llm_jax.models.FAMILIES
    vocab_size: int = 0  # 0: the tokenizer's
    vocab_multiple: int = 1  # round the embedding rows up (128 suits accelerators); never sampled
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    kv_heads: int = 0  # 0: n_heads (MHA); 1: MQA; between: GQA
    head_dim: int = 0  # 0: d_model / n_heads
    d_ff: int = 0  # 0: 4 * d_model, or 8/3 of it in steps of 64 for gated activations
    max_length: int = 0  # rows of the learned position table; 0: the training length

    positions: str = "rope"  # learned | sinusoidal | rope | none
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0  # share of a head's dimensions that is rotated
    rope_interleaved: bool = False  # pairs (0, 1), (2, 3), ... instead of the two halves
    rope_local_theta: float = 0.0  # base, unscaled, of layers with a window; 0: as all others
    rope_scaling: str = "none"  # none | linear | ntk | yarn | llama3
    rope_factor: float = 1.0  # context extension factor of the scaling
    rope_original_length: int = 0  # context the weights were trained at (yarn, ntk, llama3)
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_attention_factor: float = 0.0  # factor on cos and sin; 0: 0.1 ln(rope_factor) + 1
    # llama3: pairs that turn more than `high` times within rope_original_length stay, those that
    # turn less than `low` times are stretched by rope_factor.
    rope_low_turns: float = 1.0
    rope_high_turns: float = 4.0

    norm: str = "rmsnorm"  # layernorm | rmsnorm
    norm_position: str = "pre"  # pre | post | reordered (OLMo 2) | sandwich (Gemma 2)
    norm_eps: float = 1e-5
    norm_bias: bool = False  # layernorm only
    norm_unit_offset: bool = False  # norms multiply by 1 + scale (Gemma)
    qk_norm: bool = False
    qk_norm_over: str = "head"  # head | all (one norm over all heads together)
    window: int = 0  # sliding window in tokens, own token included; 0: full attention
    global_layers: tuple = ()  # numbers of the layers that see everything although `window` is set
    # times q . k; 0: 1 / sqrt(head_dim), or what mup_base_head_dim says
    attention_scale: float = 0.0
    attention_softcap: float = 0.0  # cap * tanh(x / cap) on attention scores; 0: off
    logit_softcap: float = 0.0  # the same on output logits
    activation: str = "swiglu"  # gelu (tanh) | gelu_erf | swiglu | geglu | relu2
    qkv_bias: bool = False
    out_bias: bool = False  # bias of the attention output projection
    mlp_bias: bool = False
    tied: bool = True  # output head shares the embedding matrix
    embed_scale: float = 1.0  # times the token embeddings (Gemma: sqrt(d_model))
    logit_scale: float = 0.0  # times the output logits; 0: 1, or what mup_base_width says
    dropout: float = 0.0
    embed_noise: float = 0.0  # NEFTune's alpha: noise on the embeddings in training; 0: none
    init_std: float = 0.02  # residual projections: init_std / sqrt(2 * n_layers)
    # muP (llm_jax/nn/mup.py): the d_model, and where heads become wider with it the head_dim, at
    # which the learning rate and init_std were found; 0: the standard parametrisation.
    mup_base_width: int = 0
    mup_base_head_dim: int = 0

    head: str = "lm"  # lm (tokens) | reward (a number, read at one token; models/heads.py)

    moe: MoEConfig = field(default_factory=MoEConfig)

    dtype: str = "auto"  # compute type: float32 | bfloat16; auto: bfloat16 where it is fast
    cache_dtype: str = "auto"  # keys and values held for decoding: auto (the compute type) | int8
    # auto | xla | reference | ring (rows cut over mesh.context) | cudnn (NVIDIA GPUs) | pallas
    # (NVIDIA GPUs, packed documents) | splash (TPUs); auto takes the fastest that can do the call
    attention: str = "auto"
    attention_block: int = 1024  # queries per block once a row is longer than this
    scan: bool = True  # lax.scan over layers; False: Python loop (faster steps, slower compile)
    scan_unroll: int = 1
    remat: str = "none"  # none | full | dots | attention (recompute all but attention outputs)
    head_chunk: int = 0  # vocabulary per chunk of the fused output head; 0: by number of tokens
    # With mesh.stage > 1: micro-batches in the pipeline (0: up to 4 a stage) and turns that each
    # takes through the stages; more of either means smaller bubbles.
    pipeline_microbatches: int = 0
    pipeline_turns: int = 1


def resolve_model(model: ModelConfig, *, vocab_size: int, length: int, backend: str) -> None:
    """Fills in place what is 0 or "auto" in a model config.

    `backend` is `jax.default_backend()`: bfloat16 is the compute type where it is fast, which a
    CPU is not.
    """
    m = model
    m.vocab_size = m.vocab_size or vocab_size
    m.kv_heads = m.kv_heads or m.n_heads
    if not m.head_dim:
        if m.d_model % m.n_heads:
            raise ValueError(
                f"model.d_model={m.d_model} is not divisible by model.n_heads={m.n_heads}; change one "
                "or set model.head_dim"
            )
        m.head_dim = m.d_model // m.n_heads
    if not m.d_ff:
        gated = m.activation in GATED
        m.d_ff = -(-8 * m.d_model // (3 * 64)) * 64 if gated else 4 * m.d_model
    if m.moe.n_experts:
        m.moe.d_ff = m.moe.d_ff or m.d_ff
    m.max_length = m.max_length or length
    if m.mup_base_width:
        m.logit_scale = m.logit_scale or m.mup_base_width / m.d_model
    if m.mup_base_head_dim:
        m.attention_scale = m.attention_scale or math.sqrt(m.mup_base_head_dim) / m.head_dim
    if m.dtype == "auto":
        m.dtype = "float32" if backend == "cpu" else "bfloat16"
