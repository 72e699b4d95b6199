"""Trains a small model on the distributions of a larger one.

python -m experiments.distill --teacher=runs/large --config=configs/quickstart.py \\
    --workdir=runs/small --config.model.n_layers=2 --alpha=0.5 --temperature=2
python -m experiments.distill --teacher=model.gguf --config=configs/quickstart.py \\
    --workdir=runs/small --input=text.txt --top_k=32
"""

from absl import flags

from experiments import cli

_CONFIG = cli.define_config()
_TEACHER = flags.DEFINE_string(
    "teacher",
    None,
    "the larger model: run directory, step folder, Hugging Face folder, .gguf or .bin file",
    required=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "new run directory of the student", required=True)
_INPUT = flags.DEFINE_list(
    "input", [], "training text: files, folders, globs, hf:NAME; replaces the recipe's data"
)
_INIT_FROM = flags.DEFINE_string(
    "init_from", None, "the student goes on from this model; default: fresh parameters"
)
_ALPHA = flags.DEFINE_float("alpha", 0.5, "share of the divergence in the loss, 0 to 1")
_TEMPERATURE = flags.DEFINE_float("temperature", 2.0, "of both distributions")
_DIVERGENCE = flags.DEFINE_enum(
    "divergence",
    "forward_kl",
    ["forward_kl", "reverse_kl", "jsd"],
    "KL(teacher || student), KL(student || teacher), or Jensen-Shannon's",
)
_BETA = flags.DEFINE_float("beta", 0.5, "of jsd: the teacher's share of the mixture")
_TOP_K = flags.DEFINE_integer(
    "top_k",
    0,
    "write the teacher's k most probable tokens to disk first and train without it; 0: it runs in "
    "every step",
    lower_bound=0,
)


def main(argv: list[str]) -> None:
    del argv
    if _CONFIG.value is None:
        raise ValueError("--config is needed, for example --config=configs/quickstart.py")
    cfg = _CONFIG.value
    if _INPUT.value:
        cfg.data.inputs, cfg.data.sources = tuple(_INPUT.value), ()
    if _INIT_FROM.value:
        from llm_jax.train import base_model

        base_model.adopt(cfg, _INIT_FROM.value)
    from llm_jax.train import xla_flags

    xla_flags.configure(cfg.log)

    from llm_jax.compression import distill
    from llm_jax.config.tuning import DistillConfig

    settings = DistillConfig(
        alpha=_ALPHA.value,
        temperature=_TEMPERATURE.value,
        divergence=_DIVERGENCE.value,
        beta=_BETA.value,
        top_k=_TOP_K.value,
    )
    summary = distill.train(cfg, settings, _TEACHER.value, _WORKDIR.value)
    print(
        f"held-out loss {summary['eval_loss']} (before {summary['eval_loss_before']}, teacher "
        f"{summary['teacher_eval_loss']}); see {_WORKDIR.value}/report.md"
    )


if __name__ == "__main__":
    cli.run_main(main)
