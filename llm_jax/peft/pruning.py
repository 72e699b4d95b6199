"""Which weights are pruned: by magnitude, by n of m, or by scores, and how many at which step.

Masks are dicts {path: bool array}, true where a weight stays; `targets` is a pattern that is
searched in the paths of the matrices.
"""

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.nn.masked import Masked, Scored
from llm_jax.nn.params import flatten, unflatten
from llm_jax.nn.weights import is_weight
from llm_jax.peft.quantization import LINEAR
from llm_jax.types import Array, PyTree

SCOPES = ("matrix", "global")


def target_paths(params: PyTree, specs: PyTree, targets: str) -> list[str]:
    """Paths of the matrices that `targets` is found in.

    Raises:
      ValueError: there are none, or one is not a plain array.
    """
    flat, declared = flatten(params), flatten(specs)
    paths = [p for p in flat if _rank(declared[p]) == 2 and re.search(targets, p)]
    if not paths:
        raise ValueError(f"targets={targets!r} is found in the path of no matrix")
    if objects := [p for p in paths if is_weight(flat[p])]:
        raise ValueError(f"{objects[0]} is a {type(flat[objects[0]]).__name__}; prune plain arrays")
    return paths


def magnitude_masks(
    params: PyTree,
    specs: PyTree,
    sparsity: float,
    *,
    targets: str = LINEAR,
    scope: str = "matrix",
) -> dict[str, Array]:
    """Masks without the round(sparsity * n) smallest magnitudes of each layer's matrix, or of all
    of them together ("global").

    The work is the host's, on whole arrays. Of equal magnitudes the first are pruned first.

    Raises:
      ValueError: a sparsity outside [0, 1), a scope that is not in SCOPES, or no target.
    """
    flat, declared = flatten(params), flatten(specs)
    paths = target_paths(params, specs, targets)
    masks = keep_largest(
        [np.abs(np.asarray(flat[p], np.float32)) for p in paths],
        [_stacked(declared[p]) for p in paths],
        sparsity,
        scope,
    )
    return {p: _like(m, flat[p]) for p, m in zip(paths, masks, strict=True)}


def keep_largest(
    values: Sequence[np.ndarray], stacked: Sequence[bool], sparsity: float, scope: str
) -> list[np.ndarray]:
    """For arrays of values, of which some lead with a layer axis: true but for the smallest."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"a sparsity of {sparsity}; it has to be in [0, 1)")
    if scope not in SCOPES:
        raise ValueError(f"{scope!r} is not one of {', '.join(SCOPES)}")
    if scope == "global":
        sizes = np.cumsum([v.size for v in values])[:-1]
        kept = np.split(_largest(np.concatenate([v.ravel() for v in values]), sparsity), sizes)
        return [k.reshape(v.shape) for k, v in zip(kept, values, strict=True)]
    out = []
    for v, many in zip(values, stacked, strict=True):
        layers = v if many else v[None]
        out.append(np.stack([_largest(w.ravel(), sparsity) for w in layers]).reshape(v.shape))
    return out


def n_of_m_masks(
    params: PyTree, specs: PyTree, n: int, m: int, *, targets: str = LINEAR
) -> dict[str, Array]:
    """Masks that keep the n largest magnitudes of each m consecutive inputs of an output.

    2 of 4 is the pattern that GPUs multiply at twice the speed (Mishra et al. 2021).

    Raises:
      ValueError: n outside 1 .. m, no target, or a matrix whose inputs do not divide by m.
    """
    if not 1 <= n <= m:
        raise ValueError(f"{n}:{m} keeps {n} of {m} weights; n has to be between 1 and m")
    flat, out = flatten(params), {}
    for path in target_paths(params, specs, targets):
        w = flat[path]
        if w.shape[-2] % m:
            raise ValueError(f"{path} has {w.shape[-2]} inputs, which do not divide by {m}")
        groups = jnp.abs(w).reshape(*w.shape[:-2], -1, m, w.shape[-1])
        order = jnp.argsort(jnp.argsort(-groups, axis=-2, stable=True), axis=-2)
        out[path] = (order < n).reshape(w.shape)
    return out


def masked(params: PyTree, masks: Mapping[str, Array]) -> PyTree:
    """The tree with `Masked` leaves."""
    flat = flatten(params)
    return unflatten({**flat, **{p: Masked(flat[p], mask) for p, mask in masks.items()}})


def scored(params: PyTree, scores: Mapping[str, Array], thresholds: Mapping[str, Array]) -> PyTree:
    """The tree with `Scored` leaves."""
    flat = flatten(params)
    new = {p: Scored(flat[p], s, thresholds[p]) for p, s in scores.items()}
    return unflatten({**flat, **new})


def pruned(params: PyTree, masks: Mapping[str, Array]) -> PyTree:
    """The tree of plain arrays with zeros where the masks are false."""
    flat = flatten(params)
    new = {p: jnp.where(mask, flat[p], 0).astype(flat[p].dtype) for p, mask in masks.items()}
    return unflatten({**flat, **new})


def cubic_sparsity(step: int, *, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """Sparsity at a step: final + (initial - final) (1 - (step - begin) / (end - begin))^3 between
    begin and end (Zhu & Gupta 2017, equation 1)."""
    if end <= begin:
        return final if step >= end else initial
    done = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return final + (initial - final) * (1.0 - done) ** 3


def score_thresholds(
    scores: Mapping[str, Array], specs: PyTree, sparsity: float
) -> dict[str, Array]:
    """The score from which on weights stay, for each layer's matrix: [M] of stacked ones, else
    scalars. Equal scores stay or go together, so those of a start at 0 all stay."""
    declared = flatten(specs)

    def one(path: str, s: Array) -> Array:
        flat = np.asarray(s).reshape(s.shape[0] if _stacked(declared[path]) else 1, -1)
        k = round(sparsity * flat.shape[1])
        cut = np.partition(flat, k, axis=1)[:, k] if k else np.full(len(flat), -np.inf)
        cut = cut.astype(np.float32)
        return jnp.asarray(cut if _stacked(declared[path]) else cut[0])

    return {path: one(path, s) for path, s in scores.items()}


def sparsity(masks: Mapping[str, Array]) -> float:
    """Share of the masked matrices' weights that are pruned."""
    kept = sum(int(jnp.sum(m)) for m in masks.values())
    return 1.0 - kept / sum(m.size for m in masks.values())


def _largest(values: np.ndarray, sparsity: float) -> np.ndarray:
    k = round(sparsity * values.size)
    if not k:
        return np.ones(values.shape, bool)
    cut = np.partition(values, k - 1)[k - 1]
    keep = values > cut
    ties = np.flatnonzero(values == cut)
    keep[ties[k - int(np.sum(values < cut)) :]] = True
    return keep


def _like(mask: np.ndarray, w: Array) -> Array:
    return jax.device_put(mask, w.sharding)


def _stacked(spec) -> bool:
    return spec.axes[:1] == ("layer",)


def _rank(spec) -> int:
    return len(spec.shape) - _stacked(spec)
