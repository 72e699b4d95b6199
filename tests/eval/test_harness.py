"""lm_eval over a model of ours gives the numbers that the model's own logits say."""

import importlib
import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llm_jax import api, sharding
from llm_jax import config as configs
from llm_jax.models import decoder
from llm_jax.nn import params as P
from llm_jax.tokenizers.simple import Characters
from llm_jax.types import Batch

os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when lm_eval imports datasets
lm_eval = pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402

from llm_jax.eval import harness  # noqa: E402

FOLDER = Path(__file__).parent / "lm_eval_tasks"
CHARACTERS = "\n ,.:<>?AQabcdefghijklmnopqrstuvwxyz"
NAMES = ("<unk>", "<s>", "</s>", "<|turn|>")
TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    """Random weights, sharp enough that choices differ."""
    tokenizer = Characters(CHARACTERS, NAMES)
    tokenizer.chat_template = TEMPLATE
    cfg = configs.TrainConfig(length=256)
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "dtype": "float32", "scan": False}
    for name, value in {**sizes, "init_std": 0.3}.items():
        setattr(cfg.model, name, value)
    configs.resolve_model(cfg.model, vocab_size=tokenizer.vocab_size, length=256, backend="cpu")
    cfg = configs.freeze(cfg)
    params = P.init(decoder.specs(cfg.model), jax.random.key(2))
    mesh = sharding.make_mesh(configs.MeshConfig(), jax.devices()[:1])
    return api.Model(cfg, params, tokenizer, mesh)


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """simple_evaluate over the task files beside this test: {task: samples}, results."""
    shutil.copytree(FOLDER, tmp_path / "tasks")
    monkeypatch.chdir(tmp_path / "tasks")  # the task files name their data relative to it

    def run(lm, *tasks, **options):
        manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
        out = lm_eval.simple_evaluate(
            lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options
        )
        return out["samples"], out["results"]

    return run


@jax.jit(static_argnames="cfg")
def _logits(params, tokens, cfg):
    return decoder.logits(params, decoder.hidden(params, Batch(tokens=tokens), cfg).x, cfg)


