"""Conversations, templates and a small tokenizer for which transformers' answers are stored.

The tokenizer is written down, not trained, so that ids never change: byte-level BPE of 256 bytes, a
few dozen merges (some across white space, some inside emoji) and the formats' special tokens.
"""

import json

from llm_jax.tokenizers.bpe_reference import byte_characters
from llm_jax.tokenizers.chat_formats import FORMATS

# As SmolLM2-Instruct's: ChatML with a system turn of its own, without marks.
SMOLLM2 = """\
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face' }}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# The same for transformers, which finds an assistant's tokens by marks alone.
SMOLLM2_MARKED = SMOLLM2.replace(
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}",
    "{{- '<|im_start|>' + message['role'] + '\\n' }}{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}{%- else %}"
    "{{- message['content'] + '<|im_end|>' }}{%- endif %}{{- '\\n' }}",
)
# name -> template as transformers gets it, with marks
TEMPLATES = {name: chat_format.template for name, chat_format in FORMATS.items()}
TEMPLATES["smollm2"] = SMOLLM2_MARKED

SPECIAL = ["<pad>", "<s>", "</s>", *(s for f in FORMATS.values() for s in f.special_tokens)]
_MERGES = (
    "t h|th e|i n|e r|a n|an d|o n|Ġ t|Ġ a|Ġ the|Ġ w|r e|s t|e n|o r|Ġ s|Ġ Ġ|ĠĠ ĠĠ|Ċ Ċ|Ċ Ġ|l l|o u|"
    "y ou|Ġ y|Ġy ou|i s|Ġ is|Ġ #|# #|## #|: Ċ|. Ċ|ð Ł|ðŁ ĺ|ðŁ ĳ|Ã ©|â Ģ|âĢ į|Ä °|I N|IN S|"
    "INS T|[ INST|[INST ]|/ INST|Ġ [|u s|us er|a s|s i|as si|> Ċ"
)


def tokenizer_json() -> bytes:
    """A `tokenizer.json`, the same for us and for transformers."""
    table = byte_characters()
    vocabulary = {table[b]: b for b in range(256)}
    merges = []
    for pair in _MERGES.split("|"):
        parts = pair.split(" ")
        merges.append(parts)
        vocabulary["".join(parts)] = len(vocabulary)
    added = [
        {"id": len(vocabulary) + i, "content": name, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, name in enumerate(SPECIAL)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": byte_level | {"use_regex": True},
            "post_processor": None,
            "decoder": byte_level | {"use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": vocabulary,
                "merges": merges,
            },
        },
        ensure_ascii=False,
    ).encode()


LLAMA2 = "tokenizers/llama2/tokenizer.model"  # in LLM_JAX_DATA
ROLES = {"pad": "<pad>", "bos": "<s>", "eos": "</s>"}

_SYSTEMS = (
    None,
    "Be kind.",
    "",
    "  Two\n\nlines  ",
    "Réponds en français \U0001f1eb\U0001f1f7",
    None,
)
_QUESTIONS = (
    "What is 2 + 2?",
    "",
    "  leading and trailing  ",
    "Naïve café, Straße, İstanbul?",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 who are they?",
    "def f(x):\n    return x  # what?\n",
    "你好，世界",
    "the assistant said the answer",
    "\n\nthree\n\n\nlines\n",
    "<b>&amp;</b> {{ user }} {% if %}",
    "mentions <|im_end|> and </s> and [INST]",
    "x",
    "مرحبا \u200f?",
)
_ANSWERS = (
    "It is 4.",
    "the assistant said the answer",
    "",
    "  indented\n    twice  ",
    "\U0001f44d\U0001f3fd",
    "ends with é",
    "```python\nfor i in range(3):\n\tprint(i)\n```",
    "こんにちは。",
    "\n",
    "\u00a0no-break\u2028separators\u00a0",
    "What is 2 + 2?",
    "a\u0301 combining, \u200bzero width",
    "### Response:\nuser\nassistant\n",
    "one </s> two <|im_end|> three",
    "x",
    "{{ bos_token }} 100 %",
    " ",
)


def conversations() -> list[list[dict[str, str]]]:
    """Fifty: with and without a system's turn, of one to four exchanges, some without an answer at
    the end. Every text of the tables above is in one of them."""
    found = []
    for n in range(50):
        messages = []
        if (system := _SYSTEMS[n % len(_SYSTEMS)]) is not None:
            messages.append({"role": "system", "content": system})
        for turn in range(1 + n % 4):
            question = _QUESTIONS[(n + 5 * turn) % len(_QUESTIONS)]
            answer = _ANSWERS[(n + 3 * turn) % len(_ANSWERS)]
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        if n % 10 == 9:
            messages.append({"role": "user", "content": "and then?"})
        found.append(messages)
    return found
