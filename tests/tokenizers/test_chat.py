"""Chat templates: what transformers renders, what a template may not do, where templates lie."""

import datetime
import json
import pickle
import sys

import pytest

from llm_jax import tokenizers
from llm_jax.tokenizers import chat

# Small templates with the features of well-known ones: who may speak, white space control, tools.
CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate: user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}
{{ ' ' + message['content'] + eos_token }}{% endif %}
{% endfor %}
"""
GEMMA = """\
{{ bos_token }}{% for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{ raise_exception('System role not supported') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
<start_of_turn>{{ role }}
    {% if message['content'] is string %}
{{ message['content'] | trim }}<end_of_turn>
    {% else %}
        {% for item in message['content'] %}
            {% if item.type != 'text' %}{% continue %}{% endif %}
{{ item['text'] | trim }}
        {% endfor %}<end_of_turn>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.reasoning_content and loop.index0 > ns.last %}
        {{- '\\n<think>\\n' + message.reasoning_content.strip() + '\\n</think>' }}
    {%- endif %}
    {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson(indent=2) }}{{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
MARKED = """\
{% for message in messages %}
{% if message.role == 'assistant' %}
<|assistant|>{% generation %} {{ message.content }}<|end|>{% endgeneration %}

{% else %}
<|{{ message.role }}|> {{ message.content }}<|end|>
{% endif %}
{% endfor %}
"""
TALK = [
    {"role": "user", "content": "Hello <b>&\u2581 "},
    {"role": "assistant", "content": "  Hi, Zoë \U0001f917!\n"},
    {"role": "user", "content": "1 + 1?"},
]
SYSTEM = [{"role": "system", "content": " Be kind. "}, *TALK]
BLOCKS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " Who? "}]},
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "Zoë"}, {"type": "text", "text": "I"}],
    },
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "It's <b>the</b> weather & more, \u00fcberall",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALLS = [
    {"role": "user", "content": "Weather in K\u00f6ln?"},
    {
        "role": "assistant",
        "content": None,
        "thinking": " Ask. ",
        "tool_calls": [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "arguments": {"city": "K\u00f6ln", "days": [1, 2.5]},
                },
            }
        ],
    },
    {"role": "tool", "content": "rain <&>"},
]
# name -> template, messages, options
CASES = {
    "chatml": (CHATML, TALK, {}),
    "chatml system": (CHATML, SYSTEM, {"add_generation_prompt": True}),
    "chatml continued": (CHATML, TALK[:2], {"continue_final_message": True}),
    "llama3": (LLAMA3, SYSTEM, {"add_generation_prompt": True}),
    "llama3 continued": (LLAMA3, TALK[:2], {"continue_final_message": True}),
    "mistral": (MISTRAL, TALK, {}),
    "mistral other bos": (MISTRAL, TALK, {"bos_token": "<other>"}),
    "gemma": (GEMMA, TALK, {"add_generation_prompt": True}),
    "gemma blocks": (GEMMA, BLOCKS, {}),
    "gemma blocks continued": (GEMMA, BLOCKS, {"continue_final_message": True}),
    "qwen tools": (
        QWEN,
        CALLS,
        {"tools": TOOLS, "add_generation_prompt": True, "enable_thinking": False},
    ),
    "qwen thinking continued": (
        QWEN,
        [CALLS[0], {"role": "assistant", "reasoning_content": "So"} | {"content": ""}],
        {"continue_final_message": "reasoning_content"},
    ),
    "marked": (MARKED, TALK + [{"role": "assistant", "content": "Two \u2581"}], {}),
}
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
# render_jinja_template of transformers 5.23.0 with NAMES.
GOLDEN = {
    "chatml": "<|im_start|>system\n"
    "Be brief.<|im_end|>\n"
    "<|im_start|>user\n"
    "Hello <b>&▁ <|im_end|>\n"
    "<|im_start|>assistant\n"
    "  Hi, Zoë 🤗!\n"
    "<|im_end|>\n"
    "<|im_start|>user\n"
    "1 + 1?<|im_end|>\n",
    "chatml system": "<|im_start|>system\n"
    " Be kind. <|im_end|>\n"
    "<|im_start|>user\n"
    "Hello <b>&▁ <|im_end|>\n"
    "<|im_start|>assistant\n"
    "  Hi, Zoë 🤗!\n"
    "<|im_end|>\n"
    "<|im_start|>user\n"
    "1 + 1?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "chatml continued": "<|im_start|>system\n"
    "Be brief.<|im_end|>\n"
    "<|im_start|>user\n"
    "Hello <b>&▁ <|im_end|>\n"
    "<|im_start|>assistant\n"
    "  Hi, Zoë 🤗!\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n"
    "\n"
    "Be kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n"
    "\n"
    "Hello <b>&▁<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n"
    "\n"
    "Hi, Zoë 🤗!<|eot_id|><|start_header_id|>user<|end_header_id|>\n"
    "\n"
    "1 + 1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n"
    "\n",
    "llama3 continued": "<s><|start_header_id|>system<|end_header_id|>\n"
    "\n"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n"
    "\n"
    "Hello <b>&▁<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n"
    "\n"
    "Hi, Zoë 🤗!",
    "mistral": "<s>[INST] Hello <b>&▁  [/INST]   Hi, Zoë 🤗!\n</s>[INST] 1 + 1? [/INST]",
    "mistral other bos": "<other>[INST] Hello <b>&▁  [/INST]   Hi, Zoë 🤗!\n"
    "</s>[INST] 1 + 1? [/INST]",
    "gemma": "<s><start_of_turn>user\n"
    "Hello <b>&▁<end_of_turn>\n"
    "<start_of_turn>model\n"
    "Hi, Zoë 🤗!<end_of_turn>\n"
    "<start_of_turn>user\n"
    "1 + 1?<end_of_turn>\n"
    "<start_of_turn>model\n",
    "gemma blocks": "<s><start_of_turn>user\n"
    "Who?\n"
    "<end_of_turn>\n"
    "<start_of_turn>model\n"
    "Zoë\n"
    "I\n"
    "<end_of_turn>\n",
    "gemma blocks continued": "<s><start_of_turn>user\n"
    "Who?\n"
    "<end_of_turn>\n"
    "<start_of_turn>model\n"
    "Zoë\n"
    "I",
    "qwen tools": "<|im_start|>system\n"
    "# Tools\n"
    "<tools>\n"
    '{"type": "function", "function": {"name": "weather", "description": "It\'s '
    '<b>the</b> weather & more, überall", "parameters": {"type": "object", '
    '"properties": {"city": {"type": "string"}}}}}\n'
    "</tools><|im_end|>\n"
    "<|im_start|>user\n"
    "Weather in Köln?<|im_end|>\n"
    "<|im_start|>assistant\n"
    "<think>\n"
    "Ask.\n"
    "</think>\n"
    "<tool_call>\n"
    '{"name": "weather", "arguments": {\n'
    '  "city": "Köln",\n'
    '  "days": [\n'
    "    1,\n"
    "    2.5\n"
    "  ]\n"
    "}}\n"
    "</tool_call><|im_end|>\n"
    "<|im_start|>tool\n"
    "rain <&><|im_end|>\n"
    "<|im_start|>assistant\n"
    "<think>\n"
    "\n"
    "</think>\n"
    "\n",
    "qwen thinking continued": "<|im_start|>user\n"
    "Weather in Köln?<|im_end|>\n"
    "<|im_start|>assistant\n"
    "<think>\n"
    "So",
    "marked": "<|user|> Hello <b>&▁ <|end|>\n"
    "<|assistant|>   Hi, Zoë 🤗!\n"
    "<|end|>\n"
    "<|user|> 1 + 1?<|end|>\n"
    "<|assistant|> Two ▁<|end|>\n",
}
SPANS = [(42, 63), (100, 113)]  # of "marked", from the same


