"""Was a data set in the training data? Two questions that need nothing but log-probabilities.

The order test asks it of a whole evaluation set and gives a p-value that holds for any model. Min-k%
probability asks it of a single text and gives a score, which means something only beside the scores
of texts that are known to be no members. `eval/overlap.py` compares the texts themselves, where the
training data are at hand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from llm_jax import models
from llm_jax.config import ModelConfig
from llm_jax.data import documents
from llm_jax.data.packing import bucket
from llm_jax.eval.classification import roc_auc
from llm_jax.eval.scoring import Progress, rolling
from llm_jax.types import Array, Batch, PyTree

# Rows of token ids -> log p of each token after the first, in nats: float [n - 1] a row, as
# `eval.scoring.score_rows` gives them.
LogProbs = Callable[[Sequence[Sequence[int]]], Sequence[np.ndarray]]

_TOKENS = 1 << 20  # scored at a time, at most


@dataclass(frozen=True)
class OrderTest:
    """What the order test found.

    Attributes:
      p_value: of the permutation test; exact, at least 1 / (1 + permutations).
      t_p_value: of the sharded t-test; None with a single shard.
      canonical: log p of the items in their canonical order, nats, a shard: [shards].
      shuffled: log p of the items in each random order: [shards, permutations].
      tokens: scored tokens of one order of all items.
    """

    p_value: float
    t_p_value: float | None
    canonical: np.ndarray
    shuffled: np.ndarray
    tokens: int

    @property
    def advantage(self) -> float:
        """Nats by which the canonical order is more probable than a random one on average."""
        return float(self.canonical.sum() - self.shuffled.mean(axis=1).sum())


def order_test(
    items: Sequence[str],
    encode: Callable[[str], Sequence[int]],
    log_probs: LogProbs,
    *,
    length: int,
    start: int,
    separator: str = "\n",
    permutations: int = 99,
    shards: int = 1,
    stride: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> OrderTest:
    """Tests whether a model knows the order in which a data set is published.

    The items of most evaluation sets are exchangeable: no order of them is more natural than
    another. A model that never saw the set gives its canonical order X a log-probability that is a
    random draw among those of all orders. With m random orders π,

        p = (1 + #{π : log p(X_π) >= log p(X)}) / (1 + m)

    is therefore uniform on 1/(1+m), ..., 1 for such a model, whatever the model, and small for one
    that was trained on the file. With `shards` r > 1 the items are cut into r runs of neighbours
    and shuffled inside each. The sums over shards give the same exact p; besides, with
    s_i = log p(X_i) - mean_π log p(X_iπ) of shard i, the one-sided t-test of mean(s) > 0 gives a p
    that is approximate but has no floor at 1/(1+m).

    The items of an order are joined by `separator`, tokenised together, and read in windows of
    `length` tokens (`scoring.rolling`). Only the order is seen: a model that read the items in other
    orders, or in no order, passes. Items sorted by some key (topic, date, length) are not
    exchangeable, and the test would find the key.

    Args:
      items: texts in canonical order.
      encode: text -> token ids.
      log_probs: rows of ids -> log p of each token after the first.
      length: tokens that the model reads at most.
      start: the token that stands before a text (`decode.generate.start_ids`).
      permutations: m, random orders; for p < 0.01 more than 99.
      shards: r; each needs two items at least.
      stride: new tokens of each window after the first; 0: half of `length`.
      progress: called with the number of orders just scored, of shards · (1 + permutations).

    Source: Oren, Meister, Chatterji, Ladhak & Hashimoto 2023, "Proving Test Set Contamination in
    Black Box Language Models", sections 3.1 (permutation test) and 3.2 (sharded test).

    Raises:
      ValueError: fewer than two items a shard, all items equal, or no permutation.
    """
    if permutations < 1:
        raise ValueError(f"--permutations={permutations} has to be 1 or more")
    if not 1 <= shards <= len(items) // 2:
        raise ValueError(
            f"--shards={shards} of {len(items)} items: a shard needs two items at least"
        )
    if len(set(items)) < 2:
        raise ValueError("all items of the data set are the same text: they have no order")
    rng = np.random.default_rng(seed)
    scores, tokens = np.empty((shards, 1 + permutations)), 0
    cut = partial(rolling, window=length, stride=stride or max(length // 2, 1), prefix=start)
    for i, shard in enumerate(np.array_split(np.arange(len(items)), shards)):
        orders = [shard, *(rng.permutation(shard) for _ in range(permutations))]
        texts = [separator.join([*(items[n] for n in order), ""]) for order in orders]
        # The same order drawn twice is scored once: rounding must not break their tie.
        different = list(dict.fromkeys(texts))
        size = len(encode(texts[0]))
        tokens += size
        totals: dict[str, float] = {}
        step = max(_TOKENS // max(size, 1), 1)
        for group in (different[at : at + step] for at in range(0, len(different), step)):
            pairs = [list(cut(encode(text))) for text in group]
            found = iter(log_probs([context + new for rows in pairs for context, new in rows]))
            for text, rows in zip(group, pairs, strict=True):
                parts = (next(found)[-len(new) :] for _, new in rows)
                totals[text] = sum(float(np.sum(part, dtype=np.float64)) for part in parts)
            if progress:
                progress(len(group))
        if progress:
            progress(len(texts) - len(different))
        scores[i] = [totals[text] for text in texts]
    canonical, shuffled = scores[:, 0], scores[:, 1:]
    return OrderTest(
        p_value=permutation_p_value(canonical.sum(), shuffled.sum(axis=0)),
        t_p_value=sharded_p_value(canonical, shuffled) if shards > 1 else None,
        canonical=canonical,
        shuffled=shuffled,
        tokens=tokens,
    )


def order_summary(found: OrderTest) -> dict:
    """A result for JSON: p-values, what was compared, and the log-probabilities of every shard."""
    return {
        "p_value": found.p_value,
        "t_p_value": found.t_p_value,
        "advantage_nats": found.advantage,
        "tokens": found.tokens,
        "shards": len(found.canonical),
        "permutations": found.shuffled.shape[1],
        "canonical": found.canonical.tolist(),
        "shuffled": found.shuffled.tolist(),
    }


def render_order(found: OrderTest) -> str:
    """The test's result and what it means, in a few lines."""
    shards, m = found.shuffled.shape
    total = found.shuffled.sum(axis=0)
    lines = [
        f"order test: the published order against {m} random ones, {found.tokens} tokens"
        + (f" in {shards} shards" if shards > 1 else ""),
        f"  log p  published {found.canonical.sum():.2f}, random {total.mean():.2f} ± "
        f"{total.std():.2f} nats (highest {total.max():.2f})",
        f"  p = {found.p_value:.4f} (permutation test; {1 / (1 + m):.4f} at least)",
    ]
    if found.t_p_value is not None:
        lines.append(f"  p = {found.t_p_value:.2e} (t-test over shards)")
    if found.p_value < 0.01:
        lines.append("  The model knows the order: the set, in this order, was in what it read.")
    else:
        lines.append(
            "  No sign that the model knows the order. It may have read the items in another order, "
            "too few times, or not at all."
        )
    return "\n".join(lines)


def permutation_p_value(observed: float, shuffled: np.ndarray) -> float:
    """(1 + #{shuffled >= observed}) / (1 + n): the observed order is one of the n + 1 orders.

    Without the ones the p-value of an observed order above all others would be 0, which no finite
    number of draws can show, and p <= α would happen more often than α. Ties count against it.
    """
    return float((1 + np.sum(np.asarray(shuffled) >= observed)) / (1 + len(shuffled)))


def sharded_p_value(canonical: np.ndarray, shuffled: np.ndarray) -> float:
    """One-sided t-test over shards of log p(canonical) [r] minus its mean over orders [r, m].

    1.0 where all shards have the same difference and it is not positive.
    """
    gains = np.asarray(canonical) - np.asarray(shuffled).mean(axis=1)
    if np.ptp(gains) == 0:
        return float(gains[0] <= 0)
    return float(stats.ttest_1samp(gains, 0.0, alternative="greater").pvalue)


def min_k(log_probs: np.ndarray, k: float = 0.2) -> float:
    """Min-k% probability: the mean of the lowest share k of a text's token log-probabilities.

    A text that was not trained on tends to have a few tokens that surprise the model very much;
    higher scores speak for membership. Of n tokens the lowest max(1, floor(k n)) count.

    Source: Shi et al. 2023, "Detecting Pretraining Data from Large Language Models", equation 1.

    Raises:
      ValueError: k outside (0, 1], or no token.
    """
    log_probs = np.asarray(log_probs, np.float64)
    if not 0 < k <= 1:
        raise ValueError(f"k={k} has to be a share in (0, 1]; the paper takes 0.2")
    if log_probs.ndim != 1 or not log_probs.size:
        raise ValueError(f"min-k needs the log-probabilities of a text [n], not {log_probs.shape}")
    count = max(int(k * log_probs.size), 1)
    return float(np.partition(log_probs, count - 1)[:count].mean())


def min_k_plus_plus(
    log_probs: np.ndarray, means: np.ndarray, deviations: np.ndarray, k: float = 0.2
) -> float:
    """Min-k%++: min-k of (log p(x_t) - μ_t) / σ_t, all arrays [n].

    μ_t and σ_t are mean and standard deviation of log p(z) for z drawn from the model's own
    distribution at t (`moments`): how probable the token is among what the model expected there.

    Source: Zhang et al. 2024, "Min-K%++: Improved Baseline for Detecting Pre-Training Data from
    Large Language Models", equation 3.
    """
    spread = np.maximum(np.asarray(deviations, np.float64), 1e-6)  # a certain model has none
    return min_k((np.asarray(log_probs, np.float64) - means) / spread, k)


@partial(jax.jit, static_argnames="cfg")
def _moments(params: PyTree, tokens: Array, cfg: ModelConfig) -> tuple[Array, Array, Array]:
    model = models.family(cfg.family)
    hidden = model.hidden(params, Batch(tokens=tokens[:, :-1]), cfg)
    log_p_BxLxV = jax.nn.log_softmax(model.logits(params, hidden.x, cfg).astype(jnp.float32))
    p_BxLxV = jnp.exp(log_p_BxLxV)
    # Where p is 0 its logarithm may be -inf, as of rows that only pad the vocabulary.
    finite_BxLxV = jnp.where(p_BxLxV > 0, log_p_BxLxV, 0.0)
    mean = jnp.sum(p_BxLxV * finite_BxLxV, axis=-1)
    variance = jnp.sum(p_BxLxV * jnp.square(finite_BxLxV - mean[..., None]), axis=-1)
    target = jnp.take_along_axis(log_p_BxLxV, tokens[:, 1:, None], axis=-1)[..., 0]
    return target, mean, jnp.sqrt(variance)


def moments(
    params: PyTree, cfg: ModelConfig, rows: Sequence[Sequence[int]]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(log p, μ, σ) of each token after a row's first, float32 [n - 1] each, in nats.

    μ and σ are mean and standard deviation of log p(z), z drawn from the model at that place. One
    row at a time, padded on the right, which a causal model does not see.
    """
    out = []
    for row in rows:
        n = len(row) - 1
        padded = np.zeros((1, bucket(n) + 1), np.int32)
        padded[0, : n + 1] = row
        out.append(tuple(np.asarray(x)[0, :n] for x in _moments(params, padded, cfg)))
    return out


def membership(
    texts: Sequence[str],
    encode: Callable[[str], Sequence[int]],
    moments: Callable[[Sequence[Sequence[int]]], list[tuple[np.ndarray, ...]]],
    *,
    length: int,
    start: int,
    k: float = 0.2,
) -> dict[str, list[float]]:
    """Scores of each text that are higher for texts that were trained on.

    {"mean_log_prob", "min_k", "min_k_plus_plus"}: a number for each text. `moments` takes rows of
    ids (the function above with parameters and config bound); long texts are read in windows of
    `length` tokens that overlap by half.
    """
    scores: dict[str, list[float]] = {"mean_log_prob": [], "min_k": [], "min_k_plus_plus": []}
    for number, text in enumerate(texts):
        ids = encode(text)
        if not len(ids):
            raise ValueError(f"text {number} has no token")
        pairs = list(rolling(ids, window=length, stride=max(length // 2, 1), prefix=start))
        found = moments([context + new for context, new in pairs])
        cut = [
            [part[-len(new) :] for part in parts]
            for parts, (_, new) in zip(found, pairs, strict=True)
        ]
        log_p, mean, deviation = (np.concatenate(part) for part in zip(*cut, strict=True))
        scores["mean_log_prob"].append(float(log_p.mean()))
        scores["min_k"].append(min_k(log_p, k))
        scores["min_k_plus_plus"].append(min_k_plus_plus(log_p, mean, deviation, k))
    return scores


def separation(members: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """How well a score tells texts from others: {"auc", "p_value"}.

    auc is the probability that one of `members` scores above one of `others` (0.5: not at all),
    p_value that of Mann-Whitney's one-sided test. Texts of another topic, style or year differ too,
    so that only others of the same kind make it a test of membership.
    """
    targets = [1] * len(members) + [0] * len(others)
    p_value = stats.mannwhitneyu(members, others, alternative="greater").pvalue
    return {"auc": roc_auc(targets, [*members, *others]), "p_value": float(p_value)}


def compare_membership(
    texts: dict[str, list[float]], others: dict[str, list[float]], *, k: float
) -> tuple[dict, str]:
    """(result for JSON, text) of `membership`'s scores of texts in question and of non-members."""
    auc = {name: separation(texts[name], others[name]) for name in texts}
    n, m = (len(scores["min_k"]) for scores in (texts, others))
    lines = [f"membership of {n} texts, against {m} reference texts: AUC (0.5: no difference)"]
    names = {
        "mean_log_prob": "mean log p",
        "min_k": f"min-{100 * k:g}%",
        "min_k_plus_plus": f"min-{100 * k:g}%++",
    }
    lines += [
        f"  {names[name]:12} {found['auc']:.3f}   p {found['p_value']:.4f}   mean "
        f"{np.mean(texts[name]):.3f} against {np.mean(others[name]):.3f}"
        for name, found in auc.items()
    ]
    lines.append(
        "  Above 0.5 the texts are less surprising than the reference: trained on, or easier, or "
        "closer to what was. Only a reference of the same kind tells these apart."
    )
    return {"k": k, "auc": auc, "texts": texts, "reference_texts": others}, "\n".join(lines)


def read_items(path: str, text_key: str = "text") -> list[str]:
    """The items of an evaluation set, in order: rows of .jsonl, .json and .parquet (also packed),
    lines of any other file. Empty ones are left out.

    Raises:
      as `data.documents.read`.
    """
    rows = {*documents.ROWS, ".json"} & set(Path(path).suffixes[-2:])
    texts = [document.text for document in documents.read([path], text_key=text_key)]
    items = texts if rows or path.startswith("hf:") else "".join(texts).splitlines()
    return [item for item in items if item.strip()]
