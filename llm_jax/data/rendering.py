"""Conversations to token ids, and which of the tokens are the assistant's own.

What a model learns to write is found from the rendering itself, so that any template will do:

  - A template with `{% generation %}` blocks says it; then the blocks decide, as in transformers.
  - Otherwise the conversation is rendered again with a turn's words exchanged for a mark. The text
    before and after the mark stands in the real rendering as well, and so bounds the words there,
    whatever the template does with them (strips them, writes them a second time) and wherever else
    the same words stand. A turn begins where the generation prompt ends, if the template has one,
    and otherwise with its words. It includes what ends it: up to the first special token after the
    words, or without one all that the template writes after them for this turn, but for white space
    at the end.

A token counts if any part of it lies in such a stretch of text, as in transformers. (There the last
character of a stretch counts with its first token alone, and white space that a tokenizer's offsets
leave out can end the mask early or not at all; neither happens where a special token ends a turn.)
"""

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.tokenizers import chat
from llm_jax.tokenizers.base import ROLES, Tokenizer, special_pattern

TRAIN_ON = ("assistant", "last", "all")
_ASK = {"add_generation_prompt": True}
_MARK = "zqturnqz"  # stands in a rendering for the words of a turn; nothing escapes it
_PROBE = ({"role": "user", "content": "question"}, {"role": "assistant", "content": _MARK})


class Rendered(NamedTuple):
    """A conversation as a model reads it."""

    ids: np.ndarray  # int32 [n]
    trained: np.ndarray  # bool [n], whether the model learns to write this token


