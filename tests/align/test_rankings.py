"""The rankings experiment: annotators, costs, fits of both losses, and a report that follows numbers."""

import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import run_binary
from scipy import stats

from llm_jax.align.rankings import data as annotators
from llm_jax.align.rankings import experiment, findings, report
from llm_jax.align.rankings.data import GUMBEL_STD, Annotator, World
from llm_jax.align.rankings.experiment import METHODS, Experiment
from llm_jax.objectives import preference
from llm_jax.types import Scores

LISTWISE, IMPLIED = METHODS["listwise"], METHODS["implied"]
PER_PROMPT = METHODS["implied_per_prompt"]


def made(annotator=Annotator(), answers=(4,), prompts=50, features=5, judged=False, seed=0):  # noqa: B008
    """(world, rankings, which answers are real) of one seed."""
    world = World.draw(np.random.default_rng([seed, 0, annotators.WORLD]), features)
    real_RxA = annotators.real_answers(answers, prompts)
    data = annotators.annotated((seed, 0), world, real_RxA, annotator, judged=judged)
    return world, data, jnp.ones_like(data.labels_RxA) if judged else jnp.asarray(real_RxA)


# -------------------------------------------------------------------------------------------- costs


def test_what_annotations_cost():
    assert [annotators.comparisons_of(n) for n in range(2, 9)] == [1, 3, 5, 7, 10, 13, 16]
    assert annotators.bits_of(4) == pytest.approx(4.585, abs=1e-3)
    assert annotators.cost((4,)) == (1, 5, 4)
    assert annotators.cost((4,), judged=True) == (6, 6, 12)
    assert annotators.cost((2,)) == annotators.cost((2,), judged=True)  # a pair is a ranking
    assert annotators.cost((2, 4, 8)).comparisons == pytest.approx((1 + 5 + 16) / 3)


def test_what_a_budget_buys():
    buy = annotators.prompts_for
    assert buy(480, (4,)) == 96 and buy(480, (2,)) == 480 and buy(480, (8,)) == 30
    assert buy(479, (4,)) == 95  # what is left over buys nothing
    assert buy(480, (4,), judged=True) == 80  # not 96: six pairs, not five comparisons
    assert buy(480, (4,), unit="answers_read") == 120 and buy(480, (4,), unit="annotations") == 480
    assert buy(22, (2, 4, 8)) == 3  # one of each


# --------------------------------------------------------------------------------------- annotators


def frequencies(annotator, r=(0.0, 0.4, 1.0), draws=30_000):
    """{order from the best: how often} of three answers."""
    rng = np.random.default_rng(3)
    r_RxA = np.tile(np.array(r), (draws, 1))
    labels, _ = annotators.annotate(rng, r_RxA, np.ones_like(r_RxA), annotator)
    orders = np.argsort(-labels, axis=1)
    return {p: int((orders == p).all(axis=1).sum()) for p in itertools.permutations(range(3))}


def plackett_luce(r, scale):
    """{order from the best: probability}, by choosing the best of what is left."""
    v = np.exp(np.array(r) / scale)
    return {
        p: math.prod(v[p[i]] / v[list(p[i:])].sum() for i in range(3))
        for p in itertools.permutations(range(3))
    }


def chi_square(annotator):
    """p-value of Plackett-Luce on the scale of the annotator's Gumbel noise."""
    r = (0.0, 0.4, 1.0)
    found = frequencies(annotator, r)
    expected = plackett_luce(r, annotator.noise / GUMBEL_STD)
    n = sum(found.values())
    return stats.chisquare([found[p] for p in expected], [n * q for q in expected.values()]).pvalue


def test_gumbel_rankings_are_plackett_luces():
    assert chi_square(Annotator("gumbel", 0.8)) > 0.001
    assert chi_square(Annotator("gaussian", 0.8)) < 1e-6  # the test can tell


def test_gaussian_pairs_are_thurstones():
    r_RxA = np.tile([1.0, 0.0], (20_000, 1))
    labels, _ = annotators.annotate(
        np.random.default_rng(0), r_RxA, np.ones_like(r_RxA), Annotator("gaussian", 0.7)
    )
    # Noise on both answers: sqrt(2) * 0.7; of one alone it would be 0.923.
    assert labels[:, 0].mean() == pytest.approx(stats.norm.cdf(1 / (0.7 * 2**0.5)), abs=0.01)


def test_careless_annotations_are_random_orders():
    always = frequencies(Annotator(noise=0.01, careless=1.0), draws=12_000)
    assert stats.chisquare(list(always.values())).pvalue > 0.001
    some = frequencies(Annotator(noise=0.01, careless=0.3), draws=12_000)
    # One in six of a random order is right by chance.
    assert some[2, 1, 0] / 12_000 == pytest.approx(0.7 + 0.3 / 6, abs=0.015)


