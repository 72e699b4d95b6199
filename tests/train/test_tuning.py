"""PEFT in a run: what is trained, saved, resumed and loaded."""

import json
import shutil
import weakref

import jax
import numpy as np
import pytest
from interop import hf_tiny
from runs import run_config
from tiny import random_batch, tiny_train

import llm_jax
from llm_jax import config as configs
from llm_jax import models, sharding
from llm_jax.config import MeshConfig, TrainConfig
from llm_jax.interop import huggingface, safetensors
from llm_jax.interop.translate import read_config
from llm_jax.nn.params import count, flatten
from llm_jax.nn.weights import is_weight
from llm_jax.train import checkpoint
from llm_jax.train.loop import train
from llm_jax.train.metrics import train_flops_per_token
from llm_jax.train.program import build, put
from llm_jax.train.tuning import make_tuning

BOTTLENECK = ("down", "down_bias", "up", "up_bias")
LORA = {"peft.method": "lora", "peft.rank": 4, "optimizer.ema_decay": 0.0}


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    """A run to start from."""
    workdir = tmp_path_factory.mktemp("base")
    train(run_config(corpus, **{"eval.sample_tokens": 0}), workdir, devices=jax.devices()[:1])
    return workdir


def tune(corpus, base, workdir, **changes):
    values = {"checkpoint.init_from": str(base), "eval.sample_tokens": 0, **LORA, **changes}
    return train(run_config(corpus, **values), workdir, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def tuned(corpus, base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tuned")
    return workdir, tune(corpus, base, workdir, **{"eval.at_start": True, "peft.dropout": 0.1})


def test_only_what_is_trained_is_in_the_checkpoint(base, tuned):
    workdir, summary = tuned
    saved = checkpoint._metadata(workdir / "checkpoints", 12)
    names = set(flatten(saved))
    assert "layers/attn/q/w/a" in names and "layers/mlp/down/w/b" in names
    assert all(name.endswith(("/w/a", "/w/b")) for name in names) and len(names) == 14
    # 2 layers of 4 attention matrices [32, 32] and 3 of the MLP [32, 64], rank 4
    assert summary["params_trained"] == 2 * 4 * (4 * 64 + 3 * 96)
    assert summary["eval_loss"] < summary["eval_loss_at_start"]
    held = llm_jax.load(base)
    batch = np.arange(20)[None]
    before, after = held.logits(batch), llm_jax.load(workdir).logits(batch)
    assert float(abs(before - after).max()) > 1e-3


def test_a_stopped_run_goes_on_bit_equally(corpus, base, tuned, tmp_path):
    _, summary = tuned
    more = {"eval.at_start": True, "peft.dropout": 0.1}
    cfg = {"steps": 12, "checkpoint.keep_last": 9}
    tune(corpus, base, tmp_path / "run", **more, **cfg)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    (tmp_path / "run" / "summary.json").unlink()
    again = tune(corpus, base, tmp_path / "run", **more, **cfg)
    assert again["eval_loss"] == summary["eval_loss"]


def test_merged_saved_and_loaded(tuned, tmp_path):
    workdir, _ = tuned
    model = llm_jax.load(workdir)
    ids = np.arange(24).reshape(2, 12)
    model.save(tmp_path / "merged")
    plain = llm_jax.load(tmp_path / "merged")
    assert plain.config.peft.method == "none"
    assert not any(map(is_weight, flatten(plain.params).values()))
    np.testing.assert_allclose(plain.logits(ids), model.logits(ids), atol=1e-5)
    assert model.generate(["the"], max_new_tokens=8, temperature=0.0) == plain.generate(
        ["the"], max_new_tokens=8, temperature=0.0
    )


def test_tuning_goes_on_from_a_tuned_run(corpus, tuned, tmp_path):
    workdir, summary = tuned
    second = tune(corpus, workdir, tmp_path / "second", **{"eval.at_start": True})
    np.testing.assert_allclose(second["eval_loss_at_start"], summary["eval_loss"], rtol=1e-5)
    merged, ids = llm_jax.load(workdir).merged(), np.arange(20)[None]
    on_it = llm_jax.load(tmp_path / "second")  # its base has an adapter of its own
    assert float(abs(on_it.logits(ids) - merged.logits(ids)).max()) > 1e-3


def test_another_base_is_refused(corpus, base, tmp_path):
    """A base that was trained on, or replaced, since."""
    folder = tmp_path / "base"
    held = llm_jax.load(base)
    held.save(folder)
    tune(corpus, folder, tmp_path / "run", steps=3)
    same = llm_jax.load(tmp_path / "run", base=base)
    assert same.path == str(base / "checkpoints" / "12")
    held.params = jax.tree.map(lambda x: 1.01 * x, held.params)
    shutil.rmtree(folder)
    held.save(folder)
    for given in (None, folder):
        with pytest.raises(ValueError, match="trained on other weights than these"):
            llm_jax.load(tmp_path / "run", base=given)
    with pytest.raises(ValueError, match="was trained with another base"):
        tune(corpus, folder, tmp_path / "run", steps=4)


def test_a_quantised_base(corpus, base, tmp_path):
    summary = tune(corpus, base, tmp_path / "q", **{"peft.base": "nf4", "eval.at_start": True})
    assert summary["eval_loss"] < summary["eval_loss_at_start"]
    leaf = flatten(llm_jax.load(tmp_path / "q").params)["layers/attn/q/w"]
    assert is_weight(leaf.base)
    floats = [x for x in jax.tree.leaves(leaf.base) if x.ndim > 2 and x.dtype == np.float32]
    assert not floats, "the base is held quantised"


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("adapter", {f"layers/{m}/w/{n}" for m in ("attn/o", "mlp/down") for n in BOTTLENECK}),
        ("prompt", {"prefix/embeddings"}),
        ("prefix", {"prefix/k", "prefix/v"}),
    ],
)
def test_other_methods_train_save_and_load(corpus, base, tmp_path, method, names):
    changes = {"peft.method": method, "peft.tokens": 4, "eval.at_start": True}
    summary = tune(corpus, base, tmp_path / "run", **changes, **{"eval.sample_tokens": 4})
    assert summary["eval_loss"] < summary["eval_loss_at_start"]
    saved = flatten(checkpoint._metadata(tmp_path / "run" / "checkpoints", 12))
    assert set(saved) == names
    model = llm_jax.load(tmp_path / "run")
    loss = -np.mean([p.sum() for p in model.log_probs(["the quick brown fox"])])
    plain = -np.mean([p.sum() for p in llm_jax.load(base).log_probs(["the quick brown fox"])])
    assert loss != plain and len(model.generate(["the"], max_new_tokens=4)) == 1
    message = "adapter" if method == "adapter" else "no parameter of the model can stand for"
    with pytest.raises(ValueError, match=message):
        model.merged()


