"""Quality against bytes and against tokens/s: one model by many schemes, and which are worth having."""

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import config as configs
from llm_jax import models
from llm_jax.compression import schemes
from llm_jax.compression.schemes import Compressed, Training
from llm_jax.config import ModelConfig, TrainConfig
from llm_jax.decode.generate import generate, start_ids
from llm_jax.eval.likelihood import perplexity
from llm_jax.eval.output import Kept
from llm_jax.eval.scoring import rolling
from llm_jax.nn import params as nn_params
from llm_jax.peft.quantization import LINEAR
from llm_jax.report import Block, Code, Plot, Series, Table, Text, write_report
from llm_jax.types import Array, Batch, PyTree

ROUNDS = 3  # timings of each model in turn; the median counts
CACHED = "+int8-cache"


@dataclass(frozen=True)
class Point:
    """One compressed model, measured.

    Attributes:
      nbytes: of the weights; the whole model's.
      tokens_per_second: decoding one row; `base_tokens_per_second` is the uncompressed model's in
        between. None: not measured.
      sparsity: of the pruned matrices.
      frontiers: "size" and "speed", of those that no other point beats.
    """

    scheme: str
    nbytes: int
    perplexity: float
    bits_per_byte: float
    tokens_per_second: float | None = None
    base_tokens_per_second: float | None = None
    sparsity: float | None = None
    frontiers: tuple[str, ...] = ()

    @property
    def speed_up(self) -> float | None:
        """Its speed as a multiple of the uncompressed model's, timed in turn with it."""
        if self.tokens_per_second is None:
            return None
        return self.tokens_per_second / self.base_tokens_per_second


@dataclass(frozen=True, kw_only=True)
class Options:
    """How models are measured.

    Attributes:
      texts: what perplexity is of; `source` says in words where they come from.
      window: tokens that the model sees at most, and the stride.
      decode_tokens: how many are decoded for the speed; 0: it is not measured.
      int8_cache: each scheme is also measured with keys and values held as int8, the texts going
        through the cache.
    """

    texts: Sequence[str]
    source: str = ""
    window: int | None = None
    batch_size: int = 4
    decode_tokens: int = 32
    int8_cache: bool = False
    targets: str = LINEAR
    training: Training | None = None


def measure(
    names: Sequence[str],
    cfg: TrainConfig,
    params: PyTree,
    tokenizer: Any,
    options: Options,
    *,
    kept: Kept | None = None,
    again: Collection[str] = (),
    done: Callable[[Point, Compressed], None] | None = None,
) -> list[Point]:
    """Each scheme's point; "float32" comes first whether it is named or not. What `kept` holds is
    not measured again, and comes along.

    `done(point, model)` is called once a model has been measured, or made `again` although it had
    been; one at a time is in memory beside the uncompressed one.

    Raises:
      ValueError: a name of no scheme (before any work), or what `schemes.compress` raises.
    """
    names = ["float32", *(n for n in dict.fromkeys(names) if n != "float32")]
    for name in names:
        schemes.check(name, options.training is not None)
    base = jax.tree.map(lambda x: x.astype("float32"), params)
    points = {}
    if kept:
        points = {name: Point(**item) for name, item in kept.items.items()}
    for name in names:
        wanted = [name, name + CACHED] if options.int8_cache else [name]
        wanted = [w for w in wanted if w not in points or w in again]
        if not wanted:
            continue
        model = schemes.compress(
            name, cfg, base, targets=options.targets, training=options.training
        )
        for point_name in wanted:
            if point_name not in points:
                point = _measure(point_name, cfg.model, model, base, tokenizer, options)
                points[point_name] = point
                if kept:
                    kept.add(point_name, asdict(point))
            if done:
                done(points[point_name], model)
    return marked(points.values())


