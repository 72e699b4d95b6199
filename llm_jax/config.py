"""Typed configs: every key is declared here, with its type and its meaning.

A recipe (`configs/*.py`) has `get_config()` that returns a `TrainConfig`. Flags change it while it
is mutable (`--config.model.d_model=512`); `resolve` fills what follows from the rest, `validate`
checks it, and `freeze` makes it hashable, so that a jitted function can close over it.

No `Literal` and no postponed annotations in this file: ml_collections reads the types at run time.
"""

import difflib
import math
from dataclasses import dataclass, field

from llm_jax.config_base import (
    Config,
    freeze,
    from_dict,
    get,
    load,
    override,
    save,
    thaw,
    to_dict,
    unknown_key,
)

__all__ = [
    "CHOICES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "GATED",
    "LogConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "freeze",
    "from_dict",
    "get",
    "load",
    "override",
    "resolve_model",
    "save",
    "thaw",
    "to_dict",
    "unknown_key",
    "validate",
]


_config = dataclass(kw_only=True, slots=True, unsafe_hash=True)


@_config
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


@_config
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
    init_std: float = 0.02  # residual projections: init_std / sqrt(2 * n_layers)
    # muP (llm_jax/nn/mup.py): the d_model, and where heads become wider with it the head_dim, at
    # which the learning rate and init_std were found; 0: the standard parametrisation.
    mup_base_width: int = 0
    mup_base_head_dim: int = 0

    moe: MoEConfig = field(default_factory=MoEConfig)

    dtype: str = "auto"  # compute type: float32 | bfloat16; auto: bfloat16 where it is fast
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


@_config
class MeshConfig(Config):
    """Devices along each mesh axis; one of them may be -1, "the rest"."""

    data: int = -1  # copies of the model
    fsdp: int = 1  # parameters, gradients and optimizer state in so many pieces
    stage: int = 1  # layers in so many stages, a pipeline
    expert: int = 1  # experts in so many groups
    context: int = 1  # rows cut along their length, ring attention
    tensor: int = 1  # heads, MLP and vocabulary in so many pieces
    auto: bool = False  # choose the sizes by the model and the devices, and say why
    slices: int = 0  # groups of devices with slow links in between; 0: as the devices say


@_config
class OptimizerConfig(Config):
    """Optimizer, schedule, clipping and the parameters they apply to."""

    name: str = "adamw"  # adamw | adafactor | muon
    learning_rate: float = 1e-3  # peak
    schedule: str = "cosine"  # cosine | linear | wsd | constant
    warmup_steps: int = 0
    decay_steps: int = 0  # wsd: length of the final decay; 0: a fifth of the steps
    final_learning_rate: float = 0.0  # where cosine, linear and wsd end
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping
    # (pattern, decayed?) in order, first match wins, every parameter must be covered.
    decay_rules: tuple = ((r"(^|/)(scale|bias)$", False), (r".*", True))
    # (pattern, frozen?) in order, first match wins, every parameter must be covered.
    freeze_rules: tuple = ((r".*", False),)
    ema_decay: float = 0.0  # exponential moving average of the parameters, used by evaluation
    moment_dtype: str = "float32"  # float32 | bfloat16 (half the memory; adamw and muon)
    muon_adam_rate: float = 0.3  # learning rate of Muon's Adam part, as a share of learning_rate
    max_bad_steps: int = 10  # non-finite steps in a row before the run stops; they are skipped


@_config
class TokenizerConfig(Config):
    """A tokenizer to load (`path`) or to train on the training data."""

    path: str = ""  # saved tokenizer, sentencepiece .model, Hugging Face tokenizer.json, ...
    kind: str = "sentencepiece_bpe"  # a key of llm_jax.tokenizers.KINDS
    vocab_size: int = 4096
    special_tokens: tuple = ()
    split_digits: bool = False
    keep_indentation: bool = True
    byte_fallback: bool = True
    unk: bool = True  # char and word: whether there is an unknown token
    train_bytes: int = 20_000_000  # at most this much text is used for training it
    end_tokens: tuple = ()  # ids that end a generated text, besides the tokenizer's own


