"""Load an exported Hugging Face folder with transformers, strictly, and compare its logits.

Runs where torch and transformers are:

  PYTHONPATH=tests python tests/interop/reload_exports.py FOLDER=REFERENCE [FOLDER=REFERENCE ...]

A REFERENCE is the name of a golden (`hf_tiny.names()`), or an .npz of our own numbers with `tokens`
[B, L], `logits` float32 [B, L, V] and, for padded rows, `mask` [B, L] (1: real), or nothing: the folder
is then only loaded. Where the folder holds a tokenizer, texts have to come back from it. Prints a
table, and ends with status 1 if a folder fails.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from interop import hf_tiny

TOLERANCE = 1e-4
TEXTS = ("The quick brown fox.", " two  spaces", "naïve café 東京 🙂", "x = [1, 2]\n\tif x:\n")


@torch.no_grad()
def logits(model, tokens_BxL, mask_BxL) -> np.ndarray:
    """float32 [B, L, V]; positions count the real tokens."""
    mask = torch.tensor(mask_BxL, dtype=torch.long)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    tokens = torch.tensor(tokens_BxL, dtype=torch.long)
    return model(tokens, attention_mask=mask, position_ids=positions).logits.numpy()


def difference(model, reference: str) -> float:
    """max |Δ logit| over the real tokens of the reference."""
    if reference.endswith(".npz"):
        with np.load(reference) as arrays:
            tokens, expected = arrays["tokens"], arrays["logits"]
            mask = arrays["mask"] if "mask" in arrays else np.ones_like(tokens)
        return float(np.abs(logits(model, tokens, mask) - expected)[mask > 0].max())
    golden = hf_tiny.load(reference)
    tokens, mask, _ = golden.padded()
    padded = logits(model, tokens, mask)
    rows = zip(padded, golden.logits)
    return max(float(np.abs(got[-len(x) :] - x).max()) for got, x in rows)


def tokenizer_says(folder: str) -> str:
    """What became of `TEXTS`, or that there is no tokenizer."""
    if not any((Path(folder) / f).exists() for f in ("tokenizer.json", "tokenizer.model")):
        return "none"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if back != text:
            return f"FAILED: {text!r} came back as {back!r}"
    chat = "with" if tokenizer.chat_template else "without"
    return f"{len(tokenizer)} ids, {chat} chat template"


def check(folder: str, reference: str) -> tuple[bool, str]:
    """(whether all is well, a line for the table)."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    model.eval()
    keys = [f"{what} {sorted(names)}" for what, names in info.items() if names]
    off = difference(model, reference) if reference else float("nan")
    words = tokenizer_says(folder)
    good = not keys and not off > TOLERANCE and "FAILED" not in words
    found = "; ".join(keys) or "all keys"
    verdict = "ok" if good else "BAD"
    return good, f"{verdict:4} {folder} | {reference} | {off:.1e} | {found} | tokenizer: {words}"


def main(arguments: list[str]) -> int:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}: folder | reference | max |Δ logit| | keys")
    failed = 0
    for argument in arguments:
        folder, _, reference = argument.partition("=")
        try:
            good, line = check(folder, reference)
        except Exception as error:  # the table goes on
            good, line = False, f"BAD  {folder} | {type(error).__name__}: {error}"
        failed += not good
        print(line, flush=True)
    print(f"{len(arguments) - failed} of {len(arguments)} ok")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
