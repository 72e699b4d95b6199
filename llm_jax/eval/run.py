"""Runs evaluation tasks on a model: items -> prompts -> scores -> metrics with standard errors.

A result says everything that its numbers depend on: worked examples, scoring, window, seed, the
text of the first prompt and a hash of all.
"""

import hashlib
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_jax import models
from llm_jax.config import ModelConfig
from llm_jax.decode.generate import generate
from llm_jax.eval import answers, datasets, prompts, tasks
from llm_jax.eval import texts as test_texts
from llm_jax.eval.classification import expected_calibration_error
from llm_jax.eval.datasets import Item
from llm_jax.eval.likelihood import perplexity
from llm_jax.eval.scoring import Score, encode_pair, score_continuations
from llm_jax.eval.tasks import TASKS, Task
from llm_jax.eval.uncertainty import standard_error
from llm_jax.types import PyTree

CALIBRATION_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an evaluation may be told; None and empty leave it to the task.

    Attributes:
      input: file, folder or hf:NAME[:config][:split] with the questions or texts; hf is the data
        set as it was published (`Task.hub`).
      fewshot_input: the same for worked examples; default: those beside the questions, else the
        other questions.
      limit: questions (of MMLU: of each subject; of perplexity: texts) at most; 0: all.
      window: tokens that the model sees at most; default: what it has room for.
      stride: of perplexity; default: the window.
      seed: of the choice of worked examples. The default is lm-evaluation-harness' own.
      pmi: also acc_pmi, which scores each answer without its question.
      add_bos: prompts begin with the tokenizer's begin token.
      extract: keys of `answers.EXTRACTIONS`.
    """

    input: str = ""
    fewshot_input: str = ""
    num_fewshot: int | None = None
    scoring: str = ""
    limit: int = 0
    batch_size: int = 8
    window: int | None = None
    stride: int | None = None
    seed: int = 1234
    apply_chat_template: bool = False
    multiturn: bool = False
    pmi: bool = False
    add_bos: bool = False
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    extract: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """An item with its finished prompts: one and its possible answers, or one for each choice and
    their common answer."""

    item: Item
    prompts: list[str]
    answers: list[str]


@dataclass(frozen=True)
class Asked:
    """Tasks with all their questions, ready to be scored as often as wanted."""

    questions: dict[str, list[Question]]  # of "perplexity" there are none
    options: Options


def expand(names: Sequence[str]) -> list[str]:
    """Task names with "arc" and "truthfulqa" taken apart.

    Raises:
      ValueError: a name that no task has.
    """
    out = []
    for name in names:
        if name not in TASKS and name not in tasks.FAMILIES and name != "perplexity":
            known = ", ".join(["perplexity", *tasks.FAMILIES, *TASKS])
            raise ValueError(f"--task={name} is unknown; there are {known}")
        out += tasks.FAMILIES.get(name, (name,))
    return list(dict.fromkeys(out))


def evaluate_tasks(
    params: PyTree,
    cfg: ModelConfig,
    tokenizer: Any,
    names: Sequence[str],
    options: Options = Options(),
    **watching: Any,
) -> dict[str, dict]:
    """`ask` and `score` in one: every error in names, files and options comes before any work."""
    return score(params, cfg, tokenizer, ask(tokenizer, names, options), **watching)


def ask(tokenizer: Any, names: Sequence[str], options: Options = Options()) -> Asked:
    """Reads the questions of tasks and makes their prompts.

    Args:
      names: keys of `tasks.TASKS`, "perplexity", or families ("arc", "truthfulqa").

    Raises:
      ValueError, FileNotFoundError: a name, file or option that is wrong.
    """
    plain = {name: [] for name in expand(names)}
    return Asked(
        plain | {n: _ask(n, tokenizer, options) for n in plain if n != "perplexity"}, options
    )


def score(
    params: PyTree,
    cfg: ModelConfig,
    tokenizer: Any,
    asked: Asked,
    *,
    record: Callable[[dict], Any] | None = None,
    progress: Callable[[str, int], Callable[[int], Any]] | None = None,
) -> dict[str, dict]:
    """Task name -> result: n, metrics {name: {value, stderr}} and what they depend on.

    Args:
      record: called with one JSON object for each item, in order.
      progress: (task name, number of requests) -> a function that is called with the number of
        requests just finished.
    """
    options, results = asked.options, {}
    for name, questions in asked.questions.items():
        model = (params, cfg, tokenizer)
        started = _starter(name, progress)
        if name == "perplexity":
            results[name] = _perplexity(model, options, started)
            continue
        task, scoring = TASKS[name], options.scoring or TASKS[name].scoring
        run = {"multiple_choice": _choose, "last_word": _last_word, "generation": _generate}
        judged = run[task.kind](model, task, scoring, questions, options, started)
        if record:
            for number, (question, found) in enumerate(zip(questions, judged, strict=True)):
                record(
                    {"task": name, "index": number, "group": question.item.group}
                    | {"id": _digest(repr(question.item)), "gold": list(question.item.gold)}
                    | found
                )
        results[name] = _summary(questions, judged) | {
            "num_fewshot": _shots(task, options),
            "scoring": scoring if task.kind == "multiple_choice" else task.kind,
            "window": options.window or models.family(cfg.family).room(params, cfg),
            "seed": options.seed,
            "chat_template": options.apply_chat_template,
            "input": options.input,
            "prompts_sha256": _digest("\0".join(p for q in questions for p in q.prompts)),
            "first_prompt": questions[0].prompts[0],
            "first_answers": questions[0].answers if task.kind == "multiple_choice" else [],
        }
        if name == "mmlu":
            category = lambda item: tasks.MMLU_CATEGORY.get(item.group, "")  # noqa: E731
            results[name]["categories"] = _grouped(questions, judged, category)
    return results


def values(results: dict[str, dict]) -> dict[str, float]:
    """{"task/metric": value}, as a training run logs them."""
    return {
        f"{task}/{metric}": found["value"]
        for task, result in results.items()
        for metric, found in result["metrics"].items()
    }


def table(results: dict[str, dict]) -> str:
    """Results as lines of text: task, n, worked examples, metric, value and standard error; of a
    task with groups also the mean over groups and the categories."""
    head = ("task", "n", "shots", "metric", "value", "stderr")
    rows = []
    for name, result in results.items():
        parts = {name: result}
        if "macro" in result:
            parts[f"{name} (macro)"] = {"n": len(result["groups"]), "metrics": result["macro"]}
        parts |= {f"{name} ({c})": part for c, part in result.get("categories", {}).items()}
        shots = str(result.get("num_fewshot", "-"))
        for part, found in parts.items():
            for metric, m in found["metrics"].items():
                numbers = (f"{m['value']:.4f}", f"{m['stderr']:.4f}")
                rows.append((part, str(found["n"]), shots, metric, *numbers))
            if error := found.get("calibration_error"):
                value = f"{error['value']:.4f}"
                rows.append((part, str(found["n"]), shots, "calibration_error", value, "-"))
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [
            c.ljust(w) if i in (0, 3) else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _ask(name: str, tokenizer: Any, options: Options) -> list[Question]:
    task, scoring = TASKS[name], options.scoring or TASKS[name].scoring
    tasks.check_scoring(name, task, scoring)
    for extraction in options.extract:
        if extraction not in answers.EXTRACTIONS:
            known = ", ".join(answers.EXTRACTIONS)
            raise ValueError(f"--extract={extraction} is unknown; there are {known}")
    items, pool, apart = _items(name, task, options)
    k = _shots(task, options)
    by_group = defaultdict(list)
    for item in pool:
        by_group[item.group].append(item)
    rng = None if task.first else random.Random(options.seed)
    out, taken = [], defaultdict(int)
    for item in items:
        taken[item.group] += 1
        if options.limit and taken[item.group] > options.limit:
            continue
        examples = prompts.draw_examples(
            by_group[item.group] if task.first else pool, k, rng, avoid=None if apart else item
        )
        questions, texts = tasks.pose(task, item, scoring)
        made = [
            prompts.build_prompt(
                question,
                examples=[tasks.worked(task, example, scoring) for example in examples],
                description=tasks.describe(task, item, scoring),
                tokenizer=tokenizer if options.apply_chat_template else None,
                multiturn=options.multiturn,
            )
            for question in questions
        ]
        out.append(Question(item, made, texts))
    return out


def _items(name: str, task: Task, options: Options) -> tuple[list[Item], list[Item], bool]:
    """(items, pool of worked examples, whether the pool holds none of the items)."""

    def read(path: str, files: Sequence[str]) -> list[Item]:
        return datasets.read_items(path, task.read, patterns=files, wants=task.wants)

    path, pool = options.input, options.fewshot_input
    if not path or (path == "hf" and not task.hub):
        or_hub = f", or hf for hf:{task.hub}" if task.hub else ", or hf:NAME:CONFIG:SPLIT"
        raise ValueError(
            f"--task={name} needs --input: {' or '.join(task.files)}, the folder it is in{or_hub} "
            f"(columns: {task.wants})"
        )
    if path == "hf":
        path, pool = f"hf:{task.hub}", pool or (task.hub_examples and f"hf:{task.hub_examples}")
    items = read(path, task.files)
    if not _shots(task, options):
        return items, [], True
    if pool:
        return items, read(pool, task.examples or task.files), True
    if not task.examples:
        return items, items, False
    if path.startswith("hf:"):
        raise ValueError(f"--task={name} needs --fewshot_input=hf:NAME:CONFIG:SPLIT beside --input")
    return items, read(datasets.beside(path, task.examples), task.examples), True


def _shots(task: Task, options: Options) -> int:
    return task.num_fewshot if options.num_fewshot is None else options.num_fewshot


def _pairs(tokenizer: Any, question: Question, options: Options, delimiter: str) -> Iterator:
    for prompt in question.prompts:
        for answer in question.answers:
            yield encode_pair(tokenizer, prompt, delimiter + answer, add_bos=options.add_bos)


def _score(model, pairs: list, options: Options, started) -> list[Score]:
    params, cfg, _ = model
    return score_continuations(
        params,
        cfg,
        pairs,
        batch_size=options.batch_size,
        window=options.window,
        progress=started(len(pairs)),
    )


def _choose(model, task: Task, scoring: str, asked: list[Question], options: Options, started):
    tokenizer = model[2]
    # Behind a chat template the answer is the beginning of a turn.
    delimiter = "" if options.apply_chat_template else prompts.DELIMITER
    requests = [list(_pairs(tokenizer, question, options, delimiter)) for question in asked]
    bare = sorted({delimiter + a for q in asked for a in q.answers}) if options.pmi else []
    flat = [pair for pairs in requests for pair in pairs]
    flat += [encode_pair(tokenizer, "", text) for text in bare]
    scores = _score(model, flat, options, started)
    unconditional = dict(zip(bare, scores[len(scores) - len(bare) :], strict=True))
    scores = iter(scores)
    judged = []
    for question, pairs in zip(asked, requests, strict=True):
        item, found = question.item, [next(scores) for _ in pairs]
        log_p = np.array([score.log_prob for score in found])
        record = {"log_probs": log_p.tolist(), "n_tokens": [score.n_tokens for score in found]}
        if task.mass:
            judged.append(record | {"metrics": {"acc": tasks.true_mass(item, found)}})
            continue
        normalised = question.answers if scoring == "answers" and not item.contexts else ()
        base = [unconditional[delimiter + a] for a in question.answers] if options.pmi else ()
        metrics, chosen = tasks.judge_choices(
            item, found, normalised, () if item.contexts else base
        )
        p = np.exp(log_p - log_p.max())
        record |= {"predicted": chosen, "confidence": float(p.max() / p.sum())}
        judged.append(record | {"metrics": metrics})
    return judged


def _last_word(model, task: Task, scoring: str, asked: list[Question], options: Options, started):
    tokenizer = model[2]
    flat = [p for q in asked for p in _pairs(tokenizer, q, options, prompts.DELIMITER)]
    return [
        {
            "log_probs": [score.log_prob],
            "n_tokens": [score.n_tokens],
            "metrics": {"acc": float(score.greedy), "log_prob": score.log_prob},
        }
        for score in _score(model, flat, options, started)
    ]


def _generate(model, task: Task, scoring: str, asked: list[Question], options: Options, started):
    params, cfg, tokenizer = model
    new = options.max_new_tokens or task.max_new_tokens
    room = (options.window or models.family(cfg.family).room(params, cfg)) - new
    if room < 1:
        raise ValueError(
            f"--max_new_tokens={new} leaves no room for a prompt in the model's window of {room + new}"
        )
    rows = [
        encode_pair(tokenizer, question.prompts[0], "", add_bos=options.add_bos)
        for question in asked
    ]
    # White space at the end of a prompt, which a pair gives to the continuation, stays here.
    rows = [(context + rest)[-room:] for context, rest in rows]
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n]))
    finished, texts = started(len(rows)), [""] * len(rows)
    for at in range(0, len(order), options.batch_size):
        group = order[at : at + options.batch_size]
        # Always as many rows, so that the last batch is not compiled anew.
        batch = [rows[n] for n in group] + [rows[group[-1]]] * (options.batch_size - len(group))
        completions = generate(
            params,
            cfg,
            tokenizer,
            batch,
            max_new_tokens=new,
            temperature=0.0,
            stop=options.stop or task.stop,
        )
        for n, completion in zip(group, completions, strict=False):
            texts[n] = completion.text
        if finished:
            finished(len(group))
    judged = []
    for question, text in zip(asked, texts, strict=True):
        metrics, predicted = {}, {}
        for name in options.extract or task.extractions:
            answer = predicted[name] = answers.EXTRACTIONS[name](text)
            right = answers.matches(answer, question.item.answers[0], numbers=task.numbers)
            metrics[f"exact_match_{name}"] = float(right)
        gold = question.item.answers[0]
        judged.append({"gold": gold, "text": text, "predicted": predicted, "metrics": metrics})
    return judged


def _summary(asked: list[Question], judged: list[dict]) -> dict:
    """Means over items, and where these have groups over each and over the groups' means."""
    metrics = _means(judged)
    if "log_prob" in metrics:  # of last words: their perplexity, a word's
        mean = metrics.pop("log_prob")
        value = math.exp(min(-mean["value"], 700.0))
        metrics["perplexity"] = {"value": value, "stderr": value * mean["stderr"]}
    result = {"n": len(judged), "metrics": metrics}
    if "confidence" in judged[0]:
        error = expected_calibration_error(
            [min(found["confidence"], 1.0) for found in judged],
            [int(found["metrics"]["acc"]) for found in judged],
            bins=CALIBRATION_BINS,
        )
        result["calibration_error"] = {"value": error, "bins": CALIBRATION_BINS}
    groups = _grouped(asked, judged, lambda item: item.group)
    if len(groups) > 1:
        result |= {"groups": groups, "macro": {}}
        for metric in metrics:
            found = [group["metrics"][metric] for group in groups.values()]
            error = np.linalg.norm([m["stderr"] for m in found]) / len(found)
            mean = np.mean([m["value"] for m in found])
            result["macro"][metric] = {"value": float(mean), "stderr": float(error)}
    return result


