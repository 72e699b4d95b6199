"""Typed configs: every key is declared in this folder, with its type and its meaning.

A recipe (`configs/*.py`) has `get_config()` that returns a `TrainConfig`. Flags change it while it
is mutable (`--config.model.d_model=512`); `resolve_model` fills what follows from the rest,
`validate` checks it, and `freeze` makes it hashable, so that a jitted function can close over it.
"""

from llm_jax.config.base import (
    Config,
    freeze,
    from_dict,
    get,
    load,
    override,
    save,
    settings,
    thaw,
    to_dict,
    unknown_key,
)
from llm_jax.config.checks import CHOICES, check_pattern, validate
from llm_jax.config.data import (
    DataConfig,
    DialogueConfig,
    PreferenceDataConfig,
    SourceConfig,
    TokenizerConfig,
)
from llm_jax.config.model import GATED, ModelConfig, MoEConfig, resolve_model
from llm_jax.config.preference import DirectConfig, RewardConfig
from llm_jax.config.run import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from llm_jax.config.tuning import PeftConfig

__all__ = [
    "CHOICES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DialogueConfig",
    "DirectConfig",
    "EvalConfig",
    "GATED",
    "LogConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PeftConfig",
    "PreferenceDataConfig",
    "RewardConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "check_pattern",
    "freeze",
    "from_dict",
    "get",
    "load",
    "override",
    "resolve_model",
    "save",
    "settings",
    "thaw",
    "to_dict",
    "unknown_key",
    "validate",
]