def test_fatigue_is_noise_that_grows_with_answers():
    tired, calm = Annotator(noise=0.5, fatigue=1.0), Annotator(noise=0.5)
    labels = lambda annotator, n: made(annotator, (n,))[1].labels_RxA  # noqa: E731
    np.testing.assert_array_equal(labels(tired, 2), labels(calm, 2))
    np.testing.assert_array_equal(labels(tired, 8), labels(Annotator(noise=2.0), 8))
    assert (labels(tired, 8) != labels(calm, 8)).any()


def test_judged_pairs_are_of_the_same_answers_and_independent():
    _, ranked, _ = made(Annotator(noise=30.0), prompts=3000)
    _, judged, real = made(Annotator(noise=30.0), prompts=3000, judged=True)
    assert judged.labels_RxA.shape == real.shape == (18_000, 2)
    np.testing.assert_array_equal(judged.x_RxAxD[7], ranked.x_RxAxD[1, [0, 2]])
    # Under mere noise three pairs are in a circle one time in four; those of a ranking never are.
    first = judged.labels_RxA[:, 0].reshape(3000, 6)[:, [0, 1, 3]] > 0  # of (0, 1), (0, 2), (1, 2)
    circle = (first[:, 0] == first[:, 2]) & (first[:, 0] != first[:, 1])
    assert circle.mean() == pytest.approx(0.25, abs=0.03)


def test_worlds_answers_and_noise_are_different_streams():
    # NumPy drops zeros at the end of a seed: streams 0 would all be one.
    world, data, _ = made()
    w = np.random.default_rng([0, 0, annotators.WORLD]).normal(size=3)
    assert not np.allclose(w, data.x_RxAxD[0, 0, :3], atol=0.1)
    x = np.random.default_rng(1).normal(size=(20_000, 5))
    assert np.std(world.reward(x)) == pytest.approx(1, abs=0.03)
    r = world._replace(nonlinear=0.4).reward(x)
    fitted = x @ np.linalg.lstsq(x, r)[0]
    assert np.var(r) == pytest.approx(1, abs=0.05) and np.var(fitted) == pytest.approx(
        0.6, abs=0.05
    )


# ------------------------------------------------------------------------------------------- learner


@pytest.mark.parametrize("name", ["listwise", "implied"])
def test_much_quiet_data_gives_the_true_reward(name):
    world, data, real = made(Annotator(noise=0.05), prompts=300)
    w_ZxD = experiment.fit(METHODS[name], data.x_RxAxD, data.labels_RxA, real)
    ahead_NxD = np.random.default_rng(5).normal(size=(4000, 5))
    truth_N = ahead_NxD @ world.linear_D > 0
    # Labels that count places from the best would give 0.01.
    assert np.mean((ahead_NxD @ np.asarray(w_ZxD[-1]) > 0) == truth_N) > 0.985


@functools.partial(jax.jit, static_argnames=("method", "order"))
def derivatives(method, w_D, x_RxAxD, labels_RxA, real_RxA, order=0):
    """[value, gradient, Hessian][: order + 1] of the objective."""
    batch = experiment.batch_of(labels_RxA, real_RxA)

    def loss(w_D):
        options = {"loss": method.loss, "per_prompt": method.per_prompt}
        return preference.reward(Scores(values=x_RxAxD @ w_D), batch, **options).value()

    return [f(loss)(w_D) for f in (lambda f: f, jax.grad, jax.hessian)[: order + 1]]


W = jnp.array([0.5, -1.0, 0.3, 0.0, 2.0])


