"""What a model is asked, in two styles: a text that a base model goes on with, and a conversation.

Both show examples and ask for one thing at a time: new instructions; whether a task is one of
classification; an input; an answer; a user's next question. In a conversation the examples are
earlier turns: models of a hundred million parameters, asked for a list, mostly repeat the list.
"""

import re
from collections.abc import Sequence
from typing import Any

from llm_jax.align.self_instruct.tasks import Task

NUMBERED = re.compile(r"\n?\s*Task \d+:")
NOTHING = re.compile(r"\W*(none|no input|n/?a|not needed)\W*", re.IGNORECASE)
MORE = 4  # instructions that one completion of a list is asked for

# Questions of the conversations.
NEW_TASK = "Write a new task."
KIND = "Is this a classification task? Say yes or no."
INPUT = "Write an input for it, or none."
LABEL = "Name one of the possible answers."
LABELLED = "Write an input to which the answer is"
NEXT = "Write the next question that the user asks."
# What ends a piece of text of a base model.
STOPS = {
    "instruction": ("\n\n",),
    "kind": ("\n",),
    "input": ("\nOutput:", "\n\nTask:"),
    "label": ("\nInput:", "\n\nTask:"),
    "labelled": ("\nOutput:", "\n\nTask:"),
    "output": ("\n\nTask:",),
    "next": ("\nAssistant:", "\n\n"),
    "answer": ("\nUser:", "\n\n"),
}


def with_input(task: Task) -> str:
    """What a user says to give a task."""
    return f"{task.instruction}\n\n{task.input}" if task.input else task.instruction


def parse_kind(text: str) -> bool | None:
    """Yes or no, or None."""
    word = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    return None if word is None else word[1].lower() == "yes"


def parse_input(text: str) -> str:
    """An input; empty where the model says that none is needed."""
    return "" if NOTHING.fullmatch(text.strip()) else text.strip()


class Base:
    """Prompts for a model that goes on with text; a stop string ends each piece."""

    def stop(self, stage: str) -> tuple[str, ...]:
        return STOPS[stage]

    def instruction(self, shots: Sequence[Task]) -> str:
        listed = "".join(f"Task {i}: {t.instruction}\n" for i, t in enumerate(shots, start=1))
        return f"Come up with a series of tasks:\n\n{listed}Task {len(shots) + 1}:"

    def parse_instructions(self, text: str, finished: bool) -> list[tuple[str, bool]]:
        """(instruction, whether its end was reached) of a list that the model went on with."""
        pieces = [piece.strip() for piece in NUMBERED.split(text)][:MORE]
        ends = [True] * (len(pieces) - 1) + [finished or len(NUMBERED.findall(text)) >= MORE]
        return [(piece, end) for piece, end in zip(pieces, ends, strict=True) if piece]

    def kind(self, task: Task, shots: Sequence[Task]) -> str:
        ask = lambda t: f"Task: {t.instruction}\n{KIND}"  # noqa: E731
        shown = [f"{ask(t)} {'Yes' if t.classification else 'No'}" for t in shots]
        return "\n\n".join([*shown, ask(task)])

    def input(self, task: Task, shots: Sequence[Task]) -> str:
        shown = [
            f"Task: {t.instruction}\nInput: {t.input or 'none'}\nOutput: {t.output}" for t in shots
        ]
        return "\n\n".join([*shown, f"Task: {task.instruction}\nInput:"])

    def label(self, task: Task, shots: Sequence[Task]) -> str:
        shown = [f"Task: {t.instruction}\nClass label: {t.output}\nInput: {t.input}" for t in shots]
        return "\n\n".join([*shown, f"Task: {task.instruction}\nClass label:"])

    def labelled(self, task: Task, shots: Sequence[Task]) -> str:
        return f"{self.label(task, shots)} {task.output}\nInput:"

    def output(self, task: Task, shots: Sequence[Task]) -> str:
        return f"{self.input(task, shots)} {task.input or 'none'}\nOutput:"

    def next(self, turns: Sequence[str], shots: Sequence[Task]) -> str:
        shown = [_dialogue([with_input(t), t.output, t.follow_up]) for t in shots]
        return "\n\n".join([*shown, f"{_dialogue(turns)}\nUser:"])

    def answer(self, turns: Sequence[str]) -> str:
        return f"{_dialogue(turns)}\nAssistant:"


