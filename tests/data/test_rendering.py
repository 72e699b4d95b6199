"""Which tokens are the assistant's: as transformers finds them where a template has marks, and the
same where it has none."""

import hashlib
import json
import pathlib
import re

import numpy as np
import pytest
from data.goldens import chat_cases

from llm_jax import tokenizers
from llm_jax.data.rendering import Renderer
from llm_jax.tokenizers import chat_formats
from llm_jax.tokenizers.subword import HuggingFace

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "renderings.npz"
MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
CONVERSATIONS = chat_cases.conversations()


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


@pytest.fixture(scope="module")
def small():
    """The tokenizer of the goldens."""
    config = json.loads(chat_cases.tokenizer_json())
    ids = {token["content"]: token["id"] for token in config["added_tokens"]}
    roles = {role: ids[name] for role, name in chat_cases.ROLES.items()}
    return HuggingFace(chat_cases.tokenizer_json(), roles)


@pytest.fixture(scope="module")
def llama2(data_dir):
    return tokenizers.load(pathlib.Path(data_dir) / chat_cases.LLAMA2)


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as file:
        return dict(file)


def golden(goldens, name):
    """(ids, mask) of each conversation."""
    ids, sizes = goldens[f"{name}_ids"], goldens[f"{name}_sizes"].astype(int)
    mask = np.unpackbits(goldens[f"{name}_mask"], count=len(ids)).astype(bool)
    cuts = np.cumsum(sizes)[:-1]
    return list(zip(np.split(ids, cuts), np.split(mask, cuts), strict=True))


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("name", chat_cases.TEMPLATES)
def test_ids_and_masks_are_those_of_transformers(small, goldens, name, marked):
    template = chat_cases.TEMPLATES[name]
    renderer = Renderer(small, template if marked else MARKS.sub("", template))
    assert renderer.marked == marked
    found = renderer.encode([renderer.spans(messages) for messages in CONVERSATIONS])
    assert len(found) == 50
    for number, (row, (ids, mask)) in enumerate(zip(found, golden(goldens, name), strict=True)):
        assert row.ids.tolist() == ids.tolist(), number
        assert row.trained.tolist() == mask.tolist(), number


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("name", chat_cases.TEMPLATES)
def test_the_same_with_a_real_tokenizer(llama2, goldens, name, marked):
    # Sentencepiece with a space in front of a text and bytes for what it does not know.
    template = chat_cases.TEMPLATES[name]
    renderer = Renderer(llama2, template if marked else MARKS.sub("", template))
    found = renderer.encode([renderer.spans(messages) for messages in CONVERSATIONS])
    ids = [row.ids.tolist() for row in found]
    masks = [row.trained.astype(int).tolist() for row in found]
    digest = hashlib.sha256(repr((ids, masks)).encode()).hexdigest()
    assert digest == goldens[f"{name}_llama2"]


def test_the_goldens_cover_what_is_hard(goldens):
    for name in chat_cases.TEMPLATES:
        rows = golden(goldens, name)
        assert len(rows) == 50
        assert all(mask.any() and not mask.all() for _, mask in rows)
        # An empty answer still has its end token; several turns have a stretch each.
        stretches = [int((np.diff(mask.astype(int), prepend=0) == 1).sum()) for _, mask in rows]
        assert {1, 2, 3, 4} <= set(stretches)


def test_apply_chat_template_gives_the_same_mask(small, goldens):
    for messages, (ids, mask) in zip(CONVERSATIONS, golden(goldens, "llama3"), strict=True):
        found = small.apply_chat_template(
            messages,
            chat_template=chat_cases.TEMPLATES["llama3"],
            return_assistant_tokens_mask=True,
        )
        assert found["input_ids"] == ids.tolist()
        assert found["assistant_masks"] == mask.astype(int).tolist()


