"""The one step: parity over meshes, accumulation, skipping, clipping, averages, freezing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_batch, tiny_train

from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.nn import dense
from llm_jax.nn.params import flatten
from llm_jax.train.program import abstract_batch, abstract_state, build, put
from llm_jax.types import Loss, Mean


def run(cfg, mesh=None, devices=1, steps=30, k=1, make_batch=random_batch, poison=None):
    """Losses, grad norms and final state of `steps` steps; batches depend on the step alone."""
    mesh = sharding.make_mesh(MeshConfig(**(mesh or {})), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        program = build(cfg, mesh)
        state = program.init(jax.random.key(0))
        losses, norms = [], []
        for step in range(steps):
            state, metrics = program.step(state, put(make_batch(seed=step % 4), mesh, k))
            losses.append(metrics["loss"])
            norms.append(metrics["grad_norm"])
        assert int(state.bad_steps) == 0
        return np.array(losses), np.array(norms), jax.device_get(state)


@pytest.fixture(scope="module")
def reference():
    return run(tiny_train())


MESHES = [
    {"data": 8},
    {"data": 1, "fsdp": 8},
    {"data": 1, "tensor": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_same_losses_on_every_mesh(reference, mesh):
    losses, norms, _ = run(tiny_train(), mesh, devices=8)
    np.testing.assert_allclose(norms[0], reference[1][0], rtol=2e-6)
    np.testing.assert_allclose(losses, reference[0], rtol=1e-6)
    assert reference[0][-1] < reference[0][0] - 0.1  # it learns, so equality says something


def test_packed_rows_and_dropout_on_a_mesh():
    cfg = tiny_train(**{"model.dropout": 0.2})
    make = lambda seed: random_batch(seed=seed, packed=True)  # noqa: E731
    a = run(cfg, steps=6, make_batch=make)[0]
    b = run(cfg, {"data": 2, "fsdp": 2, "tensor": 2}, 8, steps=6, make_batch=make)[0]
    np.testing.assert_allclose(a, b, rtol=1e-6)
    dry = run(tiny_train(), steps=6, make_batch=make)[0]
    assert abs(a - dry).max() > 1e-3  # dropout does something


@pytest.mark.parametrize("k", [2, 4])
def test_accumulation_with_unequal_counts_is_one_big_batch(k):
    def uneven(seed):
        batch = random_batch(seed=seed)
        weights = batch.weights.copy()
        weights[: 16 // k, 3:] = 0  # the first micro-batch counts 3 targets a row, the others 16
        return batch.replace(weights=weights)

    cfg = tiny_train(**{"accumulation": k, "z_loss": 1e-2, "model.dropout": 0.1})
    whole = run(tiny_train(**{"z_loss": 1e-2, "model.dropout": 0.1}), steps=5, make_batch=uneven)
    parts = run(cfg, steps=5, k=k, make_batch=uneven)
    np.testing.assert_allclose(parts[0], whole[0], rtol=2e-6)
    np.testing.assert_allclose(parts[1], whole[1], rtol=2e-5)
    for a, b in zip(
        jax.tree.leaves(parts[2].params), jax.tree.leaves(whole[2].params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=3e-5)  # a mean of means is off by 1e-2 here


def test_micro_batches_share_one_cast_of_the_masters(one_device):
    """Cast inside the loop, every micro-batch would read the float32 masters again."""
    cfg = tiny_train(**{"accumulation": 4, "batch_size": 16, "model.dtype": "bfloat16"})
    with jax.set_mesh(one_device):
        program = build(cfg, one_device)
        matrices = {s.shape for s in flatten(program.specs).values() if len(s.shape) > 2}
        step = program.step.trace(abstract_state(program), abstract_batch(cfg, one_device)).jaxpr

    def casts(jaxpr, inside=False):
        found = []
        for eqn in jaxpr.eqns:
            shape = getattr(eqn.invars[0].aval, "shape", None) if eqn.invars else None
            if eqn.primitive.name == "convert_element_type" and shape in matrices:
                if eqn.params["new_dtype"] == jnp.bfloat16:
                    found.append(inside)
            for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: v is None):
                if hasattr(sub := getattr(sub, "jaxpr", sub), "eqns"):
                    found += casts(sub, inside or eqn.primitive.name == "scan")
        return found

    found = casts(step.jaxpr)
    assert found and not any(found)


def test_weights_of_micro_batches_cost_no_second_forward_pass(one_device, monkeypatch):
    # Fewer tokens would have q, k and v apart and so more matmuls.
    monkeypatch.setattr(dense, "MERGED_FROM", 1)

    def matmuls(k):
        with jax.set_mesh(one_device):
            program = build(tiny_train(accumulation=k), one_device)
            state = jax.eval_shape(program.init, jax.random.key(0))
            return (
                program.step.lower(state, put(random_batch(), one_device, k))
                .compile()
                .as_text()
                .count(" dot(")
            )

    assert matmuls(2) == matmuls(1) > 0  # the forward pass run again for its weights would add some


def test_a_bad_step_changes_nothing_and_is_named(one_device):
    cfg = tiny_train(**{"optimizer.ema_decay": 0.9})
    with jax.set_mesh(one_device):
        calls = {"n": 0}

        def loss_fn(params, batch, carry, keys):
            del keys
            calls["n"] += 1
            poison = jnp.where(batch.tokens[0, 0] == 52, jnp.nan, 1.0)
            q = params["layers"]["attn"]["q"]["w"]
            total = jnp.sum(jnp.square(q)) * poison + sum(
                jnp.sum(jnp.square(x)) for n, x in flatten(params).items() if n != "layers/attn/q/w"
            )
            return Loss(terms={"l": Mean(total, jnp.sum(batch.weights))}), carry

        program = build(cfg, one_device, loss_fn)
        state = program.init(jax.random.key(0))
        good = random_batch()
        good.tokens[0, 0] = 1
        bad = random_batch()
        bad.tokens[0, 0] = 52
        state, _ = program.step(state, put(good, one_device, 1))
        before = jax.device_get(state)
        state, metrics = program.step(state, put(bad, one_device, 1))
        after = jax.device_get(state)
        assert int(after.step) == 2 and int(after.bad_steps) == 1
        for name in ("params", "opt_state", "ema"):
            for a, b in zip(
                jax.tree.leaves(getattr(before, name)),
                jax.tree.leaves(getattr(after, name)),
                strict=True,
            ):
                np.testing.assert_array_equal(a, b)
        where = [
            n
            for n, s in zip(flatten(after.params), np.array(metrics["grad_squares"]), strict=True)
            if not np.isfinite(s)
        ]
        assert where == ["layers/attn/q/w"]
        state, _ = program.step(state, put(good, one_device, 1))
        assert int(state.bad_steps) == 0


def test_clipping_average_and_freezing(one_device):
    cfg = tiny_train(
        **{
            "optimizer.clip_norm": 1e-3,
            "optimizer.ema_decay": 0.5,
            "optimizer.weight_decay": 0.0,
            "optimizer.freeze_rules": ((r"^embed/", True), (r".*", False)),
        }
    )
    with jax.set_mesh(one_device):
        program = build(cfg, one_device)
        state = program.init(jax.random.key(0))
        start = jax.device_get(state)
        assert list(flatten(start.frozen)) == ["embed/tokens"] and "embed" not in start.params
        state, metrics = program.step(state, put(random_batch(), one_device, 1))
        state = jax.device_get(state)
    np.testing.assert_array_equal(start.frozen["embed"]["tokens"], state.frozen["embed"]["tokens"])
    assert float(metrics["grad_norm"]) > 1e-2  # measured before clipping
    mu = sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(state.opt_state[0].mu))
    np.testing.assert_allclose(np.sqrt(mu) / (1 - cfg.optimizer.b1), 1e-3, rtol=1e-3)
    for e, a, b in zip(
        *(jax.tree.leaves(t) for t in (state.ema, start.params, state.params)), strict=True
    ):
        np.testing.assert_allclose(e, 0.5 * a + 0.5 * b, atol=1e-7)


def test_terms_with_their_own_denominators():
    a, b = Mean(jnp.float32(6), jnp.float32(3)), Mean(jnp.float32(4), jnp.float32(8))
    loss = Loss(terms={"a": a, "b": b}, scales={"b": 10.0})
    assert float(loss.value()) == 2 + 10 * 0.5
    both = a + b
    assert float(both.value()) == pytest.approx(10 / 11)  # not (2 + 0.5) / 2
    assert float(Mean(jnp.float32(0), jnp.float32(0)).value()) == 0
    assert np.isfinite(float(Mean.of(jnp.array([1.0, jnp.inf]), jnp.array([1.0, 0.0])).total))


def test_a_whole_step_holds_no_array_of_tokens_by_vocabulary(one_device):
    """128k entries and 8,192 tokens: their logits would be 4.3 GB in float32."""
    n_tokens, vocab = 8_192, 131_072
    cfg = tiny_train(
        **{"batch_size": 8, "length": n_tokens // 8, "model.vocab_size": vocab, "model.n_layers": 1}
    )
    with jax.set_mesh(one_device):
        program = build(cfg, one_device)
        compiled = program.step.lower(
            abstract_state(program), abstract_batch(cfg, one_device)
        ).compile()
    for shape in (f"[{n_tokens},{vocab}]", f"[8,{n_tokens // 8},{vocab}]"):
        assert shape not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * 4 * n_tokens * vocab
