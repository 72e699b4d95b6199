"""The order test is exact for a model that never saw an order, and finds one that was learnt."""

import functools
import json

import jax
import numpy as np
import pytest
from runs import run_binary
from scipy import stats
from tiny import tiny_model, tiny_train

from llm_jax import sharding
from llm_jax.eval import contamination as C
from llm_jax.eval.scoring import score_rows
from llm_jax.models import decoder
from llm_jax.nn import params as P
from llm_jax.tokenizers.simple import Characters
from llm_jax.train.checkpoint import save_params
from llm_jax.train.program import build, put
from llm_jax.types import Batch

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwx\n"
START = len(LETTERS)


def encode(text):
    return [LETTERS.index(char) for char in text]


def make_items(seed, number=16, size=3):
    """Different items of random letters."""
    rng = np.random.default_rng(seed)
    draw = lambda: "".join(rng.choice(list(LETTERS[:-1]), size))  # noqa: E731
    return list(dict.fromkeys(draw() for _ in range(2 * number)))[:number]


def order_test(items, log_probs, **options):
    return C.order_test(items, encode, log_probs, **{"length": 16, "start": START, **options})


def train(texts, copies=8, steps=150):
    """A tiny model after some steps on rows from anywhere in the texts, 16 tokens each."""
    cfg = tiny_train(**{"optimizer.learning_rate": 1e-2, "steps": steps, "batch_size": 8})
    ids = np.array([i for text in texts for i in [START, *encode(text)]], np.int32)
    rng = np.random.default_rng(0)
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = build(cfg, mesh)
        state = program.init(jax.random.key(0))
        for _ in range(steps):
            at = rng.integers(0, len(ids) - 17, 8)
            rows = np.stack([ids[a : a + 17] for a in at])
            batch = Batch(
                tokens=rows[:, :-1], targets=rows[:, 1:], weights=np.ones((8, 16), np.float32)
            )
            state, _ = program.step(state, put(batch, mesh, 1))
        return program.params(state), cfg


@pytest.fixture(scope="module")
def learnt():
    """(set, other set, (params, train config)): the model read ten copies of the set in one order and ten
    of the other set, each in an order of its own."""
    known, loose = make_items(1), make_items(2)
    rng = np.random.default_rng(3)
    texts = []
    for _ in range(10):
        texts.append("".join(item + "\n" for item in known))
        texts.append("".join(loose[n] + "\n" for n in rng.permutation(len(loose))))
    return known, loose, train(texts)


def scorer(model, batch_size=64):
    params, cfg = model
    return functools.partial(score_rows, params, cfg.model, batch_size=batch_size)


def test_a_learnt_order_is_found(learnt):
    known, loose, model = learnt
    found = order_test(known, scorer(model), permutations=149, shards=4)
    assert found.p_value == 1 / 150 and found.t_p_value < 0.01 and found.advantage > 20
    whole = order_test(known, scorer(model), permutations=149)
    assert whole.p_value == 1 / 150 and whole.t_p_value is None
    assert whole.tokens == found.tokens == 16 * 4
    # Only the order counts: of the same items in another order the model knows nothing, and neither
    # of items that it read as often in many orders.
    rng = np.random.default_rng(0)
    for items in ([known[n] for n in rng.permutation(16)], loose):
        assert order_test(items, scorer(model), permutations=149, shards=4).p_value > 0.05


def continuous(found, permutations):
    """p less a random part of its step 1 / (1 + m): uniform on [0, 1] where p is on its steps."""
    p_values = np.array([f.p_value for f in found])
    return p_values - np.random.default_rng(0).random(len(found)) / (1 + permutations)


def test_p_values_of_clean_sets_are_uniform():
    """A random model finds some orders much better than others, but the published one is any."""
    cfg = tiny_train(**{"model.init_std": 0.3})
    score = scorer((P.init(decoder.specs(cfg.model), jax.random.key(0)), cfg), batch_size=30)
    found = [
        order_test(make_items(seed, 8, 2), score, permutations=29, length=32) for seed in range(120)
    ]
    assert np.mean([f.shuffled.sum(axis=0).std() for f in found]) > 1  # nats
    p_values = continuous(found, 29)
    assert stats.kstest(p_values, "uniform").pvalue > 0.05
    assert np.mean(p_values <= 0.05) <= 0.1
    # A set that is sorted is not exchangeable: a model that likes the key takes it for learnt.
    by_key = [
        order_test(sorted(make_items(seed, 8, 2)), alphabetical, permutations=29).p_value
        for seed in range(120)
    ]
    assert stats.kstest(by_key, "uniform").pvalue < 1e-6


def alphabetical(rows):
    """A model that expects letters in the order of the alphabet."""
    return [-0.1 * (np.diff(row) < 0).astype(np.float32) for row in rows]


