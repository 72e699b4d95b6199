"""A training run: mesh, optimizer, evaluation, checkpoints, log, and the whole.

No `Literal` and no postponed annotations in this file: ml_collections reads the types at run time.
"""

from dataclasses import field

from llm_jax.config.base import Config, settings
from llm_jax.config.data import DataConfig, TokenizerConfig
from llm_jax.config.model import ModelConfig
from llm_jax.config.preference import DirectConfig, RewardConfig
from llm_jax.config.tuning import PeftConfig


@settings
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


@settings
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
    # Against forgetting, when a trained model is tuned. L2-SP (Li et al. 2018): half this times the
    # squared distance from the parameters of the first step is added to the loss (which is logged
    # without it). In place of weight_decay, which pulls towards 0.
    l2_to_start: float = 0.0
    # Zhao et al. 2022: this times the gradient's norm is added to the loss. A step takes a second
    # gradient, at this radius along the first; penalty = radius is sharpness-aware minimisation.
    gradient_penalty: float = 0.0
    gradient_penalty_radius: float = 0.05
    # (pattern, decayed?) in order, first match wins, every parameter must be covered.
    decay_rules: tuple = ((r"(^|/)(scale|bias)$", False), (r".*", True))
    # (pattern, frozen?) in order, first match wins, every parameter must be covered.
    freeze_rules: tuple = ((r".*", False),)
    ema_decay: float = 0.0  # exponential moving average of the parameters, used by evaluation
    moment_dtype: str = "float32"  # float32 | bfloat16 (half the memory; adamw and muon)
    muon_adam_rate: float = 0.3  # learning rate of Muon's Adam part, as a share of learning_rate
    max_bad_steps: int = 10  # non-finite steps in a row before the run stops; they are skipped


@settings
class EvalConfig(Config):
    """Evaluation and samples during training."""

    every: int = 200  # steps; 0: only at the end
    at_start: bool = False  # also before the first step
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


@settings
class CheckpointConfig(Config):
    """Saving and starting points."""

    every: int = 200  # steps; 0: only at the end and on SIGTERM or Ctrl-C
    keep_last: int = 2
    keep_best: int = 1  # by eval loss
    asynchronous: bool = True
    init_from: str = ""  # checkpoint whose parameters (and tokenizer) this run starts from


@settings
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


@settings
class TrainConfig(Config):
    """One training run."""

    name: str = ""
    seed: int = 0
    steps: int = 1000
    epochs: float = 0.0  # sets steps: so many passes over the training data; 0: steps as it is
    batch_size: int = 32  # rows a step, over all devices and micro-batches
    length: int = 256  # tokens a row
    accumulation: int = 1  # micro-batches a step; buys memory, not speed
    z_loss: float = 0.0  # scale of log_z squared (PaLM: 1e-4)
    label_smoothing: float = 0.0
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    dpo: DirectConfig = field(default_factory=DirectConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
