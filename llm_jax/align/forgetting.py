"""What a model forgets when it is tuned on instructions, and what helps.

A base model, trained on one kind of text (the original domain), is tuned on tasks. Before and after,
held-out text of the original domain is scored in bits per byte and held-out examples of all tasks by
the loss and the accuracy of their answers: against the number of examples, against the number of
tasks they are of, and under the remedies of `REMEDIES`. In every run of one size the model sees the
same examples of the first task, the target, equally often; what a remedy adds comes on top and costs
time. Runs are kept in results.json as they end, and not done again.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llm_jax import config as configs
from llm_jax import models, sharding
from llm_jax.align.forgetting_data import Rows, TaskData, drawn, interleaved, read_task
from llm_jax.config import MeshConfig, OptimizerConfig, TrainConfig
from llm_jax.data.prepare import prepare_corpus
from llm_jax.data.tokens import Tokens
from llm_jax.eval import output
from llm_jax.eval.scoring import score_continuations, score_rows
from llm_jax.nn import params as nn_params
from llm_jax.nn.params import count
from llm_jax.tokenizers import Tokenizer
from llm_jax.train import checkpoint, environment, in_memory, loop
from llm_jax.types import PyTree


@dataclass(frozen=True)
class Remedy:
    """A way of tuning.

    Attributes:
      changes: dotted keys of a TrainConfig.
      replay: share of a step's rows that are windows of the original training text.
      others: share of a step's rows that are examples of the other tasks.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    replay: float = 0.0
    others: float = 0.0


REMEDIES: dict[str, Remedy] = {
    "plain": Remedy(),
    "multi-task": Remedy(others=0.5),
    "replay": Remedy(replay=0.25),
    # penalty / radius = 0.8, the paper's choice
    "gradient norm": Remedy(
        {"optimizer.gradient_penalty": 0.04, "optimizer.gradient_penalty_radius": 0.05}
    ),
    "L2 to the start": Remedy({"optimizer.l2_to_start": 0.03}),
    "LoRA": Remedy({"peft.method": "lora", "peft.rank": 16, "peft.alpha": 32.0}),
}
BEFORE = "before"  # the base model's own scores, beside the runs in results.json
LORA_RATE = 5.0  # times the learning rate of full tuning: the update starts at 0


@dataclass(frozen=True)
class Lab:
    """What is measured.

    Attributes:
      tasks: tuned on; the first is the target, the rest are the "other tasks" of the mix.
      unseen: never tuned on.
      data: folder of the data sets; "" where the tasks need none.
      remedies: names of REMEDIES.
      examples: numbers of examples of the target.
      counts: numbers of tasks among which the largest number of examples is shared, untreated.
      epochs: how often each example is seen.
      rows: rows of examples in a step, before what a remedy adds.
      length: tokens a row.
      test_examples: held-out examples of the target; other tasks have a quarter as many, and are
        scored at the largest size alone.
      windows: of the held-out original text, as long as the base model's training rows.
    """

    tasks: tuple[str, ...]
    unseen: tuple[str, ...] = ()
    data: str = ""
    remedies: tuple[str, ...] = tuple(REMEDIES)
    examples: tuple[int, ...] = (64, 256, 1024)
    counts: tuple[int, ...] = (1, 2, 4, 8)
    seeds: int = 3
    epochs: int = 1
    rows: int = 8
    length: int = 96
    learning_rate: float = 5e-4
    test_examples: int = 128
    windows: int = 32


class Key(NamedTuple):
    """One run; examples are in all, over its tasks."""

    remedy: str
    tasks: int
    examples: int
    seed: int

    def __str__(self) -> str:
        return f"{self.remedy} / tasks {self.tasks} / examples {self.examples} / seed {self.seed}"


class Base(NamedTuple):
    """The model that every run starts from, and the text it was trained on."""

    config: TrainConfig
    params: PyTree
    tokenizer: Tokenizer
    train: Tokens
    held_out: Tokens


def check(lab: Lab) -> None:
    """Raises ValueError, naming the flag, for what cannot be measured."""
    if unknown := [r for r in lab.remedies if r not in REMEDIES]:
        raise ValueError(
            f"--remedies: none is named {unknown[0]!r}; there are {', '.join(REMEDIES)}"
        )
    if both := set(lab.tasks) & set(lab.unseen):
        raise ValueError(f"--unseen has {sorted(both)[0]}, which --tasks tunes on")
    if len(set(lab.tasks)) < len(lab.tasks):
        raise ValueError(f"--tasks={','.join(lab.tasks)} names one twice")
    if too_many := [c for c in lab.counts if not 1 <= c <= len(lab.tasks)]:
        raise ValueError(f"--task_counts={too_many[0]}, but --tasks names {len(lab.tasks)}")
    if "multi-task" in lab.remedies and len(lab.tasks) < 2:
        raise ValueError("--remedies=multi-task needs more than one of --tasks")


