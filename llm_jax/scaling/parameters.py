"""How many parameters a model has, by named conventions: papers' N differ by what they leave out.

A law is fitted to one of them, and a plan that follows the law has to count the same way.
"""

import math
from collections.abc import Callable

from llm_jax.config import ModelConfig
from llm_jax.nn.params import count, flatten
from llm_jax.train.metrics import active_count
from llm_jax.types import PyTree


def parts(specs: PyTree) -> dict[str, int]:
    """{"embedding": tables of tokens and positions, "head": the output head (0 where it shares the
    table), "layers": all the rest}; they add up to all parameters."""
    sizes = {"embedding": 0, "head": 0}
    for path, spec in flatten(specs).items():
        if path.startswith("embed/"):
            sizes["embedding"] += math.prod(spec.shape)
        elif "vocab" in spec.axes:
            sizes["head"] += math.prod(spec.shape)
    return sizes | {"layers": count(specs, embeddings=False)}


def with_head(specs: PyTree, cfg: ModelConfig) -> float:
    """What a token is multiplied with: no lookup tables, but the output head, tied or not.

    Leaving the head out bends laws of small models (Porian et al. 2024; Pearce & Song 2024).
    """
    sizes = parts(specs)
    table = math.prod(flatten(specs)["embed/tokens"].shape)
    return sizes["layers"] + (table if cfg.tied else sizes["head"])


def estimate(specs: PyTree, cfg: ModelConfig) -> float:
    """2 d L (2 d_attn + d_ff): matrices of layers with full attention and an MLP of two matrices
    (Kaplan et al. 2020, eq. 2.1)."""
    return 2 * cfg.d_model * cfg.n_layers * (2 * cfg.n_heads * cfg.head_dim + cfg.d_ff)


def twelve(specs: PyTree, cfg: ModelConfig) -> float:
    """12 L d^2: `estimate` with d_attn = d and d_ff = 4 d."""
    return 12 * cfg.n_layers * cfg.d_model**2


def hoffmann(specs: PyTree, cfg: ModelConfig) -> float:
    """A model of this shape as Hoffmann et al. (2022) built theirs: all 50 rows of table A9.

    One table for input and output; queries, keys, values, output and an MLP of two matrices, all
    with biases; relative positions as in Transformer-XL (Dai et al. 2019: one more matrix and two
    vectors a layer); norms do not count. The paper gives sizes only: this is what yields them, with
    a vocabulary of 32,000.
    """
    d, a, f = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.d_ff
    layer = (4 * d * a + 3 * a + d) + (2 * d * f + f + d) + (d * a + 2 * a)
    return cfg.vocab_size * d + cfg.n_layers * layer


# Name -> N of a resolved config.
CONVENTIONS: dict[str, Callable[[PyTree, ModelConfig], float]] = {
    "all": lambda specs, cfg: count(specs),
    "active": active_count,  # of routed experts, those that a token meets
    "non_embedding": lambda specs, cfg: count(specs, embeddings=False),
    "with_head": with_head,
    "embedding": lambda specs, cfg: parts(specs)["embedding"],
    "head": lambda specs, cfg: parts(specs)["head"],
    "estimate": estimate,
    "12ld2": twelve,
    "hoffmann": hoffmann,
}
