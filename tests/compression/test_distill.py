"""A student learns from a teacher that is itself left alone."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import run_config
from tiny import random_batch, tiny_model, tiny_train

import llm_jax
from llm_jax import config as configs
from llm_jax import models, sharding
from llm_jax.compression import distill
from llm_jax.compression.teacher import (
    check_teacher,
    check_tokenizer,
    prepare_top_k,
)
from llm_jax.config.tuning import DistillConfig
from llm_jax.nn import params as nn_params
from llm_jax.tokenizers import simple
from llm_jax.train import checkpoint, program
from llm_jax.train.companion import Companion
from llm_jax.types import Batch

V, L = 53, 16


@pytest.fixture(scope="module")
def teacher() -> Companion:
    """A random model with sharp distributions."""
    cfg = tiny_model(d_model=16, d_ff=32, n_heads=2, kv_heads=2, n_layers=1)
    specs = models.family(cfg.family).specs(cfg)
    params = jax.jit(lambda key: nn_params.init(specs, key))(jax.random.key(7))
    params["embed"]["tokens"] = params["embed"]["tokens"] * 40
    return Companion(cfg, params, specs, None)


def small_student(**changes) -> configs.TrainConfig:
    values = {"model.n_layers": 1, "model.n_heads": 2, "model.kv_heads": 2, "model.d_model": 8}
    return tiny_train(**{**values, "model.d_ff": 16, "optimizer.warmup_steps": 0, **changes})


def run(cfg, settings, teacher, batches, devices=1):
    """The state after a step on each batch, the program, and the steps' metrics."""
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        if settings.top_k:
            loss, beside, others = distill.make_top_k_loss(cfg, settings), {}, {}
        else:
            loss = distill.make_online_loss(cfg, settings, teacher.cfg)
            beside = {distill.TEACHER: teacher.specs}
            others = {distill.TEACHER: jax.tree.map(jnp.copy, teacher.params)}  # it is donated
        own = program.make_loss_fn(cfg)
        made = program.build(cfg, mesh, loss, evaluates=own, beside=beside)
        state, seen = made.init(jax.random.key(0), others), []
        for batch in batches:
            state, metrics = made.step(state, program.put(batch, mesh, cfg.accumulation))
            seen.append(jax.device_get(metrics))
        return state, made, seen