def log_softmax(model, ids):
    """[n, V]: log p of the token after each of `ids`."""
    padded = np.zeros((1, 256), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(jax.nn.log_softmax(_logits(model.params, padded, model.config.model)))[
        0, : len(ids)
    ]


def expected(model, context, continuation, max_length=256):
    """(log p, greedy) of continuation ids by the full logits."""
    ids = (context + continuation)[-(max_length + 1) :]
    log_p, m = log_softmax(model, ids[:-1])[-len(continuation) :], len(continuation)
    return log_p[np.arange(m), continuation].sum(), bool((log_p.argmax(1) == continuation).all())


def greedy_text(model, prompt, n):
    """The text of n greedy tokens after the prompt's ids, or until the end token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(log_softmax(model, ids)[-1].argmax()))
        if ids[-1] == model.tokenizer.eos_id:
            break
    return model.tokenizer.decode(ids[len(prompt) :])


def test_multiple_choice_equals_the_logits(model, evaluate):
    lm = harness.LlmJax(model, batch_size=2)
    samples, results = evaluate(lm, "tiny_choices", "tiny_letters")
    encode = model.tokenizer.encode
    right = right_norm = other = 0
    for sample in samples["tiny_choices"]:
        doc, scores = sample["doc"], []
        for option, ((log_p, greedy),) in zip(doc["options"], sample["resps"], strict=True):
            # The space before the option belongs to it.
            want = expected(model, encode(f"Q: {doc['question']}?\nA:"), encode(f" {option}"))
            np.testing.assert_allclose(log_p, want[0], atol=3e-5)
            assert greedy == want[1]
            scores.append(want[0])
        chosen = int(np.argmax(scores))
        chosen_norm = int(np.argmax(np.array(scores) / [len(text) for text in doc["options"]]))
        right, right_norm = (
            right + (chosen == doc["gold"]),
            right_norm + (chosen_norm == doc["gold"]),
        )
        other += chosen != chosen_norm
    assert other  # else one could stand for the other
    assert results["tiny_choices"]["acc,none"] == right / 5
    assert results["tiny_choices"]["acc_norm,none"] == right_norm / 5
    for sample in samples["tiny_letters"]:
        context = encode(f"Q: {sample['doc']['question']}?\nA:")
        for letter, ((log_p, _),) in zip("AQ", sample["resps"], strict=True):
            want = expected(model, context, encode(letter))[0]
            np.testing.assert_allclose(log_p, want, atol=3e-5)


def test_a_task_file_of_lm_eval_itself(model, evaluate):
    theirs = Path(lm_eval.__file__).parent / "tasks" / "arc" / "arc_easy.yaml"
    files = dict.fromkeys(("train", "validation", "test"), "arc_format.jsonl")
    own = {"include": str(theirs), "task": "own_arc", "dataset_path": "json", "dataset_name": None}
    own["dataset_kwargs"] = {"data_files": files, "cache_dir": "cache"}
    Path("own_arc.yaml").write_text(json.dumps(own))  # JSON is YAML
    samples, _ = evaluate(harness.LlmJax(model, batch_size=2), "own_arc")
    (context, option), encode = samples["own_arc"][1]["arguments"][2], model.tokenizer.encode
    assert (context, option) == ("Question: where do fish live\nAnswer:", " in water")
    got = samples["own_arc"][1]["resps"][2][0][0]
    np.testing.assert_allclose(got, expected(model, encode(context), encode(option))[0], atol=3e-5)


def test_few_shot_prompts_lose_their_beginning(model, evaluate):
    lm = harness.LlmJax(model, max_length=40, batch_size=2)
    samples, _ = evaluate(lm, "tiny_choices", num_fewshot=2)
    cut = 0
    for sample in samples["tiny_choices"]:
        for (context, option), ((log_p, _),) in zip(
            sample["arguments"], sample["resps"], strict=True
        ):
            ids = model.tokenizer.encode(context), model.tokenizer.encode(option)
            np.testing.assert_allclose(log_p, expected(model, *ids, 40)[0], atol=3e-5)
            cut += abs(expected(model, *ids)[0] - log_p) > 1e-3  # what the whole prompt would say
    assert cut > 5


def test_rolling_scores_each_token_once(model, evaluate):
    samples, results = evaluate(harness.LlmJax(model, max_length=16, batch_size=2), "tiny_pages")
    nats = n_bytes = 0
    for sample in samples["tiny_pages"]:
        ids = [model.tokenizer.bos_id] + model.tokenizer.encode(sample["doc"]["page"])
        # Windows of 16 inputs; the last one is filled up with context from the left.
        total, done = 0.0, 1
        while done < len(ids):
            end = min(done + 16, len(ids))
            total += expected(model, ids[max(end - 17, 0) : done], ids[done:end])[0]
            done = end
        np.testing.assert_allclose(sample["resps"][0][0], total, rtol=1e-5)
        nats, n_bytes = nats - total, n_bytes + len(sample["doc"]["page"])
    got = results["tiny_pages"]
    np.testing.assert_allclose(got["byte_perplexity,none"], math.exp(nats / n_bytes), rtol=1e-5)
    np.testing.assert_allclose(got["bits_per_byte,none"], nats / n_bytes / math.log(2), rtol=1e-5)


def test_generation_is_greedy_and_in_order(model, evaluate):
    samples, _ = evaluate(harness.LlmJax(model, batch_size=2), "tiny_prompts")
    texts = []
    for sample in samples["tiny_prompts"]:
        prompt = model.tokenizer.encode(sample["doc"]["prompt"])
        texts.append(greedy_text(model, prompt, 12).split("\n\n")[0])
        assert sample["resps"][0][0] == texts[-1]
    assert len(set(texts)) == 3  # an order mixed up would show


def request(*args):
    return SimpleNamespace(args=args)


def test_generation_stops_and_cuts_the_prompt(model):
    lm = harness.LlmJax(model, max_length=24, batch_size=2)
    prompt = "a long prompt whose beginning falls away, and then"
    ids = model.tokenizer.encode(prompt)
    whole = greedy_text(model, ids[-(24 - 8) :], 8)
    assert whole != greedy_text(model, ids, 8)
    stop = whole[3:5]
    answers = lm.generate_until(
        [
            request(prompt, {"until": [], "max_gen_toks": 8}),
            request(prompt, {"until": ["?!", stop], "max_new_tokens": 8, "temperature": 0.0}),
            request(prompt, {"until": stop, "max_tokens": 8, "do_sample": False}),
        ],
        disable_tqdm=True,
    )
    assert answers == [whole, whole.split(stop)[0], whole.split(stop)[0]]
    for kwargs, message in [
        ({"max_gen_toks": 24}, "max_gen_toks=24 has to be below max_length=24"),
        ({"num_beams": 4}, "'num_beams' is not one of"),
        ({"do_sample": True}, "do_sample needs a temperature"),
    ]:
        with pytest.raises(ValueError, match=message):
            lm.generate_until([request("a", {"max_gen_toks": 4, **kwargs})])


def test_a_special_token_in_until_ends_the_text(model):
    turn = model.tokenizer.special_tokens["<|turn|>"]
    sampling = {"max_gen_toks": 8, "temperature": 1.5, "do_sample": True}
    for seed in range(30):  # one whose text has the token in the middle
        lm = harness.LlmJax(model, batch_size=2, seed=seed)
        (plain,) = model.complete(["ab"] * 2, max_new_tokens=8, temperature=1.5, seed=seed)[:1]
        if turn in plain.tokens[2:-2]:
            break
    before = model.tokenizer.decode(plain.tokens[: plain.tokens.index(turn)])
    assert len(before) < len(plain.text)  # the token itself leaves no trace in the text
    for until, text in [(["<|turn|>"], before), ([], plain.text)]:
        asked = [request("ab", {"until": until, **sampling})]
        assert lm.generate_until(asked, disable_tqdm=True) == [text]


def test_samples_differ_and_repeat(model):
    lm = harness.LlmJax(model, batch_size=2)
    kwargs = {"max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
    first = lm.generate_until([request("the", kwargs)] * 4, disable_tqdm=True)
    assert len(set(first)) == 4  # repeats of one prompt, over two batches
    assert first == lm.generate_until([request("the", kwargs)] * 4, disable_tqdm=True)


def test_chat_turns_and_system_message(model, evaluate):
    samples, _ = evaluate(
        harness.LlmJax(model, batch_size=2),
        "tiny_choices",
        num_fewshot=1,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        system_instruction="be brief",
        limit=2,
    )
    context, option = samples["tiny_choices"][1]["arguments"][0]
    assert context == (
        "<|turn|>system:be brief\n"
        "<|turn|>user:Q: what do cows eat?\nA:\n<|turn|>assistant:grass\n"
        "<|turn|>user:Q: where do fish live?\nA:\n<|turn|>assistant:"
    )
    ids = model.tokenizer.encode(context, special=True), model.tokenizer.encode(option)
    assert ids[0].count(model.tokenizer.special_tokens["<|turn|>"]) == 5
    got = samples["tiny_choices"][1]["resps"][0][0][0]
    np.testing.assert_allclose(got, expected(model, *ids)[0], atol=3e-5)


def test_a_template_that_refuses_a_system_message(model, monkeypatch):
    lm = harness.LlmJax(model, batch_size=2)
    assert lm.chat_template(True) == TEMPLATE
    user = {"role": "user", "content": "hi"}
    chat = [{"role": "system", "content": "be brief"}, user]
    opened = lm.apply_chat_template([user, {"role": "assistant", "content": "he"}], False)
    assert opened.endswith("assistant:he")  # an open last message, not a further turn
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", refuse + TEMPLATE)
    assert lm.apply_chat_template(chat) == "<|turn|>user:hi\n<|turn|>assistant:"
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ raise_exception('never') }}")
    with pytest.raises(ValueError, match="never"):
        lm.apply_chat_template([user])


def test_begin_token(model):
    bos, encode = model.tokenizer.bos_id, model.tokenizer.encode
    plain, begun = (harness.LlmJax(model, batch_size=2, add_bos_token=add) for add in (None, True))
    assert plain.tok_encode("ab") == encode("ab") and begun.tok_encode("ab") == [bos] + encode("ab")
    assert begun.tok_encode("<s>ab") == [bos] + encode("ab")  # spelled out, not doubled
    assert begun.tok_encode("ab", add_special_tokens=False) == encode("ab")
    requests = [request("ab", " cd"), request("", "cd"), request("ab ", "cd")]
    for lm, begin in [(plain, []), (begun, [bos])]:
        got = lm.loglikelihood(requests, disable_tqdm=True)
        want = [
            expected(model, begin + encode("ab"), encode(" cd")),
            expected(model, [bos], encode("cd")),  # the prefix, once
            expected(model, begin + encode("ab"), encode(" cd")),
        ]
        np.testing.assert_allclose([x for x, _ in got], [x for x, _ in want], atol=3e-5)
    # lm_eval's wrapper of transformers scores the begin token too, after the prefix.
    page = begun.loglikelihood_rolling([request("cd")], True)
    want = expected(model, [bos], [bos] + encode("cd"))[0]
    np.testing.assert_allclose(page, want, atol=3e-5)
    other = harness.LlmJax(model, prefix_token_id=5, batch_size=2).loglikelihood_rolling(
        [request("cd")], True
    )
    np.testing.assert_allclose(other, expected(model, [5], encode("cd"))[0], atol=3e-5)


def test_answers_go_to_the_cache(model):
    seen = {}
    lm = harness.LlmJax(model, batch_size=2)
    lm.set_cache_hook(
        SimpleNamespace(
            add_partial=lambda kind, args, answer: seen.update({(kind, args[0]): answer})
        )
    )
    pair = lm.loglikelihood([request("ab", "cd")], disable_tqdm=True)
    page = lm.loglikelihood_rolling([request("abcd")], disable_tqdm=True)
    text = lm.generate_until([request("xy", {"max_gen_toks": 3})], disable_tqdm=True)
    assert seen == {
        ("loglikelihood", "ab"): pair[0],
        ("loglikelihood_rolling", "abcd"): page[0],
        ("generate_until", "xy"): text[0],
    }


def test_from_an_argument_string(model, evaluate, monkeypatch):
    opened = []
    monkeypatch.setattr(harness.LlmJax, "loader", lambda path: opened.append(path) or model)
    _, by_name = evaluate("llm_jax", "tiny_letters", model_args="checkpoint=runs/x,batch_size=2")
    assert opened == ["runs/x"]
    _, by_object = evaluate(harness.LlmJax(model, batch_size=2), "tiny_letters")
    assert json.dumps(by_name, default=str) == json.dumps(by_object, default=str)
    create = harness.LlmJax.create_from_arg_string
    lm = create("pretrained=runs/x,add_bos_token=True,max_length=32", {"batch_size": 5})
    assert (lm.add_bos, lm.max_length, lm.batch_size) == (True, 32, 5)
    for arguments, message in [
        ("checkpoint=a,dtype=float32", "dtype= is not one of"),
        ("batch_size=2", "one checkpoint=PATH"),
        ("checkpoint=a,batch_size=0", "batch_size=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            create(arguments)
    monkeypatch.setattr(harness.LlmJax, "loader", None)
    with pytest.raises(ValueError, match=r"LlmJax.loader = llm_jax.load"):
        create("checkpoint=a")


def test_evaluate_gives_plain_data(model, evaluate, monkeypatch):
    options = {"batch_size": 2, "max_length": 64}
    samples, results = evaluate(harness.LlmJax(model, **options), "tiny_choices", limit=3)
    settings = {"limit": 3, "bootstrap_iters": 0}
    found = harness.evaluate(model, ["tiny_choices"], include_path=".", options=options, **settings)
    assert json.loads(json.dumps(found))["results"]["tiny_choices"] == results["tiny_choices"]
    assert [s["resps"] for s in found["samples"]["tiny_choices"]] == [
        [[list(answer) for answer in answers] for answers in sample["resps"]]
        for sample in samples["tiny_choices"]
    ]
    assert found["config"]["max_length"] == 64 and found["config"]["add_bos_token"] is False
    with pytest.raises(FileNotFoundError, match="--include_path=nowhere"):
        harness.evaluate(model, ["tiny_choices"], include_path="nowhere")
    own = TaskManager
    monkeypatch.setattr(  # without lm_eval's own tasks, whose index is slow to read
        "lm_eval.tasks.TaskManager", lambda **given: own(**{**given, "include_defaults": False})
    )
    with pytest.raises(ValueError, match=r"--tasks=tiny_choice: .* did you mean tiny_choices"):
        harness.evaluate(model, ["tiny_choice"], include_path=".")


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "llm_jax.eval.harness")
    with pytest.raises(ImportError, match=r"llm_jax\[eval\]"):
        importlib.import_module("llm_jax.eval.harness")
