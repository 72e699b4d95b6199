"""Converts models between llm_jax's checkpoints and other formats.

python -m experiments.convert --from=hf --to=llm_jax --input=SmolLM2-135M --output=runs/smollm2 --verify
python -m experiments.convert --from=gguf --to=hf --input=model.gguf --output=exported --dtype=bfloat16
python -m experiments.convert --from=llm_jax --to=hf --input=runs/quickstart --output=exported
python -m experiments.convert --from=llm_jax --to=peft --input=runs/lora --output=adapter
"""

import itertools
import json
from pathlib import Path

from absl import flags

from experiments import cli

_FROM = flags.DEFINE_enum(
    "from", None, ["hf", "gguf", "llama2c", "llm_jax", "peft"], "what --input is"
)
_TO = flags.DEFINE_enum(
    "to",
    None,
    ["llm_jax", "hf", "peft"],
    "what --output becomes; peft: an adapter without its base",
)
_BASE = cli.define_base()
_INPUT = flags.DEFINE_string("input", None, "folder or file to read")
_OUTPUT = flags.DEFINE_string("output", None, "new folder to write")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "tokenizer to use in place of the one that comes along"
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "type of the weights with --to=hf"
)
_SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "largest weight file with --to=hf", lower_bound=0)
_VERIFY = flags.DEFINE_bool(
    "verify",
    False,
    "load the output again and compare its logits with the input's, and with transformers' where it "
    "is installed",
)
flags.mark_flags_as_required(["from", "to", "input", "output"])


def main(argv: list[str]) -> None:
    del argv
    import llm_jax
    from llm_jax.interop import peft_format, pretrained

    looks = pretrained.kind(_INPUT.value) or "llm_jax"
    if peft_format.is_folder(_INPUT.value):
        looks = "peft"
    if Path(_INPUT.value).expanduser().exists() and looks != _FROM.value != "llama2c":
        raise ValueError(f"--from={_FROM.value}, but --input={_INPUT.value} looks like {looks}")
    model = llm_jax.load(
        _INPUT.value,
        source=_FROM.value,
        tokenizer=_TOKENIZER.value,
        base=_BASE.value,
        dtype="float32",
    )
    if _VERIFY.value and model.config.model.head != "lm":
        raise ValueError("--verify compares logits, which a reward model has not; drop it")
    if _TO.value == "llm_jax":
        model.save(_OUTPUT.value)
    elif _TO.value == "peft":
        model.save_adapter(_OUTPUT.value)
    else:
        summary = Path(_INPUT.value) / "summary.json"
        notes = model.export(
            _OUTPUT.value,
            dtype=_DTYPE.value,
            shard_bytes=int(_SHARD_GB.value * 1e9),
            summary=json.loads(summary.read_text()) if summary.is_file() else None,
        )
        for note in notes:
            print(f"note: {note}")
    print(f"wrote {_OUTPUT.value}")
    if _VERIFY.value:
        verify(model)


def verify(model) -> None:
    """Prints how the logits of input and output agree on the start of the embedded texts."""
    import numpy as np

    import llm_jax
    from llm_jax.corpus import documents
    from llm_jax.interop import reference

    length = min(64, model.config.model.max_length)
    texts = (text for _, text in documents("docs"))
    ids = [i for text in itertools.islice(texts, 8) for i in model.tokenizer.encode(text)]
    ids = ids[: 4 * length]
    tokens = np.array(ids[: len(ids) // length * length], np.int32).reshape(-1, length)
    flat = lambda x: np.asarray(x).reshape(-1, x.shape[-1])  # noqa: E731
    ours = flat(model.logits(tokens))
    again = llm_jax.load(_OUTPUT.value, base=_BASE.value).logits(tokens)
    print(f"output against input: {reference.agreement(ours, flat(again))}")
    theirs = [
        ("input", _INPUT.value, _FROM.value in ("hf", "gguf")),
        ("output", _OUTPUT.value, _TO.value == "hf"),
    ]
    for what, path, readable in theirs:
        if not readable:
            continue
        if not reference.installed():
            print(f"transformers' logits of the {what}: torch and transformers are not installed")
            continue
        found = reference.agreement(ours, flat(reference.logits(path, tokens)))
        print(f"against transformers' logits of the {what}: {found}")


if __name__ == "__main__":
    cli.run_main(main)
