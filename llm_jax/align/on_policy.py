"""On-policy preference optimisation: sample, judge, optimise, repeat.

Each round draws answers of the policy as it stands to prompts of its own, has them judged, and
optimises on the best against the worst of each prompt. A round is a run in a folder of its own; the
same command again goes on in the round that was interrupted.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax import config as configs
from llm_jax import report, sharding
from llm_jax.align import judges, policies, rollout
from llm_jax.align.direct import training
from llm_jax.align.judges import Judge
from llm_jax.align.policies import Policy
from llm_jax.align.win_rate import win_rate
from llm_jax.config import MeshConfig, TrainConfig
from llm_jax.data.chat_corpus import with_system
from llm_jax.eval.output import write_json
from llm_jax.eval.uncertainty import standard_error
from llm_jax.train import base_model

ANSWERS, PAIRS, RESULTS, SETTINGS = "answers.jsonl", "pairs.jsonl", "results.json", "settings.json"
Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """How rounds are made."""

    rounds: int = 3
    prompts: int = 64  # of a round
    answers: int = 4  # drawn to each
    held_out: int = 32  # prompts that no round uses, answered after each
    max_new_tokens: int = 64
    temperature: float = 1.0
    missing_end_penalty: float = 0.0  # off the score of an answer that max_new_tokens cut off
    batch_size: int = 32  # answers drawn at a time
    # What each round's policy is held to: the model of the start, or that of the round before
    reference: str = "start"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "prompts", "held_out", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} has to be at least 1")
        if self.answers < 2:
            raise ValueError(f"--answers={self.answers}: a preference needs two at least")
        if self.reference not in ("start", "previous"):
            raise ValueError(f"--reference={self.reference} is neither start nor previous")


def run(
    cfg: TrainConfig,
    judge: Judge,
    prompts: Sequence[Messages],
    workdir: str | Path,
    options: Options,
    *,
    judged_by: str = "",
) -> dict[str, Any]:
    """Runs the rounds that are missing in `workdir`; returns what each ended with.

    `cfg` is a recipe of `direct.training` whose data is replaced by the rounds' own.

    Raises:
      ValueError: too few prompts, a run with other settings in `workdir`, a judge that prefers no
        answer to any other, and what `training.train` raises.
    """
    workdir = Path(workdir)
    _check(cfg, options)
    prompts = [with_system(prompt, cfg.data.dialogue.system) for prompt in prompts]
    need = options.held_out + options.prompts
    if len(prompts) < need:
        raise ValueError(
            f"--input has {len(prompts)} prompts; --held_out={options.held_out} and "
            f"--prompts={options.prompts} of a round need {need}"
        )
    cfg.data.format = "preference"
    training.check(cfg)
    workdir.mkdir(parents=True, exist_ok=True)
    start = cfg.checkpoint.init_from
    settings = {**asdict(options), "judge": judged_by, "start": start}
    settings |= {"prompts read": _digest(prompts), "recipe": _digest(configs.to_dict(cfg))}
    _same_settings(workdir, settings)
    held_out, rest = prompts[: options.held_out], prompts[options.held_out :]
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    first = policies.load(start, mesh, like=cfg)
    rows = [_measured(0, first, first, held_out, judge, workdir / "start", options)]
    for number in range(1, options.rounds + 1):
        folder = workdir / f"round-{number}"
        before = start if number == 1 else str(workdir / f"round-{number - 1}")
        if not (folder / "summary.json").is_file():
            at = (number - 1) * options.prompts
            own = [rest[i % len(rest)] for i in range(at, at + options.prompts)]
            _draw(before, own, judge, folder, cfg, mesh, options, number)
            _optimise(cfg, before, start, folder, options, number)
        policy = policies.load(folder, mesh, like=cfg)
        rows.append(_measured(number, policy, first, held_out, judge, folder, options))
        del policy
        _write(workdir, rows, judged_by)
    return {"rounds": rows}


def _check(cfg: TrainConfig, options: Options) -> None:
    """Raises ValueError for recipes that would fail, or mean something else, after hours."""
    if jax.process_count() > 1:
        raise ValueError("experiments.align draws its answers in one process; drop --distributed")
    if cfg.peft.method not in ("none", "lora"):
        raise ValueError(
            f"peft.method={cfg.peft.method} is no change of the parameters that the next round could "
            "start from; use lora or none"
        )
    if cfg.dpo.reference_path:
        raise ValueError("--reference says what a round is held to; drop dpo.reference_path")
    if cfg.dpo.reference == "adapter" and options.reference == "start":
        raise ValueError(
            "dpo.reference=adapter is the model that a round starts from; use --reference=previous, or "
            "dpo.reference=cached"
        )
    if cfg.data.eval_inputs or cfg.data.sources:
        raise ValueError(
            "the prompts that are only judged are the first --held_out of --input; drop --eval_input "
            "(data.eval_inputs) and data.sources"
        )


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _same_settings(workdir: Path, settings: dict[str, Any]) -> None:
    path = workdir / SETTINGS
    if not path.is_file():
        write_json(str(path), settings)
        return
    known = json.loads(path.read_text())
    # More rounds may follow.
    changed = [k for k in settings if k != "rounds" and known.get(k) != settings[k]]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{workdir} was begun with {name}={known.get(name)!r}, not {settings[name]!r}; set it back, "
            "or choose another --workdir"
        )


def _draw(
    path: str,
    prompts: Sequence[Messages],
    judge: Judge,
    folder: Path,
    cfg: TrainConfig,
    mesh: Any,
    options: Options,
    number: int,
) -> None:
    """Writes a round's answers with their scores, and the pairs that are learned from."""
    if (folder / PAIRS).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    policy = policies.load(path, mesh, like=cfg)
    drawn = rollout.sample(
        policy,
        prompts,
        n=options.answers,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed + number,
        batch_size=options.batch_size,
    )
    scores_PxN = judges.score(judge, prompts, [[a.text for a in group] for group in drawn])
    ended_PxN = np.array([[a.finish_reason == "stop" for a in group] for group in drawn])
    scores_PxN = scores_PxN - options.missing_end_penalty * ~ended_PxN
    pairs, rows = [], []
    for prompt, group, own in zip(prompts, drawn, scores_PxN, strict=True):
        texts = [a.text for a in group]
        rows.append(
            {
                "prompt": list(prompt),
                "answers": texts,
                "scores": own.tolist(),
                "finish_reasons": [a.finish_reason for a in group],
            }
        )
        best, worst = int(np.argmax(own)), int(np.argmin(own))
        if own[best] > own[worst] and texts[best] and texts[worst]:
            pairs.append(
                {
                    "prompt": list(prompt),
                    "chosen": texts[best],
                    "rejected": texts[worst],
                    "score_chosen": float(own[best]),
                    "score_rejected": float(own[worst]),
                }
            )
    _lines(folder / ANSWERS, rows)
    if not pairs:
        raise ValueError(
            f"round {number}: the judge prefers no answer to another one of the same prompt; in another "
            "--workdir draw more (--answers), or use another --judge"
        )
    _lines(folder / PAIRS, pairs)


