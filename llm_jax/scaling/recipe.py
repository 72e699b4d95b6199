"""From N* and D* to a training config, and to the recipe file that `experiments.pretrain` takes."""

import dataclasses
import math
import os
import textwrap
from pathlib import Path
from typing import Any

from llm_jax import config as configs
from llm_jax.config import (
    Config,
    EvalConfig,
    MeshConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)
from llm_jax.models.presets import llama
from llm_jax.scaling import shapes
from llm_jax.scaling.plan import BYTES
from llm_jax.scaling.sweep.config import SweepConfig

# Batch and learning rate by training FLOPs: DeepSeek-AI 2024 (arXiv 2401.02954), section 3.1, for
# AdamW (0.9, 0.95, weight decay 0.1). Fitted from 1e17 to 2e19 FLOPs; their 67B of 8e23 follows it.
BATCH = (0.2920, 0.3271)  # tokens
RATE = (0.3118, -0.1250)
RULE_FROM, RULE_TO = 1e17, 1e24
# Tokens times d_model of a device at a time, at most: 16,384 of a 7B model; more are micro-batches.
MICRO = 16_384 * 4096
RULE = "DeepSeek-AI 2024 (arXiv 2401.02954)"

HEAD = '''"""{title}

    python -m experiments.pretrain --config={path} --workdir=runs/{name} --input=...

{story}
"""

from llm_jax.config import {imports}TrainConfig, override


def get_config() -> TrainConfig:
    return override(
        TrainConfig(),
        {{
{changes}
        }},
    )
'''


def base(vocab_size: int) -> TrainConfig:
    """What a plan without --config starts from: Llama's architecture, rows of 2,048 tokens."""
    return TrainConfig(
        length=2048,
        z_loss=1e-5,
        model=llama(),
        mesh=MeshConfig(auto=True),
        optimizer=OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-4),
        tokenizer=TokenizerConfig(kind="hf_bpe", vocab_size=vocab_size),
        eval=EvalConfig(rows=1024),
    )


def of_sweep(cfg: SweepConfig) -> TrainConfig:
    """What the runs of a sweep have in common, to start from; branches end as wsd does."""
    run = configs.thaw(cfg.run)
    if cfg.branches:
        run.optimizer.schedule = "wsd"
    return run


