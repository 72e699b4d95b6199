"""Says on a laptop whether a recipe fits, how long it takes and what it costs.

    python -m experiments.plan --config=configs/llama2_7b.py --chip=h100 --devices=64
    python -m experiments.plan --config=configs/llama2_7b.py --topology=v5e:16x16 --output=plan.json
    python -m experiments.plan --config=configs/llama2_7b.py --chip=h100 --devices=64 --search
    python -m experiments.plan --params=175e9 --tokens=300e9 --chip=v100 --devices=10000 --mfu=0.25
    python -m experiments.plan --budget=1e21 --law=fit.json --chip=h100 --devices=64 --recipe=planned.py
    python -m experiments.plan --budget=24h --law=hoffmann3 --chip=h100 --devices=8
    python -m experiments.plan --known_runs

With --budget and --law a scaling law chooses the model, the tokens and how to train it: one fitted by
experiments.fit_scaling (FILE or FILE:NAME), or a published one by name (docs/scaling_laws.md).

By formulas; with --topology the real train step is compiled for TPUs that need not be there (extra
`plan`), or for virtual CPU devices, and the compiler says how much memory it takes.
"""

import json
from typing import Any

from absl import flags

from experiments import cli

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "compile the step for v5e:16x16, v5p:8x8x8,slices=2, cpu:8, ..."
)
_CHIP = flags.DEFINE_string("chip", None, "chip to plan for by formulas: h100, a100-80, v5p, ...")
_DEVICES = flags.DEFINE_integer("devices", None, "devices of that chip", lower_bound=1)
_SLICES = flags.DEFINE_integer("slices", 1, "slices (groups of fast links) they come in")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write")
_SEARCH = flags.DEFINE_bool(
    "search", False, "try meshes, remat policies and micro-batches; plan the fastest that fits"
)
_TOP = flags.DEFINE_integer("top", 8, "how many finds of --search to print", lower_bound=1)
_TOKENS = flags.DEFINE_float("tokens", None, "training tokens; replaces the recipe's steps")
_PARAMS = flags.DEFINE_float("params", None, "plan from parameters and --tokens, without a recipe")
_BUDGET = flags.DEFINE_string(
    "budget", None, "training FLOPs, or hours of the --devices (24h), for --law to spend"
)
_LAW = flags.DEFINE_string(
    "law", None, "fit.json, fit.json:NAME, or hoffmann1, hoffmann3, kaplan, ..."
)
_COUNT = flags.DEFINE_string(
    "count",
    None,
    "what N of a fit.json counts: all (default), non_embedding, with_head, ...",
)
_VOCAB = flags.DEFINE_integer(
    "vocab_size", 32_000, "vocabulary of the model, unless --config has a tokenizer", lower_bound=2
)
_RECIPE = flags.DEFINE_string(
    "recipe", None, "Python file to write, for experiments.pretrain --config"
)
_KNOWN = flags.DEFINE_bool("known_runs", False, "published runs, by the same arithmetic")
_CONVENTION = flags.DEFINE_string(
    "convention", "mfu", "FLOPs that --mfu is a share of: 6nd, mfu, ..."
)
_ROWS = flags.DEFINE_integer("decode_rows", None, "rows of a cache for decoding, to be sized")
_LENGTH = flags.DEFINE_integer("decode_length", None, "its length; default: the recipe's")
_ASSUMED = {
    name: flags.DEFINE_float(name, None, what)
    for name, what in {
        "mfu": "model FLOPs utilisation, in place of the roofline",
        "peak_flops": "bfloat16 FLOP/s of a chip",
        "efficiency": "share of the peak that a step reaches while it computes",
        "hbm_gb": "memory of a chip, GB",
        "bandwidth": "memory bandwidth of a chip, GB/s",
        "link_bandwidth": "fast links of a chip, all together, GB/s one way",
        "slow_bandwidth": "network of a chip, GB/s one way",
        "domain": "chips that fast links connect",
        "reserve": "share of the memory to keep free",
        "goodput": "share of the time that is training",
        "price": "$ of a chip and hour",
        "power_kw": "kW of a chip",
        "pue": "power usage effectiveness of the building",
        "carbon": "kg CO2e a kWh",
        "staff": "people on the project",
        "staff_cost": "$ of one and year",
        "staff_years": "years of it",
    }.items()
}


