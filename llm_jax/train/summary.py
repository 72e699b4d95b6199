"""What a run would be, and what a finished one leaves: summary.json and report.md with its plots."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_jax import report, sharding
from llm_jax.config import TrainConfig
from llm_jax.eval.output import write_json
from llm_jax.nn import pipeline
from llm_jax.nn.params import count
from llm_jax.train.metrics import peak_memory
from llm_jax.train.program import Program


def describe(
    cfg: TrainConfig, program: Program, corpus: Any, flops_per_token: float
) -> dict[str, Any]:
    """What a run would be, before anything is compiled."""
    mesh, per_step = program.mesh, cfg.batch_size * cfg.length
    rows = {
        "parameters": count(program.specs),
        "parameters without embeddings": count(program.specs, embeddings=False),
        "trained parameters": count(program.tuning.trained),
        "mesh": " ".join(f"{a}={n}" for a, n in mesh.shape.items() if n > 1) or "one device",
    }
    if (stages := mesh.shape["stage"]) > 1:
        shards = math.prod(mesh.shape[a] for a in sharding.RULES["batch"])
        n = pipeline.microbatches(cfg.model, cfg.batch_size // cfg.accumulation, shards, stages)
        idle = pipeline.bubble(n, stages, cfg.model.pipeline_turns)
        rows["pipeline"] = (
            f"{stages} stages, {n} micro-batches, turns {cfg.model.pipeline_turns}: {idle:.0%} bubble"
        )
    return rows | {
        "compute type": cfg.model.dtype,
        "tokens a step": per_step,
        "tokens in all": per_step * cfg.steps,
        "training tokens in the data": corpus.train_tokens,
        "held-out tokens": corpus.eval_tokens,
        "training FLOPs": flops_per_token * per_step * cfg.steps,
    }


def write(
    workdir: Path,
    cfg: TrainConfig,
    program: Program,
    *,
    corpus: Any,
    evaluated: dict[str, float],
    notes: dict[str, Any],
    blocks: list[report.Block],
    flops: float,
    wall_seconds: float,
    active: bool = True,
    compare: Callable[[dict], list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Writes both from metrics.jsonl; returns the summary. Losses are in nats a token.

    `notes` are further rows of the summary, `blocks` further parts of the report. `compare` makes
    rows of a table from the summary: predicted against measured.
    """
    if not active:
        return {}
    metrics = report.read_metrics(workdir / "metrics.jsonl")
    recent = [
        v for s, v in zip(metrics["step"], metrics["loss"], strict=True) if s > cfg.steps - 100
    ]
    rates, mfu = (
        _later([v for v in metrics[key] if v is not None]) for key in ("tokens_per_second", "mfu")
    )
    result = {
        "name": cfg.name,
        "steps": cfg.steps,
        "tokens": cfg.steps * cfg.batch_size * cfg.length,
        "params": count(program.specs),
        "params_non_embedding": count(program.specs, embeddings=False),
        "params_trained": count(program.tuning.trained),
        "flops": flops,
        "train_loss": statistics.fmean(v for v in recent if v is not None),
        "eval_loss_at_start": metrics["eval_loss"][0] if metrics["step"][0] == 0 else None,
        "eval_loss": evaluated.get("eval_loss"),
        "bits_per_byte": evaluated.get("bits_per_byte"),
        "perplexity": evaluated.get("perplexity"),
        "eval_tokens": evaluated.get("eval_tokens"),
        **{name: value for name, value in evaluated.items() if "/" in name},  # eval.tasks
        "tokens_per_second": statistics.median(rates),
        "mfu": statistics.median(mfu),
        "wall_seconds": wall_seconds,
        "peak_memory_bytes": peak_memory(),
        **notes,
    }
    write_json(str(workdir / "summary.json"), result)
    compared = compare(result) if compare else []
    write_report(workdir, cfg, result, metrics, corpus, compared, blocks)
    return result


