"""The notebook face."""

import numpy as np
import pytest
from runs import run_config

import llm_jax
from llm_jax.train import loop


@pytest.fixture(scope="module")
def model(corpus_text, tmp_path_factory):
    import jax

    workdir = tmp_path_factory.mktemp("api")
    loop.train(run_config(corpus_text, steps=4), workdir, devices=jax.devices()[:1])
    return llm_jax.load(workdir)


@pytest.fixture(scope="module")
def corpus_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("a rose is a rose is a rose. " * 200)
    return path


def test_logits_and_log_probs_agree(model):
    ids = model.tokenizer.encode("rose")
    z = np.asarray(model.logits([ids]))
    assert z.shape == (1, 4, model.config.model.vocab_size) and z.dtype == np.float32
    log_p = z[0] - np.log(np.exp(z[0]).sum(-1, keepdims=True))
    scored = model.log_probs(["rose"])[0]
    assert scored.shape == (4,)
    from llm_jax.decode.generate import start_ids

    z = np.asarray(model.logits([start_ids(model.tokenizer) + ids]))[0]
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    np.testing.assert_allclose(scored, log_p[np.arange(4), ids], atol=1e-5)


def test_generate_is_text_and_repeats(model):
    a = model.generate(["a rose", "is"], max_new_tokens=5, temperature=1.0, seed=4)
    assert a == model.generate(["a rose", "is"], max_new_tokens=5, temperature=1.0, seed=4)
    assert len(a) == 2 and all(isinstance(t, str) for t in a)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.logits([1, 2]), r"\[B, L\]"),
        (lambda m: m.logits([[1.5]]), "integers"),
        (lambda m: m.logits([[0, 99999]]), "token id 99999 is outside"),
        (lambda m: m.generate("text"), "list of texts"),
        (lambda m: m.log_probs("text"), "list of texts"),
    ],
)
def test_errors(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
