"""Does a learning rate found on a narrow model serve a wide one? Two experiments that show it.

The coordinate check (Yang et al. 2022, appendix D.1) follows how far activations move in a few
steps, for several widths: under muP by the same amount, under the standard parametrisation by more
the wider the model is. The transfer experiment looks for the best learning rate at each width.
Both grow a base config in width alone: more heads of the same size, d_ff in proportion, depth and
data unchanged.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import config as configs
from llm_jax import models
from llm_jax.config import TrainConfig
from llm_jax.data.prepare import Corpus
from llm_jax.eval import likelihood
from llm_jax.nn import taps
from llm_jax.nn.params import count
from llm_jax.train import in_memory
from llm_jax.types import Batch, PyTree

PARAMETRIZATIONS = ("mup", "standard")
FACTOR = 2.0  # between neighbouring learning rates


def at_width(
    base: TrainConfig, width: int, parametrization: str, *, vocab_size: int, **changes: Any
) -> TrainConfig:
    """The base recipe with a model of another width, resolved and frozen.

    "mup" scales by `llm_jax.nn.mup` from the base recipe's own width. "standard" draws weights with
    init_std * sqrt(base width / width), a variance of 1 / fan-in, and has one learning rate for all.

    Raises:
      ValueError: a width that the base's heads do not divide, or an unknown parametrisation.
    """
    if parametrization not in PARAMETRIZATIONS:
        raise ValueError(
            f"parametrization {parametrization!r} is none of {', '.join(PARAMETRIZATIONS)}"
        )
    cfg = configs.thaw(base)
    m = cfg.model
    start = m.d_model
    head_dim = m.head_dim or start // m.n_heads
    if width % head_dim:
        raise ValueError(
            f"width {width} is not divisible by the base recipe's heads of {head_dim} "
            f"(model.d_model={start}, model.n_heads={m.n_heads})"
        )
    m.d_ff = round((m.d_ff or 4 * start) * width / start)
    if m.kv_heads:
        m.kv_heads = max(1, m.kv_heads * width // start)
    m.d_model, m.n_heads, m.head_dim = width, width // head_dim, head_dim
    if parametrization == "mup":
        m.mup_base_width = start
    else:
        m.init_std *= math.sqrt(start / width)
    configs.override(cfg, {"name": f"{parametrization} {width}", **changes})
    configs.resolve_model(
        m, vocab_size=vocab_size, length=cfg.length, backend=jax.default_backend()
    )
    configs.validate(cfg)
    return configs.freeze(cfg)


# The best learning rate of each width ---------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One training run; `loss` is held-out, nats per token, infinity where it diverged."""

    parametrization: str
    width: int
    learning_rate: float
    seed: int
    loss: float
    parameters: int


def measure(base: TrainConfig, corpus: Corpus, key: tuple[str, int, float, int]) -> Outcome:
    """Trains and evaluates one (parametrization, width, learning rate, seed)."""
    parametrization, width, rate, seed = key
    changes = {"optimizer.learning_rate": rate, "seed": seed}
    cfg = at_width(base, width, parametrization, vocab_size=corpus.tokenizer.vocab_size, **changes)
    trained = in_memory.train(cfg, corpus.loader(cfg).batch)
    batches = corpus.eval_batches(cfg)
    with jax.set_mesh(trained.program.mesh):
        found = likelihood.evaluate(trained.program.evaluate, trained.params, batches)
    loss = found["eval_loss"]
    if not (np.isfinite(trained.losses).all() and math.isfinite(loss)):
        loss = math.inf
    return Outcome(parametrization, width, rate, seed, loss, count(trained.program.specs))