def keys(lab: Lab) -> list[Key]:
    """All runs: every remedy at every size, then the largest size over more tasks."""
    top, seeds = max(lab.examples), range(lab.seeds)
    runs = [Key(r, 1, n, s) for n in sorted(lab.examples) for r in lab.remedies for s in seeds]
    return runs + [Key("plain", c, top, s) for c in lab.counts for s in seeds if c > 1]


def load_base(path: str | Path, recipe: TrainConfig | None) -> Base:
    """The base model in the run directory `path`, which is trained now if there is none.

    Raises:
      ValueError: no checkpoint there and no recipe, or nothing of its text is held out.
    """
    try:
        config = checkpoint.load_config(path)
        done = config.steps <= checkpoint.locate(path)[1]
    except FileNotFoundError:
        done = False
    if not done:
        if recipe is None:
            raise ValueError(f"--base={path} holds no finished run; --config says how to make it")
        loop.train(recipe, path)
        config = checkpoint.load_config(path)
    environment.use_compilation_cache(config.log.compilation_cache)
    specs = models.family(config.model.family).specs(config.model)
    # Its own shards are found again.
    corpus = prepare_corpus(config.data, config.tokenizer, str(path))
    if corpus.evaluation is None:
        raise ValueError(f"--base={path} held out no text; its data.eval_fraction is 0")
    return Base(
        config,
        checkpoint.load_params(path, specs),
        checkpoint.load_tokenizer(path),
        Tokens.concatenate([component.tokens for component in corpus.train]),
        corpus.evaluation,
    )


def tuning_config(lab: Lab, base: TrainConfig, key: Key, *, steps: int, rows: int) -> TrainConfig:
    """The frozen config of a run: the base's model, an optimizer for tuning, the remedy."""
    cfg = configs.thaw(base)
    remedy = REMEDIES[key.remedy]
    rate = lab.learning_rate * (LORA_RATE if "peft.method" in remedy.changes else 1.0)
    cfg.optimizer = OptimizerConfig(
        learning_rate=rate, schedule="linear", warmup_steps=steps // 10, weight_decay=0.0
    )
    cfg.mesh = MeshConfig()  # the rows of a step divide by no number of devices
    changes = {
        "name": str(key),
        "seed": key.seed,
        "steps": steps,
        "batch_size": rows,
        "length": lab.length,
        "accumulation": 1,
        **remedy.changes,
    }
    configs.override(cfg, changes)
    configs.validate(cfg)
    return configs.freeze(cfg)


def make_rows(lab: Lab, tasks: Mapping[str, TaskData], original: Tokens, key: Key) -> Rows:
    """The rows of a run: its share of each of its tasks, and what its remedy adds."""
    remedy = REMEDIES[key.remedy]
    of_tasks = [drawn(tasks[name].train, key.seed) for name in lab.tasks]
    others = []
    if remedy.others:
        others = interleaved(of_tasks[1:], key.examples)

    def beside(share: float) -> int:
        return round(lab.rows * share / (1 - remedy.replay - remedy.others)) if share else 0

    return Rows(
        interleaved(of_tasks[: key.tasks], key.examples),
        per_step=lab.rows,
        length=lab.length,
        seed=key.seed,
        others=others,
        others_per_step=beside(remedy.others),
        original=original,
        original_per_step=beside(remedy.replay),
    )


def tune(lab: Lab, base: Base, tasks: Mapping[str, TaskData], key: Key) -> dict[str, Any]:
    """One run: its scores afterwards, its final training loss, what it trained and how long.

    Raises:
      ValueError: it diverged.
    """
    begin = time.perf_counter()
    rows = make_rows(lab, tasks, base.train, key)
    cfg = tuning_config(lab, base.config, key, steps=rows.steps(lab.epochs), rows=rows.batch_size)
    trained = in_memory.train(cfg, rows.batch, start=base.params, devices=jax.devices()[:1])
    seconds = time.perf_counter() - begin
    scored = tasks if key.examples == max(lab.examples) else {lab.tasks[0]: tasks[lab.tasks[0]]}
    if not np.isfinite(trained.losses).all():
        raise ValueError(f"{key} diverged; lower --learning_rate={lab.learning_rate}")
    return {
        **key._asdict(),
        **scores(lab, base, scored, trained.params),
        "train_loss": float(np.mean(trained.losses[-8:])),
        "trained_parameters": count(trained.program.tuning.trained),
        "steps": cfg.steps,
        "seconds": seconds,
    }