def train_config(start: TrainConfig, answer: dict[str, Any], n_devices: int) -> TrainConfig:
    """`start` with the model, batch, steps and learning rate of `from_law.answer`'s budget, mutable.

    The tokens are D* N* / N, so that the chosen model costs the budget. Under muP (model.
    mup_base_width) the learning rate stays that of `start`. `answer` gets what was chosen, as
    "model", and its "warnings" what is doubtful.

    Raises:
      ValueError: no model is near N*, or the budget is too small for a run.
    """
    cfg = configs.thaw(start)
    tokenizer = cfg.tokenizer
    vocab_size = BYTES if tokenizer.kind == "byte" else tokenizer.vocab_size
    counted, c, warnings = answer["counted"], answer["budget"], answer["warnings"]
    cfg.model, n = shapes.nearest(cfg.model, answer["N*"], counted, vocab_size)
    tokens = answer["D*"] * answer["N*"] / n
    wanted = BATCH[0] * c ** BATCH[1]
    per_device = _round(wanted / cfg.length / n_devices)
    cfg.batch_size = rows = per_device * n_devices
    at_once = max(MICRO // (cfg.length * cfg.model.d_model), 1)
    ways = (k for k in range(1, per_device + 1) if per_device % k == 0)
    cfg.accumulation = next(k for k in ways if per_device // k <= at_once)
    if not 0.5 < rows * cfg.length / wanted < 2:
        warnings.append(
            f"batch: {rows} rows, a multiple of {n_devices} devices, are {rows * cfg.length:.3g} "
            f"tokens, but {wanted:.3g} would be right"
        )
    cfg.steps = round(tokens / (rows * cfg.length))
    if cfg.steps < 10:
        raise ValueError(
            f"--budget={c:g} pays for {cfg.steps} steps of {rows} rows of {cfg.length} tokens; lower "
            "--config.length or --devices, or raise the budget"
        )
    o = cfg.optimizer
    low = o.final_learning_rate / o.learning_rate
    if not cfg.model.mup_base_width:
        o.learning_rate = _digits(RATE[0] * c ** RATE[1])
    o.final_learning_rate = _digits(o.learning_rate * low)
    # As many tokens as parameters (Porian et al. 2024), which short runs cannot afford.
    o.warmup_steps = max(1, min(round(n / (rows * cfg.length)), cfg.steps // 10))
    o.decay_steps = 0  # a fifth of the steps, with wsd
    cfg.eval.every = cfg.checkpoint.every = max(cfg.steps // 20, 1)
    if not RULE_FROM <= c <= RULE_TO:
        warnings.append(
            f"batch and learning rate: the rule was made for {RULE_FROM:g} to {RULE_TO:g} FLOPs"
        )
    if cfg.model.remat == "none" and n >= 1e8:
        cfg.model.remat = "attention" if n < 3e9 else "full"
    m = cfg.model
    answer["model"] = {
        "params": n,
        "counted": counted,
        "n_layers": m.n_layers,
        "d_model": m.d_model,
        "n_heads": m.n_heads,
        "kv_heads": m.kv_heads or m.n_heads,
        "d_ff": m.d_ff,
        "vocab_size": m.vocab_size or vocab_size,
        "tokens": float(cfg.steps * rows * cfg.length),
        "length": cfg.length,
        "batch_size": rows,
        "batch_tokens": rows * cfg.length,
        "accumulation": cfg.accumulation,
        "steps": cfg.steps,
        "warmup_steps": o.warmup_steps,
        "learning_rate": o.learning_rate,
        "batch_rule": RULE,
        "learning_rate_rule": f"muP, from width {m.mup_base_width}" if m.mup_base_width else RULE,
    }
    return cfg


def checked(path: str | os.PathLike) -> Path:
    """A path that `write` can write to.

    Raises:
      ValueError: the name is none of a Python file.
      FileNotFoundError: its folder is not there.
    """
    path = Path(path)
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise ValueError(f"--recipe={path}: the name of a Python file, such as configs/planned.py")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--recipe={path}: there is no folder {path.parent}")
    return path


def write(path: str | os.PathLike, cfg: TrainConfig, answer: dict[str, Any]) -> None:
    """Writes a recipe, `get_config()`, with what differs from a default config.

    Raises:
      ValueError, FileNotFoundError: as `checked`.
    """
    path = checked(path)
    cfg = configs.thaw(cfg)
    cfg.name = path.stem
    changes = _changes(cfg, TrainConfig())
    m, band = answer["model"], answer["intervals"].get("N*")
    between = f", {band[0]:.3g} to {band[1]:.3g} at {answer['level']:.0%}" if band else ""
    story = textwrap.fill(
        f"Written by experiments.plan. The law ({answer['source']}) says N* = {answer['N*']:.3g} "
        f"parameters ({answer['counted']}{between}) and D* = {answer['D*']:.3g} tokens. Batch: "
        f"{m['batch_rule']}; learning rate: {m['learning_rate_rule']}.",
        width=98,
    )
    text = HEAD.format(
        title=f"{m['params']:,} parameters, {m['tokens']:.4g} tokens: {answer['law']} at "
        f"{answer['budget']:.3g} FLOPs.",
        path=path,
        name=path.stem,
        story=story,
        imports="SourceConfig, " * bool(cfg.data.sources),
        changes="\n".join(f'            "{key}": {v!r},' for key, v in changes.items()),
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)


def _changes(config: Config, default: Config, prefix: str = "") -> dict[str, Any]:
    """{dotted path: value} of what is not as in `default`."""
    out = {}
    for f in dataclasses.fields(config):
        value, usual = getattr(config, f.name), getattr(default, f.name)
        if isinstance(value, Config):
            out |= _changes(value, usual, f"{prefix}{f.name}.")
        elif value != usual:
            out[prefix + f.name] = value
    return out


def _round(x: float) -> int:
    """To eighths of a power of two: whole numbers that have divisors."""
    step = max(2 ** math.floor(math.log2(max(x, 1)) - 3), 1)
    return max(round(x / step), 1) * step


def _digits(x: float) -> float:
    return float(f"{x:.3g}") if math.isfinite(x) else x
