"""Which weights are pruned."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn.masked import Masked
from llm_jax.nn.params import Constant, ParamSpec
from llm_jax.peft import pruning

SPECS = {
    "layers": {
        "mlp": {"up": {"w": ParamSpec((2, 4, 6), ("layer", "embed", "mlp"), Constant(0.0))}},
        "norm": {"scale": ParamSpec((2, 4), ("layer", None), Constant(1.0))},
    },
    "embed": {"tokens": ParamSpec((5, 4), ("vocab", "embed"), Constant(0.0))},
}
UP = "layers/mlp/up/w"


def params(seed=0):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((2, 4, 6)).astype(np.float32)
    w[1] *= 100  # one layer is much larger
    return {
        "layers": {"mlp": {"up": {"w": jnp.asarray(w)}}, "norm": {"scale": jnp.ones((2, 4))}},
        "embed": {"tokens": jnp.ones((5, 4))},
    }


def test_each_matrix_loses_its_smallest():
    tree = params()
    masks = pruning.magnitude_masks(tree, SPECS, 0.25)
    assert list(masks) == [UP]  # neither norms nor the embedding
    w = np.abs(tree["layers"]["mlp"]["up"]["w"])
    for layer, mask in zip(w, np.asarray(masks[UP]), strict=True):
        assert (~mask).sum() == 6
        assert layer[~mask].max() < layer[mask].min()
    assert pruning.sparsity(masks) == 0.25


def test_globally_the_small_layer_loses_more():
    masks = pruning.magnitude_masks(params(), SPECS, 0.5, scope="global")
    kept = np.asarray(masks[UP]).sum(axis=(1, 2))
    assert kept.sum() == 24 and kept[1] > 22


def test_ties_do_not_change_the_share():
    """All magnitudes equal: a threshold alone would prune all or nothing."""
    tree = params()
    tree["layers"]["mlp"]["up"]["w"] = jnp.ones((2, 4, 6))
    masks = pruning.magnitude_masks(tree, SPECS, 0.5)
    assert np.asarray(masks[UP]).sum(axis=(1, 2)).tolist() == [12, 12]


def test_two_of_four_keeps_the_largest_of_each_four_inputs():
    tree = params()
    w = tree["layers"]["mlp"]["up"]["w"].at[0, :, 0].set(jnp.array([1.0, -4.0, 2.0, 3.0]))
    w = w.at[0, :, 1].set(1.0)  # equal ones: the first two stay
    tree["layers"]["mlp"]["up"]["w"] = w
    mask = np.asarray(pruning.n_of_m_masks(tree, SPECS, 2, 4)[UP])
    assert mask[0, :, 0].tolist() == [False, True, False, True]
    assert mask[0, :, 1].tolist() == [True, True, False, False]
    assert (mask.sum(axis=1) == 2).all()


def test_cubic_schedule():
    """Zhu & Gupta's (2017) equation 1: most is pruned early. Half-way 7/8 of it is; a linear
    schedule would have 1/2."""
    at = [pruning.cubic_sparsity(s, begin=10, end=30, final=0.8) for s in (0, 10, 20, 30, 99)]
    np.testing.assert_allclose(at, [0, 0, 0.7, 0.8, 0.8])
    assert pruning.cubic_sparsity(5, begin=5, end=5, final=0.5) == 0.5
    assert pruning.cubic_sparsity(20, begin=10, end=30, final=0.8, initial=0.4) == 0.75


def test_thresholds_keep_the_highest_scores_of_each_layer():
    scores = {UP: params()["layers"]["mlp"]["up"]["w"]}
    cut = pruning.score_thresholds(scores, SPECS, 0.5)
    assert cut[UP].shape == (2,)
    assert (scores[UP] >= cut[UP][:, None, None]).sum(axis=(1, 2)).tolist() == [12, 12]
    nothing = pruning.score_thresholds({UP: jnp.zeros((2, 4, 6))}, SPECS, 0.0)
    assert (0 >= nothing[UP]).all()


def test_trees():
    tree = params()
    masks = pruning.magnitude_masks(tree, SPECS, 0.5)
    leaf = pruning.masked(tree, masks)["layers"]["mlp"]["up"]["w"]
    assert isinstance(leaf, Masked)
    plain = pruning.pruned(tree, masks)["layers"]["mlp"]["up"]["w"]
    np.testing.assert_array_equal(plain, leaf.dequantize(jnp.float32))
    assert int((plain == 0).sum()) == 24


def test_errors():
    tree = params()
    with pytest.raises(ValueError, match=r"sparsity of 1\.0"):
        pruning.magnitude_masks(tree, SPECS, 1.0)
    with pytest.raises(ValueError, match="'row' is not one of matrix, global"):
        pruning.magnitude_masks(tree, SPECS, 0.5, scope="row")
    with pytest.raises(ValueError, match="targets='nothing'"):
        pruning.magnitude_masks(tree, SPECS, 0.5, targets="nothing")
    with pytest.raises(ValueError, match="4 inputs, which do not divide by 8"):
        pruning.n_of_m_masks(tree, SPECS, 2, 8)
    with pytest.raises(ValueError, match="is a Masked"):
        pruning.magnitude_masks(
            pruning.masked(tree, pruning.magnitude_masks(tree, SPECS, 0.5)), SPECS, 0.5
        )
