"""A layer imports only from its left."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "llm_jax"
CHAIN = [
    {"types", "config"},
    {"sharding"},
    {"nn"},
    {"mesh"},
    {"models"},
    {"decode"},
    {"eval"},
    {"train"},
    {"align", "compression", "scaling", "curation"},
    {"playground"},
    {"api"},
]
RANK = {name: rank for rank, names in enumerate(CHAIN) for name in names}
# Beside the chain: what they may see, and from which rank on they may be seen.
BESIDE = {
    "objectives": {"types"},
    "tokenizers": set(),
    "plots": set(),
    "report": {"plots"},
    "chips": set(),
    "corpus": set(),
    "data": {"types", "config", "tokenizers", "corpus"},
    "peft": {"types", "config", "sharding", "nn"},
    "interop": {"types", "config", "sharding", "nn", "models", "tokenizers"},
}
SEEN_FROM = {
    "objectives": 3,
    "tokenizers": RANK["decode"],
    "plots": RANK["decode"],
    "report": RANK["decode"],
    "chips": RANK["mesh"],
    "corpus": RANK["eval"],
    "data": RANK["decode"],
    "peft": RANK["decode"],
    "interop": RANK["decode"],
}


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_layers(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [
                f"{node.module}.{a.name}" if node.module == "llm_jax" else node.module
                for a in node.names
            ]
        for name in names:
            parts = name.split(".")
            assert parts[0] != "experiments", f"{path} imports experiments"
            if parts[0] == "llm_jax" and len(parts) > 1:
                found.add(parts[1])
    return found


def allowed(layer: str, other: str) -> bool:
    if layer == other:
        return True
    if layer in BESIDE:
        return other in BESIDE[layer]
    if other in BESIDE:
        return RANK[layer] >= SEEN_FROM[other]
    return RANK[other] < RANK[layer] or (RANK[other] == RANK[layer] == 0)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_left(path):
    layer = layer_of(path)
    if layer == "__init__":
        return
    for other in imported_layers(path):
        assert allowed(layer, other), f"{layer} may not import {other}"


def test_the_rule_can_fail():
    assert not allowed("nn", "models") and not allowed("objectives", "models")
    assert not allowed("data", "train") and allowed("train", "data")
    assert not allowed("train", "scaling") and allowed("scaling", "train")
    assert not allowed("chips", "config") and allowed("train", "chips")
