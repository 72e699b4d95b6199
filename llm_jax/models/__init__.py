"""Model families: modules that offer specs, hidden, scores, logits and init_cache."""

from types import ModuleType

from llm_jax.models import decoder

FAMILIES: dict[str, ModuleType] = {"decoder": decoder}


def family(name: str) -> ModuleType:
    """The module of a model family, `cfg.family`."""
    if name not in FAMILIES:
        raise ValueError(f"model.family={name!r} is unknown; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]