class Renderer:
    """Renders conversations with one tokenizer and one template, or those of its own by name.

    Args:
      template: Jinja; None takes the tokenizer's own, as `Tokenizer.apply_chat_template` chooses
        for each conversation.
      train_on: "assistant", all its turns; "last", its last turn; "all", every token.
      tools: those with which the template is tried, which some need.
      now: the time of a template that writes the date; None is the present.

    Attributes:
      template: the one in use for conversations without tools (with them, if `tools` are given).
      marked: it has `{% generation %}` blocks.
      ending: the text that ends an answer; empty if the template writes nothing there.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None = None,
        *,
        train_on: str = "assistant",
        tools: Sequence | None = None,
        now: datetime.datetime | None = None,
    ):
        if train_on not in TRAIN_ON:
            raise ValueError(f"data.dialogue.train_on={train_on!r} is not in {TRAIN_ON}")
        self.tokenizer, self.train_on = tokenizer, train_on
        self._wanted, self._for_tools, self._now = template, None, now
        self.template = self._choose(tools)
        self.marked = chat.marks_assistant(self.template)
        names = {f"{role}_token": tokenizer.token_name(role) for role in ROLES}
        self._variables = {key: name for key, name in names.items() if name is not None}
        special = tokenizer.special_tokens
        self._special = special_pattern(special) if special else None
        asked, self._lead = self._text(_PROBE[:1], tools=tools), ""
        self._prompts = asked != self._text(_PROBE[:1], tools=tools, **_ASK)
        answered = self._text(_PROBE, tools=tools)
        before = _split(answered, _MARK)[0]
        # Without a generation prompt a header in front of an answer is not the model's to write,
        # but white space alone is.
        if not self._prompts and before.startswith(asked) and not before[len(asked) :].strip():
            self._lead = before[len(asked) :]
        text, spans = self.spans(_PROBE, tools=tools)
        said = _split(text[slice(*spans[-1])], _MARK) if spans else []
        closing = said[-1] if len(said) > 1 else ""
        self.ending = closing[: self._ending(closing)]

    def __call__(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence | None = None
    ) -> Rendered:
        """Ids and mask of one conversation."""
        return self.encode([self.spans(messages, tools=tools)])[0]

    def encode(self, found: Sequence[tuple[str, list[tuple[int, int]]]]) -> list[Rendered]:
        """Ids and mask of each text with its spans.

        Raises ValueError if the tokenizer cannot write a text, or writes another.
        """
        ids = self.tokenizer.encode_batch([text for text, _ in found], special=True)
        rendered = []
        for (text, spans), row in zip(found, ids, strict=True):
            trained = chat.tokens_within(self.tokenizer, text, row, spans)
            rendered.append(Rendered(row.astype(np.int32), trained))
        return rendered

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a conversation that is the assistant's to go on with."""
        text = self._text(messages, **_ASK)
        return self.tokenizer.encode(text, special=True)

    def spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence | None = None,
        after: int = 0,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and (start, end) of the characters to learn, in order.

        With `train_on="assistant"` those of the turns from number `after` on.

        Raises ValueError for what the template refuses, and if it writes a turn in a way that
        cannot be found again.
        """
        if (template := self._choose(tools)) != self.template:
            if self._for_tools is None:
                self._for_tools = Renderer(
                    self.tokenizer, template, train_on=self.train_on, tools=tools, now=self._now
                )
            return self._for_tools.spans(messages, tools=tools, after=after)
        text, blocks = self._render(messages, tools=tools)
        if self.train_on == "all":
            return text, [(0, len(text))]
        numbers = [
            i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= after
        ]
        if self.train_on == "last":
            numbers = numbers[-1:]
        if self.marked and self.train_on == "assistant" and not after:
            return text, blocks
        turns = [self._turn(text, messages, i, tools) for i in numbers]
        turns = [turn for turn in turns if turn is not None]
        if self.marked:
            turns = [b for b in blocks if any(b[0] < end and start < b[1] for start, end in turns)]
        return text, turns

    def _choose(self, tools: Sequence | None) -> str:
        own = self.tokenizer.chat_template
        return chat.choose(own, self._wanted, has_tools=tools is not None)

    def _turn(
        self, text: str, messages: Sequence[Mapping[str, Any]], i: int, tools: Any
    ) -> tuple[int, int] | None:
        """Where turn i stands; None if the template leaves it out."""
        mark = _MARK
        while mark in text:
            mark += mark
        # White space around the mark may be trimmed as that of the words was, and case changed.
        other = [*messages[:i], {"role": messages[i]["role"], "content": mark}]
        whole = self._text([*other, *messages[i + 1 :]], tools=tools)
        pieces = _split(whole, mark)
        if len(pieces) == 1 and whole == text:
            return None
        start, end = self._places(text, pieces, messages, i)
        prompt = i and self._prompts and self._text(messages[:i], tools=tools, **_ASK)
        if prompt and text.startswith(prompt):
            start = len(prompt)
        elif start is not None and text[:start].endswith(self._lead):
            start -= len(self._lead)
        if end is None or start is None or start > end:
            raise ValueError(
                f"chat template: what becomes of turn {i + 1} cannot be found in its rendering; "
                "mark the assistant's words in the template with {% generation %} and "
                "{% endgeneration %}"
            )
        closing = text[end:]
        if i + 1 < len(messages):
            closing = _common(closing, _split(self._text(other, tools=tools), mark)[-1])
        return start, end + self._ending(closing)

    def _places(
        self, text: str, pieces: list[str], messages: Sequence[Mapping[str, Any]], i: int
    ) -> tuple[int | None, int | None]:
        """Where the words of turn i begin and end in the text, given what stands around them."""
        count = len(pieces) - 1
        if count < 1:
            return None, None
        first, last = self._own(messages, i, count)
        size = (len(text) - sum(map(len, pieces))) // count
        words = text[len(pieces[0]) :][: max(size, 0)]
        if words.join(pieces) == text:
            begin = len(words.join(pieces[: first + 1]))
            return begin, len(words.join(pieces[: last + 1])) + len(words)
        # Other words come with more than themselves, such as a thought or the call of a tool.
        end = len(text) - len(pieces[-1])
        if last < count - 1 or not text.endswith(pieces[-1]):
            return None, None
        if first == 0 and text.startswith(pieces[0]):
            return len(pieces[0]), end
        return (None if _has_words(messages[i]) else end), end

    def _own(self, messages: Sequence[Mapping[str, Any]], i: int, count: int) -> tuple[int, int]:
        """Of `count` places with the words of turn i the first and the last in the turn itself.

        A template may write them elsewhere too. With a mark in every turn, the first of them is
        that after the turns before it; and in the conversation up to it, all from there on are.
        """
        if count == 1:
            return 0, 0
        marks = [f"{_MARK}{number}z" for number in range(len(messages))]
        marked = [
            message if message["role"] == "system" else {**message, "content": mark}
            for message, mark in zip(messages, marks, strict=True)
        ]

        def place(text: str) -> int:
            at = 0
            for number, message in enumerate(messages[: i + 1]):
                if message["role"] != "system" and marks[number] in text[at:]:
                    at = text.index(marks[number], at)
            return at

        text, until = self._text(marked).lower(), self._text(marked[: i + 1]).lower()
        first = text[: place(text)].count(marks[i])
        return first, first + until[place(until) :].count(marks[i]) - 1

    def _ending(self, closing: str) -> int:
        """How much of the text after a turn's words ends the turn."""
        found = self._special and self._special.search(closing)
        return found.end() if found else len(closing.rstrip())

    def _render(self, messages: Sequence[Mapping[str, Any]], **options: Any):
        options = {**self._variables, **options}
        return chat.render(self.template, messages, now=self._now, **options)

    def _text(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        return self._render(messages, **options)[0]


def _split(text: str, mark: str) -> list[str]:
    return re.split(mark, text, flags=re.IGNORECASE)


def _has_words(message: Mapping[str, Any]) -> bool:
    return bool(str(message.get("content") or "").strip() or message.get("tool_calls"))


def _common(a: str, b: str) -> str:
    """The longest common beginning."""
    size = min(len(a), len(b))
    return a[: next((i for i in range(size) if a[i] != b[i]), size)]