# Templates that do what real ones do to a conversation.
THINKS = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- set words = m.content %}{%- set thought = '' %}
    {%- if '</think>' in words %}
        {%- set thought = words.split('</think>')[0].split('<think>')[-1].strip() %}
        {%- set words = words.split('</think>')[-1] %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- words.strip() + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
MOVES_SYSTEM = """\
{{- bos_token }}
{%- set said = namespace(system='') %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{%- set said.system = m.content + '\\n\\n' %}
    {%- elif m.role == 'user' %}
        {{- '[INST] ' + (said.system if loop.revindex0 < 2 else '') + m.content + '[/INST]' }}
    {%- else %}{{- ' ' + m.content | trim + eos_token }}{%- endif %}
{%- endfor %}
"""
LINE = "<{{ m.role }}>{{ m.content }}<|im_end|>\n"
CALLS = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content }}
    {%- for call in m.tool_calls or [] %}{{- '<call>' + call.function.name + '</call>' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
AB = [user("a"), assistant("b"), user("b"), assistant("a")]
CALL = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
# what the template does -> template, messages, what is learnt
FOUND = {
    "a thought in the last turn only": (
        THINKS,
        [user("a"), assistant("<think>x</think>\n b"), user("c"), assistant("<think>y</think>d")],
        ["b<|im_end|>", "<think>\ny\n</think>\n\nd<|im_end|>"],
    ),
    "an empty thought that nobody wrote": (
        THINKS,
        [system("s"), *AB],
        ["b<|im_end|>", "<think>\n\n</think>\n\na<|im_end|>"],
    ),
    "moves the system's turn to the end": (
        MOVES_SYSTEM,
        [system("b"), user("a"), assistant("b"), user("c"), assistant("  b ")],
        [" b</s>", " b</s>"],
    ),
    "the same words everywhere": (
        f"{{% for m in messages %}}{LINE}{{% endfor %}}",
        [system("assistant"), user("assistant"), assistant("assistant"), user("<")]
        + [assistant("<|im_end|>")],
        ["assistant<|im_end|>", "<|im_end|><|im_end|>"],
    ),
    "recalls an answer in the next question": (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.role == 'user' and not loop.first %}({{ loop.previtem.content }}) {% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}",
        [*AB, user("c"), assistant("b")],
        ["b<|im_end|>", "a<|im_end|>", "b<|im_end|>"],
    ),
    "the last answer as a title": (
        "# {{ messages[-1].content }}\n{% for m in messages %}" + LINE + "{% endfor %}",
        AB,
        ["b<|im_end|>", "a<|im_end|>"],
    ),
    "says an answer twice": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}, {{ m.content }}<|im_end|>{% endfor %}",
        AB,
        ["b, b<|im_end|>", "a, a<|im_end|>"],
    ),
    "capitals": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}<|im_end|>{% endfor %}",
        AB,
        ["B<|im_end|>", "A<|im_end|>"],
    ),
    "leaves out all but the last exchange": (
        f"{{% for m in messages[-2:] %}}{LINE}{{% endfor %}}",
        AB,
        ["a<|im_end|>"],
    ),
    "a colon before words, if there are any": (
        "{% for m in messages %}{{ m.role }}{% if m.content %}: {{ m.content }}{% endif %}"
        "<|im_end|>{% endfor %}",
        [user("a"), assistant(""), user("c"), assistant("d")],
        ["<|im_end|>", "d<|im_end|>"],
    ),
    "calls a tool": (
        CALLS,
        [user("a"), assistant("", **CALL), {"role": "tool", "content": "9"}, assistant("b")],
        ["<call>f</call><|im_end|>", "b<|im_end|>"],
    ),
    "an end that is no special token": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }} #END#\n\n{% endfor %}",
        AB,
        ["b #END#", "a #END#"],
    ),
    "no end": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}; {% endfor %}",
        AB,
        ["b;", "a;"],
    ),
    "our own mark in the text": (
        f"{{% for m in messages %}}{LINE}{{% endfor %}}",
        [user("zqturnqz"), assistant("zqturnqzzqturnqz")],
        ["zqturnqzzqturnqz<|im_end|>"],
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_assistants_words_are_found_whatever_a_template_does(small, name):
    template, messages, expected = FOUND[name]
    text, spans = Renderer(small, template).spans(messages)
    assert [text[start:end] for start, end in spans] == expected


def test_a_turn_that_cannot_be_found_is_an_error_that_says_what_to_do(small):
    with pytest.raises(ValueError, match=r"of turn 2 cannot be found .*\{% generation %\}"):
        Renderer(small, "{% for m in messages %}<{{ m.content[:3] }}>{% endfor %}").spans(AB)


@pytest.mark.parametrize("marked", [True, False])
def test_train_on(small, marked):
    template = chat_formats.FORMATS["chatml"].template
    template = template if marked else MARKS.sub("", template)
    messages = [system("s"), *AB]

    def learnt(train_on):
        ids, trained = Renderer(small, template, train_on=train_on)(messages)
        return small.decode(ids[trained], skip_special=False)

    assert learnt("assistant") == "b<|im_end|>a<|im_end|>"
    assert learnt("last") == "a<|im_end|>"
    assert learnt("all").startswith("<|im_start|>system\ns<|im_end|>")


@pytest.mark.parametrize("marked", [True, False])
def test_a_conversation_with_tools_has_the_template_for_tools(small, marked):
    # Each of the two has another generation prompt, other marks and another end; and the second
    # cannot do without tools.
    default = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    answer = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    with_tools = (
        "{{ tools | map(attribute='name') | join }}:{% for m in messages %}<{{ m.role }}>"
        "{% if m.role == 'assistant' %}" + answer + "{% else %}{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    if not marked:
        with_tools = MARKS.sub("", with_tools)
    own = HuggingFace(chat_cases.tokenizer_json(), {"eos": small.eos_id})
    own.chat_template = {"default": default, "tool_use": with_tools}
    renderer, tools = Renderer(own), [{"name": "f"}]

    def learnt(**options):
        text, spans = renderer.spans(AB, **options)
        assert text == own.apply_chat_template(AB, tokenize=False, **options)
        return [text[start:end] for start, end in spans]

    for _ in range(2):  # whichever comes first
        assert learnt(tools=tools) == ["b<|im_end|>", "a<|im_end|>"]
        assert learnt() == ["b</s>", "a</s>"]
    # A template that is named is for all.
    assert Renderer(own, default).spans(AB, tools=tools)[0] == renderer.spans(AB)[0]


def test_a_prompt_is_what_stands_before_an_answer(small):
    for chat_format in chat_formats.FORMATS.values():
        renderer = Renderer(small, chat_format.template)
        ids, trained = renderer([user("Hi"), assistant("Yes")])
        prompt = renderer.prompt([user("Hi")])
        # What follows the prompt is learnt, and nothing before: training and sampling agree.
        before, learnt = np.split(ids, np.flatnonzero(trained)[:1])
        assert small.decode(before, skip_special=False) == small.decode(prompt, skip_special=False)
        assert small.decode(learnt).strip() == "Yes"


@pytest.mark.parametrize("name", chat_formats.FORMATS)
def test_a_format_ends_with_what_it_says(small, name):
    chat_format = chat_formats.FORMATS[name]
    renderer = Renderer(small, chat_format.template)
    ends = {small.special_tokens[n] for n in chat_format.stop if n in small.special_tokens}
    ids, trained = renderer([user("Hi"), assistant("Yes")])
    assert int(ids[trained][-1]) in ends | {small.eos_id}
    assert renderer.ending.strip() in {*chat_format.stop, "</s>"}


def test_characters_that_a_tokenizer_does_not_know_do_not_shift_the_mask():
    tokenizer = tokenizers.train("char", ["<userait>YesNo.\n H|m_nd"])
    renderer = Renderer(tokenizer, f"{{% for m in messages %}}{LINE}{{% endfor %}}")
    ids, trained = renderer([user("H\U0001f600i\u00e9"), assistant("Yes\U0001f600No")])
    assert int((ids == tokenizer.unk_id).sum()) == 3
    # Three unknown tokens; counted as no bytes they would move the stretch two places.
    assert tokenizer.decode(ids[trained], skip_special=False).startswith("Yes<unk>No<|im_end|>")
