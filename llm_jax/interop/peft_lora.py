"""LoRA in Hugging Face's peft: which module of theirs each of our updates is, and its arrays.

A module M with a LoRA of rank r has M.lora_A.weight [r, in] and M.lora_B.weight [out, r] and adds
scale * lora_B lora_A x, where scale is lora_alpha / r (or / sqrt(r)); ranks and alphas may differ
from module to module. Ours are stacked over layers with one rank and scale for all: lower ranks and
layers without an update are filled up with zeros, other scales go into b.

GPT-2's c_attn is queries, keys and values in one. As one module our three updates are blocks of
rank r each: lora_A = [a_q a_k a_v]^T, lora_B = diag(b_q, b_k, b_v)^T, rank 3 r.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from llm_jax.config import ModelConfig, PeftConfig
from llm_jax.interop.names import THIRDS, UPRIGHT, Part
from llm_jax.interop.weights import halves

ROTATED = re.compile(r"attn/[qk]/w$")


class Update(NamedTuple):
    """One matrix's change scale * a @ b."""

    a: np.ndarray  # [D_in, r]
    b: np.ndarray  # [r, D_out]
    scale: float


def modules(parts: list[Part]) -> dict[str, list[Part]]:
    """{module: its matrix's parts in their order} of the layers' matrices that are one matrix each
    in transformers (not experts or routers)."""
    found: dict[str, list[Part]] = {}
    for part in parts:
        upright = part.path in UPRIGHT or "/router/" in part.path
        if len(part.size) == 2 and len(part.index) == 1 and not upright:
            found.setdefault(part.name.removesuffix(".weight"), []).append(part)
    return {name: sorted(pieces, key=lambda part: part.offset) for name, pieces in found.items()}


def scale(r: int, alpha: float, rank_stabilized: bool) -> float:
    """The factor on B A."""
    return alpha / (math.sqrt(r) if rank_stabilized else r)


# Ours -> theirs -------------------------------------------------------------------------------


def written(
    pairs: Mapping[str, np.ndarray], parts: list[Part], model: ModelConfig
) -> tuple[dict[str, np.ndarray], list[str]]:
    """({name: tensor}, modules with an update of three blocks) of {path/a, path/b}, each stacked.

    Raises:
      ValueError: an update of something that is no module with a matrix.
    """
    paths = [p.removesuffix("/a") for p in pairs if p.endswith("/a")]
    known = modules(parts)
    expressible = {part.path for pieces in known.values() for part in pieces}
    for path in paths:
        if path not in expressible:
            raise ValueError(
                f"a LoRA of {path!r} has no place in peft's layout, which has those of a layer's "
                "matrices (not of experts, embeddings or the head); narrow peft.targets"
            )
    tensors, fused = {}, []
    for module, pieces in known.items():
        mine = [part for part in pieces if part.path in paths]
        if not mine:
            continue
        a = np.concatenate([_a(pairs, part, mine) for part in pieces], axis=1)
        b = np.zeros((a.shape[1], sum(part.size[1] for part in pieces)), np.float32)
        r, column = a.shape[1] // len(pieces), 0
        for n, part in enumerate(pieces):
            if part in mine:
                own = np.asarray(pairs[f"{part.path}/b"], np.float32)[part.index]
                own = halves(own, model) if _turns(part, model) else own
                b[n * r : (n + 1) * r, column : column + part.size[1]] = own
            column += part.size[1]
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a.T, b.T
        if len(pieces) > 1:
            fused.append(module)
    return tensors, fused


def _a(pairs: Mapping[str, np.ndarray], part: Part, mine: list[Part]) -> np.ndarray:
    """a [D_in, r]; zeros for the part of a fused module that has no update."""
    own = np.asarray(pairs[f"{(part if part in mine else mine[0]).path}/a"], np.float32)
    return own[part.index] if part in mine else np.zeros_like(own[part.index])


def _turns(part: Part, model: ModelConfig) -> bool:
    """Whether the columns are rotated pairs that lie beside each other in ours, as halves in theirs."""
    rotary = model.rope_interleaved and model.positions == "rope"
    return bool(rotary and ROTATED.search(part.path))


