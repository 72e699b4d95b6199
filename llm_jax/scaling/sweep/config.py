"""What a sweep is: the runs' common config, the grid, the learning rates, the branches.

No postponed annotations in this file: ml_collections reads the types at run time.
"""

from dataclasses import dataclass, field

from llm_jax.config import Config, TrainConfig, validate

_config = dataclass(kw_only=True, slots=True, unsafe_hash=True)

RULES = ("fixed", "power", "tuned", "transferred")


@_config
class RateConfig(Config):
    """The peak learning rate of each size."""

    # fixed: run.optimizer.learning_rate for all sizes.
    # power: run.optimizer.learning_rate * (N / reference) ** -exponent.
    # tuned: the best of a few short runs of each size around what `power` says; a parabola in the
    #   logarithm of the rate goes through their losses.
    # transferred: run.optimizer.learning_rate for all, as found at the width
    #   run.model.mup_base_width (muP).
    rule: str = "power"
    reference: float = 1e6  # parameters, embeddings too, at which the rate is the base's own
    exponent: float = 0.25
    tuning_factors: tuple = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the rate of `power`
    tuning_tokens: int = 0  # of a tuning run; 0: as many as the size's shortest run


@_config
class SweepConfig(Config):
    """A grid of training runs, from which scaling laws are fitted."""

    name: str = ""
    run: TrainConfig = field(default_factory=TrainConfig)  # what all runs have in common

    # The ladder of models: (d_model, n_layers, n_heads) or (d_model, n_layers, n_heads, learning
    # rate) each; empty: one for each of `widths`, with width / aspect layers, heads of head_dim.
    sizes: tuple = ()
    widths: tuple = ()
    aspect: float = 32.0
    head_dim: int = 32

    # How long each is trained: by one of the following three.
    budgets: tuple = ()  # training FLOPs of each IsoFLOP group
    tokens: tuple = ()  # a model ladder: every size for so many tokens each
    ratios: tuple = ()  # a model ladder: every size for so many tokens per parameter each
    # Convention by which a budget's FLOPs are counted: a key of llm_jax.scaling.flops.CONVENTIONS.
    flops: str = "6nd"
    # Sizes of a budget: those whose tokens per parameter (embeddings too) lie in between, and of
    # them the sizes_per_budget nearest to best_ratio (0: all of them).
    min_ratio: float = 0.0
    max_ratio: float = 1e9
    sizes_per_budget: int = 0
    best_ratio: float = 20.0

    seeds: tuple = (0,)
    rate: RateConfig = field(default_factory=RateConfig)

    # True: a size is trained once at a constant rate, and a short decay branches off for each of
    # its token counts (warm-up, stable, decay: Hu et al. 2024, section 4). False: each run on its
    # own, with run.optimizer.schedule.
    branches: bool = True
    decay: float = 0.2  # share of a run's tokens in its decay
    devices: int = 1  # accelerators of one run on this machine
    keep_checkpoints: bool = False  # of finished runs; False: only of those under way


# Changing these adds runs or looks after them; what is finished stays valid.
GRID_KEYS = (
    "budgets", "tokens", "ratios", "sizes", "widths", "min_ratio", "max_ratio", "sizes_per_budget",
    "best_ratio", "seeds", "devices", "keep_checkpoints",
)  # fmt: skip


def validate_sweep(cfg: SweepConfig) -> None:
    """Raises ValueError, naming the key to change, for what cannot work."""
    from llm_jax.scaling.flops import CONVENTIONS

    validate(cfg.run)
    if bool(cfg.sizes) == bool(cfg.widths):
        raise ValueError("give the models in `sizes` or in `widths`: one of them, not both")
    given = [key for key in ("budgets", "tokens", "ratios") if getattr(cfg, key)]
    if len(given) != 1:
        raise ValueError(
            f"give one of budgets, tokens, ratios; there are {' and '.join(given) or 'none'}"
        )
    for key in (*given, "widths", "seeds"):
        values = getattr(cfg, key)
        if not isinstance(values, tuple | list):
            raise ValueError(f"{key}={values!r} has to be a list")
        if len(set(values)) < len(values):
            raise ValueError(f"{key}={values!r} has a value twice")
        if any(v <= 0 for v in values if key != "seeds"):
            raise ValueError(f"{key}={values!r}: all have to be above 0")
    if not cfg.seeds:
        raise ValueError("seeds=() leaves nothing to run")
    for size in cfg.sizes:
        if not isinstance(size, tuple | list) or len(size) not in (3, 4) or min(size) <= 0:
            raise ValueError(
                f"sizes: {size!r} is not (d_model, n_layers, n_heads) or (d_model, n_layers, "
                "n_heads, learning rate)"
            )
    if cfg.flops not in CONVENTIONS:
        raise ValueError(f"flops={cfg.flops!r} is not one of {', '.join(CONVENTIONS)}")
    if not 0 <= cfg.min_ratio < cfg.max_ratio:
        raise ValueError(f"min_ratio={cfg.min_ratio} has to be below max_ratio={cfg.max_ratio}")
    if cfg.rate.rule not in RULES:
        raise ValueError(f"rate.rule={cfg.rate.rule!r} is not one of {', '.join(RULES)}")
    if cfg.rate.rule == "transferred" and not cfg.run.model.mup_base_width:
        raise ValueError(
            "rate.rule=transferred needs run.model.mup_base_width, the width at which "
            "run.optimizer.learning_rate was found"
        )
    if cfg.rate.rule == "tuned" and len(set(cfg.rate.tuning_factors)) < 3:
        raise ValueError(
            f"rate.tuning_factors={cfg.rate.tuning_factors} are less than the three that a parabola needs"
        )
    if cfg.branches and not 0 < cfg.decay < 1:
        raise ValueError(f"decay={cfg.decay} has to be in (0, 1)")
    if cfg.branches and len(cfg.run.data.sources) > 1:
        raise ValueError(
            "run.data.sources: weights of several sources are a function of a run's length, which "
            "branches do not share; set branches=False"
        )
    if cfg.devices < 1:
        raise ValueError(f"devices={cfg.devices} has to be at least 1")