def write_report(
    workdir: Path,
    cfg: TrainConfig,
    result: dict,
    metrics: dict[str, list],
    corpus: Any,
    compared: list[dict[str, Any]],
    found: list[report.Block],
) -> Path:
    """report.md: the numbers, what a task found, the curves, the samples, the data and the config."""
    steps = metrics["step"]
    smooth = max(len(steps) // 60, 1)

    def curve(key: str, label: str, **style: Any) -> report.Series:
        return report.Series(label, steps, metrics.get(key, [None] * len(steps)), **style)

    losses = [curve("loss", "training", smooth=smooth)]
    held_out = [
        (s, v) for s, v in zip(steps, metrics.get("eval_loss", []), strict=False) if v is not None
    ]
    if held_out:
        losses.append(report.Series("held out", *zip(*held_out, strict=True), style="points"))
    blocks: list[report.Block] = [
        report.Table(
            [{"what": k.replace("_", " "), "value": v} for k, v in result.items() if v is not None],
            caption="Summary (losses in nats a token)",
        ),
        *([report.Table(compared, caption="Predicted, and measured")] if compared else []),
        *found,
        report.Plot("loss", losses, title="Loss", xlabel="step", ylabel="nats a token"),
        *([_bits_per_byte(metrics, curve, smooth)] if "train_bits_per_byte" in metrics else []),
        report.Plot(
            "learning_rate", [curve("lr", "learning rate")], title="Learning rate", xlabel="step"
        ),
        report.Plot(
            "grad_norm",
            [curve("grad_norm", "gradient norm", smooth=smooth)],
            title="Gradient norm before clipping",
            xlabel="step",
            yscale="log",
        ),
        report.Plot(
            "speed",
            [curve("tokens_per_second", "tokens/s", smooth=smooth)],
            title="Training speed",
            xlabel="step",
            ylabel="tokens a second",
        ),
    ]
    if "expert_load_max" in metrics:
        ends = [("expert_load_max", "most used expert"), ("expert_load_min", "least used expert")]
        blocks.append(
            report.Plot(
                "expert_load",
                [curve(key, label, smooth=smooth) for key, label in ends],
                title="Share of a layer's assignments that one expert gets",
                xlabel="step",
                ylabel=f"share (even: {1 / cfg.model.moe.n_experts:.3f})",
            )
        )
    if samples := _samples(workdir):
        blocks.append(report.Text("## Samples"))
        first, last = (pick(s["step"] for s in samples) for pick in (min, max))
        # A text goes on where its prompt ends; an answer is a turn of its own.
        continues = cfg.data.format == "text"
        for s in [s for s in samples if s["step"] in (first, last)]:
            prompt = f", prompt {s['prompt']!r}" if s["prompt"] else ""
            text = s["prompt"] + s["text"] if continues else s["text"]
            blocks.append(report.Code(text, caption=f"Step {s['step']}{prompt}"))
    blocks.append(report.Text("## Data"))
    blocks += [
        report.Table(corpus.parts()),
        report.Text("## Config"),
        report.Code((workdir / "config.json").read_text(), language="json"),
    ]
    return report.write_report(workdir, f"Training run: {cfg.name or workdir.name}", blocks)


def _bits_per_byte(metrics: dict[str, list], curve: Callable, smooth: int) -> report.Plot:
    found = metrics.get("bits_per_byte", [])
    held_out = [(s, v) for s, v in zip(metrics["step"], found, strict=False) if v is not None]
    steps, values = zip(*held_out, strict=True) if held_out else ((), ())
    return report.Plot(
        "bits_per_byte",
        [
            curve("train_bits_per_byte", "training", smooth=smooth),
            report.Series("held out", steps, values, style="points"),
        ],
        title="Bits per byte",
        xlabel="step",
        ylabel="bits per UTF-8 byte",
    )


def _later(values: list[float]) -> list[float]:
    """Without the first two, where there are more: they hold the warm-up."""
    return values[2:] or values


def _samples(workdir: Path) -> list[dict]:
    path = workdir / "samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
