"""Packaging of llm_jax: `pip install -e '.[dev]'` from a checkout.

Requirements here are floors, the oldest versions the code was seen to work with. The exact versions
that the whole suite was run on are in `constraints/`, and `make` installs those.
"""

import pathlib
import re

from setuptools import find_namespace_packages, setup

HERE = pathlib.Path(__file__).parent

CORE = [
    "absl-py>=2.1",
    "chex>=0.1.90",
    "flax>=0.12.8",
    "grain>=0.2.18",
    "jax>=0.10.2",
    "matplotlib>=3.9",
    "ml_collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "scipy>=1.14",
    "sentencepiece>=0.2.3",
    "tqdm>=4.66",
]

EXTRAS = {
    "tokenizers": ["tokenizers>=0.21"],
    "hf": ["safetensors>=0.5", "datasets>=4.0", "huggingface-hub>=1.0", "jinja2>=3.1.6"],
    "gguf": ["gguf>=0.19"],
    "data": [
        "datatrove>=0.10",
        "lxml_html_clean>=0.4",
        "py3langid>=0.3",
        "pyarrow>=20",
        "rensa>=0.5",
        "trafilatura>=2.3",
        "warcio>=1.7",
        "zstandard>=0.23",
    ],
    "eval": ["lm_eval>=0.4.12", "rouge-score>=0.1.2", "sacrebleu>=2.5"],
    "track": ["tensorboardX>=2.6.4", "wandb>=0.25"],
    "serve": ["llguidance>=1.3", "starlette>=1.0", "uvicorn>=0.40"],
    "plan": ["jax[tpu]>=0.10.2"],  # libtpu compiles for a pod on a machine that has no TPU
    "cuda": ["jax[cuda]>=0.10.2"],
    "tpu": ["jax[tpu]>=0.10.2"],
    "dev": [
        # to check the code
        "hypothesis>=6.131",
        "pre-commit>=4.0",
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "ruff>=0.17",
        # to run the notebooks
        "ipykernel>=6.29",
        "nbclient>=0.10",
        "nbformat>=5.10",
        # the optional readers, writers and metrics that the suite exercises
        "gguf>=0.19",
        "jinja2>=3.1.6",
        "lm_eval>=0.4.12",
        "pyarrow>=20",
        "rouge-score>=0.1.2",
        "sacrebleu>=2.5",
        "safetensors>=0.5",
        "tensorboardX>=2.6.4",
        "tokenizers>=0.21",
        "zstandard>=0.23",
    ],
}

version = re.search(
    r'^__version__ = "([^"]+)"', (HERE / "llm_jax" / "__init__.py").read_text("utf-8"), re.MULTILINE
).group(1)

setup(
    name="llm_jax",
    version=version,
    description="Language models in JAX, from an n-gram to RLHF, on one data path and one step",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["llm_jax*", "experiments*"]),
    package_data={"llm_jax": ["align/seed_tasks.jsonl"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
