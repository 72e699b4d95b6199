"""The first step on packed preferences is the same on every mesh axis: loss and gradient."""

import jax
import numpy as np
import pytest
from tiny import tiny_train

from llm_jax import sharding
from llm_jax.align.direct import training as direct
from llm_jax.align.reward import training as reward
from llm_jax.data.branches import Document, lay
from llm_jax.data.loader import eval_batches
from llm_jax.data.tokens import Tokens
from llm_jax.train import program
from llm_jax.types import Batch


def packed(*, shared: bool, ends: bool) -> Batch:
    """16 rows of 16 tokens, each of one or two prompts."""
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(24 if shared else 16):
        answers = [rng.integers(0, 53, rng.integers(1, 3)).tolist() for _ in range(2)]
        counted = [[True] * len(a) for a in answers]
        prompt = rng.integers(0, 53, rng.integers(2, 5)).tolist()
        documents.append(Document(prompt, answers, counted, [1, 1], [1.0, 0.0]))
    laid = lay(documents, shared=shared)
    tokens = Tokens(
        [laid.ids.astype(np.uint16)],
        laid.offsets,
        vocab_size=53,
        trained=laid.written_N,
        read=laid.ends_N if ends else None,
        branches=laid.branches,
        ref_log_probs=rng.normal(-3.0, 1.0, len(laid.ids)).astype(np.float32),
    )
    lengths = np.ones(53, np.int32)
    return eval_batches(
        tokens, length=16, batch_size=16, packing="first_fit", token_lengths=lengths
    )[0]


AXES = {
    "data": {"mesh.data": 8},
    "fsdp": {"mesh.fsdp": 8, "mesh.data": 1},
    "tensor": {"mesh.tensor": 8, "mesh.data": 1},
    "stage": {"mesh.stage": 2, "mesh.data": 4},
    "context": {"mesh.context": 2, "mesh.data": 4},
}


def first_step(kind: str, batch: Batch, devices: int, **changes):
    """(loss, squared gradient norms by parameter) of one step."""
    values = {"data.format": "preference", "model.positions": "rope", **changes}
    if kind == "reward":
        values["model.head"] = "reward"
    cfg = tiny_train(**values)
    make = reward.make_loss_fn if kind == "reward" else lambda c: direct.make_loss_fn(c, "cached")
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        made = program.build(cfg, mesh, make(cfg))
        state = made.init(jax.random.key(0))
        if kind == "reward":  # it starts at 0, from which no gradient goes back
            head = {**state.params["reward"], "w": state.params["reward"]["w"] + 0.1}
            state = state.replace(params={**state.params, "reward": head})
        _, metrics = made.step(state, program.put(batch, mesh, cfg.accumulation))
        assert int(metrics["bad_steps"]) == 0
        return float(metrics["loss"]), np.asarray(metrics["grad_squares"])


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_the_first_step_is_the_same_on_every_axis(kind):
    batches = {shared: packed(shared=shared, ends=kind == "reward") for shared in (True, False)}
    alone = {shared: first_step(kind, batch, 1) for shared, batch in batches.items()}
    for axis, changes in AXES.items():
        shared = axis != "context"
        loss, squares = first_step(kind, batches[shared], 8, **changes)
        expected, expected_squares = alone[shared]
        assert loss == pytest.approx(expected, rel=1e-5), axis
        np.testing.assert_allclose(squares, expected_squares, rtol=1e-4, atol=1e-9, err_msg=axis)
    loss, squares = first_step(kind, batches[True], 1, accumulation=4)
    assert loss == pytest.approx(alone[True][0], rel=1e-5)
    np.testing.assert_allclose(squares, alone[True][1], rtol=1e-4, atol=1e-9)


def test_a_ring_cannot_share_prompts():
    batch = packed(shared=True, ends=False)
    with pytest.raises(ValueError, match=r"set data\.preference\.shared_prompt=False"):
        first_step("dpo", batch, 8, **AXES["context"])