def kept_in(directory: str, title: str, params: PyTree, options: Options) -> Kept:
    """What `directory`/results.json holds of this model, measured in this way.

    Raises:
      ValueError: it holds measurements of another model, or made in another way.
    """
    texts = hashlib.sha256("\0".join(options.texts).encode()).hexdigest()[:16]
    about = {
        "model": title,
        "weights": nn_params.fingerprint(params),
        "input": options.source,
        "text": texts,
        "window": options.window,
        "targets": options.targets,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "decode_tokens": options.decode_tokens,
    }
    if options.training:
        own = asdict(options.training)
        ids = np.ascontiguousarray(own.pop("ids"))
        about["training"] = own | {"text": hashlib.sha256(ids.tobytes()).hexdigest()[:16]}
    return Kept(Path(directory) / "results.json", about, "--output")


def marked(points: Iterable[Point]) -> list[Point]:
    """The points with the frontiers they are on: no other is at least as good in both respects and
    better in one. Lower perplexity goes with fewer bytes ("size") and a higher speed-up ("speed")."""
    points = list(points)
    timed = [p for p in points if p.tokens_per_second is not None]
    size = _best([(p.nbytes, p.perplexity) for p in points])
    speed = _best([(-p.speed_up, p.perplexity) for p in timed])
    on = {id(p): ["size"] for p, best in zip(points, size, strict=True) if best}
    for p, best in zip(timed, speed, strict=True):
        if best:
            on.setdefault(id(p), []).append("speed")
    return [replace(p, frontiers=tuple(on.get(id(p), ()))) for p in points]


def write(points: Sequence[Point], directory: str, about: dict, command: Sequence[str]) -> Path:
    """Writes report.md and its plots, `about` being `Kept.settings`; returns the path."""
    return write_report(
        directory, f"Compression: {about['model']}", _blocks(points, about, command)
    )


def through_cache(
    params: PyTree,
    cfg: ModelConfig,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int,
    batch_size: int,
) -> dict[str, float]:
    """Perplexity as `likelihood.perplexity` has it (stride = window), but with keys and values
    written into the decoding cache and read from there."""
    (prefix,) = start_ids(tokenizer)
    rows = []
    for text in texts:
        for context, continuation in rolling(
            tokenizer.encode(text), window=window, stride=window, prefix=prefix
        ):
            rows.append(([*context, *continuation], len(continuation)))
    nats = count = 0
    for i in range(0, len(rows), batch_size):
        group = rows[i : i + batch_size]
        tokens = np.zeros((batch_size, window + 1), np.int32)
        weights = np.zeros((batch_size, window), np.float32)
        for r, (ids, scored) in enumerate(group):
            tokens[r, : len(ids)] = ids
            weights[r, len(ids) - 1 - scored : len(ids) - 1] = 1
            count += scored
        nats += float(_cached_nats(params, tokens, weights, cfg))
    n_bytes = sum(len(text.encode()) for text in texts)
    return {
        "perplexity": float(np.exp(min(nats / count, 700.0))),
        "bits_per_byte": nats / n_bytes / float(np.log(2)),
    }


@partial(jax.jit, static_argnames="cfg")
def _cached_nats(params: PyTree, tokens: Array, weights: Array, cfg: ModelConfig) -> Array:
    model = models.family(cfg.family)
    batch = Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:])
    cache = model.init_cache(params, batch, cfg, tokens.shape[1] - 1)
    scores = model.scores(params, batch, cfg, cache=cache, want=("log_probs",))
    return -jnp.sum(scores.log_probs * weights)


def _measure(
    name: str,
    cfg: ModelConfig,
    model: Compressed,
    base: PyTree,
    tokenizer: Any,
    options: Options,
) -> Point:
    own = cfg
    if name.endswith(CACHED):
        changed = configs.thaw(cfg)
        changed.cache_dtype = "int8"
        own = configs.freeze(changed)
        quality = through_cache(
            model.params,
            own,
            tokenizer,
            options.texts,
            window=options.window or cfg.max_length,
            batch_size=options.batch_size,
        )
    else:
        quality = perplexity(
            model.params,
            cfg,
            tokenizer,
            options.texts,
            window=options.window,
            batch_size=options.batch_size,
        )
    speed = (None, None)
    if options.decode_tokens:
        speed = _speeds([(model.params, own), (base, cfg)], tokenizer, options.decode_tokens)
    return Point(
        name, model.nbytes, quality["perplexity"], quality["bits_per_byte"], *speed, model.sparsity
    )


