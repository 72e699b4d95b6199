"""What the rankings experiment found: paired differences, and which claims about pairs they bear out."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from llm_jax.align.rankings.data import KINDS, pairs_of, prompts_for

BOTH = ("listwise", "implied")
STABILITY = ("spread", "outlier", "condition")
PAIRS = (2,)  # the design whose rankings are pairs
RESAMPLES = 2000
UNITS = {"comparisons": "comparisons", "answers_read": "answers read", "annotations": "annotations"}


class Estimate(NamedTuple):
    """A mean over seeds, or a statistic of them, and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"

    @property
    def sign(self) -> int:
        """Of all the interval; 0 where it holds 0."""
        return int(self.low > 0) - int(self.high < 0)

    def negated(self) -> "Estimate":
        """Of the difference the other way round."""
        return Estimate(-self.mean, -self.high, -self.low)

    def points(self) -> str:
        """A difference of accuracies, in points of a hundred."""
        return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * v for v in self))


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and Student's interval."""
    mean, n = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half)


def ratio_of_spreads(a_K: Sequence[float], b_K: Sequence[float]) -> Estimate:
    """Standard deviation of a over that of b, of the same seeds, and its bootstrap interval."""
    a_K, b_K = np.asarray(a_K), np.asarray(b_K)
    picks = np.random.default_rng(0).integers(len(a_K), size=(RESAMPLES, len(a_K)))
    found = np.std(a_K[picks], axis=1) / np.maximum(np.std(b_K[picks], axis=1), 1e-12)
    low, high = np.quantile(found, [0.025, 0.975]).tolist()
    return Estimate(float(np.std(a_K) / max(np.std(b_K), 1e-12)), low, high)


def in_words(annotator: Mapping[str, Any]) -> str:
    """Which annotator: what differs from plain noise is named."""
    words = [f"{annotator['kind']} noise {annotator['noise']:g}"]
    if annotator["careless"]:
        words.append(f"{100 * annotator['careless']:g}% careless")
    if annotator["fatigue"]:
        words.append(f"fatigue {annotator['fatigue']:g}")
    return ", ".join(words)