def test_parameters_trained_whole_beside_it(corpus, base, tuned, tmp_path):
    also = {"peft.also": ("norm/scale$",), "eval.at_start": True}
    summary = tune(corpus, base, tmp_path / "also", **also)
    assert summary["eval_loss_at_start"] == tuned[1]["eval_loss_at_start"]
    names = set(flatten(checkpoint._metadata(tmp_path / "also" / "checkpoints", 12)))
    assert {"final_norm/scale", "layers/attn_norm/scale", "layers/mlp_norm/scale"} < names
    was = flatten(llm_jax.load(base).params)["final_norm/scale"]
    now = flatten(llm_jax.load(tmp_path / "also").params)["final_norm/scale"]
    assert float(abs(was - now).max()) > 0 and summary["bits_per_byte"] > 0
    whole = {"peft.method": "lora", "peft.also": ("embed/tokens$",), "model.dtype": "bfloat16"}
    cfg = tiny_train(**whole)
    tuning = make_tuning(cfg, models.family("decoder").specs(cfg.model))
    kept = {path: tuning.hold(path, was).dtype for path in ("embed/tokens", "layers/attn/q/w")}
    assert kept == {"embed/tokens": "float32", "layers/attn/q/w": "bfloat16"}  # a master, a copy


def test_a_prompt_and_a_prefix_that_start_as_a_text_are_that_text(corpus, base, tmp_path):
    """Before a step they change the texts behind them as the text itself in front would."""
    plain = llm_jax.load(base)
    ids = np.array([plain.tokenizer.encode("dogcat the fox")])
    want = np.asarray(plain.logits(ids))[:, 6:]
    for method in ("prompt", "prefix"):
        changes = {"peft.method": method, "peft.tokens": 6, "peft.start_text": "dogcat"}
        changes |= {"steps": 1, "optimizer.learning_rate": 0.0, "optimizer.warmup_steps": 0}
        tune(corpus, base, tmp_path / method, **changes)
        got = llm_jax.load(tmp_path / method).logits(ids[:, 6:])
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint.init_from": ""}, "name it with --init_from"),
        ({"peft.targets": "nothing"}, "peft.targets='nothing' matches no parameter"),
        ({"peft.also": ("nothing",)}, "peft.also: the pattern 'nothing' matches no parameter"),
        ({"peft.also": ("attn/q/w",)}, "narrow peft.also or peft.targets"),
        ({"optimizer.freeze_rules": ((".*", True),)}, "both say what is trained"),
        ({"peft.method": "none", "peft.base": "nf4"}, "peft.method=none trains every parameter"),
    ],
)
def test_what_cannot_work_is_named(corpus, base, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tune(corpus, base, tmp_path, **changes)


def test_a_base_that_is_gone_is_named(corpus, base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    tune(corpus, tmp_path / "base", tmp_path / "run", steps=4)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="say where it is now with --base"):
        llm_jax.load(tmp_path / "run")
    llm_jax.load(tmp_path / "run", base=tmp_path / "moved")


@pytest.mark.parametrize(
    "held",
    [*(pytest.param(held, marks=pytest.mark.slow) for held in ("float", "int8")), "nf4"],
)  # 15 seconds each
def test_a_mesh_changes_nothing(held):
    batch = random_batch(packed=True)

    def losses(**mesh):
        cfg = tiny_train(
            **{"peft.method": "lora", "peft.base": held, "peft.dropout": 0.1, "steps": 8}
        )
        m = sharding.make_mesh(MeshConfig(**mesh), jax.devices()[: int(np.prod([*mesh.values()]))])
        with jax.set_mesh(m):
            program = build(cfg, m)
            state, out = program.init(jax.random.key(0)), []
            for _ in range(8):
                state, metrics = program.step(state, put(batch, m, 1))
                out.append(float(metrics["loss"]))
            assert int(state.bad_steps) == 0
        return out

    one = losses(data=1)
    assert one[-1] < one[0]
    np.testing.assert_allclose(losses(data=1, fsdp=2, tensor=2), one, rtol=2e-6)
    np.testing.assert_allclose(losses(data=2, context=2), one, rtol=2e-6)


def test_adapters_share_one_base_and_come_back_from_a_peft_folder(base, tuned, tmp_path):
    workdir, _ = tuned
    held = llm_jax.load(base)
    first = held.with_adapter(workdir)
    assert held.trained is None and first.trained is not None
    leaf = flatten(first.params)["layers/attn/q/w"]
    assert leaf.base is flatten(held.params)["layers/attn/q/w"], "the base is not copied"
    ids = np.arange(16)[None]
    first.save_adapter(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = llm_jax.load(tmp_path / "adapter", base=base)
    again.save_adapter(tmp_path / "copy")
    named = json.loads((tmp_path / "copy" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(base / "checkpoints" / "12")
    np.testing.assert_allclose(again.logits(ids), first.logits(ids), atol=1e-5)
    assert float(abs(first.logits(ids) - held.logits(ids)).max()) > 1e-3
    with pytest.raises(ValueError, match="has an adapter"):
        first.with_adapter(workdir)
    with pytest.raises(ValueError, match="is a whole model, not an adapter"):
        held.with_adapter(base)
    with pytest.raises(ValueError, match="is for an adapter, drop it"):
        llm_jax.load(base, base=base)
    with pytest.raises(ValueError, match="no adapter; save or export"):
        held.save_adapter(tmp_path / "none")


def test_flops_of_tuning():
    specs = models.family("decoder").specs(tiny_train().model)
    full = train_flops_per_token(specs, tiny_train().model, 16)
    cfg = tiny_train(**{"peft.method": "lora", "peft.rank": 4})
    trained = make_tuning(cfg, specs).trained
    attention = 12 * 2 * 8 * 4 * 16  # layers, heads, their width, length
    got = train_flops_per_token(specs, cfg.model, 16, trained)
    assert got == (full - attention) * 4 / 6 + 6 * count(trained) + attention


def test_a_quantised_base_is_never_there_whole(tmp_path, one_device):
    """Each parameter of a Hugging Face folder is quantised as it is read."""
    hf_tiny.write(tmp_path / "model", hf_tiny.load("llama-2_gqa"))
    values = huggingface.load_json(tmp_path / "model" / "config.json")
    cfg = TrainConfig(length=8, model=read_config(values, ""))
    configs.override(cfg, {"peft.method": "lora", "peft.base": "nf4", "peft.targets": "attn/q/w"})
    configs.resolve_model(cfg.model, vocab_size=cfg.model.vocab_size, length=8, backend="cpu")
    cfg = configs.freeze(cfg)
    specs = models.family("decoder").specs(cfg.model)
    hold, plain = make_tuning(cfg, specs).hold, []

    def watched(path, leaf):
        held = hold(path, leaf)
        plain.append(sum(ref() is not None for ref in refs))
        refs.append(weakref.ref(leaf))
        return held

    refs = []
    source = safetensors.Source(tmp_path / "model")
    _, params = huggingface.load_tensors(values, source, one_device, hold=watched)
    quantised = [p for p, leaf in flatten(params).items() if is_weight(leaf)]
    assert len(quantised) == 7 and len(plain) == len(flatten(specs))
    kept = sum(not is_weight(leaf) for leaf in flatten(params).values())
    assert max(plain) <= kept + 1, "what was quantised is gone before the next is read"
