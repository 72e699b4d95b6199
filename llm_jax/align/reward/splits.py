"""Whether a reward is better than preferring by length: over several held-out parts, with tests."""

import math
from typing import Any

import numpy as np
from scipy import stats

from llm_jax import config as configs
from llm_jax import report
from llm_jax.align import judgements
from llm_jax.align.reward.features import Answers
from llm_jax.align.reward.linear import Head, choose, fit, held_out_loss, judged
from llm_jax.config import TrainConfig
from llm_jax.eval.uncertainty import mcnemar

# What is compared: as the recipe says, but for whether length is controlled for.
VARIANTS = {"reward": False, "length-controlled reward": True}


def compare(answers: Answers, cfg: TrainConfig) -> tuple[dict[str, Any], Head, list[report.Block]]:
    """Fits heads on all prompts but a part, `reward.splits` times, and judges that part.

    Parts are disjoint, drawn with `data.preference.split_seed` (0 if it is -1), of
    `data.eval_fraction` of the prompts each. Which length is preferred, and how strongly weights are
    held to 0, is found on the other prompts alone. The paired tests of accuracy against that of
    length: over parts a t-test whose variance is corrected for training data that overlap (Nadeau &
    Bengio 2003, factor 1/k + n_test/n_train), and McNemar's exact one over all held-out pairs.

    Returns:
      rows for a summary, the head of all answers, and a table.

    Raises:
      ValueError: more parts than there are prompts for, or fewer than two.
    """
    k, fraction, n = cfg.reward.splits, cfg.data.eval_fraction, int(answers.prompts_N[-1]) + 1
    size = round(fraction * n)
    if k < 2 or size < 1 or k * size > n:
        raise ValueError(
            f"reward.splits={k} parts of data.eval_fraction={fraction:.3g} are not from 2 parts to all "
            f"of the {n} prompts; change one of them"
        )
    seed = max(cfg.data.preference.split_seed, 0)
    order = np.random.default_rng(seed).permutation(n)
    rows, hits = [], {name: [] for name in (*VARIANTS, "length")}
    for part in range(k):
        out_N = np.isin(answers.prompts_N, order[part * size : (part + 1) * size])
        train, test = answers.pick(~out_N), answers.pick(out_N)
        pairs = judgements.pairs_of(judgements.Judged(*_plain(train)))
        ahead = train.tokens_N[pairs.better] - train.tokens_N[pairs.worse]
        shorter = float(judgements.right(-ahead).mean()) >= 0.5
        for name, controls in VARIANTS.items():
            own = _controlling(cfg, controls)
            l2 = cfg.reward.l2 or choose(train, own)[0]
            head = fit(train, own, l2)
            found = judged(head, test)
            held = judgements.pairs_of(found)
            hits[name].append(
                judgements.right(found.scores[held.better] - found.scores[held.worse])
            )
            numbers = judgements.measure(found, shorter_wins=shorter)
            rows.append(
                {"part": part + 1, "reward": name, "l2": l2, "loss": held_out_loss(head, test, own)}
                | {key.removeprefix("eval/"): value for key, value in numbers.items()}
            )
        longer = found.tokens[held.better] - found.tokens[held.worse]
        hits["length"].append(judgements.right(-longer if shorter else longer))
    trained_on = len(order) - size
    tests = [_test(name, hits, size / trained_on) for name in VARIANTS]
    means = [_means(name, rows) for name in VARIANTS]
    own = cfg.reward.l2 or choose(answers, cfg)[0]
    summary = {"name": cfg.name, "l2": own, "splits": k}
    chosen = list(VARIANTS.values()).index(cfg.reward.control_length)
    found = tests[chosen] | means[chosen]
    summary |= {f"splits/{key}": value for key, value in found.items() if key != "reward"}
    blocks: list[report.Block] = [
        report.Text("## Held-out parts"),
        report.Table(
            tests, caption=f"Accuracy against length alone, {k} disjoint parts of {size} prompts"
        ),
        report.Table(means, caption="Means over the parts"),
        report.Table(rows, caption="Each part"),
    ]
    return summary, fit(answers, cfg, own), blocks


def _plain(answers: Answers) -> tuple[np.ndarray, ...]:
    return np.zeros(len(answers.labels_N)), answers.labels_N, answers.tokens_N, answers.groups_N


def _controlling(cfg: TrainConfig, controls: bool) -> TrainConfig:
    own = configs.thaw(cfg)
    own.reward.control_length = controls
    return configs.freeze(own)


def _test(name: str, hits: dict[str, list[np.ndarray]], ratio: float) -> dict[str, Any]:
    """A reward's accuracy, length's, and the two paired tests."""
    ours, length = ([float(h.mean()) for h in hits[key]] for key in (name, "length"))
    gain = np.array(ours) - np.array(length)
    k = len(gain)
    error = math.sqrt((1 / k + ratio) * gain.var(ddof=1))
    t = gain.mean() / error if error else math.inf * gain.mean() if gain.mean() else 0.0
    half = stats.t.ppf(0.975, k - 1) * error
    whole = {key: np.concatenate(hits[key]) for key in (name, "length")}
    decided = (whole[name] != 0.5) & (whole["length"] != 0.5)
    p, alone, other = 1.0, 0, 0
    if decided.any():
        p, alone, other = mcnemar(whole[name][decided], whole["length"][decided])
    return {
        "reward": name,
        "accuracy": float(np.mean(ours)),
        "accuracy of length": float(np.mean(length)),
        "gain": float(gain.mean()),
        "gain, lower": float(gain.mean() - half),
        "gain, upper": float(gain.mean() + half),
        "p, t-test over parts": float(2 * stats.t.sf(abs(t), k - 1)),
        "pairs": len(whole[name]),
        "right alone": alone,
        "length right alone": other,
        "p, McNemar": p,
    }


def _means(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    own = [row for row in rows if row["reward"] == name]
    keys = [
        key
        for key in own[0]
        if key not in ("part", "reward", "l2", "pairs", "pair_accuracy_stderr")
    ]
    return {"reward": name} | {
        key: float(np.mean([row[key] for row in own if key in row])) for key in keys
    }
