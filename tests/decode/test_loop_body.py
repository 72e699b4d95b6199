"""What the compiled loop over tokens does: it reads weights and cache and copies neither."""

import re

import jax
import jax.numpy as jnp
import pytest
from tiny import tiny_model

from llm_jax.decode import generate as G
from llm_jax.decode.sampling import make_sampling
from llm_jax.models import decoder
from llm_jax.nn import params as P

# An instruction of HLO text: name = type[shape]{layout} opcode(...).
INSTRUCTION = re.compile(r"^ *(?:ROOT )?%(\S+) = \w+\[([\d,]*)\]\S* ([\w-]+)\(")
# Large enough that scores and logits are smaller than any matrix and than a layer's cache.
SIZES = {"n_layers": 3, "d_model": 64, "n_heads": 4, "d_ff": 128, "scan": True}
MOVES_NOTHING = {"get-tuple-element", "bitcast", "parameter", "tuple"}


@pytest.fixture
def optimised():
    """The suite compiles without most optimisations; here they are what is tested."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def made_in_loop(cfg, rows, n_slots):
    """[(name, shape)] of the arrays as large as a weight matrix that the loop over tokens makes."""
    like = jax.ShapeDtypeStruct
    compiled = G.generate_tokens.lower(
        jax.eval_shape(lambda: P.init(decoder.specs(cfg), jax.random.key(0))),
        like((rows, 32), jnp.int32),
        like((rows,), jnp.int32),
        like((), jnp.int32),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)),
        make_sampling(temperature=0),
        like((1,), jnp.int32),
        None,
        cfg=cfg,
        n_slots=n_slots,
    ).compile()
    text = compiled.as_text()
    bodies = set(re.findall(r"while\(.*body=%?([\w.-]+)", text))
    parts = re.split(r"\n(?=%|ENTRY)", text)
    found, size = [], cfg.d_model * cfg.kv_heads * cfg.head_dim  # the smallest matrix
    for part in parts:
        if part.split(" ")[0].lstrip("%") in bodies:
            for line in part.splitlines():
                if (m := INSTRUCTION.match(line)) and m[3] not in MOVES_NOTHING:
                    shape = [int(n) for n in m[2].split(",") if n]
                    if jnp.prod(jnp.array(shape, int)) >= size:
                        found.append((m[1], tuple(shape)))
    assert bodies
    return found


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "changes", [{"kv_heads": 4}, {"kv_heads": 2, "tied": False, "norm": "layernorm"}]
)
def test_only_the_cache_is_written_and_in_place(optimised, rows, changes):
    """One layer's keys and values are written where they stand, everything else is smaller.

    A copy of a layer's weights or of its cache would have the size of one, and so would a whole
    one, stacked or transposed.
    """
    cfg = tiny_model(**SIZES, **changes)
    written = made_in_loop(cfg, rows, 64)
    cache = rows * cfg.kv_heads * 96 * cfg.head_dim
    assert len(written) == 2 * cfg.n_layers, written
    for name, shape in written:
        assert "dynamic-update-slice" in name and jnp.prod(jnp.array(shape)) == cache, name


def test_a_scan_over_layers_would_be_seen(optimised, monkeypatch):
    monkeypatch.setattr(G, "LOOPED_LAYERS", 0)
    assert any(
        "dynamic-update-slice" not in name
        for name, _ in made_in_loop(tiny_model(**SIZES, kv_heads=4), 3, 96)
    )