def _speeds(
    pairs: Sequence[tuple[PyTree, ModelConfig]], tokenizer: Any, n: int
) -> tuple[float, ...]:
    """Tokens per second of greedy decoding of each model, timed in turn; the prompt, one token,
    counts as nothing."""
    times = [[] for _ in pairs]
    for turn in range(ROUNDS + 1):
        for taken, (params, cfg) in zip(times, pairs, strict=True):
            begin = time.perf_counter()
            generate(
                params,
                cfg,
                tokenizer,
                [start_ids(tokenizer)],
                max_new_tokens=n,
                temperature=0.0,
                stop_at_end=False,
            )
            if turn:  # the first one compiles
                taken.append(time.perf_counter() - begin)
    return tuple(n / float(np.median(taken)) for taken in times)


def _best(pairs: Sequence[tuple[float, float]]) -> list[bool]:
    def beaten(p):
        return any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in pairs)

    return [not beaten(p) for p in pairs]


def _blocks(points: Sequence[Point], about: dict, command: Sequence[str]) -> list[Block]:
    base = points[0]
    rows = []
    for p in points:
        row = {
            "scheme": p.scheme,
            "MB": p.nbytes / 1e6,
            "of float32": p.nbytes / base.nbytes,
            "perplexity": p.perplexity,
            "change": f"{p.perplexity / base.perplexity - 1:+.2%}",
            "bits per byte": p.bits_per_byte,
        }
        if p.tokens_per_second is not None:
            row["tokens/s"] = p.tokens_per_second
            row["of float32's"] = p.speed_up
        if any(q.sparsity is not None for q in points):
            row["pruned"] = "" if p.sparsity is None else f"{p.sparsity:.1%}"
        rows.append(row | {"frontier": " ".join(p.frontiers)})
    speed = (
        f"Speed is that of one row on {about['device']}, jax {about['jax']}, median of {ROUNDS}, each "
        "timed in turn with the float32 model. "
    )
    timed = any(p.tokens_per_second is not None for p in points)
    blocks = [
        Text(
            f"Perplexity of {about['input'] or 'the given texts'}, window and stride "
            f"{about['window'] or 'the longest that the model takes'}; schemes apply to the matrices "
            f"`{about['targets']}`, and bytes are those of all weights. "
            f"{speed if timed else ''}On a frontier is what no other scheme beats."
        ),
        Table(rows),
        _plot(
            [p for p in points if CACHED not in p.scheme],
            "size",
            "MB of weights",
            lambda p: p.nbytes / 1e6,
        ),
    ]
    if any(p.tokens_per_second is not None for p in points):
        label = "decoding speed, times that of float32"
        blocks.append(_plot(points, "speed", label, lambda p: p.speed_up))
    return [*blocks, Text("## How to make this again"), Code(" ".join(command), language="sh")]


def _plot(points: Sequence[Point], kind: str, label: str, x: Callable[[Point], Any]) -> Plot:
    points = sorted((p for p in points if x(p) is not None), key=x)
    best = [p for p in points if kind in p.frontiers]
    ys = [p.perplexity for p in points]
    return Plot(
        name=f"quality_{kind}",
        title=f"Quality against {kind}",
        xlabel=label,
        ylabel="perplexity",
        xscale="log",
        yscale="log" if max(ys) > 3 * min(ys) else "linear",
        series=[
            Series(
                "schemes",
                [x(p) for p in points],
                ys,
                style="points",
                texts=[p.scheme for p in points],
            ),
            Series("frontier", [x(p) for p in best], [p.perplexity for p in best], style="line"),
        ],
    )
