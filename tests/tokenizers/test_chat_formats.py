"""The known chat formats, letter by letter as their publishers write them."""

import re

import pytest

from llm_jax import tokenizers
from llm_jax.tokenizers import chat
from llm_jax.tokenizers.chat_formats import FORMATS

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " Hi "},
    {"role": "assistant", "content": "Zoë \U0001f917\n"},
    {"role": "user", "content": "q"},
]
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
)
# name -> with a system's turn, without one; both with a generation prompt
EXPECTED = {
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n"
        "<|im_start|>assistant\nZoë \U0001f917\n<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama2": (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Zoë \U0001f917 </s><s>[INST] q [/INST]",
        "<s>[INST] Hi [/INST]",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nZoë \U0001f917<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "alpaca": (
        "Be kind.\n\n### Instruction:\n Hi \n\n### Response:\nZoë \U0001f917\n</s>\n\n"
        "### Instruction:\nq\n\n### Response:\n",
        f"{PREAMBLE}### Instruction:\n Hi \n\n### Response:\n",
    ),
    "zephyr": (
        "<|system|>\nBe kind.</s>\n<|user|>\n Hi </s>\n<|assistant|>\nZoë \U0001f917\n</s>\n"
        "<|user|>\nq</s>\n<|assistant|>\n",
        "<|user|>\n Hi </s>\n<|assistant|>\n",
    ),
}


def render(name, messages):
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    return chat.render(FORMATS[name].template, messages, **names)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_written_as_its_publishers_do(name):
    text, spans = render(name, TALK)
    assert text == EXPECTED[name][0]
    assert render(name, TALK[1:2]) == (EXPECTED[name][1], [])
    (span,) = spans
    assert re.fullmatch(r" ?Zoë \U0001f917\s*(</s>|<\|\w+\|>)", text[slice(*span)])
    for token in FORMATS[name].special_tokens:
        assert token in text


def test_an_instruction_and_its_input_have_headings_in_alpaca_only():
    """The prompts of Stanford's train.py, but for the line break before a response."""
    parts = {"instruction": "Add.", "input": "1 2"}
    asked = {"role": "user", "content": "Add.\n\n1 2"}
    assert render("alpaca", [asked | parts])[0] == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    whole = f"{PREAMBLE}### Instruction:\nAdd.\n\n1 2\n\n### Response:\n"
    assert render("alpaca", [asked])[0] == whole
    for part in ({"input": "1 2"}, {"instruction": "Add."}):  # somebody's own keys
        assert render("alpaca", [asked | part])[0] == whole
    for name in FORMATS.keys() - {"alpaca"}:
        assert render(name, [asked | parts]) == render(name, [asked])


@pytest.mark.parametrize("name", ["llama2", "alpaca"])
def test_turns_that_a_format_has_not_are_refused(name):
    with pytest.raises(ValueError, match=r"^chat template: "):
        render(name, [*TALK[:2], {"role": "tool", "content": "9"}])


def test_a_tokenizer_without_an_end_token_cannot_have_a_format_that_needs_it():
    tokenizer = tokenizers.train("byte", [])
    tokenizer.eos_id = None
    with pytest.raises(ValueError, match="'eos_token' is undefined"):
        tokenizer.apply_chat_template(TALK, chat_template=FORMATS["zephyr"].template)