@pytest.fixture(scope="module")
def tokenizer():
    """Ids of bytes, and <pad>, <s>, </s> and two more."""
    return tokenizers.train("byte", [], special_tokens=["<|end|>", "<|user|>"])


@pytest.mark.parametrize("name", CASES)
def test_text_is_what_transformers_renders(name):
    template, messages, options = CASES[name]
    before = json.dumps(messages)
    text, _ = chat.render(template, messages, **{**NAMES, **options})
    assert text == GOLDEN[name]
    assert json.dumps(messages) == before  # rendered from a copy


def test_generation_blocks_are_where_transformers_finds_them():
    text, spans = chat.render(MARKED, CASES["marked"][1], **NAMES)
    assert spans == SPANS
    assert [text[a:b] for a, b in spans] == [
        "   Hi, Zo\u00eb \U0001f917!\n<|end|>",
        " Two \u2581<|end|>",
    ]


def test_ids_are_those_of_the_text_and_special_tokens_are_one_id_each(tokenizer):
    messages = [{"role": "user", "content": "Hi"}]
    template = "{{ bos_token }}{{ eos_token }}<|user|>{{ messages[0].content }}<|end|>"
    ids = tokenizer.apply_chat_template(messages, chat_template=template)
    user, end = (tokenizer.special_tokens[name] for name in ("<|user|>", "<|end|>"))
    # No second bos in front: a tokenizer that adds its own would give [257, 257, …].
    assert ids == [tokenizer.bos_id, tokenizer.eos_id, user, *b"Hi", end]
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert text == "<s></s><|user|>Hi<|end|>"
    rows = tokenizer.apply_chat_template([messages] * 2, chat_template=template, return_dict=True)
    assert rows == {"input_ids": [ids] * 2, "attention_mask": [[1] * len(ids)] * 2}


