"""Trains a small model on the distributions of a larger one.

python -m experiments.distill --teacher=runs/large --config=configs/quickstart.py \\
    --workdir=runs/small --config.model.n_layers=2 --alpha=0.5 --temperature=2
python -m experiments.distill --teacher=model.gguf --config=configs/quickstart.py \\
    --workdir=runs/small --input=text.txt --top_k=32
"""

from absl import flags

from experiments import cli

_TRAINING = cli.Training(
    example="configs/quickstart.py",
    data="training text, or conversations with such a recipe",
    init_from="the student goes on from this model; default: fresh parameters",
)
_TEACHER = flags.DEFINE_string(
    "teacher",
    None,
    "the larger model: run directory, step folder, Hugging Face folder, .gguf or .bin file",
    required=True,
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
    cfg = _TRAINING.config()

    def train(workdir: str, **options) -> dict:
        from llm_jax.compression import distill
        from llm_jax.config.tuning import DistillConfig

        settings = DistillConfig(
            alpha=_ALPHA.value,
            temperature=_TEMPERATURE.value,
            divergence=_DIVERGENCE.value,
            beta=_BETA.value,
            top_k=_TOP_K.value,
        )
        return distill.train(cfg, settings, _TEACHER.value, workdir, **options)

    _TRAINING.run(cfg, train)


if __name__ == "__main__":
    cli.run_main(main)