def test_of_two_answers_the_losses_are_one():
    _, data, real = made(answers=(2,))
    for a, b in zip(*(derivatives(m, W, *data[:2], real, 1) for m in (LISTWISE, IMPLIED))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    _, data, real = made(answers=(3,))
    a, b = (derivatives(m, W, *data[:2], real)[0] for m in (LISTWISE, IMPLIED))
    assert abs(a - b) > 0.1


def test_prompts_of_one_size_weigh_alike_either_way():
    for answers, same in (((4,), True), ((2, 4, 8), False)):
        _, data, real = made(answers=answers)
        a, b = (derivatives(m, W, *data[:2], real)[0] for m in (IMPLIED, PER_PROMPT))
        assert (abs(a - b) < 1e-5) == same


@pytest.mark.parametrize(
    "method", [LISTWISE, IMPLIED, PER_PROMPT], ids=["list", "pairs", "prompts"]
)
def test_derivatives_are_those_of_the_objective(method):
    _, data, real = made(answers=(2, 4, 3), prompts=30)
    pull = lambda x, labels: experiment.pull(method, W, x, experiment.batch_of(labels, real))  # noqa: E731
    found = jax.jit(pull)(*data[:2])
    _, gradient, hessian = derivatives(method, W, *data[:2], real, 2)
    np.testing.assert_allclose(found.gradient_RxD.sum(axis=0), gradient, atol=1e-5)
    np.testing.assert_allclose(found.hessian_DxD, hessian, atol=1e-5)


def test_fits_are_optima_and_rows_beyond_a_budget_do_not_count():
    _, data, real = made(Annotator(noise=0.3), prompts=40)
    labels_SxKxRxA = jnp.asarray(data.labels_RxA)[None, None]
    found = experiment.fit_all(
        LISTWISE, data.x_RxAxD[None], labels_SxKxRxA, real, jnp.array([12, 40])
    )
    assert found.shape == (2, 1, 1, len(experiment.L2), 5)
    for w_ZxD, rows in ((found[0, 0, 0], 12), (found[1, 0, 0], 40)):
        for w_D, l2 in zip(w_ZxD, experiment.L2, strict=True):
            part = (v[:rows] for v in (*data[:2], real))
            gradient = derivatives(LISTWISE, w_D, *part, 1)[1]
            assert np.linalg.norm(gradient + np.array(l2 * w_D)) < 1e-4


def test_pairs_are_counted_right_and_apart_from_those_of_tuning():
    ahead = np.ones((1, experiment.TUNING_PAIRS + 10, 1), np.float32)
    first = np.ones((1, experiment.TUNING_PAIRS + 10), bool)
    first[0, -3:] = False
    w = np.array([2.0, -1.0]).reshape(1, 1, 1, 2, 1)  # the second is wrong about every pair
    tuning, test = experiment.count_right(w, ahead, first)
    assert tuning.ravel().tolist() == [experiment.TUNING_PAIRS, 0]
    assert test.ravel().tolist() == [7, 3]


def test_careless_rankings_pull_harder():
    world, data, real = made(Annotator(noise=0.3, careless=0.3), prompts=60)
    w_1x1xD = jnp.asarray(world.linear_D * GUMBEL_STD / 0.3, jnp.float32)[None, None]

    def stability(careless_R):
        one = annotators.Rankings(data.x_RxAxD[None], data.labels_RxA[None, None], careless_R)
        return experiment.stabilities(IMPLIED, w_1x1xD, one, real)

    found = stability(data.careless_R[None, None])
    assert found.outlier > 1.5 and found.condition > 1 and found.spread > 0.1
    assert np.isnan(stability(np.zeros((1, 1, 60), bool)).outlier)  # nobody was careless


# -------------------------------------------------------------------------------------- the whole of it

TINY = Experiment(
    answers=(3,), comparisons=(12, 24), noise=(0.5,), careless=(0.4,), fatigue=(1.0,),
    features=3, test_pairs=200, seeds=2,
)  # fmt: skip


def test_a_run_and_its_report(tmp_path):
    result = experiment.run(TINY)
    runs = {
        (tuple(r["answers"]), r["method"], findings.in_words(r["annotator"])): r
        for r in result["runs"]
    }
    assert len(runs) == len(result["runs"]) == 3 + 4 + 4 + 3 + 3 * 4
    pairs = runs[(2,), "implied", "gumbel noise 0.5"]
    # 24 comparisons, the usual budget, are 8 rankings of 3, with 24 answers: 12 pairs.
    assert pairs["prompts"] == pairs["comparisons"] == [8, 12, 24]
    assert runs[(3,), "judged", "gaussian noise 0.5"]["annotations"] == [12, 24]
    assert runs[(2, 3), "listwise", "gumbel noise 0.5"]["prompts"] == [6, 12]
    one = runs[(3,), "listwise", "gumbel noise 0.5, 40% careless"]
    assert np.shape(one["right"]) == (2, 2) and len(one["spread"]) == 2
    assert "spread" not in runs[(3,), "listwise", "gumbel noise 0.5, fatigue 1"]
    report.write(tmp_path, result)
    text = (tmp_path / "report.md").read_text()
    assert "| 8 | 40,320 | 28 | 15.30 | 16 |" in text and "Holds here" in text
    assert (tmp_path / "plots/accuracy.png").stat().st_size > 5_000
    stored = json.loads((tmp_path / "results.json").read_text())
    assert findings.lines(stored) == findings.lines(result)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answers": (2, 4)}, "--answers=2,4"),
        ({"answers": (4, 4)}, "--answers=4,4"),
        ({"comparisons": (20,)}, "--comparisons=20: .* 28"),
        ({"noise": ()}, "--noise="),
        ({"careless": (1.5,)}, "--careless=1.5"),
        ({"fatigue": (0.0,)}, "--fatigue=0.0"),
        ({"nonlinear": 1.0}, "--nonlinear"),
        ({"seeds": 1}, "--seeds=1"),
    ],
)
def test_what_cannot_be_run_names_the_flag(changes, words):
    with pytest.raises(ValueError, match=words):
        experiment.check(Experiment(**changes))


