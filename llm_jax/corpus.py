"""Text that every machine with Python has: its help topics, docstrings and source.

A fresh machine has no data set and perhaps no network, but it has the standard library. These
corpora are read from the running Python, so they differ a little between Python versions; within
one installation they are the same, in the same order, on every call.
"""

import ast
import functools
import hashlib
import inspect
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator

NAMES = ("docs", "docstrings", "preferences", "questions", "source", "topics")

# Tests, programs beside the library, generated tables (a hundred codecs share one docstring but for
# a name), the text of `topics` as code, and what is not part of Python.
SKIPPED = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


def documents(name: str) -> Iterator[tuple[str, str]]:
    """(name, text) pairs of an embedded corpus.

    topics      `pydoc_data.topics`: prose about the language, 0.5 MB
    docstrings  each distinct docstring of the standard library once, 1.5 MB
    docs        both, mixed: any part of it, such as the last tenth, is a fair sample
    source      the source files of the standard library, 9 MB
    questions   `questions`, each with its answer in one text, 1 MB
    preferences the same texts: `preferences`, each with its chosen answer

    Raises ValueError for another name.
    """
    if name == "topics":
        yield from _topics()
    elif name == "docstrings":
        yield from _distinct(docstrings())
    elif name == "docs":
        both = _distinct([*_topics(), *docstrings()])
        yield from sorted(both, key=lambda document: _digest(document[0]))
    elif name in ("preferences", "questions"):  # as text, a spoiled answer teaches nothing
        yield from ((n, f"{question}\n{answer}\n") for n, question, answer in questions())
    elif name == "source":
        yield from ((module, _source(path)) for module, path in _modules())
    else:
        raise ValueError(f"no embedded corpus is named {name!r}; there are {', '.join(NAMES)}")


def version() -> str:
    """What the corpora depend on: they are the same under the same version."""
    return f"Python {platform.python_version()}"


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics.{name}", topics[name].strip() + "\n"


@functools.cache  # a second of parsing, for 2 MB; preparing data reads a corpus several times
def docstrings() -> tuple[tuple[str, str], ...]:
    """(qualified name, docstring) of each module, its classes and functions, in file order."""
    return tuple(_docstrings())


def _docstrings() -> Iterator[tuple[str, str]]:
    for module, path in _modules():
        stack = [(module, ast.parse(_source(path)))]
        while stack:
            name, node = stack.pop()
            text = ast.get_docstring(node, clean=False)
            if text and text.strip():
                yield name, inspect.cleandoc(text).strip() + "\n"
            inner = [n for n in node.body if isinstance(n, _DOCUMENTED)]
            stack += [(f"{name}.{n.name}", n) for n in reversed(inner)]


_ASKED = (
    "What does {name} do?",
    "What is {name}?",
    "Explain {name} in Python.",
    "What is {name} for?",
    "Describe {name}.",
    "In Python, what does {name} do?",
    "Tell me about {name}.",
    "How would you describe {name} from the standard library?",
)


@functools.cache
def questions() -> tuple[tuple[str, str, str], ...]:
    """(qualified name, question, answer) of each public object of the standard library.

    The answer is the first paragraph of its docstring. An object is asked about once, in one of
    several phrasings, and no answer comes twice: any part of them, such as the last tenth, is a
    fair sample that shares neither an object nor an answer with the rest.
    """
    answers = (
        (name, " ".join(text.partition("\n\n")[0].split()))
        for name, text in docstrings()
        if not any(part.startswith("_") for part in name.split("."))
    )
    found = {}  # of a name that is defined twice, the last definition
    for name, answer in _distinct(answers):
        # A line such as "x.y(a, b) -> c" is a signature, no answer.
        if len(answer.split()) >= 4 and "->" not in answer:
            phrasing = _ASKED[_digest(f"phrasing of {name}")[0] % len(_ASKED)]
            found[name] = (name, phrasing.format(name=f"`{name}`"), answer)
    return tuple(sorted(found.values(), key=lambda row: _digest(row[0])))


_PLACE_SHARE = 1 / 3  # of an answer's words, those that are replaced
_NEIGHBOURS = 256  # questions, at least, among which an answer of the same length is looked for


@functools.cache
def preferences() -> tuple[tuple[str, str, str, str], ...]:
    """(qualified name, question, chosen, rejected) of each of `questions`, in their order.

    The chosen answer is the true one; the rejected one is of one of three kinds, by a digest of the
    name:

    60 %  the words of the true answer in another order
    25 %  the true answer with a third of its words replaced by words drawn from all answers
    15 %  the true answer to another question, of about the same length

    Each kind is on average as long as the true answers, so length tells nothing. The other question
    stands close by, so a part of them, such as the last tenth, shares hardly an answer with the rest.
    """
    rows = questions()
    words = [word for _, _, answer in rows for word in answer.split()]
    found = []
    blocks = max(1, len(rows) // _NEIGHBOURS)
    for block in range(blocks):
        near = rows[len(rows) * block // blocks : len(rows) * (block + 1) // blocks]
        others = _of_like_length([answer for _, _, answer in near])
        for (name, question, answer), other in zip(near, others, strict=True):
            kind = _number(f"kind of {name}", 100)
            if kind < 60:
                rejected = _scrambled(answer, name)
            elif kind < 85:
                rejected = _replaced(answer, name, words)
            else:
                rejected = other
            # A few words may happen to keep their order.
            found.append((name, question, answer, rejected if rejected != answer else other))
    return tuple(found)


def _scrambled(answer: str, name: str) -> str:
    words = answer.split()
    order = sorted(range(len(words)), key=lambda i: _digest(f"order of {name} {i}"))
    return " ".join(words[i] for i in order)


def _replaced(answer: str, name: str, pool: list[str]) -> str:
    words = answer.split()
    order = sorted(range(len(words)), key=lambda i: _digest(f"place of {name} {i}"))
    for i in order[: max(1, round(len(words) * _PLACE_SHARE))]:
        at = _number(f"word of {name} {i}", len(pool))
        while pool[at] == words[i]:
            at = (at + 1) % len(pool)
        words[i] = pool[at]
    return " ".join(words)


def _of_like_length(answers: list[str]) -> list[str]:
    """For each answer another one, of neighbours in length: two and two are each other's."""
    order = sorted(range(len(answers)), key=lambda i: (len(answers[i]), _digest(answers[i])))
    others = [""] * len(answers)
    for rank, i in enumerate(order):
        other = rank ^ 1 if rank ^ 1 < len(order) else rank - 1
        others[i] = answers[order[other]]
    return others


def _number(text: str, below: int) -> int:
    """A number from 0 that looks drawn at random, the same in every process."""
    return int.from_bytes(_digest(text)[:8], "big") % below


_DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _distinct(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Drops a text that differs from an earlier one in white space or case only.

    Twins such as `io` and `_pyio` would otherwise put training documents into held-out text.
    """
    seen = set()
    for name, text in pairs:
        key = _digest(" ".join(text.lower().split()))
        if key not in seen:
            seen.add(key)
            yield name, text


def _modules() -> Iterator[tuple[str, str]]:
    """(dotted name, path) of the standard library's source files, sorted within each folder."""
    root = sysconfig.get_paths()["stdlib"]
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in SKIPPED and not f.startswith("config-"))
        for file in sorted(files):
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                path = os.path.join(folder, file)
                parts = os.path.relpath(path, root)[: -len(".py")].split(os.sep)
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _source(path: str) -> str:
    with tokenize.open(path) as f:  # minds the coding cookie
        return f.read()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