def test_both_p_values_of_clean_shards_are_uniform():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(53, 53, 53))

    def log_probs(rows):  # of each token given the two before it
        rows = [np.array(row) for row in rows]
        return [np.concatenate([[0.0], table[r[:-2], r[1:-1], r[2:]]]) for r in rows]

    found = [
        order_test(
            make_items(seed), log_probs, permutations=19, shards=4, length=64, seed=1000 + seed
        )
        for seed in range(200)
    ]
    for p_values in (continuous(found, 19), np.array([f.t_p_value for f in found])):
        assert stats.kstest(p_values, "uniform").pvalue > 0.05
        assert np.mean(p_values <= 0.05) < 0.09


def test_exact_p_value():
    assert C.permutation_p_value(2.0, np.array([1.0, 3.0, 0.0])) == 2 / 4
    assert C.permutation_p_value(9.0, np.arange(9)) == 1 / 10  # 0 / 9 cannot be known
    assert C.permutation_p_value(1.0, np.array([1.0, 1.0, 0.0])) == 3 / 4  # ties count against


def test_orders_of_few_items_tie():
    """Half of all orders of two items are the published one: no p can be small."""
    rng = np.random.default_rng(0)
    noisy = lambda rows: [  # noqa: E731
        -np.abs(np.diff(row)) + 1e-6 * rng.random(len(row) - 1) for row in rows
    ]
    assert 0.3 < order_test(["A", "Z"], noisy, permutations=99).p_value <= 1.0
    assert order_test(["A", "Z"], lambda rows: [np.zeros(len(r) - 1) for r in rows]).p_value == 1.0


def test_sharded_p_value():
    rng = np.random.default_rng(0)
    canonical, shuffled = rng.normal(size=12) + 1, rng.normal(size=(12, 30))
    gains = canonical - shuffled.mean(axis=1)
    t = gains.mean() / (gains.std(ddof=1) / np.sqrt(12))
    assert C.sharded_p_value(canonical, shuffled) == pytest.approx(stats.t.sf(t, 11))
    assert C.sharded_p_value(-canonical, -shuffled) > 0.5  # one-sided: less probable is no sign
    assert C.sharded_p_value(np.zeros(3), np.zeros((3, 5))) == 1.0


@pytest.mark.parametrize(("length", "stride"), [(5, 5), (5, 2), (7, 0), (400, 0)])
def test_each_token_is_scored_once(length, stride):
    seen = []

    def log_probs(rows):
        seen.extend(len(row) - 1 for row in rows)
        return [-np.array(row[1:], np.float64) for row in rows]  # whatever stands before it

    items = make_items(0, 10)
    found = order_test(items, log_probs, length=length, stride=stride, permutations=5, shards=2)
    assert found.canonical.sum() == -sum(encode("\n".join([*items, ""])))
    assert max(seen) <= length and found.tokens == 40
    assert found.p_value == 1.0  # without context all orders are equal


def test_batches_of_orders_do_not_matter(monkeypatch, learnt):
    known, _, model = learnt
    counted = []
    whole = order_test(known, scorer(model), permutations=9, shards=2, progress=counted.append)
    assert sum(counted) == 2 * 10
    monkeypatch.setattr(C, "_TOKENS", 50)
    few = order_test(known, scorer(model), permutations=9, shards=2)
    np.testing.assert_allclose(few.shuffled, whole.shuffled, rtol=1e-5)


def test_user_errors_of_the_order_test():
    for options, message in (
        ({"shards": 3}, "--shards=3 of 4 items"),
        ({"permutations": 0}, "--permutations=0"),
        ({"stride": 17}, "--stride=17"),
    ):
        with pytest.raises(ValueError, match=message):
            order_test(["A", "B", "C", "D"], alphabetical, **options)
    with pytest.raises(ValueError, match="the same text"):
        order_test(["A", "A"], alphabetical)


def test_min_k_is_the_mean_of_the_lowest():
    log_probs = -np.array([1.0, 5.0, 2.0, 9.0, 3.0, 4.0, 8.0, 7.0, 6.0, 10.0])
    assert C.min_k(log_probs) == -9.5  # -1.5 of the highest
    assert C.min_k(log_probs, 0.29) == -9.5 and C.min_k(log_probs, 1.0) == -5.5
    assert C.min_k(log_probs[:3]) == -5.0  # never none
    assert C.min_k_plus_plus([-3.0, -1.0], [-2.0, -2.0], [0.5, 1.0], 0.5) == -2.0
    for wrong in ((log_probs, 20), ([], 0.2)):
        with pytest.raises(ValueError, match=r"k=20|min-k needs"):
            C.min_k(*wrong)


