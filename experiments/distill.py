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
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "the student's run directory; made if absent, resumed if not", required=True
)
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


_DRY_RUN = flags.DEFINE_bool("dry_run", False, "prepare the data, print what would run, and stop")
_JOB = cli.define_distributed()


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
    with _JOB():
        from llm_jax.compression import distill
        from llm_jax.config.tuning import DistillConfig
        from llm_jax.train import distributed

        settings = DistillConfig(
            alpha=_ALPHA.value,
            temperature=_TEMPERATURE.value,
            divergence=_DIVERGENCE.value,
            beta=_BETA.value,
            top_k=_TOP_K.value,
        )
        options = {"dry_run": _DRY_RUN.value}
        summary = distill.train(cfg, settings, _TEACHER.value, _WORKDIR.value, **options)
        if distributed.is_main() and not _DRY_RUN.value:
            cli.show_run(summary, _WORKDIR.value)


if __name__ == "__main__":
    cli.run_main(main)
