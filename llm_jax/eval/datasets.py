"""Evaluation sets: files and Hugging Face data sets -> `Item`s, whatever their columns are called.

Each reader takes a row with the columns of the data set as it was published (those of its Hugging
Face repository) or with the ready-made ones that many copies have (query, choices, gold).
"""

import csv
import glob
import gzip
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Row = Mapping[str, object]


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      question: the question, for the task's template.
      answers: what may be chosen; of a text to generate or complete, the right answer alone.
      gold: numbers of the right answers.
      contexts: one for each choice where the choice stands before the common answers[0] (partial
        evaluation, Trinh and Le 2018).
      group: what results are also given by, such as the subject.
    """

    question: str
    answers: tuple[str, ...]
    gold: tuple[int, ...] = (0,)
    contexts: tuple[str, ...] = ()
    group: str = ""


def _ready(row: Row) -> Item:
    return Item(str(row["query"]), tuple(row["choices"]), (int(row["gold"]),))


def arc(row: Row) -> Item:
    """AI2 reasoning challenge (Clark et al. 2018): three to five choices."""
    if "query" in row:
        item = _ready(row)
        return Item(item.question.removeprefix("Question: "), item.answers, item.gold)
    if isinstance(row["question"], Mapping):  # the authors' own files
        question, choices = row["question"]["stem"], row["question"]["choices"]
        labels, texts = [c["label"] for c in choices], [c["text"] for c in choices]
    else:
        question = row["question"]
        labels, texts = list(row["choices"]["label"]), row["choices"]["text"]
    return Item(question, tuple(texts), (labels.index(row["answerKey"]),))


def boolq(row: Row) -> Item:
    """BoolQ (Clark et al. 2019): a passage and a yes/no question."""
    if "query" in row:
        item = _ready(row)
        return Item(item.question.removeprefix("Passage: "), item.answers, item.gold)
    gold = int(row["label"] if "label" in row else row["answer"])
    return Item(f"{row['passage']}\nQuestion: {row['question']}?", ("no", "yes"), (gold,))


def piqa(row: Row) -> Item:
    """Physical interaction (Bisk et al. 2020): two ways to a goal."""
    if "query" in row:
        item = _ready(row)
        question = item.question.removeprefix("Question: ").removesuffix("\n")
        return Item(question, item.answers, item.gold)
    return Item(row["goal"], (row["sol1"], row["sol2"]), (int(row["label"]),))


def winogrande(row: Row) -> Item:
    """WinoGrande (Sakaguchi et al. 2020): which of two names fills the gap, by what follows it."""
    if "context_options" in row:
        contexts, rest, gold = row["context_options"], row["continuation"], int(row["gold"])
    else:
        before, _, rest = row["sentence"].partition("_")
        contexts = [before + row["option1"], before + row["option2"]]
        gold = int(row["answer"]) - 1
    return Item("", (rest.strip(),), (gold,), tuple(contexts))


def lambada(row: Row) -> Item:
    """LAMBADA (Paperno et al. 2016): the last word of a passage."""
    if "context" in row:
        return Item(row["context"], (row["continuation"].strip(),))
    context, _, word = row["text"].rpartition(" ")
    return Item(context, (word,))


def hellaswag(row: Row) -> Item:
    """HellaSwag (Zellers et al. 2019): which of four endings follows."""
    if "query" in row:
        return _ready(row)

    def clean(text: str) -> str:  # brackets are marks of the WikiHow half
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Item(clean(query), tuple(clean(e) for e in row["endings"]), (int(row["label"]),))


def mmlu(row: Row) -> Item:
    """MMLU (Hendrycks et al. 2021): 57 subjects, four choices; the row's `subject` is its group."""
    if "choices" in row:
        choices = tuple(row["choices"])
    else:
        names = "ABCD" if "A" in row else [f"choice{i}" for i in range(4)]
        choices = tuple(row[name] for name in names)
    answer = str(row["answer"])
    gold = int(answer) if answer.isdigit() else "ABCD".index(answer)
    return Item(row["question"].strip(), choices, (gold,), group=str(row.get("subject", "")))


def truthfulqa_mc1(row: Row) -> Item:
    """TruthfulQA (Lin et al. 2022), one true answer: of the CSV, the best one and all false ones."""
    if "mc1_targets" in row:
        targets = row["mc1_targets"]
        return Item(row["question"], tuple(targets["choices"]), (list(targets["labels"]).index(1),))
    return Item(row["Question"], (row["Best Answer"].strip(), *_split(row["Incorrect Answers"])))


def truthfulqa_mc2(row: Row) -> Item:
    """TruthfulQA (Lin et al. 2022), all true and all false answers."""
    if "mc2_targets" in row:
        targets = row["mc2_targets"]
        gold = tuple(i for i, label in enumerate(targets["labels"]) if label)
        return Item(row["question"], tuple(targets["choices"]), gold)
    true, false = _split(row["Correct Answers"]), _split(row["Incorrect Answers"])
    return Item(row["Question"], (*true, *false), tuple(range(len(true))))


def _split(answers: str) -> list[str]:
    return [answer.strip() for answer in answers.split(";") if answer.strip()]


def gsm8k(row: Row) -> Item:
    """Grade-school mathematics (Cobbe et al. 2021): worked answers that end in "#### number"."""
    return Item(row["question"], (row["answer"],))


def multiple_choice(row: Row) -> Item:
    """Anybody's: `question`, `choices` and `answer` (its number from 0, its letter or its text)."""
    choices, answer = tuple(map(str, row["choices"])), row["answer"]
    if isinstance(answer, int):
        gold = answer
    elif answer in choices:
        gold = choices.index(answer)
    elif str(answer).isdigit():
        gold = int(answer)
    else:
        gold = "ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(str(answer))
    return Item(str(row["question"]), choices, (gold,), group=str(row.get("group", "")))


