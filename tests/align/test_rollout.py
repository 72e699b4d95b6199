"""Answers have keys of their own, and the divergence of samples is the one that can be counted."""

import itertools
import json
import math

import jax
import numpy as np
import pytest
from tiny import tiny_train

from llm_jax import config as configs
from llm_jax.align import prompts as prompt_files
from llm_jax.align import rollout
from llm_jax.api import Model
from llm_jax.models import family
from llm_jax.nn import params
from llm_jax.tokenizers import simple

PROMPTS = [
    [{"role": "user", "content": text}]
    for text in ("why", "a much longer question than the others are", "so", "and then?")
]


def make_model(mesh, seed):
    cfg = configs.thaw(tiny_train(**{"model.vocab_size": 259, "model.n_layers": 1}))
    cfg.tokenizer.stop = ("\n",)
    cfg = configs.freeze(cfg)
    tokenizer = simple.train_bytes()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    values = params.init(family(cfg.model.family).specs(cfg.model), jax.random.key(seed))
    return Model(cfg, values, tokenizer, mesh)


@pytest.fixture(scope="module")
def model(one_device):
    return make_model(one_device, 0)


@pytest.fixture(scope="module")
def drawn(model):
    return rollout.sample(model, PROMPTS, n=3, max_new_tokens=6, seed=5, batch_size=4)


def tokens(answers):
    return [[a.tokens for a in group] for group in answers]


@pytest.mark.parametrize("batch_size", [5, 100])
def test_answers_do_not_depend_on_the_batch(model, drawn, batch_size):
    again = rollout.sample(model, PROMPTS, n=3, max_new_tokens=6, seed=5, batch_size=batch_size)
    assert tokens(again) == tokens(drawn)


def test_answers_do_not_depend_on_what_else_is_drawn(model, drawn):
    fewer = rollout.sample(model, PROMPTS[:2], n=2, max_new_tokens=6, seed=5)
    assert tokens(fewer) == [group[:2] for group in tokens(drawn)[:2]]
    other = rollout.sample(model, PROMPTS[:2], n=2, max_new_tokens=6, seed=6)
    assert tokens(other) != tokens(fewer)
    twice = rollout.sample(model, PROMPTS[:1] * 2, n=2, max_new_tokens=6, seed=5, batch_size=2)
    assert len({tuple(ids) for group in tokens(twice) for ids in group}) == 4


def test_answers_end_as_those_of_the_model(model):
    """At the model's stop string, which is no part of the text, or at its end token."""
    (answers,) = rollout.sample(model, PROMPTS[:1], n=80, max_new_tokens=30, seed=1, batch_size=80)
    stopped = [a for a in answers if a.finish_reason == "stop"]
    assert stopped and all(a.text == a.text.strip() for a in answers)
    end = {10, model.tokenizer.eos_id}
    assert all(a.tokens[-1] in end and not end & set(a.tokens[:-1]) for a in stopped)
    long = [a for a in answers if a.finish_reason == "length"]
    assert all(len(a.tokens) == 30 and not end & set(a.tokens) for a in long)
    ((greedy,),) = rollout.sample(model, PROMPTS[:1], n=1, max_new_tokens=6, temperature=0.0)
    assert greedy.text == model.chat(PROMPTS[0], max_new_tokens=6, temperature=0.0)


def test_log_probs_are_those_that_generation_gave(model, drawn):
    ids = rollout.prompt_ids(model, PROMPTS)
    assert model.tokenizer.decode(ids[0]) == "user: why\nassistant:"
    scored = rollout.log_probs(model, ids, tokens(drawn))
    for group, answers in zip(scored, drawn, strict=True):
        for row, answer in zip(group, answers, strict=True):
            assert len(row) == len(answer.tokens)
            np.testing.assert_allclose(row, answer.log_probs, atol=1e-4)
    own = rollout.kl([[a.log_probs for a in group] for group in drawn], scored)
    assert abs(own.k1) < 1e-3 and abs(own.k3) < 1e-6


