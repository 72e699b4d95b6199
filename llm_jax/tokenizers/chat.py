"""Chat templates: a list of messages to text, as Hugging Face's Jinja templates do it.

A template is a program that its model's publisher wrote. It runs in Jinja's sandbox and sees
nothing but plain data.
"""

import datetime
import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"  # the named ones beside the default

# Names under which a message may carry the reasoning before its answer; the first is the standard.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Marks that text cannot contain: written while a template runs and taken out of what it wrote.
_NONCE = secrets.token_hex(8)
_START, _END, _CUT = f"\ufdd0{_NONCE}\ufdd1", f"\ufdd0{_NONCE}\ufdd2", f"\ufdd0{_NONCE}\ufdd3 "
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def choose(
    templates: str | Mapping[str, str] | None, wanted: str | None, *, has_tools: bool
) -> str:
    """The template to use: `wanted` (a name or a template), else the tokenizer's own.

    A tokenizer with several uses "tool_use" when there are tools, and "default" otherwise.
    """
    named = templates if isinstance(templates, Mapping) else {}
    if wanted is not None:
        return named.get(wanted, wanted)
    if isinstance(templates, str):
        return templates
    if has_tools and "tool_use" in named:
        return named["tool_use"]
    if "default" in named:
        return named["default"]
    if named:
        raise ValueError(
            f"this tokenizer has the chat templates {sorted(named)} and no default; name one with "
            "chat_template="
        )
    raise ValueError("this tokenizer has no chat template; give chat_template=")


def marks_assistant(template: str) -> bool:
    """Whether the template has a `{% generation %}` block, so that `render` finds spans."""
    return bool(_GENERATION_TAG.search(template))


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    now: datetime.datetime | None = None,
    **variables: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where in it the assistant's own words stand.

    Args:
      messages: each with a "role" and "content" (or "tool_calls").
      tools: JSON schemas of the functions the model may call.
      add_generation_prompt: end with the header of an assistant's message.
      continue_final_message: leave the last message open, for the model to go on with it. A string
        names the field to continue instead of "content".
      now: the time of a template that writes the date (`strftime_now`); None is the present.
      variables: whatever else the template reads, such as `bos_token`.

    Returns:
      The text, and the (start, end) characters of each `{% generation %}` block, in order.

    Raises ValueError for a malformed message and for everything the template itself refuses.
    """
    if continue_final_message and add_generation_prompt:
        raise ValueError(
            "continue_final_message leaves the last message open and add_generation_prompt starts "
            "a new one; give only one of them"
        )
    messages = [_checked(message, number) for number, message in enumerate(messages)]
    if not messages:
        raise ValueError("a chat needs at least one message")
    if continue_final_message:
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        last_words = _leave_open(messages[-1], field)
    text = _run(
        template,
        {
            "strftime_now": (now or datetime.datetime.now()).strftime,
            **_plain(variables),
            "messages": messages,
            "tools": _plain(tools),
            "documents": _plain(documents),
            "add_generation_prompt": add_generation_prompt,
        },
    )
    text, spans = _take_out_marks(text)
    if not continue_final_message:
        return text, spans
    cut = text.rfind(_CUT.strip())
    if cut < 0 or last_words.strip() not in text:
        raise ValueError(
            "continue_final_message: the template does not write the last message's "
            f"{field!r} as it is, so it cannot be continued"
        )
    # A template that trims the message took the mark's own space away, and the message's with it.
    whole = text[cut : cut + len(_CUT)] == _CUT
    text = text[:cut] if whole else text[:cut].rstrip()
    return text, [(start, min(end, len(text))) for start, end in spans if start < len(text)]


def tokens_within(
    tokenizer: Any, text: str, ids: np.ndarray, spans: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Of the ids of a text (special tokens parsed) those with a part in a span, bool [n].

    Args:
      spans: (start, end) characters of the text.

    Raises ValueError if the tokens do not spell the text, as with a tokenizer that lower-cases it.
    """
    table = tokenizer.decode_table(False)
    pieces = [table[i] for i in np.asarray(ids).tolist()]
    content, written = text.encode(), b"".join(pieces)
    sizes = np.fromiter((len(piece) for piece in pieces), np.int64, len(pieces))
    ends = np.cumsum(sizes)
    starts = ends - sizes
    shift = int(tokenizer.strips_leading_space and written[:1] == b" ")
    if written[shift:] != content:
        known = [b"" if i == tokenizer.unk_id else p for i, p in zip(ids, pieces, strict=True)]
        starts, ends, shift = *_places_of(known, content, shift), 0
    inside = np.zeros(max(len(written), len(content)) + 1, np.int64)
    for start, end in spans:
        before = len(text[:start].encode()) + shift
        inside[before : before + len(text[start:end].encode())] = 1
    total = np.concatenate([[0], np.cumsum(inside)])
    return total[ends] > total[starts]


