"""Completes prompts with a trained checkpoint, or with a model of another format.

python -m experiments.generate --checkpoint=runs/quickstart --prompt='Return the ' --max_new_tokens=64
python -m experiments.generate --checkpoint=model.gguf --chat --prompt='What is the capital of France?'
"""

import json
import sys

from absl import flags

from experiments import cli

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "run directory, its checkpoints folder or one step folder; Hugging Face folder, .gguf file, "
    "llama2.c .bin",
    required=True,
)
_BASE = cli.define_base()
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "tokenizer to use in place of the one that comes along"
)
_CHAT = flags.DEFINE_bool(
    "chat", False, "each prompt is a user's message in the tokenizer's chat template"
)
_SYSTEM = flags.DEFINE_string("system", None, "with --chat: the system message")
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "prompt; may be repeated; default: the start of a text"
)
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "file with one prompt a line ('-': stdin)")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "tokens to generate at most")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0: greedy")
_TOP_K = flags.DEFINE_integer("top_k", 0, "keep the k most probable tokens; 0: all")
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "keep the most probable tokens up to this probability; 1: all"
)
_MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "keep tokens with this share of the highest probability; 0: all"
)
_REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "1: none")
_STOP = flags.DEFINE_multi_string("stop", [], "string that ends a text; may be repeated")
_SAMPLES = flags.DEFINE_integer("samples", 1, "completions of each prompt")
_SEED = flags.DEFINE_integer("seed", 0, "the same seed gives the same texts")
_JSON = flags.DEFINE_bool(
    "json", False, "print one JSON object a completion, with log-probabilities"
)


def main(argv: list[str]) -> None:
    del argv
    prompts = list(_PROMPT.value)
    if _PROMPT_FILE.value:
        source = sys.stdin if _PROMPT_FILE.value == "-" else open(_PROMPT_FILE.value)
        with source:
            prompts += [line.rstrip("\n") for line in source]
    prompts = [p for p in prompts or [""] for _ in range(_SAMPLES.value)]

    import llm_jax

    model = llm_jax.load(_CHECKPOINT.value, base=_BASE.value, tokenizer=_TOKENIZER.value)
    sampling = {
        "max_new_tokens": _MAX_NEW_TOKENS.value,
        "temperature": _TEMPERATURE.value,
        "top_k": _TOP_K.value,
        "top_p": _TOP_P.value,
        "min_p": _MIN_P.value,
        "repetition_penalty": _REPETITION_PENALTY.value,
        "stop": _STOP.value,
        "seed": _SEED.value,
    }
    if _SYSTEM.value and not _CHAT.value:
        raise ValueError("--system is for --chat")
    if _CHAT.value:
        system = [{"role": "system", "content": _SYSTEM.value}] if _SYSTEM.value else []
        asked = [[*system, {"role": "user", "content": prompt}] for prompt in prompts]
        completions = model.answers(asked, **sampling)
    else:
        completions = model.complete(prompts, **sampling)
    for i, (prompt, out) in enumerate(zip(prompts, completions, strict=True)):
        if _JSON.value:
            record = {
                "prompt": prompt,
                "text": out.text,
                "tokens": out.tokens,
                "log_probs": out.log_probs,
                "finish_reason": out.finish_reason,
            }
            print(json.dumps(record))
        else:
            print(("---\n" if i else "") + ("" if _CHAT.value else prompt) + out.text)


if __name__ == "__main__":
    cli.run_main(main)
