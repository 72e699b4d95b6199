"""Scores a checkpoint on a text, through the public interface only: loss over consecutive windows.

python -m benchmarks.score_checkpoint --checkpoint=DIR --input=FILE --length=64 --output=FILE
"""

import json

from absl import flags

from experiments.cli import run_main

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory or checkpoint.", required=True)
INPUT = flags.DEFINE_string("input", None, "Text file.", required=True)
LENGTH = flags.DEFINE_integer("length", 64, "Tokens a window.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.", required=True)


def score(checkpoint: str, text: str, length: int) -> dict:
    """Loss of a checkpoint on `text`; raises ValueError unless a token is a character."""
    import numpy as np
    from scipy.special import logsumexp

    import llm_jax
    from benchmarks.windows import consecutive_windows, window_losses

    model = llm_jax.load(checkpoint)
    ids = np.asarray(model.tokenizer.encode(text), np.int32)
    # A loss a token is comparable only between equal tokens.
    if len(ids) != len(text):
        raise ValueError(
            f"{checkpoint}: {len(text)} characters became {len(ids)} tokens; set "
            "--config.tokenizer.kind=char and no begin or end token"
        )

    def total_loss(inputs: np.ndarray, targets: np.ndarray) -> float:
        logits = np.asarray(model.logits(inputs), np.float64)
        chosen = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return float(np.sum(logsumexp(logits, axis=-1) - chosen))

    return window_losses(consecutive_windows(ids, length), total_loss)


def main(_) -> None:
    with open(INPUT.value, encoding="utf-8", newline="") as f:
        result = score(CHECKPOINT.value, f.read(), LENGTH.value)
    with open(OUTPUT.value, "w") as f:
        json.dump(result, f)


if __name__ == "__main__":
    run_main(main)