def _places_of(pieces: list[bytes], content: bytes, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each piece stands in a text of which some characters are unknown to the tokenizer.

    A piece without bytes (the unknown token) takes the place up to the next piece.
    """
    starts, ends, at = [], [], 0
    for number, piece in enumerate(pieces):
        piece = piece[shift:] if number == 0 else piece
        found = content.find(piece, at)
        if found < 0:
            raise ValueError(
                "this tokenizer changes the text, so its tokens cannot be matched with characters"
            )
        starts.append(found if piece else at)
        at = found + len(piece)
        ends.append(at)
    for number in range(len(pieces) - 1, -1, -1):
        if not pieces[number]:
            ends[number] = starts[number + 1] if number + 1 < len(pieces) else len(content)
    return np.array(starts), np.array(ends)


def _run(template: str, variables: Mapping[str, Any]) -> str:
    compiled = compile_template(template)
    import jinja2

    try:
        return compiled.render(variables)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"chat template: {message or type(error).__name__}") from None


@functools.lru_cache(maxsize=32)
def compile_template(template: str) -> Any:
    """The template as Jinja compiles it. Raises ValueError for what is no template."""
    try:
        import jinja2
        from jinja2 import ext, nodes, sandbox
    except ImportError:
        raise ImportError("chat templates need jinja2: pip install 'llm_jax[hf]'") from None

    class Generation(ext.Extension):
        """{% generation %} … {% endgeneration %}: the words between are the assistant's."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, caller):
            return _START + caller() + _END

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    # Jinja's own filter escapes <, > and & for HTML.
    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template, line {error.lineno}: {error.message}") from None
    except SyntaxError as error:  # of the Python it becomes: {% break %} outside a loop
        raise ValueError(f"chat template: {error.msg}") from None


def _checked(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A copy in plain data, without empty fields and with reasoning under every name it has."""
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is {type(message).__name__}, not a dict")
    message = {key: _plain(value) for key, value in message.items() if value is not None}
    if "role" not in message:
        raise ValueError(f"message {number} has no 'role' (it has {sorted(message)})")
    if not {"content", "tool_calls"} & set(message):
        raise ValueError(f"message {number} has no 'content' (it has {sorted(message)})")
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _leave_open(message: dict[str, Any], field: str) -> str:
    """Puts a mark behind the text in `message[field]` and returns that text."""
    value = message.get(field)
    if isinstance(value, list):
        blocks = [block for block in value if isinstance(block, dict) and "text" in block]
        if not blocks:
            raise ValueError("continue_final_message: the last message has no text to continue")
        text = blocks[-1]["text"]
        blocks[-1]["text"] = text + _CUT
        return text
    if not isinstance(value, str):
        raise ValueError(f"continue_final_message: the last message has no text in {field!r}")
    names = _REASONING if field in _REASONING else (field,)
    for name in names:
        if message.get(name) == value:
            message[name] = value + _CUT
    return value


def _take_out_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    kept, spans, starts, length = [], [], [], 0
    for part in re.split(f"({_START}|{_END})", text):
        if part == _START:
            starts.append(length)
        elif part == _END:
            spans.append((starts.pop() if starts else 0, length))
        else:
            kept.append(part)
            length += len(part)
    return "".join(kept), sorted(spans)


def _plain(value: Any) -> Any:
    """Rebuilt of JSON's types alone: other objects have methods that a sandbox cannot judge."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, str):  # an enumeration, say, whose str() is its name
        return str.__str__(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    raise ValueError(
        f"a chat template takes strings, numbers, lists and dicts, not {type(value).__name__}; "
        "tools are given as JSON schemas"
    )


def to_files(templates: str | Mapping[str, str] | None) -> dict[str, bytes]:
    """File name -> content: how templates lie in a Hugging Face folder."""
    if templates is None:
        return {}
    if isinstance(templates, str):
        return {TEMPLATE_FILE: templates.encode()}
    files = {}
    for name, template in sorted(templates.items()):
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"chat template name {name!r} must be letters, digits, _ and - only")
        path = TEMPLATE_FILE if name == "default" else f"{TEMPLATE_FOLDER}/{name}.jinja"
        files[path] = template.encode()
    return files


def from_files(files: Mapping[str, bytes]) -> str | dict[str, str] | None:
    """The templates among the files of a folder, of ours or of Hugging Face.

    A template in a file of its own wins over one inside a JSON file, as there.
    """
    named = {}
    for path, content in files.items():
        if path.startswith(f"{TEMPLATE_FOLDER}/") and path.endswith(".jinja"):
            named[path.removeprefix(f"{TEMPLATE_FOLDER}/").removesuffix(".jinja")] = (
                content.decode()
            )
    if TEMPLATE_FILE in files:
        named["default"] = files[TEMPLATE_FILE].decode()
    for path in ("chat_template.json", "tokenizer_config.json"):
        if named or path not in files:
            continue
        value = json.loads(files[path]).get("chat_template")
        if isinstance(value, str):
            named["default"] = value
        elif value:
            named.update({entry["name"]: entry["template"] for entry in value})
    if set(named) == {"default"}:
        return named["default"]
    return named or None