def suffixes(targeted: list[str], every: list[str]) -> list[str]:
    """The shortest ends of module names that select the `targeted` among all: "q_proj", or where
    others end alike "attn.c_proj"."""
    rest, out = set(every) - set(targeted), set()
    for module in targeted:
        names = module.split(".")
        for n in range(1, len(names) + 1):
            end = ".".join(names[-n:])
            if not any(f".{other}".endswith(f".{end}") for other in rest):
                out.add(end)
                break
    return sorted(out)


# Theirs -> ours -------------------------------------------------------------------------------


def targets(config: Mapping[str, Any], module: str) -> bool:
    """Whether an adapter_config.json selects a module, by peft's rules."""

    def ends(names: Any) -> bool:
        return any(module == name or module.endswith(f".{name}") for name in names)

    out = config.get("exclude_modules")
    if out and (re.fullmatch(out, module) if isinstance(out, str) else ends(out)):
        return False
    for name in config.get("modules_to_save") or ():
        if re.match(rf"(^|.*\.){name}($|\..*)", module):
            return False
    wanted = config.get("target_modules") or ()
    if isinstance(wanted, str):
        return wanted.lower() == "all-linear" or re.fullmatch(wanted, module) is not None
    if not ends(wanted):
        return False
    chosen = config.get("layers_to_transform")
    if chosen is None or chosen == []:
        return True
    patterns = config.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if m := re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", module):
            return int(m["idx"]) in ([chosen] if isinstance(chosen, int) else chosen)
    return False


def of_module(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The entry of a rank_pattern or alpha_pattern for a module."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def updates(
    lora_A: np.ndarray, lora_B: np.ndarray, factor: float, pieces: list[Part], rank: int
) -> dict[str, Update]:
    """{path: update} of one module. That of a fused one is cut into blocks if it is made of blocks
    of `rank`; else the parts share its a."""
    a, b = lora_A.T.astype(np.float32), lora_B.T.astype(np.float32)
    if len(pieces) == 1:
        return {pieces[0].path: Update(a, b, factor)}
    columns = np.split(b, THIRDS, axis=1)
    if a.shape[1] == THIRDS * rank:
        rows = [slice(n * rank, (n + 1) * rank) for n in range(THIRDS)]
        if not any(
            columns[n][rows[m]].any() for n in range(THIRDS) for m in range(THIRDS) if m != n
        ):
            return {
                part.path: Update(a[:, own], column[own], factor)
                for part, own, column in zip(pieces, rows, columns, strict=True)
                if a[:, own].any()
            }
    return {
        part.path: Update(a, column, factor) for part, column in zip(pieces, columns, strict=True)
    }


def stacked(
    found: Mapping[str, Mapping[int, Update]],
    shapes: Mapping[str, tuple[int, int, int]],
    model: ModelConfig,
    peft: PeftConfig,
) -> dict[str, np.ndarray]:
    """{path/a, path/b} from {path: {layer: update}}, where `shapes` are those of the matrices
    [M, D_in, D_out] and `peft` has the rank and the scale of all."""
    out, common = {}, scale(peft.rank, peft.alpha, peft.rank_stabilized)
    for path, by_layer in found.items():
        M, d_in, d_out = shapes[path]
        a = np.zeros((M, d_in, peft.rank), np.float32)
        b = np.zeros((M, peft.rank, d_out), np.float32)
        for i, update in by_layer.items():
            r = update.a.shape[1]
            a[i, :, :r] = update.a
            exact = math.isclose(update.scale, common, rel_tol=1e-12)
            b[i, :r] = update.b if exact else update.b * (update.scale / common)
        if model.rope_interleaved and model.positions == "rope" and ROTATED.search(path):
            b = pairs_of(b, model)
        out[f"{path}/a"], out[f"{path}/b"] = a, b
    return out


def pairs_of(values: np.ndarray, model: ModelConfig) -> np.ndarray:
    """The inverse of `halves`."""
    order = halves(np.arange(values.shape[-1])[None], model)[0]
    return values[..., np.argsort(order)]