def _grouped(
    asked: list[Question], judged: list[dict], of: Callable[[Item], str]
) -> dict[str, dict]:
    found = defaultdict(list)
    for question, record in zip(asked, judged, strict=True):
        found[of(question.item)].append(record)
    return {name: {"n": len(rs), "metrics": _means(rs)} for name, rs in found.items() if name}


def _means(judged: list[dict]) -> dict[str, dict]:
    out = {}
    for metric in judged[0]["metrics"]:
        values = [found["metrics"][metric] for found in judged]
        out[metric] = {"value": float(np.mean(values)), "stderr": standard_error(values)}
    return out


def _perplexity(model, options: Options, started) -> dict:
    params, cfg, tokenizer = model
    whole = list(itertools.islice(test_texts.read(options.input), options.limit or None))
    found = perplexity(
        params,
        cfg,
        tokenizer,
        whole,
        window=options.window,
        stride=options.stride,
        batch_size=options.batch_size,
        progress=started(None),
    )
    names = [name for name in found if f"{name}_stderr" in found]
    metrics = {n: {"value": found.pop(n), "stderr": found.pop(f"{n}_stderr")} for n in names}
    return (
        {"n": found.pop("n"), "metrics": metrics}
        | found
        | {"input": test_texts.where(options.input)}
    )


def _starter(name: str, progress) -> Callable[[int | None], Any]:
    return lambda total: progress(name, total) if progress else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
