"""Quantised trees in a whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_batch, tiny_model

from llm_jax import config as configs
from llm_jax import models, sharding
from llm_jax.nn import params as nn_params
from llm_jax.nn.params import flatten
from llm_jax.nn.quantized import Blockwise, Int8
from llm_jax.nn.weights import is_weight
from llm_jax.peft.quantization import dequantize_tree, nbytes, parse, quantize_tree


def made(**changes):
    cfg = tiny_model(**changes)
    specs = models.family(cfg.family).specs(cfg)
    return cfg, specs, jax.jit(lambda key: nn_params.init(specs, key))(jax.random.key(0))


def log_probs(params, cfg, batch):
    scores = jax.jit(lambda p, b: models.family(cfg.family).scores(p, b, cfg).log_probs)
    return scores(params, batch)


EVERYTHING = r"/w$|embed/"


@pytest.mark.parametrize("name", ["int8-row", "nf4-48-double"])
def test_a_model_of_leaves_equals_one_of_their_plain_arrays(name):
    """With the embedding, which is the head too, in a loop over layers and in a scan."""
    cfg, specs, params = made(scan=False)
    held = quantize_tree(params, specs, parse(name), EVERYTHING)
    assert is_weight(held["embed"]["tokens"]) and is_weight(held["layers"]["mlp"]["up"]["w"])
    assert not is_weight(held["layers"]["attn_norm"]["scale"])
    assert nbytes(held) < nbytes(params) / 2.5
    batch = random_batch(rows=2)
    plain = log_probs(dequantize_tree(held), cfg, batch)
    for scan in (False, True):
        ours = log_probs(held, tiny_model(scan=scan), batch)
        np.testing.assert_allclose(ours, plain, atol=2e-5)


def test_constants_stay_float32_in_a_bfloat16_model():
    """And what goes through the layers is bfloat16, also where the embedding is quantised."""
    cfg, specs, params = made(dtype="bfloat16")
    held = quantize_tree(params, specs, parse("nf4-8"), EVERYTHING)
    hidden = jax.eval_shape(
        lambda p, b: models.family(cfg.family).hidden(p, b, cfg).x, held, random_batch(rows=2)
    )
    assert hidden.dtype == jnp.bfloat16
    cast = models.family(cfg.family).cast(quantize_tree(params, specs, parse("nf4-8")), cfg.dtype)
    leaf = cast["layers"]["attn"]["q"]["w"]
    assert leaf.codes.dtype == jnp.uint8 and leaf.constants.dtype == jnp.float32
    assert cast["embed"]["tokens"].dtype == jnp.bfloat16


def temporary_bytes(params, cfg, batch):
    """Of a training step of one small parameter: the embeddings' scale."""

    def loss(scale, params, batch):
        whole = {**params, "embed": {"tokens": params["embed"]["tokens"] * scale}}
        return -jnp.mean(models.family(cfg.family).scores(whole, batch, cfg).log_probs)

    compiled = jax.jit(jax.grad(loss)).lower(jnp.float32(1), params, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("name", "scan"), [("nf4-64-double", False), ("nf4-64-double", True), ("int8-channel", False)]
)
def test_a_training_step_holds_no_plain_copy_of_the_model(name, scan):
    """A layer more costs its activations, not its matrices: copies that are kept for the backward
    pass, or all made before the first layer, would cost them once or twice."""
    need, plain = {}, {}
    for n_layers in (2, 4):
        cfg = tiny_model(scan=scan, n_layers=n_layers, d_model=128, d_ff=512, n_heads=2, kv_heads=2)
        specs = models.family(cfg.family).specs(cfg)
        params = nn_params.abstract(specs)
        plain[n_layers] = nbytes({p: x for p, x in flatten(params).items() if p.endswith("/w")})
        held = jax.eval_shape(lambda p: quantize_tree(p, specs, parse(name)), params)  # noqa: B023
        need[n_layers] = temporary_bytes(held, cfg, random_batch(rows=1, length=8))
    assert need[4] - need[2] < (plain[4] - plain[2]) / 4


@pytest.mark.parametrize("name", ["nf4-8-double"])
def test_born_sharded_on_a_mesh_with_equal_results(name):
    cfg, specs, params = made()
    batch = random_batch(rows=2)
    expected = log_probs(quantize_tree(params, specs, parse(name)), cfg, batch)
    mesh = sharding.make_mesh(configs.MeshConfig(fsdp=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda p: quantize_tree(p, specs, parse(name)), params)
        axes = {path: spec.axes for path, spec in flatten(specs).items()}
        cut = nn_params.unflatten(
            {
                path: jax.tree.map(
                    lambda a: sharding.named(a, mesh),
                    leaf.layout(axes[path]) if is_weight(leaf) else axes[path],
                    is_leaf=lambda a: isinstance(a, tuple),
                )
                for path, leaf in flatten(shapes).items()
            }
        )
        make = jax.jit(lambda p: quantize_tree(p, specs, parse(name)), out_shardings=cut)
        held = make(jax.device_put(params, nn_params.shardings(specs, mesh)))
        codes = held["layers"]["attn"]["q"]["w"].codes
        assert codes.sharding.shard_shape(codes.shape)[1] == codes.shape[1] // 2
        np.testing.assert_allclose(log_probs(held, cfg, batch), expected, atol=2e-5)


@pytest.mark.parametrize(
    "name", ["int8-row", "int8-channel", "int8-tensor", "nf4-64", "int4-32-double", "int3-128"]
)
def test_names_are_read_and_written(name):
    assert parse(name).name == name


def test_int8_is_absmax_or_blockwise_by_its_name():
    x = jnp.ones((4, 64))
    assert isinstance(parse("int8-row").quantize(x), Int8)
    assert isinstance(parse("int8-64").quantize(x), Blockwise)


@pytest.mark.parametrize(
    "name", ["nf4", "nf4-0", "int9-64", "int8-column", "fp4-64", "nf4-64-twice"]
)
def test_unknown_schemes(name):
    with pytest.raises(ValueError, match=r"no quantisation scheme.*nf4-64-double"):
        parse(name)


def test_errors_and_deletion():
    _, specs, params = made()
    with pytest.raises(ValueError, match="targets='nothing'"):
        quantize_tree(params, specs, parse("nf4-8"), "nothing")
    held = quantize_tree(params, specs, parse("nf4-8"), delete=True)
    assert params["layers"]["mlp"]["up"]["w"].is_deleted()
    assert not params["embed"]["tokens"].is_deleted()
    with pytest.raises(ValueError, match="a Blockwise already"):
        quantize_tree(held, specs, parse("nf4-8"))
