r"""The one prompt builder of all evaluations: description, worked examples, the question.

    description + question + " " + answer + "\n\n" + ... + question to answer

which is how lm-evaluation-harness lays out its default templates. The continuation that is scored
begins with the delimiter (" "), or with nothing behind a chat template.
"""

import random
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")
DELIMITER, SEPARATOR = " ", "\n\n"


def build_prompt(
    question: str,
    *,
    examples: Sequence[tuple[str, str]] = (),
    description: str = "",
    tokenizer: Any = None,
    multiturn: bool = False,
) -> str:
    """A prompt that asks `question` after worked (question, answer) examples.

    With a `tokenizer` it goes through its chat template and ends where the assistant's turn begins:
    the description is the system's message, the rest one message of the user, or with `multiturn`
    each example a turn of the user and one of the assistant.
    """
    if tokenizer is None:
        shots = "".join(q + DELIMITER + a + SEPARATOR for q, a in examples)
        return description + shots + question
    messages = [{"role": "system", "content": description}] if description else []
    if multiturn:
        for q, a in examples:
            messages += [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        messages.append({"role": "user", "content": question})
    else:
        content = build_prompt(question, examples=examples)
        messages.append({"role": "user", "content": content})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def draw_examples(
    pool: Sequence[T], k: int, rng: random.Random | None, *, avoid: T | None = None
) -> list[T]:
    """k examples from `pool`: the first ones, or with `rng` random ones in random order.

    `avoid` is the question itself where it comes from the same pool. Drawn question after question
    with one `random.Random(seed)`, the examples are those of lm-evaluation-harness.

    Raises:
      ValueError: fewer than k examples.
    """
    if k == 0:
        return []
    if len(pool) - (avoid is not None) < k:
        raise ValueError(
            f"--num_fewshot={k} wants more examples than the {len(pool)} there are; lower it or give "
            "more with --fewshot_input"
        )
    if rng is None:
        return [x for x in pool if avoid is None or x != avoid][:k]
    if avoid is None:
        return rng.sample(pool, k)
    # One more than asked for: `avoid` may be among them, and twice so if the pool repeats it.
    drawn = [x for x in rng.sample(pool, k + 1) if x != avoid][:k]
    return drawn if len(drawn) == k else rng.sample([x for x in pool if x != avoid], k)


def options(choices: Sequence[str]) -> str:
    """The choices as lines: "A. first", "B. second", ..."""
    return "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
