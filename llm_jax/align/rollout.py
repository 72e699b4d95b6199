"""Many answers of a model to each of many prompts, and how far their policy is from another.

A model is what `llm_jax.load` returns: its `complete`, `params`, `config`, `tokenizer` and `mesh`
are used. A prompt is a list of messages, the last of them to be answered.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from llm_jax.data.packing import bucket
from llm_jax.data.progress import bar
from llm_jax.decode.generate import start_ids
from llm_jax.eval.scoring import score_rows
from llm_jax.eval.uncertainty import standard_error

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """One sampled answer."""

    text: str  # stripped, without the end token and the stop string
    tokens: list[int]  # with them
    log_probs: list[float]  # of each token under the policy at temperature 1, in nats
    finish_reason: str  # "stop", or "length": max_new_tokens


def prompt_ids(model: Any, prompts: Sequence[Messages]) -> list[list[int]]:
    """The ids that `model` answers: each prompt in its chat template, up to where an answer begins.

    Raises:
      ValueError: it has no chat template.
    """
    if not model.tokenizer.chat_template:
        raise ValueError(
            "the model's tokenizer has no chat template, which says how it is asked; give that of a run "
            "of sft, reward or dpo on it (--tokenizer=RUN/data/tokenizer)"
        )
    render = partial(model.tokenizer.apply_chat_template, add_generation_prompt=True)
    return [render(messages) or start_ids(model.tokenizer) for messages in prompts]


def sample(
    model: Any,
    prompts: Sequence[Messages],
    *,
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch_size: int = 32,
) -> list[list[Answer]]:
    """`n` answers to each prompt; they end where those of `Model.answers` do.

    Answer a to prompt p is drawn with a key made of `seed`, p and a. It does not depend on n, on
    `batch_size` or on the other prompts (but for rounding, which differs between batches of other
    shapes and may once in a long while turn a token), so that more answers, or more prompts behind
    these, leave those that were drawn as they are.

    Args:
      batch_size: answers drawn at a time, at most. A batch has prompts of one padded length, and
        those of one length are of one size: one shape is compiled for each length.

    Raises:
      ValueError: a number out of its range, no chat template, or a prompt that does not fit.
    """
    for name, value in (("n", n), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"--{name}={value} has to be at least 1")
    encoded = prompt_ids(model, prompts)
    lengths = defaultdict(list)
    for p, ids in enumerate(encoded):
        lengths[bucket(len(ids))] += [(p, a) for a in range(n)]
    keys = _keys(seed, len(prompts), n)
    answers: list[list[Any]] = [[None] * n for _ in prompts]
    progress = bar("sampling", len(prompts) * n, "answer")
    for length in sorted(lengths, reverse=True):  # what does not fit shows at once
        for rows in _even_batches(lengths[length], batch_size):
            done = model.complete(
                [encoded[p] for p, _ in rows],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                stop=tuple(model.config.tokenizer.stop),
                row_keys=keys[tuple(np.array(rows).T)],
            )
            for (p, a), out in zip(rows, done, strict=True):
                answers[p][a] = Answer(
                    out.text.strip(), out.tokens, out.log_probs, out.finish_reason
                )
            progress.update(len(set(rows)))
    progress.close()
    return answers


def log_probs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int = 8,
) -> list[list[np.ndarray]]:
    """log p of each token of given answers under `model` (temperature 1), in nats.

    Args:
      prompts: ids of each prompt, as `prompt_ids` has them.
      answers: [prompt][answer] ids, such as `Answer.tokens`, of the same tokenizer.

    Returns:
      [prompt][answer] float32 arrays, one number a token.

    Raises:
      ValueError: not as many prompts as lists of answers, or ids that `model` does not have.
    """
    pairs = [
        (p, tokens)
        for p, group in zip(range(len(prompts)), answers, strict=True)
        for tokens in group
    ]
    progress = bar("scoring", len(pairs), "answer")
    with jax.set_mesh(model.mesh):
        scored = score_rows(
            model.params,
            model.config.model,
            [[*prompts[p], *tokens] for p, tokens in pairs],
            batch_size=batch_size,
            progress=progress.update,
        )
    progress.close()
    out: list[list[np.ndarray]] = [[] for _ in prompts]
    for (p, tokens), row in zip(pairs, scored, strict=True):
        out[p].append(row[len(row) - len(tokens) :])
    return out


class Kl(NamedTuple):
    """Two estimates of one divergence, in nats an answer, with standard errors over prompts (nan of
    a single prompt)."""

    k1: float
    k1_error: float
    k3: float
    k3_error: float


def kl(
    policy: Sequence[Sequence[Sequence[float]]], reference: Sequence[Sequence[Sequence[float]]]
) -> Kl:
    """KL(policy || reference) of whole answers, from the log-probabilities that both give to the
    tokens of answers that the policy itself wrote, [prompt][answer][token].

    With d = log policy - log reference of a token:

        k1 = mean of sum_t d                     unbiased, and below 0 for some answers
        k3 = mean of sum_t (exp(-d) - 1 + d)     no term below 0, of less variance where the two are
                                                 close; unbiased where the policy can write all that
                                                 the reference can

    Each prompt counts the same. The answers have to be drawn at temperature 1 with no other filter:
    those of another temperature, of top-p or of top-k are samples of another policy, and neither
    mean is then the divergence of this one (nor of that one, whose log-probabilities are not these).
    Source: Schulman 2020, "Approximating KL Divergence"; k3 of an answer by the chain rule.

    Raises:
      ValueError: no prompt, a prompt without answers, or log-probabilities that do not fit together.
    """
    if not len(policy):
        raise ValueError("the divergence needs one prompt at least")
    per_prompt = []
    for ours, theirs in zip(policy, reference, strict=True):
        if not len(ours):
            raise ValueError("each prompt needs one answer at least")
        sums = []
        for a, b in zip(ours, theirs, strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            if a.shape != b.shape:
                raise ValueError(
                    f"an answer has {a.size} and {b.size} log-probabilities; they are of one text"
                )
            d = a - b
            sums.append((d.sum(), (np.expm1(-d) + d).sum()))
        per_prompt.append(np.mean(sums, axis=0))
    k1, k3 = np.array(per_prompt).T
    return Kl(float(k1.mean()), standard_error(k1), float(k3.mean()), standard_error(k3))


def _keys(seed: int, n_prompts: int, n: int) -> jax.Array:
    """[prompts, n] random keys."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    by_prompt = fold(jax.random.key(seed), np.arange(n_prompts))
    return jax.vmap(fold, in_axes=(0, None))(by_prompt, np.arange(n))


def _even_batches(rows: list[tuple[int, int]], batch_size: int) -> list[list[tuple[int, int]]]:
    """Batches of one size, at most `batch_size`; the last is filled with its last row."""
    count = math.ceil(len(rows) / batch_size)
    size = math.ceil(len(rows) / count)
    batches = [rows[at : at + size] for at in range(0, len(rows), size)]
    batches[-1] += batches[-1][-1:] * (size - len(batches[-1]))
    return batches
