"""FLOPs by every convention, against numbers computed by hand and against the traced program."""

import jax
import numpy as np
import pytest
from jax.extend import core
from tiny import random_batch, tiny_model

from llm_jax.config import MoEConfig, resolve_model
from llm_jax.models import decoder
from llm_jax.models.presets import preset
from llm_jax.nn import params as P
from llm_jax.nn.blockwise import Mask, Shape, visible
from llm_jax.scaling import flops, parameters
from llm_jax.train.metrics import active_count


def matmul_flops(jaxpr: core.Jaxpr) -> int:
    """2 M N K of every dot_general of a program, those of inner programs too."""
    total = 0
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += matmul_flops(inner)
        if eqn.primitive.name == "dot_general":
            (over, _), _ = eqn.params["dimension_numbers"]
            k = np.prod([eqn.invars[0].aval.shape[i] for i in over])
            total += 2 * int(k * np.prod(eqn.outvars[0].aval.shape))
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": False, "kv_heads": 2, "activation": "gelu", "qkv_bias": True, "mlp_bias": True},
        {"n_layers": 3, "positions": "learned", "head_dim": 8, "qk_norm": True},
    ],
    ids=str,
)
def test_forward_counts_the_matmuls_that_are_traced(changes):
    """Biases, norms, embedding rows and position tables are no matmuls; a tied head is one."""
    cfg = tiny_model(**changes)
    params = P.abstract(decoder.specs(cfg))
    batch = random_batch(rows=2, length=16)
    traced = jax.make_jaxpr(lambda p: decoder.logits(p, decoder.hidden(p, batch, cfg).x, cfg))(
        params
    )
    want = flops.forward(decoder.specs(cfg), cfg, 16, causal=False)
    assert matmul_flops(traced.jaxpr) == 32 * sum(want.values())


def test_by_hand():
    """d_model 32, 8 heads of 4, d_ff 64, 56 rows of vocabulary, 2 layers, rows of 16."""
    cfg = tiny_model()
    specs = decoder.specs(cfg)
    layer = 4 * 32 * 32 + 3 * 32 * 64
    table, norms = 56 * 32, 5 * 32
    assert flops.CONVENTIONS["6nd"](specs, cfg, 16) == 6 * (2 * layer + table + norms)
    assert flops.CONVENTIONS["kaplan"](specs, cfg, 16) == 6 * (2 * layer + norms)
    attention = 12 * 2 * 8 * 4 * 16  # 12 layers heads width keys
    assert flops.CONVENTIONS["exact"](specs, cfg, 16) == 6 * (2 * layer + table) + attention
    # Half of a full square would be 8 keys a token; with its own a token sees 8.5 on average.
    causal = 6 * (2 * layer + table) + attention * 8.5 / 16
    assert flops.CONVENTIONS["causal"](specs, cfg, 16) == causal
    # Lookup and head as matmuls with the whole table, 3 for each of 8 heads' probabilities.
    hoffmann = 6 * (2 * layer + 2 * table) + attention + 3 * 3 * 2 * 8 * 16
    assert flops.CONVENTIONS["hoffmann"](specs, cfg, 16) == hoffmann
    assert flops.CONVENTIONS["hoffmann_layers"](specs, cfg, 16) == hoffmann - 6 * 2 * table
    # MFU's convention counts norms as if they were matrices.
    assert flops.CONVENTIONS["mfu"](specs, cfg, 16) == 6 * (2 * layer + table + norms) + attention


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
def test_parameters_by_hand(tied):
    cfg = tiny_model(tied=tied)
    specs = decoder.specs(cfg)
    matrices, table, norms = 2 * (4 * 32 * 32 + 3 * 32 * 64), 56 * 32, 5 * 32
    got = {name: f(specs, cfg) for name, f in parameters.CONVENTIONS.items()}
    assert got.pop("hoffmann") == 53 * 32 + 2 * (5 * 32 * 33 + 2 * 32 * 64 + 64 + 2 * 32)
    assert got == {
        "all": matrices + norms + (1 if tied else 2) * table,
        "active": matrices + norms + (1 if tied else 2) * table,
        "non_embedding": matrices + norms,
        "with_head": matrices + norms + table,
        "embedding": table,
        "head": 0 if tied else table,
        "estimate": 2 * 32 * 2 * (2 * 32 + 64),  # the gate is not in it
        "12ld2": 12 * 2 * 32 * 32,
    }
    assert sum(parameters.parts(specs).values()) == got["all"]