@pytest.mark.parametrize("kind", ["byte", "sentencepiece_bpe", "hf_bpe"])
def test_mask_marks_the_tokens_of_the_assistant(kind, prose):
    tokenizer = tokenizers.train(
        kind, [prose[:100_000]], vocab_size=600, special_tokens=["<|end|>", "<|assistant|>"]
    )
    tokenizer.chat_template = MARKED
    found = tokenizer.apply_chat_template(
        CASES["marked"][1], return_assistant_tokens_mask=True, return_dict=True
    )
    ids, mask = found["input_ids"], found["assistant_masks"]
    assert len(mask) == len(ids)
    said = [i for i, inside in zip(ids, mask, strict=True) if inside]
    # Characters are not bytes: counted as if they were, the mask would end 4 bytes early.
    assert tokenizer.decode(said, skip_special=False) == (
        "   Hi, Zo\u00eb \U0001f917!\n<|end|> Two \u2581<|end|>"
    )


def test_mask_with_a_tokenizer_that_adds_a_space(real_data):
    tokenizer = tokenizers.load(real_data / "tokenizers/llama2/tokenizer.model")
    template = (
        "{% for m in messages %}A:{% generation %} {{ m.content }}{% endgeneration %};{% endfor %}"
    )
    found = tokenizer.apply_chat_template(
        [{"role": "assistant", "content": "\U0001f917 yes"}],
        chat_template=template,
        return_assistant_tokens_mask=True,
    )
    said = [i for i, m in zip(found["input_ids"], found["assistant_masks"], strict=True) if m]
    assert tokenizer.decode([tokenizer.bos_id, *said], skip_special=False) == "<s> \U0001f917 yes"


def test_a_template_writes_the_present_date_or_a_given_one(tokenizer):
    template, form = "{{ strftime_now('%d %b %Y') }}", "%d %b %Y"
    given = datetime.datetime(1999, 12, 31)
    assert chat.render(template, TALK, now=given)[0] == given.strftime(form)
    before = datetime.datetime.now().strftime(form)
    text = tokenizer.apply_chat_template(TALK, chat_template=template, tokenize=False)
    assert text in (before, datetime.datetime.now().strftime(form))