class Findings:
    """results.json by design, method, annotator and number of prompts."""

    def __init__(self, result: Mapping[str, Any]):
        self.settings = s = result["settings"]
        self.runs = {
            (tuple(r["answers"]), r["method"], in_words(r["annotator"])): r for r in result["runs"]
        }
        self.sizes = list(s["answers"])
        self.mixed = (2, *sorted(self.sizes))
        self.budgets = sorted(s["comparisons"])
        self.budget = self.budgets[len(self.budgets) // 2]
        noise = sorted(s["noise"])
        self.noise, self.usual = noise, self.name(noise=noise[len(noise) // 2])
        self.careless = sorted(s["careless"])
        self.attentive = [n for d, _, n in self.runs if d == PAIRS]
        self.all = list(dict.fromkeys(n for _, _, n in self.runs))

    @staticmethod
    def name(kind: str = "gumbel", noise: float = 1.0, careless: float = 0.0, fatigue: float = 0.0):
        """`in_words`."""
        return in_words({"kind": kind, "noise": noise, "careless": careless, "fatigue": fatigue})

    def run(self, design: Sequence[int], method: str, annotator: str) -> Mapping[str, Any]:
        """One of the runs. Of pairs, those of the same annotator who does not tire."""
        if tuple(design) == PAIRS or method == "judged":
            annotator = annotator.split(", fatigue")[0]
        return self.runs[tuple(design), method, annotator]

    def accuracies(
        self, design: Sequence[int], method: str, annotator: str, prompts: int
    ) -> np.ndarray:
        """[K], of so many prompts."""
        run = self.run(design, method, annotator)
        right = run["right"][run["prompts"].index(prompts)]
        return np.array(right) / self.settings["test_pairs"]

    def bought(
        self, design: Sequence[int], method: str, annotator: str, budget: float | None = None
    ) -> np.ndarray:
        """Accuracies [K] of what `budget` comparisons buy; of the usual one where there is none."""
        prompts = prompts_for(budget or self.budget, design, judged=method == "judged")
        return self.accuracies(design, method, annotator, prompts)

    def of_pairs(self, n: int, annotator: str, unit: str) -> np.ndarray:
        """Accuracies [K] of fresh pairs that cost, in a unit, what the usual budget's rankings do."""
        rankings = prompts_for(self.budget, (n,))
        if unit == "comparisons":
            return self.bought(PAIRS, "implied", annotator)
        pairs = {"annotations": rankings, "answers_read": rankings * n // 2}[unit]
        return self.accuracies(PAIRS, "implied", annotator, pairs)

    def differences(
        self, n: int, annotators: Sequence[str], unit: str = "comparisons"
    ) -> dict[str, Estimate]:
        """Fresh pairs minus rankings of n (listwise) at equal cost, by annotator."""
        return {
            a: estimate(self.of_pairs(n, a, unit) - self.bought((n,), "listwise", a))
            for a in annotators
        }

    def losses(self, n: int) -> dict[str, Estimate]:
        """Pairwise minus listwise loss on the same rankings of n, by annotator."""
        return {
            a: estimate(self.bought((n,), "implied", a) - self.bought((n,), "listwise", a))
            for a in self.all
        }

    def growth(self, n: int, more: str, less: str) -> Estimate:
        """By how much the pairs' lead at equal comparisons is larger with one annotator than another."""
        lead = [
            self.of_pairs(n, a, "comparisons") - self.bought((n,), "listwise", a)
            for a in (more, less)
        ]
        return estimate(lead[0] - lead[1])

    def fatigues(self) -> dict[float, str]:
        """{exponent: annotator} at the usual noise, from 0."""
        found = [0.0, *sorted(self.settings["fatigue"])]
        return {v: self.name(noise=self.noise[len(self.noise) // 2], fatigue=v) for v in found}


# ------------------------------------------------------------------------------------------- verdicts


def verdict(difference: Estimate, better: str, worse: str) -> str:
    """Which is ahead, or that it cannot be told; in points of accuracy."""
    if not difference.sign:
        return f"no difference can be told, {difference.points()} points"
    ahead, by = (better, difference) if difference.sign > 0 else (worse, difference.negated())
    return f"{ahead} are ahead by {by.points().replace('+', '')} points"


def tally(found: Sequence[Estimate], better: str, worse: str) -> str:
    """How often which is ahead."""
    signs = [d.sign for d in found]
    return (
        f"{better} are ahead in {signs.count(1)} of {len(signs)} cases, {worse} in "
        f"{signs.count(-1)}, and {signs.count(0)} cannot be told"
    )


def holds(signs: Sequence[int]) -> str:
    """Of a claim that differences are above 0: in all cases, in some, or in none."""
    count, n = list(signs).count(1), len(signs)
    if not count:
        return f"Does not hold here, in none of {n} cases"
    return f"Holds here in all {n} cases" if count == n else f"Holds here in {count} of {n} cases"


def tipping(f: Findings, n: int, unit: str) -> str:
    """From which fatigue on fresh pairs beat rankings, by linear interpolation of the means."""
    by_name = f.differences(n, list(f.fatigues().values()), unit)
    points = [(v, by_name[name].mean) for v, name in f.fatigues().items()]
    if points[0][1] > 0:
        return "even without fatigue"
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 > 0:
            return f"from about {x0 + (x1 - x0) * y0 / (y0 - y1):.2f} on"
    return f"at no fatigue up to {points[-1][0]:g}"


def stabilities(f: Findings) -> list[dict[str, Any]]:
    """Listwise against pairwise, by number of answers and share of careless annotations: for each
    quantity an Estimate of both losses and, as `KEY gap`, of listwise minus pairwise."""
    rows = []
    plain = f.name(noise=f.noise[0])
    for n, careless in itertools.product(f.sizes, (0.0, *f.careless)):
        name = f.name(noise=f.noise[0], careless=careless)
        accuracy = {m: f.bought((n,), m, name) for m in BOTH}
        row = {"answers": n, "careless": careless}
        row["std"] = {m: float(np.std(v, ddof=1)) for m, v in accuracy.items()}
        row["std ratio"] = ratio_of_spreads(accuracy["listwise"], accuracy["implied"])
        values = {k: {m: f.run((n,), m, name)[k] for m in BOTH} for k in STABILITY}
        values["lost"] = {m: f.bought((n,), m, plain) - v for m, v in accuracy.items()}
        for key, by_loss in values.items():
            if all(v is not None for v in by_loss.values()):
                row[key] = {m: estimate(v) for m, v in by_loss.items()}
                row[f"{key} gap"] = estimate(np.subtract(by_loss["listwise"], by_loss["implied"]))
        rows.append(row)
    return rows


def lines(result: Mapping[str, Any]) -> list[str]:
    """What the binary prints at the end and the report begins with: each claim and what is found."""
    f = Findings(result)
    return [
        *_orders(f),
        *_noise(f),
        *_dependence(f),
        *_fatigue(f),
        *_loss(f),
        *_stability(f),
        *_price(f),
    ]


def _orders(f: Findings) -> list[str]:
    n = max(f.sizes)
    rankings, orders = prompts_for(f.budget, (n,)), math.factorial(n)
    found = {
        kind: list(f.differences(n, [f.name(kind, v) for v in f.noise]).values()) for kind in KINDS
    }
    by_kind = {kind: holds([d.sign for d in of_noise]) for kind, of_noise in found.items()}
    return [
        "**Orders are many and labels few: n answers have n! orders and only n (n - 1) / 2 pairs, so "
        "rankings teach less than as many comparisons of pairs.** "
        f"{by_kind['gumbel']} of gumbel noise, of which the listwise loss is the likelihood; "
        f"{by_kind['gaussian'].lower()} of gaussian noise. {n} answers have {orders:,} orders and "
        f"{pairs_of(n)} pairs; {f.budget:,} comparisons buy {rankings:,} rankings, "
        f"{rankings / orders:.2g} of one for each order; at {f.usual} they give an accuracy of "
        f"{estimate(f.bought((n,), 'listwise', f.usual))}, fresh pairs "
        f"{estimate(f.bought(PAIRS, 'implied', f.usual))}."
    ]


def _noise(f: Findings) -> list[str]:
    first, last = f.noise[0], f.noise[-1]
    steps = {}
    if last > first:
        for kind in KINDS:
            steps[f"{kind} noise {first:g} to {last:g}"] = f.name(kind, last), f.name(kind, first)
    for share in f.careless:
        more = f.name(noise=first, careless=share)
        steps[f"none to {share:.0%} careless"] = more, f.name(noise=first)
    if not steps:
        return []
    found = {step: [f.growth(n, *ends) for n in f.sizes] for step, ends in steps.items()}
    each = [
        f"{step} {' and '.join(f'{d.points()} points' for d in of_sizes)}"
        for step, of_sizes in found.items()
    ]
    return [
        "**Noise alone hurts rankings more than pairs: the pairs' lead at equal comparisons grows "
        f"with it.** {holds([d.sign for of_sizes in found.values() for d in of_sizes])}. From "
        f"{'; '.join(each)}, over rankings of {' and '.join(map(str, f.sizes))}."
    ]


def _dependence(f: Findings) -> list[str]:
    found = [
        estimate(f.bought((n,), "judged", a) - f.bought((n,), "implied", a))
        for n in f.sizes
        for a in f.attentive
    ]
    usual = [
        estimate(f.bought((n,), "judged", f.usual) - f.bought((n,), "implied", f.usual))
        for n in f.sizes
    ]
    each = [f"{d.points()} points at {n} answers" for n, d in zip(f.sizes, usual, strict=True)]
    return [
        "**Errors within a ranking go together: its pairs are worth less than pairs of the same "
        f"answers, each judged by itself, at equal comparisons.** {holds([d.sign for d in found])}; "
        f"{' and '.join(each)} at {f.usual}."
    ]


def _fatigue(f: Findings) -> list[str]:
    names = list(f.fatigues().values())
    if len(names) < 2:
        return []
    signs = [f.growth(n, names[-1], f.usual).sign for n in f.sizes]
    each = [
        f"at equal {words} "
        + " and ".join(f"{tipping(f, n, unit)} for rankings of {n}" for n in f.sizes)
        for unit, words in UNITS.items()
    ]
    return [
        "**Annotators who tire, so that noise is (n / 2)^fatigue times as large, raise the lead of "
        f"pairs.** {holds(signs)}. On average fresh pairs are ahead {'; '.join(each)}."
    ]


def _loss(f: Findings) -> list[str]:
    found = {n: f.losses(n) for n in f.sizes}
    every = [d for by_name in found.values() for d in by_name.values()]
    each = [f"{found[n][f.usual].points()} points at {n} answers" for n in f.sizes]
    return [
        "**On the same rankings the pairwise loss learns more than the listwise.** "
        f"{holds([d.sign for d in every])}: the listwise is ahead in "
        f"{sum(d.sign < 0 for d in every)}. Pairwise minus listwise is {' and '.join(each)} at "
        f"{f.usual}."
    ]


def _stability(f: Findings) -> list[str]:
    rows = [r for r in stabilities(f) if r["careless"]]
    if not rows:
        return []
    signs = {k: [r[f"{k} gap"].sign for r in rows if f"{k} gap" in r] for k in (*STABILITY, "lost")}
    signs["std"] = [int(r["std ratio"].low > 1) - int(r["std ratio"].high < 1) for r in rows]
    words = {
        "spread": "gradient norms spread more over prompts",
        "outlier": "careless rankings pull harder against the others",
        "condition": "the Hessian is conditioned worse",
        "std": "accuracy varies more over seeds",
        "lost": "carelessness costs more accuracy",
    }
    each = [
        f"{text} under the listwise loss in {signs[k].count(1)}, under the pairwise in "
        f"{signs[k].count(-1)} of {len(signs[k])}"
        for k, text in words.items()
        if signs[k]
    ]
    every = [sign for found in signs.values() for sign in found]
    return [
        "**The listwise loss is the less stable one where annotators are careless.** "
        f"{holds(every)}: {'; '.join(each)}."
    ]


def _price(f: Findings) -> list[str]:
    each = []
    for unit, words in UNITS.items():
        for n in f.sizes:
            lead = f.differences(n, [f.usual], unit)[f.usual]
            each.append(f"{words}, rankings of {n}: {verdict(lead, 'pairs', 'rankings')}")
    return [
        f"**What counts as equal cost decides.** Fresh pairs against rankings at {f.usual}, equal in "
        f"{'; '.join(each)}."
    ]
