"""What the rankings experiment annotates: made-up answers, annotators who err, and what they cost.

Answers are vectors of features with a true reward; an annotator orders those to a prompt by the
reward that is seen, the true one and noise.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

GUMBEL_STD = math.pi / math.sqrt(6)
KINDS = ("gumbel", "gaussian")


@dataclasses.dataclass(frozen=True)
class Annotator:
    """How an annotator errs.

    Attributes:
      kind: of the noise on the reward that is seen. gumbel makes rankings distributed as Plackett-Luce
        (Luce 1959; Yellott 1977), so that `listwise` is the right likelihood; gaussian is Thurstone's
        (1927) case V.
      noise: its standard deviation at two answers, in standard deviations of the true reward.
      careless: the share of annotations that are a uniformly random order; of pairs, a coin's.
      fatigue: at n answers the noise is (n / 2)^fatigue times as large.
    """

    kind: str = "gumbel"
    noise: float = 1.0
    careless: float = 0.0
    fatigue: float = 0.0


# -------------------------------------------------------------------------------------------- costs


def pairs_of(n: int) -> int:
    """Pairs of n answers, C(n, 2)."""
    return n * (n - 1) // 2


def bits_of(n: int) -> float:
    """Bits that a ranking of n answers holds at most, log2(n!)."""
    return math.log2(math.factorial(n))


def comparisons_of(n: int) -> int:
    """Comparisons without which n answers cannot be sorted in the worst case, ceil(log2(n!))."""
    return (math.factorial(n) - 1).bit_length()


class Cost(NamedTuple):
    """What is asked of annotators."""

    annotations: float  # rankings that are given, or pairs that are judged
    comparisons: float
    answers_read: float


def cost(answers: Sequence[int], *, judged: bool = False) -> Cost:
    """Of a prompt: its ranking or, `judged`, each of its pairs by itself; of several designs the mean."""
    rows = []
    for n in answers:
        pairs = pairs_of(n)
        rows.append((pairs, pairs, 2 * pairs) if judged else (1, comparisons_of(n), n))
    return Cost(*np.mean(rows, axis=0).tolist())


def prompts_for(
    budget: float, answers: Sequence[int], *, judged: bool = False, unit: str = "comparisons"
) -> int:
    """Prompts whose annotation costs at most `budget`, of one of Cost's units."""
    of_all = sum(getattr(cost((n,), judged=judged), unit) for n in answers)
    return int(budget * len(answers) // of_all)


# --------------------------------------------------------------------------------------- annotations


class Rankings(NamedTuple):
    """Annotated prompts; a pair is a ranking of two. Fields may lead with more axes."""

    x_RxAxD: np.ndarray
    labels_RxA: np.ndarray  # float32: places from the worst, 0, up
    careless_R: np.ndarray  # bool: what was not looked at


def annotate(
    rng: np.random.Generator, r_RxA: np.ndarray, real_RxA: np.ndarray, annotator: Annotator
) -> tuple[np.ndarray, np.ndarray]:
    """How answers of true reward r are ordered: (labels [R, A], careless [R])."""
    careless_R = rng.random(len(r_RxA)) < annotator.careless
    anything_RxA = rng.random(r_RxA.shape)
    drawn_RxA = {
        "gumbel": lambda: rng.gumbel(size=r_RxA.shape) / GUMBEL_STD,
        "gaussian": lambda: rng.normal(size=r_RxA.shape),
    }[annotator.kind]()
    n_Rx1 = real_RxA.sum(axis=1, keepdims=True)
    seen_RxA = r_RxA + annotator.noise * (n_Rx1 / 2) ** annotator.fatigue * drawn_RxA
    seen_RxA = np.where(careless_R[:, None], anything_RxA, seen_RxA)
    seen_RxA = np.where(real_RxA > 0, seen_RxA, -np.inf)
    return np.argsort(np.argsort(seen_RxA, axis=1), axis=1).astype(np.float32), careless_R


def real_answers(answers: Sequence[int], prompts: int) -> np.ndarray:
    """[R, A] float32, 1 where a prompt has an answer; prompts have `answers` in turn."""
    sizes_R = np.resize(np.array(answers), prompts)
    return (np.arange(max(answers))[None, :] < sizes_R[:, None]).astype(np.float32)


class World(NamedTuple):
    """The true reward of features: linear, and a share of a square, which no linear reward explains."""

    linear_D: np.ndarray
    square_D: np.ndarray
    nonlinear: float

    @classmethod
    def draw(cls, rng: np.random.Generator, features: int, nonlinear: float = 0.0) -> "World":
        """One with variance 1 over features that are standard normal."""
        w_2xD = rng.normal(size=(2, features))
        return cls(*(w_2xD / np.linalg.norm(w_2xD, axis=1, keepdims=True)), nonlinear)

    def reward(self, x: np.ndarray) -> np.ndarray:
        """[..., D] -> [...]."""
        square = ((x @ self.square_D) ** 2 - 1) / math.sqrt(2)
        return (
            math.sqrt(1 - self.nonlinear) * (x @ self.linear_D) + math.sqrt(self.nonlinear) * square
        )


# Of random streams. None is 0: NumPy takes a seed with zeros at its end for the seed without.
WORLD, ANSWERS, ANNOTATOR = 1, 2, 3


def annotated(
    seed: Sequence[int],
    world: World,
    real_RxA: np.ndarray,
    annotator: Annotator,
    *,
    judged: bool = False,
) -> Rankings:
    """Prompts with rankings, or with each pair `judged`: those of a prompt are then rows one after the
    other. The same seed has the same answers, whoever annotates them and how."""
    D = len(world.linear_D)
    x_RxAxD = np.random.default_rng([*seed, ANSWERS]).normal(size=(*real_RxA.shape, D))
    if judged:
        pairs = np.triu_indices(real_RxA.shape[1], k=1)
        x_RxAxD = np.stack([x_RxAxD[:, i] for i in pairs], axis=2).reshape(-1, 2, D)
        real_RxA = np.ones(x_RxAxD.shape[:2], np.float32)
    rng = np.random.default_rng([*seed, ANNOTATOR])
    return Rankings(
        x_RxAxD.astype(np.float32), *annotate(rng, world.reward(x_RxAxD), real_RxA, annotator)
    )