@_config
class SourceConfig(Config):
    """One source of a mixture."""

    name: str = ""
    inputs: tuple = ()  # files, folders, globs, hf:NAME, embedded:NAME
    # (fraction of training, weight) points, linear in between; annealing on a better mix at the
    # end is ((0, 1), (0.9, 1), (1, 4)).
    weights: tuple = ((0.0, 1.0),)


@_config
class DataConfig(Config):
    """Text in, rows out."""

    # Files, folders, globs, hf:NAME, embedded:NAME, or one folder that prepare_data wrote.
    inputs: tuple = ("embedded:docs",)
    # SourceConfigs; replaces `inputs` when given
    sources: tuple = field(default=(), metadata={"of": SourceConfig})
    eval_inputs: tuple = ()  # held-out text; empty: the last eval_fraction of each source
    eval_fraction: float = 0.1  # by characters, from the end
    text_key: str = "text"  # field of jsonl and parquet rows
    # split (concatenate and split) | random (windows at random places) | first_fit | pad
    packing: str = "split"
    isolate_documents: bool = True  # no token sees a neighbour's document, positions restart
    add_bos: bool = False
    add_eos: bool = True  # the tokenizer's end token after each document
    shuffle: bool = True
    cache_dir: str = ""  # token shards; empty: WORKDIR/data


@_config
class EvalConfig(Config):
    """Evaluation and samples during training."""

    every: int = 200  # steps; 0: only at the end
    rows: int = 0  # rows of the held-out text to use; 0: all
    batch_size: int = 0  # 0: the training batch size
    prompts: tuple = ("",)  # a sample is drawn from each; an empty one starts a document
    sample_tokens: int = 64  # 0: no samples
    tasks: tuple = ()  # also scored then, as experiments.evaluate does: names of its tasks
    task_input: str = ""  # the folder that their files are in
    task_limit: int = 100  # questions of each; 0: all
    task_shots: int = 0  # worked examples in a prompt
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95


@_config
class CheckpointConfig(Config):
    """Saving and starting points."""

    every: int = 200  # steps; 0: only at the end and on SIGTERM or Ctrl-C
    keep_last: int = 2
    keep_best: int = 1  # by eval loss
    asynchronous: bool = True
    init_from: str = ""  # checkpoint whose parameters (and tokenizer) this run starts from


@_config
class LogConfig(Config):
    """What a run writes while it trains."""

    every: int = 10  # steps between lines of metrics.jsonl
    tensorboard: bool = False  # needs the extra `track`
    profile_start: int = 0  # first step of the profiler window
    profile_steps: int = 0  # its length; 0: no profile
    compilation_cache: str = "~/.cache/llm_jax/xla"  # persistent; empty: none
    xla_flags: str = "auto"  # auto: those of llm_jax/train/xla_flags.py; empty: none
    # Without progress for so long, the stacks of all threads are printed and the job ends (exit
    # code 70), so that it is started again; compiling has half an hour more. 0: never.
    watchdog_minutes: float = 30.0


@_config
class TrainConfig(Config):
    """One training run."""

    name: str = ""
    seed: int = 0
    steps: int = 1000
    batch_size: int = 32  # rows a step, over all devices and micro-batches
    length: int = 256  # tokens a row
    accumulation: int = 1  # micro-batches a step; buys memory, not speed
    z_loss: float = 0.0  # scale of log_z squared (PaLM: 1e-4)
    label_smoothing: float = 0.0
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