def generation(row: Row) -> Item:
    """Anybody's: `prompt` and the `answer` that is to be written."""
    return Item(str(row["prompt"]), (str(row["answer"]),), group=str(row.get("group", "")))


def read_items(
    path: str,
    reader: Callable[[Row], Item],
    *,
    patterns: Sequence[str] = (),
    wants: str,
) -> list[Item]:
    """All items of a file, of the files of a folder that match, or of `hf:NAME[:config][:split]`.

    Args:
      patterns: names of the files of this data set in a folder, the first that is there counts.
      wants: the columns, for error messages.

    Raises:
      FileNotFoundError: no such file, or a folder without one of that name.
      ValueError: a damaged file, or a row with other columns.
    """
    items = []
    for where, row in _rows(path, patterns):
        try:
            item = reader(row)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as e:
            raise ValueError(f"{where}: {_reason(e, row)}; wanted: {wants} (--input)") from None
        n = len(item.contexts or item.answers)
        if bad := [gold for gold in item.gold if not 0 <= gold < n]:
            raise ValueError(f"{where}: the answer is number {bad[0]} of {n} choices (--input)")
        items.append(item)
    if not items:
        raise ValueError(f"{path}: no row in it (--input)")
    return items


def _reason(error: Exception, row: object) -> str:
    if isinstance(error, KeyError) and isinstance(row, Mapping):
        return f"there is no column {error.args[0]!r}, only {', '.join(map(str, row))}"
    return f"a row that cannot be read ({error})"


def find(path: str, patterns: Sequence[str]) -> list[str]:
    """The files of a data set: the file itself, or those in the folder `path` or below it."""
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such file (--input)")
        return [path]
    for pattern in patterns:
        for below in ("", "**"):
            found = sorted(
                glob.glob(os.path.join(glob.escape(path), below, pattern), recursive=True)
            )
            if found:
                return found
    raise FileNotFoundError(f"{path}: no {' or '.join(patterns)} in this folder (--input)")


def _rows(path: str, patterns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """(where it stands, row) of each row."""
    if path.startswith("hf:"):
        try:
            library = importlib.import_module("datasets")
        except ImportError:
            raise ImportError(f"{path} needs datasets: pip install 'llm_jax[hf]'") from None
        _, name, config, split = (path.split(":", 3) + ["", ""])[:4]
        rows = library.load_dataset(name, config or None, split=split or "test")
        yield from ((f"{path} row {n}", row) for n, row in enumerate(rows))
        return
    for file in find(path, patterns):
        # A folder of one file a subject (MMLU): its name is the subject's.
        subject = re.sub(r"_(test|dev|val)$", "", os.path.basename(file).split(".")[0])
        for n, row in enumerate(_file(file), 1):
            if isinstance(row, dict):
                row = {"subject": subject, **row}
            yield f"{file} row {n}", row


def _file(path: str) -> Iterator[Row]:
    stem, suffix = os.path.splitext(path)
    packed = suffix == ".gz"
    suffix = os.path.splitext(stem)[1] if packed else suffix
    if suffix == ".parquet":
        try:
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise ImportError(f"{path} needs pyarrow: pip install 'llm_jax[data]'") from None
        yield from parquet.read_table(path).to_pylist()
        return
    if suffix not in (".csv", ".jsonl", ".json"):
        raise ValueError(f"{path}: rows come as .jsonl, .json, .csv or .parquet (--input)")
    open_ = gzip.open if packed else open
    with open_(path, "rt", encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as file:
        try:
            if suffix == ".csv":
                yield from _csv(csv.reader(file, strict=True))
            elif suffix == ".json":
                yield from json.load(file)
            else:
                for line in file:
                    if line.strip():
                        yield json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError, csv.Error) as e:
            raise ValueError(f"{path}: damaged file ({e}) (--input)") from None


def _csv(rows: Iterator[list[str]]) -> Iterator[Row]:
    header = next(rows, [])
    if len(header) == 6 and header[-1] in tuple("ABCD"):  # MMLU as it was published has no header
        names = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
        yield dict(zip(names, header, strict=True))
        header = names
    for row in rows:
        if len(row) != len(header):
            raise csv.Error(f"a row of {len(row)} columns under a header of {len(header)}")
        yield dict(zip(header, row, strict=True))


def beside(path: str, patterns: Sequence[str]) -> str:
    """The folder with files called like `patterns` that is closest to `path`: in it, beside it, or
    beside the folder it is in. A file that only says which split it is ("train.jsonl") has to lie
    in the same folder: in another it may be any data set's.

    Raises:
      FileNotFoundError: there is none.
    """
    path = os.path.abspath(os.path.expanduser(path))
    if os.path.isdir(path):
        try:
            return os.path.dirname(find(path, patterns)[0])
        except FileNotFoundError:
            pass
    parent = glob.escape(os.path.dirname(path))
    above = glob.escape(os.path.dirname(os.path.dirname(path)))
    for folder in (parent, f"{parent}/*", above, f"{above}/*"):
        for pattern in patterns:
            if folder != parent and os.path.splitext(pattern)[0] in ("train", "dev", "validation"):
                continue
            if found := sorted(glob.glob(os.path.join(folder, pattern))):
                return os.path.dirname(found[0])
    raise FileNotFoundError(
        f"{path}: no {' or '.join(patterns)} beside it for worked examples; name them with "
        "--fewshot_input, or set --num_fewshot=0"
    )