def test_moments_are_those_of_the_models_distribution():
    cfg = tiny_model(vocab_size=53, init_std=0.3)  # the embedding has 56 rows
    params = P.init(decoder.specs(cfg), jax.random.key(1))
    rows = [encode("ABC\nDEFGH"), encode("Za")]
    logits = jax.jit(
        lambda tokens: decoder.logits(
            params, decoder.hidden(params, Batch(tokens=tokens), cfg).x, cfg
        )
    )
    for row, (log_p, mean, deviation) in zip(rows, C.moments(params, cfg, rows), strict=True):
        z = logits(np.array([row[:-1]], np.int32))
        log_p_LxV = np.asarray(jax.nn.log_softmax(z))[0, :, :53]
        p_LxV = np.exp(log_p_LxV.astype(np.float64))
        np.testing.assert_allclose(p_LxV.sum(1), 1, rtol=1e-5)
        np.testing.assert_allclose(log_p, log_p_LxV[range(len(row) - 1), row[1:]], atol=1e-5)
        mu = (p_LxV * log_p_LxV).sum(1)
        np.testing.assert_allclose(mean, mu, rtol=1e-4)
        sigma = np.sqrt((p_LxV * (log_p_LxV - mu[:, None]) ** 2).sum(1))
        np.testing.assert_allclose(deviation, sigma, rtol=1e-3)


def test_membership_separates_what_was_read(learnt):
    known, _, (params, cfg) = learnt
    moments = functools.partial(C.moments, params, cfg.model)
    measure = functools.partial(
        C.membership, encode=encode, moments=moments, length=16, start=START
    )
    texts, others = measure(known), measure(make_items(9))
    result, text = C.compare_membership(texts, others, k=0.2)
    assert all(found["auc"] > 0.75 for found in result["auc"].values()), text
    assert C.separation(others["min_k"], texts["min_k"])["p_value"] > 0.9


def test_membership_reads_each_token_of_a_long_text_once():
    def moments(rows):
        assert max(map(len, rows)) <= 17
        tokens = [np.array(row[1:], np.float64) for row in rows]
        return [(-t, 0 * t - 1, 0 * t + 2) for t in tokens]

    ids = encode("".join(make_items(4)))
    assert len(ids) == 48
    text = "".join(make_items(4))
    found = C.membership([text], encode, moments, length=16, start=START, k=1.0)
    assert found["mean_log_prob"] == found["min_k"] == [-np.mean(ids)]
    assert found["min_k_plus_plus"] == [pytest.approx((1 - np.mean(ids)) / 2)]
    with pytest.raises(ValueError, match="text 1 has no token"):
        C.membership([text, ""], encode, moments, length=16, start=START)


def test_items(tmp_path):
    (tmp_path / "lines.txt").write_text("one\n\n two, with spaces \nthree")
    assert C.read_items(str(tmp_path / "lines.txt")) == ["one", " two, with spaces ", "three"]
    rows = [{"q": "one\nline and another", "text": 0}, {"q": "two"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert C.read_items(str(tmp_path / "rows.jsonl"), "q") == ["one\nline and another", "two"]
    with pytest.raises(ValueError, match="--text_key"):
        C.read_items(str(tmp_path / "rows.jsonl"), "answer")


@pytest.fixture(scope="module")
def files(learnt, tmp_path_factory):
    """A folder with the model that learnt an order, that set, and texts it never read."""
    known, _, (params, cfg) = learnt
    folder = tmp_path_factory.mktemp("contamination")
    save_params(folder / "model", cfg, Characters(list(LETTERS), ["<s>", "<unused>"]), params)
    (folder / "set.txt").write_text("\n".join(known))
    (folder / "others.txt").write_text("\n".join(make_items(9)))
    return folder


def test_the_binary(files, learnt):
    given = [f"--checkpoint={files / 'model'}", f"--input={files / 'set.txt'}"]
    output = files / "new" / "out.json"
    done = run_binary("contamination", *given, "--permutations=149", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert "p = 0.0067 (permutation test; 0.0067 at least)" in done.stdout
    assert "The model knows the order" in done.stdout
    found = json.loads(output.read_text())
    here = order_test(learnt[0], scorer(learnt[2]), permutations=149, shards=4)
    assert found["p_value"] == here.p_value and found["tokens"] == here.tokens
    np.testing.assert_allclose(found["canonical"], here.canonical, rtol=1e-4)

    reference = f"--reference={files / 'others.txt'}"
    done = run_binary("contamination", "--test=min_k", *given, reference, f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text())["auc"]["min_k"]["auc"] > 0.75
    assert "min-20%++" in done.stdout


def test_the_binary_needs_no_model_for_overlap(files, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("before " + (files / "set.txt").read_text() + " after")
    flags = ["--test=overlap", f"--input={files / 'others.txt'}", "--ngram=1"]
    done = run_binary("contamination", *flags)
    assert done.returncode == 1 and "--corpus" in done.stderr and done.stderr.count("\n") == 1
    flags[1] = f"--input={files / 'set.txt'}"
    output = tmp_path / "out.json"
    done = run_binary("contamination", *flags, f"--corpus={corpus}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["contaminated"] == found["items"] == 16 and found["corpus_words"] == 18
