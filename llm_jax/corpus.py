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


@functools.cache
def preferences() -> tuple[tuple[str, str, str, str], ...]:
    """(qualified name, question, chosen, rejected) of each of `questions`, in their order.

    The chosen answer is the true one; the rejected one is spoiled as weak generators spoil theirs, in
    one of two ways, by a digest of the name:

    70 %  its words in another order
    30 %  a loop: its first two or three words, over and over

    Either has as many words as the true answer, so that length tells little.
    """
    found = []
    for name, question, answer in questions():
        ways = (
            (_scrambled, _looped) if _number(f"kind of {name}", 100) < 70 else (_looped, _scrambled)
        )
        spoiled = [rejected for way in ways if (rejected := way(answer, name)) != answer]
        # Words that are all the same have no other order: half of them, then.
        half = answer.split()[: len(answer.split()) // 2]
        found.append((name, question, answer, spoiled[0] if spoiled else " ".join(half)))
    return tuple(found)


def _scrambled(answer: str, name: str) -> str:
    words = answer.split()
    order = sorted(range(len(words)), key=lambda i: _digest(f"order of {name} {i}"))
    return " ".join(words[i] for i in order)


def _looped(answer: str, name: str) -> str:
    words = answer.split()
    loop = words[: 2 + _number(f"loop of {name}", 2)]
    return " ".join(loop[i % len(loop)] for i in range(len(words)))


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
