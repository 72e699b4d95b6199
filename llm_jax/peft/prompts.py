"""Soft prompts (Lester et al. 2021) and prefixes (Li & Liang 2021): a trained, prefilled cache.

Both are the entry "prefix" of the tree, which the model itself puts in front of every document
(`models.decoder.prefix_of`): a prompt as n rows in place of the embedding table's, a prefix as the
keys and values of n slots in every layer.
"""

import jax
import jax.numpy as jnp

from llm_jax.config import PeftConfig
from llm_jax.nn import weights
from llm_jax.nn.params import Normal, ParamSpec, flatten
from llm_jax.types import Array, PyTree

STD = 0.02  # of a prefix that starts from nothing


def specs(base_specs: PyTree, cfg: PeftConfig) -> PyTree:
    """ "prefix": {"embeddings"} [n, D] of a prompt, {"k", "v"} [M, n, K * Dh] of a prefix."""
    n, flat = cfg.tokens, flatten(base_specs)
    if n < 1:
        raise ValueError(f"peft.tokens={n} has to be at least 1")
    if (table := flat.get("embed/positions")) is not None and n >= table.shape[0]:
        raise ValueError(
            f"peft.tokens={n} leaves none of model.max_length={table.shape[0]} learned positions"
        )
    if cfg.method == "prompt":
        table = flat["embed/tokens"]
        return {
            "prefix": {"embeddings": ParamSpec((n, table.shape[1]), (None, "embed"), table.init)}
        }
    layers = [flat[path] for path in flat if path.endswith("/attn/k/w")]
    shape = (sum(k.shape[0] for k in layers), n, layers[0].shape[-1])
    spec = ParamSpec(shape, ("layer", None, "kv_heads"), Normal(STD))
    return {"prefix": {"k": spec, "v": spec}}


def start(base: PyTree, trained: PyTree, key: Array, cfg: PeftConfig, *, vocab_size: int) -> PyTree:
    """First values: a prompt is the embeddings of `cfg.start_ids`, over and over, or without them
    those of tokens drawn at random, without repetition where there are enough; a prefix is small
    noise."""
    if cfg.start_ids:
        return from_tokens(base, jnp.resize(jnp.array(cfg.start_ids), (cfg.tokens,)))
    if cfg.method == "prefix":
        keys = dict(zip(("k", "v"), jax.random.split(key), strict=True))
        spec = trained["prefix"]
        return {"prefix": {n: spec[n].init(keys[n], spec[n].shape, spec[n].dtype) for n in spec}}
    # The table has more rows than tokens where it is padded.
    ids = jax.random.choice(key, vocab_size, (cfg.tokens,), replace=vocab_size < cfg.tokens)
    return from_tokens(base, ids)


def from_tokens(base: PyTree, ids: Array) -> PyTree:
    """A prompt [n, D] of the embeddings of given tokens; a prefix that stands for the same tokens
    is the model family's `prefix_of` of the tree that it is attached to."""
    rows_nxD = weights.rows(base["embed"]["tokens"], jnp.asarray(ids, jnp.int32))
    return {"prefix": {"embeddings": rows_nxD.astype(jnp.float32)}}


def attach(base: PyTree, trained: PyTree, cfg: PeftConfig) -> PyTree:
    """The base with the prefix in front. No array is copied."""
    return {**base, **trained}