def distances(a, b) -> float:
    return max(
        float(np.abs(np.asarray(x) - np.asarray(y)).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


BATCHES = [random_batch(packed=True, seed=i) for i in range(2)]
SETTINGS = {"divergence": "jsd", "temperature": 2.0}
PARTLY_FROZEN = {"optimizer.freeze_rules": ((r"^final_norm", True), (r".*", False)), "steps": 2}


@pytest.fixture(scope="module")
def online(teacher):
    """Two steps with the teacher in them, on one device."""
    return run(small_student(**PARTLY_FROZEN), DistillConfig(**SETTINGS), teacher, BATCHES)


def test_the_teacher_is_left_alone_and_is_not_part_of_the_student(teacher, online):
    state, made, _ = online
    assert distances(state.frozen[distill.TEACHER], teacher.params) == 0
    own = nn_params.flatten(made.specs).keys()
    assert nn_params.flatten(made.params(state)).keys() == own
    # What the optimizer sees and a checkpoint holds.
    assert nn_params.flatten(state.params).keys() == own - {"final_norm/scale"}
    sizes = sum(x.size for x in jax.tree.leaves(state.opt_state))
    assert sizes < 2 * nn_params.count(made.specs) + 10  # two moments of the trained, counters


def test_a_mesh_and_micro_batches_change_nothing(teacher, online):
    cfg = small_student(**PARTLY_FROZEN, **{"mesh.data": 1, "mesh.fsdp": 2, "accumulation": 2})
    state, _, seen = run(cfg, DistillConfig(**SETTINGS), teacher, BATCHES, devices=2)
    np.testing.assert_allclose([x["loss"] for x in seen], [x["loss"] for x in online[2]], rtol=2e-6)
    assert distances(state.params, online[0].params) < 1e-4
    assert all(x["bad_steps"] == 0 for x in seen)
    cut = state.frozen[distill.TEACHER]["embed"]["tokens"].sharding.spec
    assert cut == jax.sharding.PartitionSpec(None, "fsdp")


class Rows:
    """A loader's batches, given."""

    def __init__(self, batches):
        self.identity = {"rows": "given"}
        self.batch = lambda step: batches[step]


def test_the_whole_vocabulary_on_disk_is_the_teacher_in_the_step(teacher, online, tmp_path):
    cfg = small_student(**PARTLY_FROZEN)
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        kept = prepare_top_k(teacher, Rows(BATCHES), cfg, mesh, V, tmp_path)
        again = prepare_top_k(teacher, Rows(None), cfg, mesh, V, tmp_path)  # no pass: it is there
    assert again.folder == kept.folder
    settings = DistillConfig(**SETTINGS, top_k=V)
    state, _, seen = run(cfg, settings, None, [kept.add(b, i) for i, b in enumerate(BATCHES)])
    np.testing.assert_allclose([x["loss"] for x in seen], [x["loss"] for x in online[2]], rtol=1e-5)
    assert distances(state.params, online[0].params) < 1e-4
    assert state.frozen.keys() == {"final_norm"}  # the teacher is not in memory


def test_another_vocabulary_and_bad_numbers_are_named():
    cfg = small_student()
    with pytest.raises(ValueError, match=r"64 tokens .* 53; .*tokenizer\.path"):
        check_teacher(tiny_model(vocab_size=64), cfg)
    with pytest.raises(ValueError, match=r"length=16 is longer than the 8 positions"):
        check_teacher(tiny_model(positions="learned", max_length=8), cfg)
    with pytest.raises(ValueError, match=r"data\.packing=bucket"):
        distill.check(small_student(**{"data.packing": "bucket"}), DistillConfig(top_k=4))
    for key, value in [("alpha", 1.5), ("temperature", 0.0), ("top_k", -1)]:
        with pytest.raises(ValueError, match=f"--{key}={value}"):
            distill.check(cfg, DistillConfig(**{key: value}))
    with pytest.raises(ValueError, match="label_smoothing"):
        distill.check(small_student(label_smoothing=0.1), DistillConfig())
    byte, words = simple.train_bytes(), simple.train_words(["a b"], vocab_size=10)
    with pytest.raises(ValueError, match=r"have other tokens; .* leave tokenizer\.path"):
        check_tokenizer(byte, words)
    chatting = simple.train_bytes()
    chatting.chat_template = "{{ messages }}"
    check_tokenizer(byte, chatting)  # no id stands for another token


def sampled(teacher: Companion, rows: int, seed: int) -> np.ndarray:
    """[rows, L + 1] tokens drawn from the teacher itself."""
    model = models.family(teacher.cfg.family)

    @jax.jit
    def draw(tokens, i, key):
        x = model.hidden(teacher.params, Batch(tokens=tokens), teacher.cfg).x
        z = model.logits(teacher.params, x, teacher.cfg)
        new = jax.random.categorical(key, jax.lax.dynamic_index_in_dim(z, i, 1, keepdims=False))
        return tokens.at[:, i + 1].set(new)

    keys = jax.random.split(jax.random.key(seed), L + 1)
    tokens = jnp.zeros((rows, L + 1), jnp.int32)
    tokens = tokens.at[:, 0].set(jax.random.randint(keys[L], (rows,), 0, V))
    for i in range(L):
        tokens = draw(tokens, i, keys[i])
    return np.asarray(tokens)


def as_batch(tokens: np.ndarray) -> Batch:
    ones = np.ones_like(tokens[:, 1:])
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=ones.astype(np.float32),
        bytes=ones,
    )


def test_a_student_learns_more_from_few_texts_with_a_teacher(teacher):
    """Eight texts, seen again and again: alone the student learns them by heart."""
    texts, held_out = as_batch(sampled(teacher, 8, 1)), as_batch(sampled(teacher, 128, 2))
    values = {"optimizer.learning_rate": 1e-2, "optimizer.weight_decay": 0.0, "steps": 150}
    cfg = small_student(**{**values, "model.d_model": 16, "model.d_ff": 32, "batch_size": 8})
    losses = {}
    for name, settings in {
        "alone": DistillConfig(alpha=0.0),
        "teacher": DistillConfig(alpha=1.0, temperature=1.0),
    }.items():
        state, made, _ = run(cfg, settings, teacher, [texts] * cfg.steps)
        mean = made.evaluate(made.params(state), held_out)["nll"]
        losses[name] = float(mean.value())
    assert losses["teacher"] < losses["alone"] - 0.2, losses


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    """A checkpoint of an untrained byte model."""
    cfg = tiny_train(**{"model.vocab_size": 259, "model.n_layers": 1})
    specs = models.family(cfg.model.family).specs(cfg.model)
    params = jax.jit(lambda key: nn_params.init(specs, key))(jax.random.key(0))
    folder = tmp_path_factory.mktemp("teacher")
    checkpoint.save_params(folder / "checkpoints", cfg, simple.train_bytes(), params)
    return folder


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_run_leaves_a_student_that_loads(corpus, teacher_run, tmp_path, capsys, top_k):
    changes = {"steps": 4, "optimizer.warmup_steps": 0, "model.d_model": 16, "model.n_layers": 1}
    changes |= {"eval.sample_tokens": 0, "eval.at_start": True, "checkpoint.every": 2}

    def run(**settings):
        cfg = run_config(corpus, **changes)
        cfg.tokenizer.kind = "character"  # of no effect: the teacher's is taken
        settings = DistillConfig(top_k=top_k, **settings)
        one = jax.devices()[:1]
        return distill.train(cfg, settings, teacher_run, tmp_path / "student", devices=one)

    summary = run()
    assert summary["eval_loss"] < summary["eval_loss_at_start"]
    assert summary["teacher_eval_loss"] > 0 and summary["teacher_params"] > summary["params"]
    saved = checkpoint._metadata(tmp_path / "student/checkpoints", 4)
    assert distill.TEACHER not in saved
    loaded = llm_jax.load(tmp_path / "student")
    assert loaded.tokenizer.fingerprint() == checkpoint.load_tokenizer(teacher_run).fingerprint()
    assert loaded.config.model.d_model == 16
    lines = [
        json.loads(x) for x in Path(tmp_path / "student/metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert [x["step"] for x in lines] == [0, 1, 2, 3, 4]
    assert all(x["divergence"] > 0 for x in lines[1:])
    # A run that was stopped goes on, teacher and all.
    shutil.rmtree(tmp_path / "student/checkpoints/4")
    assert run()["eval_loss"] == summary["eval_loss"]
    assert "goes on with" not in capsys.readouterr().out
    run(alpha=0.25)
    assert "note: this run goes on with alpha=0.25 (was 0.5)\n" in capsys.readouterr().out
    record = json.loads((tmp_path / "student/distill.json").read_text())
    assert record["teacher"] == str(teacher_run) and record["alpha"] == 0.5  # as it was trained
