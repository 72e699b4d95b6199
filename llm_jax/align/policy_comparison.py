"""A run that compares policies by a judge: a base, best-of-n of it, and models that were tuned."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import report
from llm_jax.align import best_of_n, judges, rollout
from llm_jax.eval.output import Kept, replacing, write_json
from llm_jax.train.companion import same_vocabulary

ANSWERS, RESULTS, DRAWN = "answers.jsonl", "results.json", "drawn.json"
EXAMPLES = 3


@dataclass(frozen=True)
class Options:
    """How answers are drawn."""

    n: int = 16  # of best-of-n, at most; one more is drawn, to compare with
    answers: int = 4  # of each other policy to a prompt
    max_new_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 32  # answers at a time

    def __post_init__(self):
        for name in ("n", "answers", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} has to be at least 1")
        if self.temperature <= 0:
            raise ValueError(
                f"--temperature={self.temperature} draws one answer again and again; 1 draws from "
                "the policy itself"
            )


@dataclass(frozen=True)
class Drawn:
    """What a policy answered, [prompt][answer] everywhere; `kl` is of the policy from the base."""

    name: str
    answers: list[list[rollout.Answer]]
    scores: np.ndarray
    kl: rollout.Kl | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Characters of each answer."""
        return np.array([[len(a.text) for a in group] for group in self.answers])


