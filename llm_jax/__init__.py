"""llm_jax: language models in JAX, from an n-gram to RLHF.

`import llm_jax` costs nothing: jax is imported by the first thing that needs it.
"""

__version__ = "0.1.0"

__all__ = ["__version__", "load"]


def __getattr__(name: str):
    """Imports `llm_jax.load` when it is first asked for, since `llm_jax.api` imports jax."""
    if name == "load":
        from llm_jax.api import load

        return load
    raise AttributeError(f"module 'llm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