class Chat:
    """Prompts in the tokenizer's chat template; the model ends each piece by its end token."""

    def stop(self, stage: str) -> tuple[str, ...]:
        return ()

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def _ids(self, *turns: str) -> list[int]:
        messages = [
            {"role": "assistant" if i % 2 else "user", "content": text}
            for i, text in enumerate(turns)
        ]
        return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    def instruction(self, shots: Sequence[Task]) -> list[int]:
        shown = [text for t in shots for text in (NEW_TASK, t.instruction)]
        return self._ids(*shown, NEW_TASK)

    def parse_instructions(self, text: str, finished: bool) -> list[tuple[str, bool]]:
        """The one instruction of an answer, without a number or quotation marks around it."""
        text = re.sub(r"^\s*(\d+[.)]\s+|task( \d+)?:\s*)", "", text, flags=re.IGNORECASE).strip()
        if len(text) > 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
            text = text[1:-1].strip()
        return [(text, finished)] if text else []

    def kind(self, task: Task, shots: Sequence[Task]) -> list[int]:
        ask = lambda t: f"Task: {t.instruction}\n{KIND}"  # noqa: E731
        shown = [x for t in shots for x in (ask(t), "yes" if t.classification else "no")]
        return self._ids(*shown, ask(task))

    def input(self, task: Task, shots: Sequence[Task]) -> list[int]:
        ask = lambda t: f"Task: {t.instruction}\n{INPUT}"  # noqa: E731
        shown = [text for t in shots for text in (ask(t), t.input or "none")]
        return self._ids(*shown, ask(task))

    def label(self, task: Task, shots: Sequence[Task]) -> list[int]:
        ask = lambda t: f"Task: {t.instruction}\n{LABEL}"  # noqa: E731
        shown = [text for t in shots for text in (ask(t), t.output)]
        return self._ids(*shown, ask(task))

    def labelled(self, task: Task, shots: Sequence[Task]) -> list[int]:
        ask = lambda t: f"Task: {t.instruction}\n{LABELLED}: {t.output}"  # noqa: E731
        shown = [text for t in shots for text in (ask(t), t.input)]
        return self._ids(*shown, ask(task))

    def output(self, task: Task, shots: Sequence[Task]) -> list[int]:
        return self._ids(with_input(task))  # the model answers as it answers a user

    def next(self, turns: Sequence[str], shots: Sequence[Task]) -> list[int]:
        ask = lambda turns: f"{_dialogue(turns)}\n\n{NEXT}"  # noqa: E731
        shown = [x for t in shots for x in (ask([with_input(t), t.output]), t.follow_up)]
        return self._ids(*shown, ask(turns))

    def answer(self, turns: Sequence[str]) -> list[int]:
        return self._ids(*turns)


Style = Base | Chat


def style(name: str, tokenizer: Any) -> Style:
    """The style "base" or "chat"; "auto": chat if the tokenizer has a chat template.

    Raises:
      ValueError: chat without a template, or another name.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if name == "auto":
        name = "chat" if has_template else "base"
    if name == "base":
        return Base()
    if name != "chat":
        raise ValueError(f"--style={name} is unknown; there are auto, base, chat")
    if not has_template:
        raise ValueError("--style=chat: the tokenizer has no chat template; use --style=base")
    return Chat(tokenizer)


def _dialogue(turns: Sequence[str]) -> str:
    names = ("User", "Assistant")
    return "\n".join(f"{names[i % 2]}: {text}" for i, text in enumerate(turns))