def test_words_are_no_numbers(tmp_path):
    done = run_binary("rankings", f"--workdir={tmp_path}", "--noise=0.5,much")
    assert done.returncode == 1 and done.stderr == "error: --noise=0.5,much: expected numbers\n"


# --------------------------------------------------------------------------------------------- report


def invented(pairs=0.9, listwise=0.9, implied=0.9, judged=0.9, tired=0.0, outlier=(2.0, 2.0)):
    """Results of made-up accuracies; rankings of those who tire are less accurate by `tired`."""
    e = Experiment(noise=(0.5, 1.0), careless=(0.2,), fatigue=(1.0,), seeds=5)
    by_method = {"listwise": listwise, "implied": implied, "judged": judged}
    by_method["implied_per_prompt"] = implied
    lab, runs = experiment.Lab(e), []
    for answers in e.designs():
        for name in experiment.methods_for(answers):
            is_judged = METHODS[name].judged
            prompts = lab.prompts(answers, judged=is_judged)
            for annotator in e.annotators((2,) if is_judged else answers):
                mean = pairs if answers == (2,) else by_method[name] - tired * annotator.fatigue
                jitter = 0.001 * np.sin(np.arange(5) + 7 * len(runs))  # seeds are never alike
                right = np.round((mean + jitter) * e.test_pairs).tolist()
                pull = outlier[name == "implied"]
                runs.append(
                    {
                        "answers": answers, "method": name, "annotator": vars(annotator),
                        "prompts": prompts, "right": [right] * len(prompts),
                        "spread": [1.0, 1.1, 1.2, 1.3, 1.4], "condition": [2.0] * 5,
                        "outlier": [pull + j for j in jitter] if annotator.careless else None,
                    }
                )  # fmt: skip
    return {"settings": vars(e), "runs": runs, "seconds": 1.0}


def claim(result, words):
    (line,) = [line for line in findings.lines(result) if words in line]
    return line.split("** ")[1]


def test_claims_follow_the_numbers():
    loss = "pairwise loss learns more"
    assert claim(invented(implied=0.95), loss).startswith("Holds here in all 12 cases")
    worse = claim(invented(implied=0.85), loss)
    assert worse.startswith("Does not hold here, in none of 12") and "ahead in 12" in worse
    assert "-5.0 (" in worse
    orders = "n! orders"
    assert claim(invented(pairs=0.95), orders).startswith("Holds here in all 2 cases of gumbel")
    assert claim(invented(pairs=0.85), orders).startswith("Does not hold here")
    assert claim(invented(judged=0.93), "Errors within").startswith("Holds here in all 10 cases")
    assert claim(invented(), "Noise alone").startswith("Does not hold here, in none of 6")


def test_stability_follows_the_numbers():
    stable = "less stable"
    words = "pull harder against the others under the listwise loss in {}, under the pairwise in {} of 2"
    assert words.format(2, 0) in claim(invented(outlier=(3.0, 2.0)), stable)
    assert words.format(0, 2) in claim(invented(outlier=(2.0, 3.0)), stable)


def test_where_the_balance_tips():
    f = findings.Findings(invented(pairs=0.88, listwise=0.91, tired=0.12))
    # Three points behind at 0, nine ahead at 1.
    assert findings.tipping(f, 4, "comparisons") == "from about 0.25 on"
    f = findings.Findings(invented(pairs=0.88, listwise=0.92, tired=0.01))
    assert findings.tipping(f, 4, "comparisons") == "at no fatigue up to 1"
    f = findings.Findings(invented(pairs=0.93, listwise=0.92))
    assert findings.tipping(f, 4, "answers_read") == "even without fatigue"


def test_intervals():
    found = findings.estimate([1.0, 2.0, 3.0])
    # Student's with 2 degrees of freedom; 1.96 standard errors would be 1.13.
    assert found.high - found.mean == pytest.approx(4.3027 / math.sqrt(3), rel=1e-3)
    assert found.sign == 0 and findings.estimate([1.0, 1.1, 1.2]).sign == 1
    minus = findings.estimate([-1.0, -1.1, -1.2])
    assert minus.sign == -1 and minus.negated().low == pytest.approx(-minus.high)
    rng = np.random.default_rng(0)
    a, b = 3 * rng.normal(size=200), rng.normal(size=200)
    ratio = findings.ratio_of_spreads(a, b)
    assert ratio.low < 3 < ratio.high and ratio.low > 1