def run(
    base: Any,
    prompts: Sequence[rollout.Messages],
    judge: judges.Judge,
    folder: str | Path,
    *,
    options: Options | None = None,
    against: Mapping[str, Callable[[], Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[best_of_n.Point]:
    """Draws, judges and compares; writes answers.jsonl, results.json and report.md with its plot.

    What has been drawn is kept in drawn.json until all is done: the same call goes on from it. The
    rows of answers.jsonl (of each policy one for each prompt) are rankings as `data.preferences` reads
    them.

    Args:
      base: a model, as `llm_jax.load` returns.
      against: {name: function that loads the model}; one of them is held at a time.
      settings: what the run was asked for, for results.json and the report.

    Raises:
      ValueError: fewer than two prompts, and what `rollout.sample` and `judges.score` raise.
    """
    options, folder = options or Options(), Path(folder)
    if len(prompts) < 2:
        raise ValueError("intervals over prompts need two of them at least (--prompts, --input)")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**(settings or {}), **asdict(options), "prompts": len(prompts)}
    digest = hashlib.sha256(json.dumps([list(p) for p in prompts]).encode()).hexdigest()[:16]
    kept = Kept(folder / DRAWN, {**settings, "prompts read": digest}, "--output")
    drawn = []
    for name, load in {best_of_n.BASE: lambda: base, **(against or {})}.items():
        if name not in kept.items:
            model, n = load(), options.n + 1 if name == best_of_n.BASE else options.answers
            answers = _draw(name, model, prompts, n, options)
            apart = None if name == best_of_n.BASE else _kl(model, base, prompts, answers, options)
            kept.add(name, {"answers": [[asdict(a) for a in g] for g in answers], "kl": apart})
            del model
        item = kept.items[name]
        if "scores" not in item:
            texts = [[a["text"] for a in group] for group in item["answers"]]
            kept.add(name, item | {"scores": judges.score(judge, prompts, texts).tolist()})
        drawn.append(_drawn(name, kept.items[name]))
    ours, *others = drawn
    points = best_of_n.compare(
        ours.scores,
        ours.lengths,
        ns=[*(2**i for i in range(options.n.bit_length())), options.n],
        others=[
            best_of_n.Policy(d.name, d.scores, d.lengths, *(d.kl[:2] if d.kl else ()))
            for d in others
        ],
        seed=options.seed,
    )
    _write_answers(folder / ANSWERS, prompts, drawn)
    write_json(
        str(folder / RESULTS),
        {
            "settings": settings,
            "ties": best_of_n.ties(ours.scores),
            "points": [_plain(p) for p in points],
            "policies": _policies(drawn),
        },
    )
    report.write_report(folder, "Best of n", _blocks(points, drawn, prompts, settings))
    (folder / DRAWN).unlink()
    return points


def _drawn(name: str, item: dict[str, Any]) -> Drawn:
    answers = [[rollout.Answer(**a) for a in group] for group in item["answers"]]
    numbers = item["kl"] and [math.nan if x is None else x for x in item["kl"]]
    kl = rollout.Kl(*numbers) if numbers else None
    return Drawn(name, answers, np.array(item["scores"]), kl)


def _draw(name, model, prompts, n, options: Options) -> list[list[rollout.Answer]]:
    # Independent of what other policies draw, as a win rate over another answer asks for.
    words = np.random.SeedSequence([options.seed, *name.encode()]).generate_state(1)
    return rollout.sample(
        model,
        prompts,
        n=n,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=int(words[0] >> 1),
        batch_size=options.batch_size,
    )


def _kl(model, base, prompts, answers, options: Options) -> rollout.Kl | None:
    """KL(model || base); None where samples do not tell it."""
    if options.temperature != 1 or not same_vocabulary(model.tokenizer, base.tokenizer):
        return None
    # Both by the same computation: what rounding makes of it is then in both.
    ids, tokens = rollout.prompt_ids(model, prompts), [[a.tokens for a in g] for g in answers]
    return rollout.kl(*(rollout.log_probs(m, ids, tokens) for m in (model, base)))


def _plain(point: best_of_n.Point) -> dict[str, Any]:
    return {
        **asdict(point),
        "kl_is_bound": point.n is not None,
        "wins": point.wins and point.wins._asdict(),
    }


def _policies(drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    return [
        {
            "policy": d.name,
            "answers": int(d.scores.size),
            "score": float(d.scores.mean()),
            "length": float(d.lengths.mean()),
            "cut off": float(np.mean([a.finish_reason == "length" for g in d.answers for a in g])),
            **(d.kl._asdict() if d.kl else {}),
        }
        for d in drawn
    ]


def _write_answers(path: Path, prompts: Sequence[Any], drawn: Sequence[Drawn]) -> None:
    with replacing(str(path)) as file:
        for d in drawn:
            for prompt, answers, scores in zip(prompts, d.answers, d.scores, strict=True):
                row = {
                    "policy": d.name,
                    "prompt": list(prompt),
                    "answers": [a.text for a in answers],
                    "scores": scores.tolist(),
                    "finish_reasons": [a.finish_reason for a in answers],
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _blocks(
    points: Sequence[best_of_n.Point],
    drawn: Sequence[Drawn],
    prompts: Sequence[rollout.Messages],
    settings: Mapping[str, Any],
) -> list[report.Block]:
    tied, warm = best_of_n.ties(drawn[0].scores), settings["temperature"] != 1
    notes = [
        f"{len(prompts)} prompts; best-of-n is estimated from {drawn[0].scores.shape[1]} answers of "
        "the base to each, other policies from theirs. Lengths are in characters; a win rate is over "
        "one answer of the base, ties counted as half.",
        "The divergence of best-of-n is at most log n - (n - 1) / n nats; it comes near where few "
        "answers have the score of another, and stays far below where many have. Of the pairs of "
        f"answers to a prompt {tied:.1%} have the same score here.",
    ]
    if warm and len(drawn) > 1:
        notes.append(
            f"Answers were drawn at temperature {settings['temperature']:g}: of other policies no "
            "divergence can be estimated from them, and best-of-n starts from the base at that "
            "temperature."
        )
    elif any(d.kl is None for d in drawn[1:]):
        notes.append("A policy with another vocabulary than the base has no divergence here.")
    rows = [
        {
            **{k: row[k] for k in ("policy", "answers", "score", "length")},
            "cut off": f"{row['cut off']:.1%}",
            **{k: f"{row[k]:.4g} ± {row[f'{k}_error']:.2g}" for k in ("k1", "k3") if k in row},
        }
        for row in _policies(drawn)
    ]
    blocks: list[report.Block] = [
        report.Text("\n\n".join(notes)),
        best_of_n.table(points),
        best_of_n.plot(points, ylabel=f"score: {settings.get('judge', 'judge')}"),
        report.Table(
            rows,
            caption="All answers; k1 and k3 estimate the divergence from the base, in nats an answer",
        ),
        report.Text("## Settings"),
        report.Table([{"setting": k, "value": str(v)} for k, v in settings.items()]),
        report.Text("## Examples"),
    ]
    for p, prompt in enumerate(prompts[:EXAMPLES]):
        shown = [("base", drawn[0], 0), (f"best of {settings['n']}", drawn[0], None)]
        shown += [(d.name, d, 0) for d in drawn[1:]]
        texts = [f"{m['role']}: {m['content']}" for m in prompt]
        for name, d, i in shown:
            i = int(np.argmax(d.scores[p, : settings["n"]])) if i is None else i
            score = report.format_number(float(d.scores[p, i]))
            texts.append(f"[{name}, {score}] {d.answers[p][i].text}")
        blocks.append(report.Code("\n\n".join(texts), caption=f"{p + 1}."))
    return blocks
