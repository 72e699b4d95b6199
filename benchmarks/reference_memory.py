"""Memory of a DPO step with a LoRA, by where the reference's log-probabilities come from.

    python -m benchmarks.reference_memory --checkpoint=SmolLM2-135M-Instruct.Q4_1.gguf \\
        [--output=benchmarks/results/reference_memory.json]

The step of configs/dpo_smollm2.py is compiled for each kind of reference, and the compiler says what it
takes: bytes of its arguments (parameters, optimizer state, frozen arrays) and of its temporaries. Nothing
is run, no weights are read.
"""

import argparse

import jax

from benchmarks import record
from configs import dpo_smollm2
from llm_jax import config as configs
from llm_jax import models, sharding
from llm_jax.align.direct import training
from llm_jax.train import base_model, companion, program

KINDS = ("cached", "adapter", "model")


def measure(checkpoint: str, kind: str) -> dict[str, int]:
    """Bytes of a step on one device."""
    cfg = dpo_smollm2.get_config()
    base_model.adopt(cfg, checkpoint)
    cfg.dpo.reference = kind
    model, tokenizer = companion.describe(checkpoint)
    cfg.model.vocab_size = model.vocab_size
    configs.resolve_model(
        cfg.model,
        vocab_size=tokenizer.vocab_size,
        length=cfg.length,
        backend=jax.default_backend(),
    )
    configs.validate(cfg)
    configs.freeze(cfg)
    specs = models.family(model.family).specs(model)
    second = companion.Companion(model, None, specs, tokenizer) if kind == "model" else None
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        made = program.build(
            cfg,
            mesh,
            training.make_loss_fn(cfg, kind, second),
            beside={training.REFERENCE: specs} if second else {},
        )
        batch = program.abstract_batch(cfg, mesh)
        compiled = made.step.lower(program.abstract_state(made), batch).compile()
    found = compiled.memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="the model whose shapes are taken")
    parser.add_argument("--output", help="where to write the figures as JSON")
    args = parser.parse_args()
    rows = {}
    for kind in KINDS:
        rows[kind] = measure(args.checkpoint, kind)
        rows[kind]["total"] = sum(rows[kind].values())
        shown = ", ".join(f"{name} {value / 1e6:,.0f} MB" for name, value in rows[kind].items())
        print(f"{kind:8} {shown}", flush=True)
    if args.output:
        record.save(
            {**record.header(), "recipe": "configs/dpo_smollm2.py", "bytes": rows}, args.output
        )


if __name__ == "__main__":
    main()