CHOICES = {
    "model.positions": ("learned", "sinusoidal", "rope", "none"),
    "model.rope_scaling": ("none", "linear", "ntk", "yarn", "llama3"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.norm_position": ("pre", "post", "reordered", "sandwich"),
    "model.qk_norm_over": ("head", "all"),
    "model.activation": ("gelu", "gelu_erf", "swiglu", "geglu", "relu2"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.attention": ("auto", "xla", "cudnn", "pallas", "splash", "reference", "ring"),
    "model.moe.scores": ("softmax", "sigmoid"),
    "model.moe.implementation": ("auto", "ragged", "blocks", "dense"),
    "model.moe.dispatch": ("gather", "all_to_all"),
    "model.remat": ("none", "full", "dots", "attention"),
    "optimizer.name": ("adamw", "adafactor", "muon"),
    "optimizer.moment_dtype": ("float32", "bfloat16"),
    "optimizer.schedule": ("cosine", "linear", "wsd", "constant"),
    "log.xla_flags": ("auto", ""),
    "data.packing": ("split", "random", "first_fit", "pad"),
}
GATED = ("swiglu", "geglu")


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


def validate(config: Config) -> None:
    """Raises ValueError, naming the key to change, for what cannot work."""
    for path, choices in CHOICES.items():
        try:
            value = get(config, path)
        except AttributeError:
            continue
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{path}={value!r} is not one of {', '.join(choices)}{hint}")
    for path in ("steps", "batch_size", "length", "accumulation"):
        if get(config, path) < 1:
            raise ValueError(f"{path}={get(config, path)} has to be at least 1")
    m = config.model
    for path in ("d_model", "n_layers", "n_heads"):
        if getattr(m, path) < 1:
            raise ValueError(f"model.{path}={getattr(m, path)} has to be at least 1")
    if m.kv_heads and m.n_heads % m.kv_heads:
        raise ValueError(
            f"model.n_heads={m.n_heads} is not divisible by model.kv_heads={m.kv_heads}"
        )
    if config.batch_size % config.accumulation:
        raise ValueError(
            f"batch_size={config.batch_size} is not divisible by accumulation={config.accumulation}"
        )
    if m.positions == "learned" and m.max_length and config.length > m.max_length:
        raise ValueError(
            f"length={config.length} is longer than the learned position table; raise "
            f"model.max_length={m.max_length}, or use model.positions=rope"
        )
    if m.rope_scaling in ("ntk", "yarn", "llama3") and not m.rope_original_length:
        raise ValueError(
            f"model.rope_scaling={m.rope_scaling} needs model.rope_original_length, the context the "
            "weights were trained at"
        )
    if bad := [i for i in m.global_layers if not 0 <= i < m.n_layers]:
        raise ValueError(
            f"model.global_layers has layer {bad[0]}, but model.n_layers={m.n_layers} has 0 to "
            f"{m.n_layers - 1}"
        )
    if m.moe.n_experts:
        _validate_experts(m)
    if m.mup_base_width and config.optimizer.name == "adafactor":
        raise ValueError(
            "optimizer.name=adafactor scales its steps by the parameters' size, to which muP's factors "
            "do not apply; set optimizer.name to adamw or muon, or model.mup_base_width=0"
        )
    if m.mup_base_head_dim and not m.mup_base_width:
        raise ValueError(
            f"model.mup_base_head_dim={m.mup_base_head_dim} is for muP: set model.mup_base_width too"
        )
    if config.optimizer.moment_dtype != "float32" and config.optimizer.name == "adafactor":
        raise ValueError(
            f"optimizer.moment_dtype={config.optimizer.moment_dtype} is for adamw and muon; "
            "adafactor's moments are small already"
        )
    if not 0.0 <= m.dropout < 1.0:
        raise ValueError(f"model.dropout={m.dropout} has to be in [0, 1)")
    if not 0.0 <= config.data.eval_fraction < 1.0:
        raise ValueError(f"data.eval_fraction={config.data.eval_fraction} has to be in [0, 1)")


def _validate_experts(m: ModelConfig) -> None:
    e = m.moe
    if not 1 <= e.top_k <= e.n_experts:
        raise ValueError(
            f"model.moe.top_k={e.top_k} has to be between 1 and model.moe.n_experts={e.n_experts}"
        )
    if not 0 <= e.first_dense < m.n_layers:
        raise ValueError(
            f"model.moe.first_dense={e.first_dense} has to leave some of model.n_layers={m.n_layers}"
        )
    if e.groups:
        size = e.n_experts // e.groups
        if e.n_experts % e.groups or size < 2:
            raise ValueError(
                f"model.moe.n_experts={e.n_experts} does not fall into model.moe.groups={e.groups} of "
                "two or more"
            )
        if not 1 <= e.top_groups <= e.groups or e.top_groups * size < e.top_k:
            raise ValueError(
                f"model.moe.top_groups={e.top_groups} has to be at most model.moe.groups={e.groups}, "
                f"and to hold model.moe.top_k={e.top_k} experts (groups have {size})"
            )
