"""From logits to the next token."""

import flax.struct
import jax
import jax.numpy as jnp

from llm_jax.types import Array

NEVER = -1e30


@flax.struct.dataclass
class Sampling:
    """How to choose. Numbers are traced, so that changing one does not compile again; which
    filters are on is static."""

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array
    greedy: bool = flax.struct.field(pytree_node=False)
    sorts: bool = flax.struct.field(pytree_node=False)  # top-k or top-p is on
    penalises: bool = flax.struct.field(pytree_node=False)


def make_sampling(
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Sampling:
    """Checks the numbers. Temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and penalty 1 are off.

    Raises:
      ValueError: a number out of its range, naming the flag.
    """
    if temperature < 0:
        raise ValueError(f"--temperature={temperature} has to be 0 (greedy) or more")
    if top_k < 0:
        raise ValueError(f"--top_k={top_k} has to be 0 (off) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top_p={top_p} has to be in (0, 1]")
    if not 0 <= min_p < 1:
        raise ValueError(f"--min_p={min_p} has to be in [0, 1)")
    if repetition_penalty <= 0:
        raise ValueError(f"--repetition_penalty={repetition_penalty} has to be positive; 1 is off")
    return Sampling(
        temperature=jnp.float32(temperature or 1.0),
        top_k=jnp.int32(top_k or 2**30),
        top_p=jnp.float32(top_p),
        min_p=jnp.float32(min_p),
        repetition_penalty=jnp.float32(repetition_penalty),
        greedy=temperature == 0,
        sorts=temperature != 0 and (top_k > 0 or top_p < 1),
        penalises=repetition_penalty != 1,
    )


def penalise(logits_BxV: Array, seen_BxV: Array, penalty: Array) -> Array:
    """Repetition penalty (Keskar et al. 2019): tokens that were seen have positive logits divided
    by the penalty and negative ones multiplied with it."""
    changed = jnp.where(logits_BxV > 0, logits_BxV / penalty, logits_BxV * penalty)
    return jnp.where(seen_BxV, changed, logits_BxV)


def filter_logits(logits_BxV: Array, sampling: Sampling) -> Array:
    """Temperature, then top-k, then top-p (Holtzman et al. 2020), then min-p (Nguyen et al. 2024).

    What is filtered out gets NEVER. Top-p keeps the smallest set of the most probable tokens whose
    probability reaches p; min-p those with at least min_p times the highest probability. The most
    probable token always stays.
    """
    z = logits_BxV / sampling.temperature
    if sampling.sorts:
        V = z.shape[1]
        ranked = -jnp.sort(-z, axis=1)
        k_th = jnp.take(ranked, jnp.minimum(sampling.top_k, V) - 1, axis=1)[:, None]
        z, ranked = jnp.where(z < k_th, NEVER, z), jnp.where(ranked < k_th, NEVER, ranked)
        p = jax.nn.softmax(ranked, axis=1)
        before = jnp.cumsum(p, axis=1) - p
        kept = jnp.where(before < sampling.top_p, ranked, jnp.inf)
        z = jnp.where(z < jnp.min(kept, axis=1, keepdims=True), NEVER, z)
    top = jnp.max(z, axis=1, keepdims=True)
    floor = jnp.where(sampling.min_p > 0, top + jnp.log(jnp.maximum(sampling.min_p, 1e-30)), NEVER)
    return jnp.where(z < floor, NEVER, z)


def choose(
    logits_BxV: Array, keys_B: Array, seen_BxV: Array | None, sampling: Sampling
) -> tuple[Array, Array]:
    """The next token [B], and its log-probability [B] under the model itself (before any filter)."""
    log_p = jax.nn.log_softmax(logits_BxV, axis=1)
    z = logits_BxV
    if sampling.penalises:
        z = penalise(z, seen_BxV, sampling.repetition_penalty)
    if sampling.greedy:
        token = jnp.argmax(z, axis=1)
    else:
        token = jax.vmap(jax.random.categorical)(keys_B, filter_logits(z, sampling))
    return token.astype(jnp.int32), jnp.take_along_axis(log_p, token[:, None], axis=1)[:, 0]
