"""Well-known chat formats as Jinja templates, and what ends an answer in each.

    chatml    OpenAI's markup; Qwen, SmolLM and many others
    llama2    Touvron et al., Llama 2, 2023: [INST] and <<SYS>>
    llama3    the Llama 3 herd, 2024: header ids and <|eot_id|>
    alpaca    Taori et al., Stanford Alpaca, 2023: headings; a user's message with "instruction" and
              "input" besides its "content" has them under two
    zephyr    Tunstall et al., Zephyr, 2023: role tags and the tokenizer's end token

The answers stand in `{% generation %}` blocks: from where a generation prompt ends to the end of
what ends the answer.
"""

from dataclasses import dataclass

_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_LLAMA2 = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
        {{- raise_exception('after an optional system turn, user and assistant have to take turns') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') }}
        {{- message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{- ' ' + message['content'] | trim + ' ' + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""

_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_ALPACA = """\
{%- if messages[0]['role'] == 'system' %}
    {{- messages[0]['content'] + '\\n\\n' }}
    {%- set turns = messages[1:] %}
{%- else %}
    {{- 'Below is an instruction that describes a task' }}
    {%- if messages[0]['instruction'] and messages[0]['input'] %}
        {{- ', paired with an input that provides further context' }}
    {%- endif %}
    {{- '. Write a response that appropriately completes the request.\\n\\n' }}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if message['role'] == 'user' and message['instruction'] and message['input'] %}
        {{- '### Instruction:\\n' + message['instruction'] + '\\n\\n' }}
        {{- '### Input:\\n' + message['input'] + '\\n\\n' }}
    {%- elif message['role'] == 'user' %}
        {{- '### Instruction:\\n' + message['content'] + '\\n\\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '### Response:\\n' }}
        {%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
        {{- '\\n\\n' }}
    {%- else %}
        {{- raise_exception('the Alpaca format has no turns of ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\\n' }}
{%- endif %}
"""

_ZEPHYR = """\
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + eos_token }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class ChatFormat:
    """A chat format.

    Attributes:
      template: Jinja, as `Tokenizer.chat_template` and transformers take it.
      special_tokens: those that the template spells, which a tokenizer for it should have. The
        `bos_token` and `eos_token` that some write are the tokenizer's own.
      stop: strings that end an answer, besides the tokenizer's end token.
    """

    template: str
    special_tokens: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()


FORMATS = {
    "chatml": ChatFormat(_CHATML, ("<|im_start|>", "<|im_end|>"), ("<|im_end|>",)),
    "llama2": ChatFormat(_LLAMA2),
    "llama3": ChatFormat(
        _LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|eot_id|>",),
    ),
    "alpaca": ChatFormat(_ALPACA, (), ("\n### Instruction:",)),
    "zephyr": ChatFormat(_ZEPHYR, ("<|system|>", "<|user|>", "<|assistant|>"), ("<|user|>",)),
}