def scores(lab: Lab, base: Base, tasks: Mapping[str, TaskData], params: PyTree) -> dict[str, Any]:
    """bits_per_byte of the held-out original text, and for each task loss (nats a token of the right
    answer, its end included), exact (share of answers that greedy decoding would write) and accuracy
    (share where the right choice is the most probable; None where there is nothing to choose)."""
    model = base.config.model
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        found = {"bits_per_byte": _bits_per_byte(params, base, lab.windows)}
        found["by_task"] = {name: _task_scores(params, model, task) for name, task in tasks.items()}
    return found


def _bits_per_byte(params: PyTree, base: Base, windows: int) -> float:
    L = base.config.length
    places = np.arange(0, base.held_out.total - L, L)
    if not len(places):
        raise ValueError(f"the held-out original text is shorter than a row of {L} tokens")
    places = places[np.linspace(0, len(places) - 1, min(windows, len(places))).astype(int)]
    rows = base.held_out.windows(places, L + 1).astype(np.int32)
    nats = -sum(
        float(x.sum(dtype=np.float64))
        for x in score_rows(params, base.config.model, rows, batch_size=16)
    )
    n_bytes = int(base.tokenizer.token_lengths()[rows[:, 1:]].sum())
    return nats / n_bytes / math.log(2)


def _task_scores(params: PyTree, model: configs.ModelConfig, task: TaskData) -> dict[str, Any]:
    requests = [(e.prompt, answer) for e in task.held_out for answer in e.answers]
    found = iter(score_continuations(params, model, requests, batch_size=32))
    nats = tokens = exact = chosen = 0.0
    for example in task.held_out:
        of_answers = [next(found) for _ in example.answers]
        right = of_answers[example.right]
        nats, tokens = nats - right.log_prob, tokens + right.n_tokens
        exact += right.greedy
        chosen += int(np.argmax([s.log_prob for s in of_answers])) == example.right
    n = len(task.held_out)
    choices = len(task.held_out[0].answers) > 1
    return {
        "loss": nats / tokens,
        "exact": exact / n,
        "accuracy": chosen / n if choices else None,
        "n": n,
    }


def _settings(lab: Lab, base: Base) -> dict[str, Any]:
    """What must not change from run to run; more seeds and remedies may come later."""
    same = {k: v for k, v in asdict(lab).items() if k not in ("remedies", "seeds", "data")}
    strengths = {name: remedy.changes for name, remedy in REMEDIES.items()}
    weights = nn_params.fingerprint(base.params)
    return same | {
        "base": configs.to_dict(base.config),
        "base_weights": weights,
        "strengths": strengths,
    }


def read_tasks(lab: Lab, tokenizer: Tokenizer) -> dict[str, TaskData]:
    """The examples of all tasks, those that are never trained on too."""
    need = dict.fromkeys(lab.unseen, 1)
    for name in lab.tasks:
        need[name] = max(lab.examples) if name == lab.tasks[0] else _share(lab)
    return {
        name: read_task(
            name,
            lab.data,
            tokenizer,
            length=lab.length,
            train=n,
            held_out=lab.test_examples if name == lab.tasks[0] else -(-lab.test_examples // 4),
        )
        for name, n in need.items()
    }


def _share(lab: Lab) -> int:
    """Examples that a task other than the target has to have."""
    most = max(lab.examples)
    return max(
        -(-most // max(len(lab.tasks) - 1, 1)), *(-(-most // c) for c in lab.counts if c > 1), 1
    )


def run(lab: Lab, base: Base, folder: str | Path, *, progress: Any = print) -> dict[str, Any]:
    """All runs that are not known yet; returns {"settings", "before", "runs"} of all that are.

    Raises:
      ValueError: what `check` raises, or the folder holds runs of another lab or base.
    """
    check(lab)
    kept = output.Kept(Path(folder) / "results.json", _settings(lab, base), "--workdir")
    tasks = read_tasks(lab, base.tokenizer)
    if BEFORE not in kept.items:
        kept.add(BEFORE, scores(lab, base, tasks, base.params))
    before = kept.items[BEFORE]
    todo: Sequence[Key] = [k for k in keys(lab) if str(k) not in kept.items]
    for number, key in enumerate(todo, 1):
        done = tune(lab, base, tasks, key)
        kept.add(str(key), done)
        forgot = done["bits_per_byte"] - before["bits_per_byte"]
        target = done["by_task"][lab.tasks[0]]["loss"]
        progress(
            f"{number}/{len(todo)} {key}: {forgot:+.4f} bits per byte, target loss {target:.4f}, "
            f"{done['seconds']:.0f} s"
        )
    runs = {name: run for name, run in kept.items.items() if name != BEFORE}
    return {"settings": kept.settings, "before": before, "runs": runs}
