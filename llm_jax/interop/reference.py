"""What transformers computes for the same weights, where it is installed."""

from pathlib import Path
from typing import NamedTuple

import numpy as np


class Agreement(NamedTuple):
    """How two models' logits over the same vocabulary differ."""

    max_difference: float  # largest |difference| of two logits
    kl: float  # mean over positions of KL(a || b), nats
    top1: float  # share of positions with the same most probable token
    n: int  # positions

    def __str__(self) -> str:
        return (
            f"max |difference of logits| {self.max_difference:.2e}, KL {self.kl:.2e} nats, the same "
            f"most probable token at {self.top1:.2%} of {self.n} positions"
        )


def agreement(a_NxV: np.ndarray, b_NxV: np.ndarray) -> Agreement:
    """Compares logits [N, V].

    Raises:
      ValueError: vocabularies of different sizes.
    """
    if a_NxV.shape != b_NxV.shape:
        raise ValueError(f"logits of shapes {a_NxV.shape} and {b_NxV.shape} cannot be compared")
    a, b = a_NxV.astype(np.float64), b_NxV.astype(np.float64)
    log_a, log_b = _log_softmax(a), _log_softmax(b)
    return Agreement(
        float(np.abs(a - b).max()),
        float((np.exp(log_a) * (log_a - log_b)).sum(axis=1).mean()),
        float((a.argmax(axis=1) == b.argmax(axis=1)).mean()),
        len(a),
    )


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def installed() -> bool:
    """Whether torch and transformers can be imported."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True


def logits(path: str | Path, tokens_BxL: np.ndarray) -> np.ndarray:
    """transformers' float32 logits [B, L, V] of a Hugging Face folder or a .gguf file, on the CPU."""
    import torch
    import transformers

    path = Path(path)
    where = {"pretrained_model_name_or_path": str(path)}
    if path.is_file():
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        out = model.eval()(torch.tensor(np.asarray(tokens_BxL, np.int64)), use_cache=False)
    return out.logits.float().numpy()