def _optimise(
    cfg: TrainConfig, before: str, start: str, folder: Path, options: Options, number: int
) -> None:
    own = configs.thaw(cfg)
    own.name = f"{cfg.name or 'align'} round {number}"
    own.seed = options.seed + number
    own.data.inputs, own.data.sources = (str(folder / PAIRS),), ()
    own.data.eval_inputs, own.data.eval_fraction = (), 0.0
    own.data.preference.layout = "auto"
    own.eval.sample_tokens = own.dpo.sample_prompts = 0
    own.checkpoint.init_from, own.tokenizer.path = before, ""
    base_model.adopt(own, before)
    if (
        options.reference == "start"
        and number > 1
        and own.dpo.loss not in training.WITHOUT_REFERENCE
    ):
        own.dpo.reference_path = start
    training.train(own, folder)


def _measured(
    number: int,
    policy: Policy,
    first: Policy,
    held_out: Sequence[Messages],
    judge: Judge,
    folder: Path,
    options: Options,
) -> dict[str, Any]:
    """What a policy's answers to the held-out prompts are worth; kept in `folder`."""
    path = folder / RESULTS
    if path.is_file():
        return json.loads(path.read_text())
    folder.mkdir(parents=True, exist_ok=True)

    def answers(model: Policy, seed: int) -> list[list[rollout.Answer]]:
        return rollout.sample(
            model,
            held_out,
            n=1,
            max_new_tokens=options.max_new_tokens,
            seed=seed,
            batch_size=options.batch_size,
        )

    def scores(drawn: list[list[rollout.Answer]]) -> np.ndarray:
        return judges.score(judge, held_out, [[a.text for a in group] for group in drawn])[:, 0]

    drawn = answers(policy, options.seed)
    own = scores(drawn)
    row = {
        "round": number,
        "score": float(own.mean()),
        "score_stderr": standard_error(own),
        "tokens": float(np.mean([len(group[0].tokens) for group in drawn])),
        "cut_off": float(np.mean([group[0].finish_reason == "length" for group in drawn])),
    }
    if policy is not first:
        ids = rollout.prompt_ids(policy, held_out)
        written = [[a.tokens for a in group] for group in drawn]
        apart = rollout.kl(
            rollout.log_probs(policy, ids, written), rollout.log_probs(first, ids, written)
        )
        against = win_rate(own, scores(answers(first, options.seed + 1)))
        row |= {"kl": apart.k1, "kl_stderr": apart.k1_error}
        row |= {
            "win_rate": against.rate,
            "win_rate_low": against.low,
            "win_rate_high": against.high,
        }
    write_json(str(path), row)
    return row


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(f"{path}.partial", "w") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")
    os.replace(f"{path}.partial", path)


def _write(workdir: Path, rows: list[dict[str, Any]], judged_by: str) -> None:
    write_json(str(workdir / RESULTS), {"judge": judged_by, "rounds": rows})
    series = report.Series("mean score", [r["round"] for r in rows], [r["score"] for r in rows])
    blocks: list[report.Block] = [
        report.Text(
            f"Answers to held-out prompts, at temperature 1, judged by {judged_by or 'a function'}. "
            "Win rate and KL (nats an answer) are against the model of the start."
        ),
        report.Table(rows),
        report.Plot("score", [series], title="Score by round", xlabel="round", ylabel="mean score"),
    ]
    report.write_report(workdir, "On-policy preference optimisation", blocks)