def test_templates_by_name(tokenizer):
    messages = [{"role": "user", "content": "Hi"}]
    other = pickle.loads(pickle.dumps(tokenizer))
    other.chat_template = {"default": "D", "tool_use": "T{{ tools | length }}", "rag": "R"}

    def text(**options):
        return other.apply_chat_template(messages, tokenize=False, **options)

    assert [text(), text(tools=[{}]), text(chat_template="rag")] == ["D", "T1", "R"]
    assert text(chat_template="{{ 'own' }}") == "own"
    other.chat_template = {"rag": "R"}
    with pytest.raises(ValueError, match=r"\['rag'\] and no default; name one with chat_template="):
        text()


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, TALK, "^this tokenizer has no chat template; give chat_template=$"),
        (MISTRAL, TALK[1:], "^chat template: Roles must alternate: user/assistant/"),
        (GEMMA, SYSTEM, "^chat template: System role not supported$"),
        (CHATML, [{"content": "x"}], r"^message 0 has no 'role' \(it has \['content'\]\)$"),
        (
            CHATML,
            [TALK[0], {"role": "user"}],
            r"^message 1 has no 'content' \(it has \['role'\]\)$",
        ),
        (CHATML, [{"role": "user", "content": None}], "^message 0 has no 'content'"),
        (CHATML, ["Hi"], "^message 0 is str, not a dict$"),
        (CHATML, [], "^a chat needs at least one message$"),
        (CHATML, [{"role": "user", "content": object()}], "takes strings, .* not object"),
        ("{% if %}", TALK, "^chat template, line 1: "),
        ("{% break %}", TALK, "^chat template: 'break' outside loop$"),
        ("{{ messages[0].content + 1 }}", TALK, "^chat template: can only concatenate str"),
        # The sandbox: no way out through attributes, and nothing given can be changed.
        ("{{ ''.__class__.__mro__ }}", TALK, "^chat template: .*unsafe"),
        ("{{ messages.append(1) }}", TALK, "^chat template: access to attribute .append."),
    ],
)
def test_errors_are_one_line(tokenizer, template, messages, message):
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert "\n" not in str(caught.value)


def test_without_jinja_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install 'llm_jax\[hf\]'"):
        chat.render("never compiled before", TALK)


def test_what_cannot_be_continued_is_an_error():
    with pytest.raises(ValueError, match="give only one of them"):
        chat.render(CHATML, TALK, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(ValueError, match="does not write the last message's 'content' as it is"):
        chat.render("{{ messages[0].content }}", TALK[:2], continue_final_message=True)
    with pytest.raises(ValueError, match="has no text in 'thinking'"):
        chat.render(CHATML, TALK[:2], continue_final_message="thinking")
    with pytest.raises(ValueError, match="does not take padding, return_tensors here"):
        tokenizers.train("byte", []).apply_chat_template(TALK, padding=True, return_tensors="np")
    with pytest.raises(ValueError, match=r"no \{% generation %\} block"):
        tokenizers.train("byte", []).apply_chat_template(
            TALK, chat_template=CHATML, return_assistant_tokens_mask=True
        )


@pytest.mark.parametrize("template", [CHATML, {"default": GEMMA, "tool_use": QWEN}])
@pytest.mark.parametrize("kind", ["byte", "hf_bpe", "sentencepiece_bpe"])
def test_template_is_kept_wherever_the_tokenizer_is(kind, template, trained, tmp_path):
    plain = trained[kind]
    tokenizer = tokenizers.from_files(plain.files())
    tokenizer.chat_template = template
    assert tokenizer.fingerprint() != plain.fingerprint()
    tokenizer.save(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    for other in (
        tokenizers.load(tmp_path),
        tokenizers.from_files(tokenizer.files()),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert other.chat_template == template
        assert other.fingerprint() == tokenizer.fingerprint()
    assert plain.chat_template is None


def test_templates_in_a_hugging_face_folder(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(trained["hf_bpe"].files()["tokenizer.json"])

    def found(**files):
        for name, content in files.items():
            (tmp_path / name.replace("__", ".")).write_text(json.dumps(content))
        return tokenizers.load(tmp_path).chat_template

    assert found() is None
    assert found(tokenizer_config__json={"chat_template": "A"}) == "A"
    several = [{"name": "default", "template": "B"}, {"name": "rag", "template": "C"}]
    config = {"chat_template": several, "eos_token": "</s>"}
    assert found(tokenizer_config__json=config) == {"default": "B", "rag": "C"}
    assert found(chat_template__json={"chat_template": "D"}) == "D"
    # A file of its own wins over both.
    (tmp_path / "chat_template.jinja").write_text("E\n")
    assert found() == "E\n"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("F")
    assert found() == {"default": "E\n", "tool_use": "F"}