def test_the_compiler_counts_what_we_count():
    """XLA adds some FLOPs for each element of an array to those of the matmuls, 1.7 % here; half of
    attention would be 3.5 % less, an output head forgotten 7 %, a backward pass of one forward
    pass 33 %."""
    sizes = {"d_model": 128, "d_ff": 512, "n_heads": 4, "kv_heads": 4, "activation": "gelu"}
    cfg = tiny_model(vocab_size=256, **sizes)
    specs = decoder.specs(cfg)
    batch = random_batch(rows=2, length=64)

    def total(params):
        logits = decoder.logits(params, decoder.hidden(params, batch, cfg).x, cfg)
        return jax.nn.log_softmax(logits)[..., 0].sum()

    costs = jax.jit(jax.grad(total)).lower(P.abstract(specs)).compile().cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    assert 1.0 < costs["flops"] / (128 * flops.CONVENTIONS["exact"](specs, cfg, 64)) < 1.03


def test_experts_count_by_the_ones_a_token_meets():
    """2 of 4 routed experts and 1 shared one: all 4 would give 15 * 64 columns, 2 alone 6 * 64."""
    cfg = tiny_model(moe=MoEConfig(n_experts=4, top_k=2, n_shared=1, d_ff=64))
    specs = decoder.specs(cfg)
    got = flops.forward(specs, cfg, 16, causal=False)
    for name in ("up", "gate", "down"):
        assert got[f"moe/experts/{name}"] == 2 * 2 * (2 * 32 * 64)  # layers, FLOPs, two experts
        assert got[f"moe/shared/{name}"] == 2 * 2 * (32 * 64)
    assert got["moe/router"] == 2 * 2 * 32 * 4
    active = P.count(specs) - 2 * 2 * 3 * 32 * 64  # two experts of each layer less
    assert active_count(specs, cfg) == active
    assert flops.CONVENTIONS["6nd"](specs, cfg, 16) == 6 * active
    dense = flops.CONVENTIONS["mfu"](decoder.specs(tiny_model()), tiny_model(), 16)
    # Three experts on a token's path in place of one MLP, and the router.
    more = 6 * 2 * (2 * 3 * 32 * 64 + 32 * 4)
    assert flops.CONVENTIONS["mfu"](specs, cfg, 16) == dense + more


def test_mixtral_meets_13_of_its_47_billion():
    cfg = preset("mixtral-8x7b")
    resolve_model(cfg, vocab_size=0, length=4096, backend="tpu")
    specs = decoder.specs(cfg)
    assert round(P.count(specs) / 1e9, 1) == 46.7
    assert round(active_count(specs, cfg) / 1e9, 1) == 12.9  # the paper: 13B of 47B


@pytest.mark.parametrize(("length", "window"), [(1, 0), (7, 0), (7, 3), (7, 7), (7, 50)])
def test_visible_keys_counts_the_mask(length, window):
    n = np.arange(length)
    mask = visible(Mask(), Shape(True, window), n, n)
    assert flops.visible_keys(length, window) == float(np.sum(mask)) / length


def test_llama_3_405b_takes_the_flops_of_its_paper():
    cfg = preset("llama3-405b")
    resolve_model(cfg, vocab_size=0, length=8192, backend="tpu")
    total = 15.6e12 * flops.CONVENTIONS["6nd"](decoder.specs(cfg), cfg, 8192)
    assert total == pytest.approx(3.8e25, rel=0.002)
