"""Why reward models are learned from pairs and not from rankings: an experiment on made-up annotators.

A linear reward is fitted with the project's objectives to the same rankings (listwise, or by the pairs
that they imply), or to pairs that were judged one at a time, at equal cost. What is measured is the
accuracy on held-out true pairs, and how evenly a loss pulls.

Dimension letters here: R prompts, A answers to a prompt, D features, K seeds, S annotators, C numbers
of prompts, Z strengths of L2.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.align.rankings.data import (
    GUMBEL_STD,
    KINDS,
    WORLD,
    Annotator,
    Rankings,
    World,
    annotated,
    cost,
    pairs_of,
    prompts_for,
    real_answers,
)
from llm_jax.objectives import preference
from llm_jax.types import Array, Batch, Scores

L2 = (30.0, 3.0, 0.3, 0.03, 0.003)  # tried by every method, each warm-started from the one before
TUNING_PAIRS = 2000  # true pairs by which a method's L2 is chosen, apart from those of the test


@dataclasses.dataclass(frozen=True)
class Method:
    """How rankings are learned from: options of `preference.reward`.

    `judged`: instead of a prompt's ranking there is a judgement of each of its pairs, by itself.
    """

    loss: str
    per_prompt: bool = False
    judged: bool = False


# Rankings of two answers are what is called fresh pairs: each has a prompt and answers of its own.
METHODS = {
    "listwise": Method("listwise"),
    "implied": Method("logistic"),
    # Where all prompts have as many answers, the same as `implied`.
    "implied_per_prompt": Method("logistic", per_prompt=True),
    "judged": Method("logistic", judged=True),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is run.

    Attributes:
      answers: to a prompt, the usual number first; each is a design of its own. So are prompts with
        two, the pairs, and prompts with all of these numbers in turn.
      comparisons: budgets: what annotators may compare in total.
      noise: standard deviations, of both kinds.
      careless: shares above 0, at the lowest noise.
      fatigue: exponents above 0, at the usual noise.
      nonlinear: share of the true reward's variance that no linear reward can explain.
    """

    answers: tuple[int, ...] = (4, 8)
    comparisons: tuple[int, ...] = (120, 240, 480, 960)
    noise: tuple[float, ...] = (0.5, 1.0, 2.0)
    careless: tuple[float, ...] = (0.2, 0.5)
    fatigue: tuple[float, ...] = (0.25, 0.5, 1.0)
    features: int = 16
    nonlinear: float = 0.0
    test_pairs: int = 4000
    seeds: int = 20
    seed: int = 0

    @property
    def usual_noise(self) -> float:
        """The middle one."""
        return sorted(self.noise)[len(self.noise) // 2]

    @property
    def usual_budget(self) -> int:
        """The middle one."""
        return sorted(self.comparisons)[len(self.comparisons) // 2]

    def annotators(self, answers: Sequence[int]) -> list[Annotator]:
        """All who order so many answers; nobody tires of pairs."""
        return [
            *(Annotator(kind, noise) for kind in KINDS for noise in self.noise),
            *(Annotator(noise=min(self.noise), careless=e) for e in self.careless),
            *(
                Annotator(noise=self.usual_noise, fatigue=f)
                for f in self.fatigue
                if max(answers) > 2
            ),
        ]

    def designs(self) -> list[tuple[int, ...]]:
        """Numbers of answers that prompts have in turn."""
        return [(2,), *((n,) for n in self.answers), (2, *sorted(self.answers))]


def check(e: Experiment) -> None:
    """Whether it can be run.

    Raises:
      ValueError: a number out of range; names the flag.
    """
    n = e.answers
    if not n or len(set(n)) < len(n) or not all(3 <= a <= 12 for a in n):
        raise ValueError(f"--answers={_listed(n)}: expected different numbers from 3 to 12")
    if len(set(e.comparisons)) < len(e.comparisons) or min(e.comparisons, default=0) < pairs_of(
        max(n)
    ):
        raise ValueError(
            f"--comparisons={_listed(e.comparisons)}: expected different numbers from "
            f"{pairs_of(max(n))}, the pairs of {max(n)} answers"
        )
    if not e.noise or min(e.noise) <= 0:
        raise ValueError(f"--noise={_listed(e.noise)}: expected numbers above 0")
    if not all(0 < c <= 1 for c in e.careless):
        raise ValueError(f"--careless={_listed(e.careless)}: expected shares above 0, at most 1")
    if not all(f > 0 for f in e.fatigue):
        raise ValueError(f"--fatigue={_listed(e.fatigue)}: expected exponents above 0")
    if not 0 <= e.nonlinear < 1:
        raise ValueError(f"--nonlinear={e.nonlinear}: expected a share from 0 to below 1")
    for name, least in (("features", 1), ("test_pairs", 1), ("seeds", 2)):
        if getattr(e, name) < least:
            raise ValueError(f"--{name}={getattr(e, name)}: expected {least} or more")


def _listed(values: Sequence[float]) -> str:
    return ",".join(map(str, values))


# ------------------------------------------------------------------------------------------- learner


def batch_of(labels_RxA: Array, real_RxA: Array) -> Batch:
    """A row for each prompt, a target for each answer."""
    numbers_RxA = jnp.broadcast_to(jnp.arange(1, real_RxA.shape[1] + 1)[None, :], real_RxA.shape)
    return Batch(
        tokens=jnp.zeros(real_RxA.shape, jnp.int32),
        weights=real_RxA,
        answers=numbers_RxA,
        groups=(real_RxA > 0).astype(jnp.int32),
        labels=labels_RxA,
    )


class Pull(NamedTuple):
    """A loss's derivatives by the weights of a linear reward."""

    gradient_RxD: Array  # each prompt's part
    hessian_DxD: Array


def pull(method: Method, w_D: Array, x_RxAxD: Array, batch: Batch) -> Pull:
    """Of the project's objective of the reward w x, a mean over prompts or pairs."""
    options = {"loss": method.loss, "per_prompt": method.per_prompt}

    def loss(r_RxA: Array) -> Array:
        return preference.reward(Scores(values=r_RxA), batch, **options).value()

    r_RxA = x_RxAxD @ w_D
    # No prompt's gradient depends on another's rewards: one direction serves all prompts.
    along = lambda e_A: jax.jvp(  # noqa: E731
        jax.grad(loss), (r_RxA,), (jnp.broadcast_to(e_A[None, :], r_RxA.shape),)
    )[1]
    second_AxRxA = jax.vmap(along)(jnp.eye(r_RxA.shape[1]))
    inner_AxRxD = jnp.einsum("arb,rbd->ard", second_AxRxA, x_RxAxD)
    return Pull(
        jnp.einsum("ra,rad->rd", jax.grad(loss)(r_RxA), x_RxAxD),
        jnp.einsum("rad,are->de", x_RxAxD, inner_AxRxD),
    )


def minimise(
    derivatives: Callable[[Array], tuple[Array, Array]],
    w_D: Array,
    *,
    most: int = 30,
    tolerance: float = 2e-3,
) -> Array:
    """Newton's method on a convex function, from its gradient and Hessian; `most` steps at most.

    The last step is from where the gradient's norm was below `tolerance`, which squares about that.
    Optima are exact, so no method owes its accuracy to an optimizer.
    """

    def step(carry: tuple) -> tuple:
        w, _, steps = carry
        gradient, hessian = derivatives(w)
        return w - jnp.linalg.solve(hessian, gradient), jnp.linalg.norm(gradient), steps + 1

    goes_on = lambda carry: (carry[1] > tolerance) & (carry[2] < most)  # noqa: E731
    return jax.lax.while_loop(goes_on, step, (w_D, jnp.array(jnp.inf), jnp.array(0)))[0]


def fit(
    method: Method, x_RxAxD: Array, labels_RxA: Array, real_RxA: Array, l2_Z: Sequence[float] = L2
) -> Array:
    """Weights of the linear reward [Z, D] for each strength of L2, loss + l2 |w|^2 / 2."""
    batch = batch_of(labels_RxA, real_RxA)

    def next_fit(w_D: Array, l2: Array) -> tuple[Array, Array]:
        def derivatives(w_D: Array) -> tuple[Array, Array]:
            gradient_RxD, hessian_DxD = pull(method, w_D, x_RxAxD, batch)
            return jnp.sum(gradient_RxD, axis=0) + l2 * w_D, hessian_DxD + l2 * jnp.eye(len(w_D))

        w_D = minimise(derivatives, w_D)
        return w_D, w_D

    return jax.lax.scan(next_fit, jnp.zeros(x_RxAxD.shape[2]), jnp.array(l2_Z))[1]


@functools.partial(jax.jit, static_argnames="method")
def fit_all(
    method: Method,
    x_KxRxAxD: Array,
    labels_SxKxRxA: Array,
    real_RxA: Array,
    rows_C: Array,
) -> Array:
    """Weights [C, S, K, Z, D]: the first `rows_C` rows, each annotator, each seed, each L2."""

    def of_seeds(labels_KxRxA: Array, real_RxA: Array) -> Array:
        return jax.vmap(lambda x, labels: fit(method, x, labels, real_RxA))(x_KxRxAxD, labels_KxRxA)

    def of_rows(rows: Array) -> Array:
        here_RxA = real_RxA * (jnp.arange(real_RxA.shape[0]) < rows)[:, None]
        return jax.lax.map(lambda labels: of_seeds(labels, here_RxA), labels_SxKxRxA)

    return jax.lax.map(of_rows, rows_C)


def count_right(
    w: np.ndarray, ahead_KxNxD: np.ndarray, first_KxN: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs in whose true order the reward agrees: of the TUNING_PAIRS, and of the others.

    Args:
      w: weights [C, S, K, Z, D].
      ahead_KxNxD: features of the first minus those of the second answer.
      first_KxN: whether the first is truly better.

    Returns:
      int [C, S, K, Z] twice.
    """
    tuning, test = np.empty(w.shape[:-1], int), np.empty(w.shape[:-1], int)
    for k, (ahead_NxD, first_N) in enumerate(zip(ahead_KxNxD, first_KxN, strict=True)):
        right_CxSxZxN = (w[:, :, k] @ ahead_NxD.T > 0) == first_N
        tuning[:, :, k] = right_CxSxZxN[..., :TUNING_PAIRS].sum(axis=-1)
        test[:, :, k] = right_CxSxZxN[..., TUNING_PAIRS:].sum(axis=-1)
    return tuning, test


class Stability(NamedTuple):
    """How a loss pulls at a reward; none of it depends on the loss's scale."""

    spread: Array  # of the prompts' gradient norms, standard deviation over mean
    outlier: Array  # mean gradient norm of careless annotations over that of the others
    condition: Array  # of the loss's Hessian, largest over smallest eigenvalue


def stability(method: Method, w_D: Array, rankings: Rankings, real_RxA: Array) -> Stability:
    """Of the reward w x, scalars; `outlier` is NaN where no annotation, or each, was careless."""
    x_RxAxD, labels_RxA, careless_R = rankings
    gradient_RxD, hessian_DxD = pull(method, w_D, x_RxAxD, batch_of(labels_RxA, real_RxA))
    norm_R = jnp.linalg.norm(gradient_RxD, axis=1)
    mean_of = lambda chosen_R: jnp.sum(norm_R * chosen_R) / jnp.sum(chosen_R)  # noqa: E731
    eigenvalues_D = jnp.linalg.eigvalsh(hessian_DxD)
    return Stability(
        jnp.std(norm_R) / jnp.mean(norm_R),
        mean_of(careless_R) / mean_of(~careless_R),
        eigenvalues_D[-1] / eigenvalues_D[0],
    )


@functools.partial(jax.jit, static_argnames="method")
def stabilities(method: Method, w_SxKxD: Array, rankings: Rankings, real_RxA: Array) -> Stability:
    """[S, K] each, of rankings whose x are [K, R, A, D] and labels [S, K, R, A]."""
    x_KxRxAxD, labels_SxKxRxA, careless_SxKxR = rankings

    def of_seed(w_D: Array, *one: Array) -> Stability:
        return stability(method, w_D, Rankings(*one), real_RxA)

    return jax.lax.map(
        lambda several: jax.vmap(of_seed)(several[0], x_KxRxAxD, *several[1:]),
        (w_SxKxD, labels_SxKxRxA, careless_SxKxR),
    )


# ------------------------------------------------------------------------------- the whole experiment


class Lab:
    """What the methods of all designs share: the worlds of the seeds, and held-out pairs."""

    def __init__(self, e: Experiment):
        self.e = e
        self.worlds, pairs = [], []
        for seed in self.seeds:
            rng = np.random.default_rng([*seed, WORLD])
            self.worlds.append(World.draw(rng, e.features, e.nonlinear))
            pairs.append(rng.normal(size=(TUNING_PAIRS + e.test_pairs, 2, e.features)))
        r_KxNx2 = np.stack([w.reward(x) for w, x in zip(self.worlds, pairs, strict=True)])
        self.first_KxN = r_KxNx2[:, :, 0] > r_KxNx2[:, :, 1]
        self.ahead_KxNxD = np.stack([x[:, 0] - x[:, 1] for x in pairs]).astype(np.float32)

    @property
    def seeds(self) -> list[tuple[int, int]]:
        """Of the generators."""
        return [(self.e.seed, k) for k in range(self.e.seeds)]

    def annotated(
        self, real_RxA: np.ndarray, annotators: Sequence[Annotator], *, judged: bool
    ) -> Rankings:
        """x [K, R, A, D], labels [S, K, R, A], careless [S, K, R]."""
        rows = [
            [
                annotated(seed, world, real_RxA, annotator, judged=judged)
                for seed, world in zip(self.seeds, self.worlds, strict=True)
            ]
            for annotator in annotators
        ]
        return Rankings(
            np.stack([one.x_RxAxD for one in rows[0]]),
            np.stack([[one.labels_RxA for one in row] for row in rows]),
            np.stack([[one.careless_R for one in row] for row in rows]),
        )

    def prompts(self, answers: Sequence[int], *, judged: bool) -> list[int]:
        """Numbers of prompts that are annotated: what the budgets buy. Of pairs also as many as there
        are rankings for the usual budget, and as many as have as many answers to be read."""
        e = self.e
        rows = [prompts_for(c, answers, judged=judged) for c in e.comparisons]
        if tuple(answers) == (2,):
            for n in e.answers:
                rankings = prompts_for(e.usual_budget, (n,))
                rows += [rankings, rankings * n // 2]
        return sorted(set(rows))

    def run(self, answers: tuple[int, ...], name: str) -> list[dict[str, Any]]:
        """Of one design and method: one of `runs` of results.json for each annotator."""
        method = METHODS[name]
        annotators = self.e.annotators((2,) if method.judged else answers)
        prompts = self.prompts(answers, judged=method.judged)
        real_RxA = real_answers(answers, prompts[-1])
        rankings = self.annotated(real_RxA, annotators, judged=method.judged)
        rows_C = np.array(prompts)
        if method.judged:
            real_RxA = np.ones((rankings.labels_RxA.shape[2], 2), np.float32)
            rows_C = rows_C * pairs_of(answers[0])
        fitted = np.asarray(
            fit_all(method, rankings.x_RxAxD, rankings.labels_RxA, real_RxA, rows_C)
        )
        right = count_right(fitted, self.ahead_KxNxD, self.first_KxN)
        # One strength of L2 for all seeds of a method, annotator and budget.
        best_CxS = right[0].mean(axis=2).argmax(axis=2)
        stable = {}
        if len(answers) == 1 and not method.judged and answers != (2,):
            # What both losses would find, were all rankings Plackett-Luce's.
            w_SxKxD = np.stack(
                [
                    [world.linear_D * GUMBEL_STD / annotator.noise for world in self.worlds]
                    for annotator in annotators
                ]
            ).astype(np.float32)
            stable = stabilities(method, w_SxKxD, rankings, real_RxA)._asdict()
        each = cost(answers, judged=method.judged)._asdict()
        return [
            {
                "answers": list(answers),
                "method": name,
                "annotator": dataclasses.asdict(annotator),
                "prompts": prompts,
                **{unit: [round(c * value, 1) for c in prompts] for unit, value in each.items()},
                "l2": [L2[z] for z in best_CxS[:, s]],
                "right": [right[1][c, s, :, z].tolist() for c, z in enumerate(best_CxS[:, s])],
                # Those who tire have another scale.
                **({} if annotator.fatigue else {k: _rounded(v[s]) for k, v in stable.items()}),
            }
            for s, annotator in enumerate(annotators)
        ]


def _rounded(values: Array) -> list[float] | None:
    """For JSON, which has no NaN: of no seed."""
    values = np.asarray(values, float)
    return values.round(2).tolist() if np.isfinite(values).all() else None


def run(e: Experiment, log: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Every design, method and annotator; what results.json holds.

    Returns:
      `settings`; `seconds`; `runs`, whose lists are by number of prompts, except that `right`, test
      pairs that were told rightly, is [C][K], and what `Stability` names by seed.

    Raises:
      ValueError: as `check`.
    """
    check(e)
    start = time.time()
    lab, runs = Lab(e), []
    for answers in e.designs():
        for name in methods_for(answers):
            runs += lab.run(answers, name)
            log(f"{_listed(answers)} answers, {name}: done after {time.time() - start:.0f} s")
    seconds = round(time.time() - start, 1)
    return {"settings": dataclasses.asdict(e), "runs": runs, "seconds": seconds}


def methods_for(answers: Sequence[int]) -> list[str]:
    """What can be told apart: of two answers all methods are one."""
    if tuple(answers) == (2,):
        return ["implied"]
    return ["listwise", "implied", "judged" if len(answers) == 1 else "implied_per_prompt"]
