"""A plan: whether a config fits, how long it takes and what it costs, before anything is spent.

`make_plan` puts the formulas of this folder together, and the compiler's word where there is one;
`predict_run` and `compare` set a run's own numbers against the formulas.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from llm_jax import chips, sharding
from llm_jax import config as configs
from llm_jax import mesh as meshes
from llm_jax.chips import GB
from llm_jax.config import TrainConfig
from llm_jax.nn.params import count
from llm_jax.scaling import compiled, cost, flops, memory, roofline
from llm_jax.scaling.assumptions import Assumptions
from llm_jax.scaling.layout import abstract_mesh, fast_group
from llm_jax.scaling.state import cache_bytes, specs_of
from llm_jax.train.metrics import active_count

Plan = dict[str, Any]  # ready for JSON
BYTES = 259  # entries of the byte tokenizer


def prepare(cfg: TrainConfig, a: Assumptions, n_devices: int, slices: int = 1) -> TrainConfig:
    """Resolves, validates and freezes a config, in place, for chips that this machine need not have.

    With `mesh.auto` the mesh is chosen as a run would choose it.
    """
    vocabulary = BYTES if cfg.tokenizer.kind == "byte" else cfg.tokenizer.vocab_size
    backend = a.chip.platform
    configs.resolve_model(cfg.model, vocab_size=vocabulary, length=cfg.length, backend=backend)
    configs.validate(cfg)
    if cfg.mesh.auto:
        group = fast_group(a, n_devices, slices)
        machine = meshes.Machine(n_devices, a["hbm_gb"] * GB / a.chip.devices, group)
        cfg.mesh, _ = meshes.choose(cfg, count(specs_of(cfg.model)), machine)
    return configs.freeze(cfg)


def make_plan(
    cfg: TrainConfig,
    a: Assumptions,
    n_devices: int,
    *,
    devices: Sequence[jax.Device] | None = None,
    slices: int = 1,
    tokens: float | None = None,
    convention: str = "mfu",
    decode: tuple[int, int] | None = None,
) -> Plan:
    """The plan of a resolved and frozen config on `n_devices` devices of `a.chip`.

    With `devices` (`topology.devices`) the real step is compiled for them. `tokens` replaces what
    the config's steps add up to. `convention`, a key of flops.CONVENTIONS, is what an assumed
    "mfu" is a share of. `decode` is (rows, length) of a cache of keys and values to be sized.

    Raises:
      ValueError: the config does not divide over the mesh; it names the key to change.
    """
    if convention not in flops.CONVENTIONS:
        raise ValueError(f"--convention={convention} is not one of {', '.join(flops.CONVENTIONS)}")
    mesh = abstract_mesh(cfg, n_devices)
    per_step = cfg.batch_size * cfg.length
    total = tokens or cfg.steps * per_step
    out = predict(cfg, a, mesh, slices=slices, convention=convention)
    specs = specs_of(cfg.model)
    out |= {
        "name": cfg.name,
        "mesh": {axis: n for axis, n in mesh.shape.items() if n > 1},
        "slices": slices,
        "remat": cfg.model.remat,
        "accumulation": cfg.accumulation,
        "steps": total / per_step,
        "tokens": total,
        "tokens_per_day": out["tokens_per_second"] * 86_400 * a["goodput"],
        "flops": out["flops_per_step"] * total / per_step,
        "flops_6nd": out["flops_per_token"]["6nd"] * total,
        **cost.weights(count(specs)),
        **cost.bill(out["step_seconds"] * total / per_step, n_devices / a.chip.devices, a),
        **cost.reporting(out["flops_per_step"] * total / per_step),
        "assumptions": a.to_json(),
        "notes": notes(cfg, a, tokens, convention),
        "argument_bytes": None,
        "temp_bytes": None,
        "compile_seconds": None,
    }
    if decode is not None:
        out["kv_cache_bytes"] = cache_bytes(cfg, mesh, *decode)
    if devices is not None:
        built = compiled.compile_step(cfg, devices)
        out |= {
            "argument_bytes": built.argument_bytes,
            "temp_bytes": built.temp_bytes,
            "live_temp_bytes": built.live_bytes,
            "total_bytes": built.total_bytes,
            "compile_seconds": built.compile_seconds,
            "host_peak_bytes": built.host_peak_bytes,
        }
        out["fits"] = built.total_bytes <= out["usable_bytes"]
    return out


def predict(
    cfg: TrainConfig,
    a: Assumptions,
    mesh: AbstractMesh,
    *,
    slices: int = 1,
    convention: str = "mfu",
) -> Plan:
    """What the formulas say of a frozen config on a mesh of `a.chip`s: sizes, memory, speed."""
    sharding.check_divisible(cfg, dict(mesh.shape))
    specs, chip = specs_of(cfg.model), a.chip
    n_chips, per_step = mesh.size / chip.devices, cfg.batch_size * cfg.length
    per_token = {name: f(specs, cfg.model, cfg.length) for name, f in flops.CONVENTIONS.items()}
    needs, times = memory.predict(cfg, mesh, chip.platform), roofline.estimate(cfg, mesh, a, slices)
    seconds, peak = times.step, n_chips * a["peak_flops"]
    if "mfu" in a:
        seconds = per_token[convention] * per_step / (peak * a["mfu"])
    hbm = a["hbm_gb"] * GB / chip.devices
    usable = hbm * (1 - a["reserve"])
    total = needs.argument_bytes + needs.temp_bytes
    return {
        "chip": chip.name,
        "devices": mesh.size,
        "params": count(specs),
        "params_non_embedding": count(specs, embeddings=False),
        "params_active": active_count(specs, cfg.model),
        "tokens_per_step": per_step,
        "flops_per_token": per_token,
        "flops_per_step": per_token["exact"] * per_step,
        "hardware_flops_per_step": roofline.hardware_flops(cfg) * per_step,
        "bytes": {
            kind: round(n)
            for kind, n in (needs.arguments | needs.temporaries | {"gaps": needs.gaps}).items()
        },
        "peak": needs.peak,
        "predicted_argument_bytes": needs.argument_bytes,
        "predicted_temp_bytes": needs.temp_bytes,
        "total_bytes": total,
        "hbm_bytes": hbm,
        "usable_bytes": usable,
        "fits": total <= usable,
        "step_seconds": seconds,
        "seconds": {
            "computation": times.compute,
            "memory traffic": times.memory,
            "communication beside it": times.hidden,
            "communication it waits for": times.exposed,
        },
        "bound_by": times.bound,
        "bubble": times.bubble,
        "collectives": {
            axis: {"bytes": times.sent[axis], "seconds": t} for axis, t in times.links.items() if t
        },
        "tokens_per_second": per_step / seconds,
        "mfu": per_token["mfu"] * per_step / (seconds * peak),
    }


def notes(cfg: TrainConfig, a: Assumptions, tokens: float | None, convention: str) -> list[str]:
    """What a reader has to know to take the numbers for what they are."""
    out = []
    if not cfg.tokenizer.path:
        out.append(
            f"a vocabulary of {cfg.model.vocab_size:,}; the tokenizer that gets trained decides"
        )
    if tokens:
        out.append(f"--tokens={tokens:g} replaces steps={cfg.steps:,}")
    if "mfu" in a:
        out.append(f"step time from --mfu={a['mfu']:g} of {convention} FLOPs, not by the roofline")
    if a.chip.platform == "cpu":
        out.append("CPUs differ widely: set --peak_flops, --bandwidth and --hbm_gb to this one's")
    return out


def predict_run(
    cfg: TrainConfig,
    mesh: Mesh,
    device_kind: str,
    *,
    peak_flops: float | None = None,
    hbm_bytes: float | None = None,
) -> Plan:
    """What the formulas say of a run on a mesh that exists; `compare` reads it.

    `device_kind` is jax's; `peak_flops` and `hbm_bytes` of one device replace the table's where
    they were measured. A kind that is not in the table counts as a CPU's core.
    """
    chip = chips.by_kind(device_kind) or chips.find("cpu")
    slices = len(sharding.fast_groups(list(mesh.devices.flat), cfg.mesh.slices))
    given = {
        "peak_flops": peak_flops and peak_flops * chip.devices,
        "hbm_gb": hbm_bytes and hbm_bytes * chip.devices / GB,
        "domain": mesh.size / slices / chip.devices,  # as the devices say
    }
    out = predict(cfg, Assumptions(chip, given), mesh.abstract_mesh, slices=slices)
    return out | {
        "flops": out["flops_per_token"]["mfu"] * out["tokens_per_step"] * cfg.steps,
        "hours": out["step_seconds"] * cfg.steps / 3600,
    }


def compare(
    predicted: Plan, summary: Mapping[str, Any], memory_stats: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """Rows {"what", "predicted", "actual", "actual / predicted"} for the report of a finished run.

    `summary` is what `train.summary.write` returns, `memory_stats` a device's `memory_stats()`,
    None where it has none (CPUs). What is not known on either side is left out.
    """
    rate = summary.get("tokens_per_second")
    pairs = [
        ("parameters", "params", summary.get("params")),
        ("training FLOPs", "flops", summary.get("flops")),
        ("seconds a step", "step_seconds", rate and predicted["tokens_per_step"] / rate),
        ("tokens a second", "tokens_per_second", rate),
        ("MFU", "mfu", summary.get("mfu")),
        ("memory of a device, bytes", "total_bytes", (memory_stats or {}).get("peak_bytes_in_use")),
    ]
    return [
        {
            "what": what,
            "predicted": predicted[key],
            "actual": actual,
            "actual / predicted": actual / predicted[key],
        }
        for what, key, actual in pairs
        if actual and predicted.get(key)
    ]


def report_rows(
    cfg: TrainConfig, mesh: Mesh, peak_flops: float, summary: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """`compare` for a run that has just ended on `mesh`, whose devices do `peak_flops` together."""
    device = mesh.local_devices[0]
    predicted = predict_run(cfg, mesh, device.device_kind, peak_flops=peak_flops / mesh.size)
    return compare(predicted, summary, device.memory_stats())
