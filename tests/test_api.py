"""The notebook face."""

import numpy as np
import pytest
from runs import run_config

import llm_jax
from llm_jax import config as configs
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


def test_answers_end_where_the_model_was_taught_to(model):
    own = model.config
    try:
        model.tokenizer.chat_template = "{{ messages[0].content }}"
        asked = [[{"role": "user", "content": text}] for text in ("a rose", "is")]
        greedy = {"temperature": 0.0, "max_new_tokens": 12}
        long = [out.text for out in model.answers(asked, **greedy)]
        assert long == model.generate(["a rose", "is"], add_bos=False, **greedy)
        model.config = configs.thaw(own)
        model.config.tokenizer.stop = (long[0][3],)
        short = model.answers(asked, **greedy)
        assert [out.text for out in short] == [text.split(long[0][3])[0] for text in long]
        assert model.chat(asked[0], stop=[long[0][1]], **greedy) == long[0][:1].strip()
    finally:
        model.config, model.tokenizer.chat_template = own, None


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