def main(argv: list[str]) -> None:
    del argv
    given = {name: flag.value for name, flag in _ASSUMED.items()}
    if _KNOWN.value:
        from llm_jax.scaling import known_runs

        result = known_runs.plans(given)
        print("\n".join(known_runs.table(result)))
    elif _PARAMS.value is not None:
        from llm_jax.scaling import cost, printout

        result = cost.from_totals(_PARAMS.value, _TOKENS.value, _CHIP.value, _DEVICES.value, given)
        print("\n".join(printout.totals(result)))
    else:
        result = _plan(given)
    if _OUTPUT.value:
        with open(_OUTPUT.value, "w") as f:
            json.dump(result, f, indent=2)
            f.write("\n")


def _plan(given: dict[str, float | None]) -> dict:
    cfg = _CONFIG.value
    if (_BUDGET.value is None) != (_LAW.value is None):
        raise ValueError("--budget and --law go together: --budget=1e21 --law=fit.json")
    if _BUDGET.value is None and _RECIPE.value:
        raise ValueError("--recipe is for --budget and --law")
    if cfg is None and _LAW.value is None:
        raise ValueError(
            "--config is needed, for example --config=configs/llama2_7b.py; or --budget and --law; or "
            "--params and --tokens"
        )
    if (_TOPOLOGY.value is None) == (_CHIP.value is None or _DEVICES.value is None):
        raise ValueError("either --topology=v5e:16x16 or --chip=h100 --devices=8 is needed")
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing runs: accelerators here stay free
    jax.config.update("jax_enable_compilation_cache", False)  # what a compilation takes is told
    from llm_jax import chips
    from llm_jax import config as configs
    from llm_jax.scaling import printout, recipe, search, topology
    from llm_jax.scaling.assumptions import Assumptions
    from llm_jax.scaling.plan import make_plan, prepare

    if _TOPOLOGY.value:
        where = topology.parse(_TOPOLOGY.value)
        devices = topology.devices(where)
        chip, n, slices = where.chip, where.n_devices, where.slices
    else:
        chip, n, slices, devices = _CHIP.value, _DEVICES.value, _SLICES.value, None
    a = Assumptions(chips.find(chip), given)
    if _LAW.value is not None:
        cfg, answer = _by_law(cfg, a, n)
        planned = configs.thaw(cfg)
    cfg = prepare(cfg, a, n, slices)
    found = None
    if _SEARCH.value:
        found = search.search(cfg, a, n, slices=slices, top=_TOP.value)
        print("\n".join(search.table(found)) + "\n")
        cfg = found[0].cfg
    decode = (_ROWS.value, _LENGTH.value or cfg.length) if _ROWS.value else None
    result = make_plan(
        cfg,
        a,
        n,
        devices=devices,
        slices=slices,
        tokens=_TOKENS.value,
        convention=_CONVENTION.value,
        decode=decode,
    )
    print("\n".join(printout.lines(result)))
    if found is not None:
        result["search"] = [x.to_json() for x in found]
    if _LAW.value is not None:
        result["law"] = answer
    if _RECIPE.value:
        if found is not None:  # run it as planned
            planned.mesh, planned.accumulation = cfg.mesh, cfg.accumulation
            planned.model.remat = cfg.model.remat
        recipe.write(_RECIPE.value, planned, answer)
        print(f"recipe: {_RECIPE.value}")
    return result


def _by_law(cfg: Any, a: Any, n_devices: int) -> tuple[Any, dict]:
    """The config that a law chooses, and what it says."""
    from llm_jax.config import MeshConfig
    from llm_jax.scaling import from_law, printout, recipe

    if _RECIPE.value:
        recipe.checked(_RECIPE.value)
    law, others = from_law.load(_LAW.value, _COUNT.value)
    answer = from_law.answer(law, others, *from_law.budget(_BUDGET.value, a, n_devices))
    if hasattr(cfg, "run"):
        cfg = recipe.of_sweep(cfg)
    cfg = recipe.train_config(cfg or recipe.base(_VOCAB.value), answer, n_devices)
    cfg.name = f"{law.name} at {answer['budget']:.3g} FLOPs"
    print("\n".join(printout.law(answer)) + "\n")
    if _SEARCH.value:
        cfg.mesh = MeshConfig(slices=cfg.mesh.slices)  # the search finds one, not mesh.auto
    return cfg, answer


if __name__ == "__main__":
    cli.run_main(main)
