"""Generation: one prefill and a `lax.while_loop` over a key-value cache, all on the device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import config as configs
from llm_jax import models, sharding
from llm_jax.config import ModelConfig
from llm_jax.data.packing import bucket
from llm_jax.decode import stopping, weights
from llm_jax.decode.sampling import Sampling, choose, make_sampling
from llm_jax.nn.cached import queue
from llm_jax.types import Array, Batch, PyTree

OUTPUT_STEP = 32  # output lengths are rounded up to it, so that few shapes are compiled
# Deeper models keep the scan over layers: a loop takes compile time in proportion to its length,
# about half a second a layer on a CPU, and a second copy of the weights.
LOOPED_LAYERS = 32


@dataclass(frozen=True)
class Completion:
    """One generated text."""

    text: str  # without the prompt, the end token and the stop string
    tokens: list[int]
    log_probs: list[float]  # of each token under the model itself, in nats
    finish_reason: str  # "stop": end token or stop string; "length": max_new_tokens


class Output(NamedTuple):
    """What the device returns."""

    tokens: Array  # int32 [B, n], 0 after a row's end
    log_probs: Array  # float32 [B, n]
    lengths: Array  # int32 [B], the end token or the token that completed a stop string included
    stopped: Array  # bool [B]


def in_a_loop(cfg: ModelConfig) -> ModelConfig:
    """The same model with its layers in a Python loop.

    A scan over layers cuts each layer's weights and cache out of their stacks once a token, which
    moves them three times instead of once. In a loop `weights.cut` and `cached.queue` make the cuts
    once, before the first token.
    """
    looped = configs.thaw(cfg)
    looped.scan, looped.remat = False, "none"
    return configs.freeze(looped)


@partial(jax.jit, static_argnames=("cfg", "n_slots"))
def generate_tokens(
    params: PyTree,
    prompt_BxP: Array,
    lengths_B: Array,
    limit: Array,
    keys_B: Array,
    sampling: Sampling,
    end_ids: Array,
    stop_table: Array | None,
    *,
    cfg: ModelConfig,
    n_slots: int,
) -> Output:
    """Up to min(limit, n_slots) tokens for each prompt.

    Prompts are padded on the left, so that all rows write the same cache slot. `end_ids` [E] are
    tokens that end a row; `stop_table` [states, V] is that of `stopping.token_automaton`, whose
    last state accepts. Row r draws its n-th token with `fold_in(keys_B[r], n)`.
    """
    looped = cfg.n_layers <= LOOPED_LAYERS and sharding.ambient_mesh() is None
    model, cfg = models.family(cfg.family), in_a_loop(cfg) if looped else cfg
    B, P = prompt_BxP.shape
    position = jnp.arange(P)[None] - (P - lengths_B)[:, None]
    batch = Batch(
        tokens=prompt_BxP,
        segments=(position >= 0).astype(jnp.int32),
        positions=jnp.maximum(position, 0),
    )
    cache = model.init_cache(params, batch, cfg, P + n_slots)
    params = model.cast(params, cfg.dtype)
    held = weights.cut(params, model.specs(cfg)) if looped else None
    if looped:
        cache = cache.replace(layers=queue(cache.layers, cfg.n_layers))

    def advance(batch: Batch, cache):
        whole = weights.joined(held) if looped else params
        out = model.hidden(whole, batch, cfg, cache=cache)
        return model.logits(params, out.x[:, -1:], cfg)[:, 0], out.cache

    def pick(n, logits, seen, state, done):
        token, log_p = choose(
            logits, jax.vmap(lambda k: jax.random.fold_in(k, n))(keys_B), seen, sampling
        )
        if seen is not None:
            seen = seen.at[jnp.arange(B), token].set(True)
        ends = jnp.any(token[:, None] == end_ids[None, :], axis=1)
        if stop_table is not None:
            state = stop_table[state, token]
            ends = ends | (state == stop_table.shape[0] - 1)
        return jnp.where(done, 0, token), jnp.where(done, 0.0, log_p), seen, state, done | ends

    seen = None
    if sampling.penalises:
        seen = jnp.zeros((B, cfg.vocab_size), bool)
        seen = seen.at[jnp.arange(B)[:, None], prompt_BxP].max(position >= 0)
    logits, cache = advance(batch, cache)
    nobody = jnp.zeros((B,), bool)
    token, log_p, seen, state, done = pick(0, logits, seen, jnp.zeros((B,), jnp.int32), nobody)
    tokens = jnp.zeros((B, n_slots), jnp.int32).at[:, 0].set(token)
    log_probs = jnp.zeros((B, n_slots), jnp.float32).at[:, 0].set(log_p)
    counts = jnp.ones((B,), jnp.int32)

    def unfinished(carry):
        n, _, _, _, _, _, _, done, _ = carry
        return (n < jnp.minimum(limit, n_slots)) & ~jnp.all(done)

    def body(carry):
        n, token, cache, tokens, log_probs, seen, state, done, counts = carry
        batch = Batch(
            tokens=token[:, None],
            segments=jnp.ones((B, 1), jnp.int32),
            positions=(lengths_B + n - 1)[:, None],
        )
        logits, cache = advance(batch, cache)
        counts = counts + ~done
        token, log_p, seen, state, done = pick(n, logits, seen, state, done)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, n))
        log_probs = jax.lax.dynamic_update_slice(log_probs, log_p[:, None], (0, n))
        return n + 1, token, cache, tokens, log_probs, seen, state, done, counts

    start = (jnp.int32(1), token, cache, tokens, log_probs, seen, state, done, counts)
    _, _, _, tokens, log_probs, _, _, done, counts = jax.lax.while_loop(unfinished, body, start)
    return Output(tokens, log_probs, counts, done)


def start_ids(tokenizer: Any) -> list[int]:
    """The token that a text without a prompt starts from: begin, else end (documents follow one
    another in training), else a line break."""
    for token in (tokenizer.bos_id, tokenizer.eos_id):
        if token is not None:
            return [token]
    return tokenizer.encode("\n")[:1] or [0]


def encode_prompt(tokenizer: Any, prompt: str, *, add_bos: bool = False) -> list[int]:
    """Prompt -> ids, never empty; special tokens in it are read as such, and a begin token that
    stands there already is not put in front again."""
    ids = tokenizer.encode(prompt, special=True)
    if add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    return ids or start_ids(tokenizer)


def generate(
    params: PyTree,
    cfg: ModelConfig,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 64,
    seed: int = 0,
    stop: Sequence[str] = (),
    stop_at_end: bool = True,
    end_tokens: Sequence[int] = (),
    add_bos: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    row_keys: Array | None = None,
) -> list[Completion]:
    """Completes each prompt (text, or token ids); prompts of any lengths share one batch.

    The same seed gives the same texts; `row_keys`, a random key for each prompt, take its place, so
    that a text does not depend on where its prompt stands. `stop` strings end a text and are cut
    off, also where they span several tokens; `stop_at_end` ends it at the tokenizer's end token and
    at any of `end_tokens`.

    Raises:
      ValueError: a number out of its range, a prompt with ids outside the vocabulary, lengths that
        a learned position table does not have, or not as many `row_keys` as prompts.
    """
    if max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens={max_new_tokens} has to be at least 1")
    if not prompts:
        return []
    sampling = make_sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    encoded = [
        encode_prompt(tokenizer, p, add_bos=add_bos)
        if isinstance(p, str)
        else list(p) or start_ids(tokenizer)
        for p in prompts
    ]
    _check_ids(encoded, cfg)
    longest = max(map(len, encoded))
    room = models.family(cfg.family).room(params, cfg)
    if cfg.positions == "learned" and longest + max_new_tokens > room:
        raise ValueError(
            f"a prompt of {longest} tokens and --max_new_tokens={max_new_tokens} do not fit the model's "
            f"{room} learned positions; shorten one"
        )
    P = bucket(longest)
    n_slots = -(-max_new_tokens // OUTPUT_STEP) * OUTPUT_STEP
    B = len(encoded)
    mesh = sharding.ambient_mesh()
    divisor = 1 if mesh is None else math.prod(mesh.shape[a] for a in sharding.RULES["batch"])
    rows = -(-B // divisor) * divisor  # the rest repeat the last prompt
    encoded += [encoded[-1]] * (rows - B)
    tokens = np.zeros((rows, P), np.int32)
    for row, ids in zip(tokens, encoded, strict=True):
        row[P - len(ids) :] = ids
    stop_table = None
    if stop:
        stop_table = stopping.token_automaton(
            stop, _padded(tokenizer.token_bytes(), cfg.vocab_size)
        )[0]
    if row_keys is None:
        row_keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(B))
    elif len(row_keys) != B:
        raise ValueError(f"{B} prompts need as many row_keys, not {len(row_keys)}")
    out = generate_tokens(
        params,
        tokens,
        np.array([len(ids) for ids in encoded], np.int32),
        np.int32(max_new_tokens),
        row_keys[jnp.minimum(jnp.arange(rows), B - 1)],
        sampling,
        np.array(_end_ids(tokenizer, end_tokens) if stop_at_end else [-1], np.int32),
        stop_table,
        cfg=cfg,
        n_slots=n_slots,
    )
    tokens, log_probs, lengths, stopped = (np.asarray(x)[:B] for x in jax.device_get(tuple(out)))
    completions = []
    for ids, log_p, n, ended in zip(tokens, log_probs, lengths, stopped, strict=True):
        ids, log_p = ids[:n].tolist(), log_p[:n].tolist()
        # Imported models often have more rows than tokens; such an id stands for no text.
        text = tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])
        if cuts := [at for s in stop if (at := text.find(s)) >= 0]:
            text = text[: min(cuts)]
        completions.append(Completion(text, ids, log_p, "stop" if ended else "length"))
    return completions


def _end_ids(tokenizer: Any, more: Sequence[int]) -> list[int]:
    own = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return list(dict.fromkeys([*own, *more])) or [-1]


def _check_ids(encoded: list[list[int]], cfg: ModelConfig) -> None:
    for row in encoded:
        if bad := [i for i in row if not 0 <= i < cfg.vocab_size]:
            raise ValueError(
                f"token id {bad[0]} is outside the model's vocabulary of {cfg.vocab_size}"
            )


def _padded(token_bytes: list[bytes], vocab_size: int) -> list[bytes]:
    return (token_bytes + [b""] * vocab_size)[:vocab_size]