def test_numbers_out_of_range(model):
    for wrong in ({"n": 0}, {"max_new_tokens": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="--" + next(iter(wrong))):
            rollout.sample(model, PROMPTS, **{"n": 1, "max_new_tokens": 4, **wrong})
    with pytest.raises(ValueError, match="2 prompts need as many row_keys, not 3"):
        model.complete([[1], [2]], row_keys=jax.random.split(jax.random.key(0), 3))


# ---------------------------------------------------------------------------------------- divergence


def policies(rng, V=3, L=3):
    """Two policies over answers of L tokens: {prefix: log-probabilities [V]}."""

    def one(scale):
        prefixes = (p for n in range(L) for p in itertools.product(range(V), repeat=n))
        z = {p: scale * rng.normal(size=V) for p in prefixes}
        return {p: v - np.log(np.exp(v).sum()) for p, v in z.items()}

    return one(1.0), one(1.0)


def path(policy, answer):
    return [policy[answer[:t]][token] for t, token in enumerate(answer)]


def test_both_estimates_are_of_the_exact_divergence():
    rng = np.random.default_rng(0)
    ours, theirs = policies(rng)
    answers = list(itertools.product(range(3), repeat=3))
    p = np.exp([sum(path(ours, a)) for a in answers])
    q = np.exp([sum(path(theirs, a)) for a in answers])
    exact, backwards = np.sum(p * np.log(p / q)), np.sum(q * np.log(q / p))
    drawn = rng.choice(len(answers), (500, 8), p=p / p.sum())
    found = rollout.kl(
        *(
            [[path(policy, answers[i]) for i in group] for group in drawn]
            for policy in (ours, theirs)
        )
    )
    for value, error in ((found.k1, found.k1_error), (found.k3, found.k3_error)):
        assert abs(value - exact) < 4 * error < 0.2 * exact
        assert abs(value - backwards) > 4 * error  # of the other direction, or of a token
        assert abs(value - exact / 3) > 4 * error
    # Errors are over prompts: those of eight answers that are copies of one are those of one.
    copied = [[[path(policy, answers[g[0]])] * 8 for g in drawn] for policy in (ours, theirs)]
    single = [[[path(policy, answers[g[0]])] for g in drawn] for policy in (ours, theirs)]
    assert rollout.kl(*copied).k1_error == pytest.approx(rollout.kl(*single).k1_error)


def test_another_temperature_estimates_something_else():
    """Colder samples: neither the divergence of the policy nor that of the cold one."""
    rng = np.random.default_rng(2)
    z = rng.normal(size=20)
    log_p, log_q = (v - np.log(np.exp(v).sum()) for v in (z, rng.normal(size=20)))
    cold = np.exp(2 * log_p) / np.exp(2 * log_p).sum()
    exact = np.sum(np.exp(log_p) * (log_p - log_q))
    of_cold = np.sum(cold * (np.log(cold) - log_q))
    drawn = rng.choice(20, 20_000, p=cold)
    found = rollout.kl([[[log_p[i]]] for i in drawn], [[[log_q[i]]] for i in drawn])
    for value in (exact, of_cold):
        assert abs(found.k1 - value) > 10 * found.k1_error


def test_small_cases():
    found = rollout.kl([[[math.log(0.5)]]], [[[math.log(0.25)]]])
    assert found.k1 == pytest.approx(math.log(2))
    assert found.k3 == pytest.approx(0.5 - 1 + math.log(2)) and math.isnan(found.k1_error)
    uneven = rollout.kl([[[0.0], [0.0]], [[0.0]]], [[[-1.0], [-3.0]], [[-6.0]]])
    assert uneven.k1 == pytest.approx(4.0)  # each prompt counts the same; over answers it is 10 / 3
    with pytest.raises(ValueError, match="2 and 1 log-probabilities"):
        rollout.kl([[[0.0, 0.0]]], [[[0.0]]])
    with pytest.raises(ValueError, match="one answer at least"):
        rollout.kl([[]], [[]])
    with pytest.raises(ValueError, match="one prompt at least"):
        rollout.kl([], [])


# ------------------------------------------------------------------------------------------- prompts


def test_prompts_of_any_rows(tmp_path):
    user, said = {"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}
    then = {"role": "user", "content": "and two"}
    system = {"role": "system", "content": "be brief"}
    rows = [
        {"prompt": "one"},
        {"prompt": [system, user]},
        {"messages": [user, said, then, {"role": "assistant", "content": "2"}]},
        {"messages": [system, user, said, then]},
        {"instruction": "three", "input": "", "output": "3"},
        {"prompt": "four", "chosen": "4", "rejected": "5"},
        {"prompt": "four", "completion": "4"},  # that prompt again
        {"prompt": "five", "completion": "5", "label": True},
        {"text": "no prompt"},
        {"prompt": 6},
        {"prompt": " "},
        {"prompt": "with tools", "completion": "x", "tools": [{"name": "f"}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, rejected = prompt_files.read([str(path)])
    assert [[m["content"] for m in prompt] for prompt in found] == [
        ["one"],
        ["be brief", "one"],
        ["one", "1", "and two"],
        ["be brief", "one", "1", "and two"],
        ["three"],
        ["four"],
        ["five"],
    ]
    assert [r.line for r in rejected] == [9, 10, 11, 12]
    assert prompt_files.read([str(path)], limit=2)[0] == found[:2]
    path.write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"no prompt in .*unknown layout"):
        prompt_files.read([str(path)])
