"""What conversations and preferences have in common: the chat template, the tokenizer that carries it,
the corpus that a run trains on, and the rows that are left out."""

import contextlib
import datetime
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from absl import logging

from llm_jax import tokenizers
from llm_jax.config import DialogueConfig, TokenizerConfig
from llm_jax.data import conversations
from llm_jax.data.conversations import Rejected
from llm_jax.data.mixture import Component
from llm_jax.data.prepare import TOKENIZER, Corpus, save_tokenizer, training_options
from llm_jax.data.rendering import Renderer
from llm_jax.data.tokens import Tokens
from llm_jax.tokenizers import chat
from llm_jax.tokenizers.chat_formats import FORMATS, ChatFormat

REJECTED = "rejected.jsonl"
RENDERED_ON = "rendered_on.txt"
SHOWN = 5  # rejected rows that are printed
Told = tuple[Sequence[dict[str, Any]], Sequence | None]  # messages and tools


class ChatCorpus(Corpus):
    """What training needs of conversations; made by `prepare_dialogues` and `prepare_preferences`.

    Attributes, besides those of a `Corpus`:
      tokenizer: with the chat template in use.
      directory: where the tokenizer and the list of rejected rows are.
      stop: strings that end an answer where no id does.
    """

    def __init__(
        self,
        renderer: Renderer,
        directory: str,
        train: list[Component],
        evaluation: Tokens | None,
        *,
        system: str,
        parts: list[dict[str, Any]],
        stop: Sequence[str] | None,  # None: what the template writes behind an answer
    ):
        self._renderer, self._system, self._parts = renderer, system, parts
        tokenizer = renderer.tokenizer
        special = tokenizer.special_tokens
        ending = renderer.ending.strip()
        # Where a special token closes the ending, it alone is waited for.
        ending = max((name for name in special if ending.endswith(name)), key=len, default=ending)
        stop = (ending,) if stop is None else stop
        ends = {special[name] for name in (ending, *stop) if name in special}
        ends = tuple(sorted(ends - {tokenizer.eos_id}))
        stop = tuple(name for name in stop if name and name not in special)
        super().__init__(tokenizer, train, evaluation, directory, ends, stop)

    def parts(self) -> list[dict[str, Any]]:
        """Rows of a report's table: what each part holds and what became of its rows."""
        return [dict(part) for part in self._parts]

    def prompt(self, text: str) -> list[int]:
        """Ids of `text` as a user's turn, up to where the assistant is to answer."""
        return self._renderer.prompt(with_system([{"role": "user", "content": text}], self._system))


def settle(
    rejected: list[Rejected],
    left_out: list[Rejected],
    cfg: DialogueConfig,
    root: str,
    writer: bool,
) -> None:
    """Writes down all that is not trained on, and names what is malformed or fails for it."""
    path = os.path.join(root, REJECTED)
    if writer:
        os.makedirs(root, exist_ok=True)
        with open(path + ".partial", "w") as f:
            for row in [*rejected, *left_out]:
                line = {"file": row.source, "line": row.line, "rule": row.rule}
                f.write(json.dumps(line | {"detail": row.detail}) + "\n")
        os.replace(path + ".partial", path)
    if rejected and cfg.malformed == "fail":
        raise ValueError(
            f"{len(rejected)} malformed rows ({by_rule(rejected)}), the first {rejected[0]}; all are "
            f"in {path}; mend them, or leave them out with data.dialogue.malformed=skip"
        )
    if rejected and writer:
        logging.warning(
            "%d malformed rows are left out (%s); all are in %s",
            len(rejected),
            by_rule(rejected),
            path,
        )
        for row in rejected[:SHOWN]:
            logging.warning("  %s", row)


def by_rule(rejected: list[Rejected]) -> str:
    return ", ".join(f"{n} {rule}" for rule, n in conversations.counts(rejected).items())


def with_system(messages: Sequence[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return list(messages)


def find_template(cfg: DialogueConfig) -> tuple[str | None, ChatFormat | None]:
    """The template that the config names (None: the tokenizer's own), and its format if known."""
    if cfg.template in FORMATS:
        return FORMATS[cfg.template].template, FORMATS[cfg.template]
    if not cfg.template:
        return None, None
    path = os.path.expanduser(cfg.template)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"data.dialogue.template={cfg.template}: neither a file nor one of {', '.join(FORMATS)}"
        )
    try:
        with open(path, encoding="utf-8-sig") as f:
            template = f.read()
        chat.compile_template(template)
    except ValueError as e:  # not UTF-8, or not Jinja
        raise ValueError(f"data.dialogue.template={cfg.template}: {e}") from None
    return template, None


def rendered_on(root: str, writer: bool) -> datetime.datetime:
    """When the conversations in `root` were first rendered: a template may write the date, and a
    run that goes on another day has to go on with the same data."""
    path = os.path.join(root, RENDERED_ON)
    if writer and not os.path.isfile(path):
        os.makedirs(root, exist_ok=True)
        with open(path + ".partial", "w") as f:
            f.write(datetime.datetime.now().isoformat(timespec="seconds"))
        os.replace(path + ".partial", path)
    with open(path) as f:
        text = f.read().strip()
    try:
        return datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{path}: {text!r} is no date like 2024-12-31T12:00:00") from None


def keep_tokenizer(
    root: str,
    told: Iterable[Told],
    template: str | None,
    chat_format: ChatFormat | None,
    config: TokenizerConfig,
    now: datetime.datetime,
    writer: bool,
) -> tokenizers.Tokenizer:
    """The tokenizer of the run, with the template, which `root`/tokenizer holds afterwards.

    One without a `config.path` is trained on the renderings of what is `told`.
    """
    folder = os.path.join(root, TOKENIZER)
    if not writer:
        return tokenizers.load(folder)
    if config.path:
        made = tokenizers.load(config.path)
        if template is None and made.chat_template is None:
            raise ValueError(
                f"{config.path} has no chat template; name one in data.dialogue.template "
                f"({', '.join(FORMATS)} or a file)"
            )
    else:
        if template is None:
            raise ValueError(
                "a tokenizer that is trained now has no chat template; name one in "
                f"data.dialogue.template ({', '.join(FORMATS)} or a file)"
            )
        options = training_options(config)
        kind, max_bytes = options.pop("kind"), options.pop("train_bytes")
        names = chat_format.special_tokens if chat_format else ()
        options["special_tokens"] = tuple(dict.fromkeys([*options["special_tokens"], *names]))
        # Any tokenizer renders the text that this one is trained on.
        plain = tokenizers.train("byte", [], special_tokens=options["special_tokens"])
        texts = _rendered(told, Renderer(plain, template, train_on="all", now=now))
        made = tokenizers.train(kind, texts, max_bytes=max_bytes, **options)
    if template is not None:
        made.chat_template = template
    save_tokenizer(made, folder, None)
    return made


def _rendered(told: Iterable[Told], renderer: Renderer) -> Iterator[str]:
    """The texts that the template does not refuse."""
    for messages, tools in told:
        with contextlib.suppress(ValueError, RecursionError):
            yield renderer.spans(messages, tools=tools)[0]


def say_once(renderer: Renderer, chat_format: ChatFormat | None) -> None:
    special = renderer.tokenizer.special_tokens
    missing = [n for n in chat_format.special_tokens if n not in special] if chat_format else []
    if missing:
        logging.info(
            "note: the tokenizer has no special token %s; the template's is plain text to it",
            ", ".join(missing),
        )
    if not renderer.ending:
        logging.warning(
            "note: the template writes nothing behind an answer, so the model does not learn to end"
        )