class Outcomes:
    """The runs of a transfer experiment, each kept in `folder`/outcomes.jsonl as soon as it is known.

    Raises:
      ValueError: the folder holds runs of another recipe.
    """

    def __init__(self, folder: str, base: TrainConfig):
        self._path = path = os.path.join(folder, "outcomes.jsonl")
        recipe = os.path.join(folder, "config.json")
        if os.path.exists(path) and os.path.exists(recipe):
            with open(recipe) as f:
                before = json.load(f)
            now = json.loads(json.dumps(configs.to_dict(base)))  # tuples as lists
            if changed := [name for name in now if now[name] != before.get(name)]:
                raise ValueError(
                    f"{folder} has runs of a recipe that differs in {', '.join(changed)}; choose another "
                    "--workdir"
                )
        configs.save(base, recipe)
        self.known: dict[tuple[str, int, float, int], Outcome] = {}
        if os.path.exists(path):
            with open(path) as f:
                for line in f:
                    with contextlib.suppress(ValueError):  # cut off when the process died
                        self._add(Outcome(**json.loads(line)))

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values of all runs."""
        return [dataclasses.asdict(o) for o in self.known.values()]

    def _add(self, o: Outcome) -> None:
        self.known[o.parametrization, o.width, o.learning_rate, o.seed] = o

    def get(self, key: tuple[str, int, float, int], make: Callable[[tuple], Outcome]) -> Outcome:
        """What is known under this key, or made now."""
        if key not in self.known:
            made = make(key)
            self._add(made)
            with open(self._path, "a") as f:
                f.write(json.dumps(dataclasses.asdict(made)) + "\n")
        return self.known[key]


def search_all(
    base: TrainConfig,
    corpus: Corpus,
    outcomes: Outcomes,
    *,
    widths: Sequence[int],
    parametrizations: Sequence[str] = PARAMETRIZATIONS,
    seeds: int = 1,
    points: int = 5,
) -> None:
    """Looks for the best learning rate of each width, narrow ones first: the next width starts
    from what was best there."""
    for parametrization in parametrizations:
        start = base.optimizer.learning_rate
        for width in sorted(widths):

            def loss(rate: float, width=width, parametrization=parametrization) -> float:
                found = [
                    outcomes.get(
                        (parametrization, width, rate, seed), partial(measure, base, corpus)
                    )
                    for seed in range(seeds)
                ]
                mean = float(np.mean([o.loss for o in found]))
                print(f"{parametrization} {width}: rate {rate:.3e} loss {mean:.4f}", flush=True)
                return mean

            tried = search(loss, start, points)
            start = min(tried, key=tried.get)


def search(loss: Callable[[float], float], start: float, points: int = 5) -> dict[float, float]:
    """{learning rate: loss} at steps of FACTOR from `start`, until the least loss has neighbours on
    both sides and there are at least `points` of them."""
    found = {0: loss(start)}

    def rate(i: int) -> float:
        return start * FACTOR**i

    while True:
        best = min(found, key=found.get)
        low, high = min(found), max(found)
        if best == low:
            new = low - 1
        elif best == high:
            new = high + 1
        elif len(found) < points:
            new = low - 1 if best - low <= high - best else high + 1
        else:
            return {rate(i): found[i] for i in sorted(found)}
        if abs(new) > 16:
            raise ValueError(
                f"the loss keeps falling down to a learning rate of {rate(new):.2e}; start elsewhere"
            )
        found[new] = loss(rate(new))


def mean_over_seeds(outcomes: Sequence[Outcome]) -> dict[tuple[str, int], dict[float, float]]:
    """{(parametrization, width): {learning rate: mean loss}}, of rates that every seed has."""
    losses: dict[tuple[str, int], dict[float, list[float]]] = {}
    for o in outcomes:
        losses.setdefault((o.parametrization, o.width), {}).setdefault(o.learning_rate, []).append(
            o.loss
        )
    return {
        key: {
            rate: float(np.mean(values))
            for rate, values in sorted(by_rate.items())
            if len(values) == max(map(len, by_rate.values()))
        }
        for key, by_rate in losses.items()
    }


# The coordinate check -------------------------------------------------------------------------


def coordinate_check(
    base: TrainConfig, corpus: Corpus, widths: Sequence[int], *, steps: int = 8, seeds: int = 3
) -> list[dict[str, Any]]:
    """How activations move in the first steps at the base recipe's peak learning rate.

    Returns rows of parametrization, width, step, where (embedded, attention_out 0, mlp_out 0, ...,
    trunk, logits), size (root mean square) and change (that of the difference to the activations
    before the first step), on one batch that is not trained on; means over seeds.
    """
    rows: dict[tuple, list[tuple[float, float]]] = {}
    vocab_size = corpus.tokenizer.vocab_size
    for parametrization in PARAMETRIZATIONS:
        for width in widths:
            for seed in range(seeds):
                cfg = at_width(
                    base,
                    width,
                    parametrization,
                    vocab_size=vocab_size,
                    seed=seed,
                    **{
                        "steps": steps,
                        "optimizer.schedule": "constant",
                        "optimizer.warmup_steps": 0,
                        "model.scan": False,
                        "model.remat": "none",
                    },
                )
                for key, value in _moves(cfg, corpus).items():
                    rows.setdefault((parametrization, width, *key), []).append(value)
    return [
        {
            "parametrization": parametrization,
            "width": width,
            "step": step,
            "where": where,
            "size": float(np.mean([v[0] for v in values])),
            "change": float(np.mean([v[1] for v in values])),
        }
        for (parametrization, width, step, where), values in rows.items()
    ]


def growth(rows: Sequence[dict[str, Any]], value: str = "change") -> dict[tuple[str, str], float]:
    """{(parametrization, where): slope of log value against log width at the last step}: 0 where
    width makes no difference, 1 where it grows in proportion."""
    last = max(r["step"] for r in rows)
    points: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for r in rows:
        if r["step"] == last:
            points.setdefault((r["parametrization"], r["where"]), []).append((r["width"], r[value]))
    return {
        key: float(np.polyfit(*np.log(np.array(sorted(p), float).T), 1)[0])
        for key, p in points.items()
    }


def _moves(cfg: TrainConfig, corpus: Corpus) -> dict[tuple[int, str], tuple[float, float]]:
    """{(step, where): (size, change)} of one short training run."""
    model = models.family(cfg.model.family)
    held_out = corpus.eval_batches(cfg)[0]

    def logits(params: PyTree, batch: Batch) -> jax.Array:
        return model.logits(params, model.hidden(params, batch, cfg.model).x, cfg.model)

    @jax.jit
    def look(params: PyTree, batch: Batch) -> dict[str, jax.Array]:
        out, seen = taps.record(logits)(params, batch)
        named = {"logits": out}
        for name, values in seen.items():
            for i, value in enumerate(values):
                named[name if len(values) == 1 else f"{name} {i}"] = value
        return named

    first: dict[str, jax.Array] = {}
    moves = {}

    def rms(x: jax.Array) -> float:
        return float(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))))

    def watch(step: int, params: PyTree) -> None:
        now = look(params, held_out)
        if not first:
            first.update(now)
        for where, value in now.items():
            moves[step, where] = rms(value), rms(value - first[where])

    in_memory.train(cfg, corpus.loader(cfg).batch, watch=watch)
    return moves
