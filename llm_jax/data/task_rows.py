"""Public data sets of many tasks, read from a folder of their files: rows of named fields.

Each reader takes the folder and gives `Row`s. The files are those of the data sets as published, in
subfolders: glue/SST-2/train.tsv, eval/boolq.jsonl, gsm8k/train.jsonl, translation/train.de.gz, ...
"""

import csv
import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llm_jax import corpus

NO_YES = ("no", "yes")


@dataclass(frozen=True)
class Row:
    """An example of a task before it is put into words.

    Attributes:
      fields: texts by name; of a task without choices one of them is "answer".
      choices: the answers to choose from; empty where the answer is written.
      gold: number of the right choice.
      group: rows of one group are never on both sides of a split; "" for a row by itself.
      held_out: whether the data set's authors keep it for evaluation; None: they have one file.
      messages: a whole conversation, which needs no phrasing.
    """

    fields: Mapping[str, str]
    choices: tuple[str, ...] = ()
    gold: int = 0
    group: str = ""
    held_out: bool | None = None
    messages: tuple = field(default=())


def digest(*parts: object) -> int:
    """A number in [0, 2^64) that depends on nothing but the parts."""
    text = json.dumps(parts, ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def open_text(path: Path):
    """A text file, perhaps packed; FileNotFoundError names the task's file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --input is the folder of the data sets")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return open(path, encoding="utf-8-sig", newline="")


def _parts(folder: Path, train: str, held_out: str) -> Iterator[tuple[bool, Path]]:
    yield False, folder / train
    yield True, folder / held_out


def _table(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a tab-separated file with a header; quotes are letters."""
    with open_text(path) as file:
        yield from csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _lines(path: Path) -> Iterator[dict]:
    with open_text(path) as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _glue(folder: Path, name: str) -> Iterator[tuple[bool, dict[str, str]]]:
    for held_out, path in _parts(folder / "glue" / name, "train.tsv", "dev.tsv"):
        for row in _table(path):
            yield held_out, row


def sst2(folder: Path) -> Iterator[Row]:
    """Stanford sentiment treebank (Socher et al. 2013), phrases of film reviews."""
    for held_out, row in _glue(folder, "SST-2"):
        fields = {"text": row["sentence"].strip()}
        yield Row(fields, ("negative", "positive"), int(row["label"]), held_out=held_out)


def mrpc(folder: Path) -> Iterator[Row]:
    """Microsoft paraphrases (Dolan and Brockett 2005)."""
    for held_out, row in _glue(folder, "MRPC"):
        fields = {"first": row["#1 String"], "second": row["#2 String"]}
        yield Row(fields, NO_YES, int(row["Quality"]), held_out=held_out)


def rte(folder: Path) -> Iterator[Row]:
    """Recognising textual entailment (Dagan et al. 2006 and later)."""
    for held_out, row in _glue(folder, "RTE"):
        fields = {"premise": row["sentence1"], "hypothesis": row["sentence2"]}
        yield Row(fields, NO_YES, int(row["label"] == "entailment"), held_out=held_out)


def stsb(folder: Path) -> Iterator[Row]:
    """Semantic similarity (Cer et al. 2017), 0 to 5, to one decimal."""
    for held_out, row in _glue(folder, "STS-B"):
        score = f"{float(row['score']):.1f}"
        fields = {"first": row["sentence1"], "second": row["sentence2"], "answer": score}
        yield Row(fields, held_out=held_out)


def cola(folder: Path) -> Iterator[Row]:
    """Linguistic acceptability (Warstadt et al. 2019)."""
    where = folder / "glue" / "CoLA"
    for held_out, path in _parts(where, "in_domain_train.tsv", "in_domain_dev.tsv"):
        with open_text(path) as file:
            for _, label, _, text in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                yield Row({"text": text}, NO_YES, int(label), held_out=held_out)


def boolq(folder: Path) -> Iterator[Row]:
    """BoolQ (Clark et al. 2019); rows of one passage stay together."""
    for row in _lines(folder / "eval" / "boolq.jsonl"):
        passage, _, question = row["query"].removeprefix("Passage: ").rpartition("\nQuestion: ")
        yield Row(
            {"passage": passage, "question": question}, NO_YES, int(row["gold"]), group=passage
        )


def _arc(folder: Path, file: str) -> Iterator[Row]:
    for row in _lines(folder / "eval" / file):
        fields = {"question": row["query"].removeprefix("Question: ")}
        yield Row(fields, tuple(row["choices"]), int(row["gold"]))


def arc_easy(folder: Path) -> Iterator[Row]:
    """AI2 reasoning challenge (Clark et al. 2018), the easy part."""
    return _arc(folder, "arc_easy.jsonl")


def arc_challenge(folder: Path) -> Iterator[Row]:
    """AI2 reasoning challenge, the hard part."""
    return _arc(folder, "arc_challenge.jsonl")


def piqa(folder: Path) -> Iterator[Row]:
    """Physical interaction (Bisk et al. 2020); rows of one goal stay together."""
    for row in _lines(folder / "eval" / "piqa.jsonl"):
        goal = row["query"].removeprefix("Question: ").strip()
        yield Row({"goal": goal}, tuple(row["choices"]), int(row["gold"]), group=goal)


def winogrande(folder: Path) -> Iterator[Row]:
    """WinoGrande (Sakaguchi et al. 2020); twins, which differ in a word, stay together."""
    for row in _lines(folder / "eval" / "winogrande.jsonl"):
        one, two = row["context_options"]
        differ = (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
        same = next(differ, min(len(one), len(two)))
        start = one.rfind(" ", 0, same) + 1  # the names may begin alike
        text = f"{one[:start]}_ {row['continuation'].strip()}"
        yield Row({"text": text}, (one[start:], two[start:]), int(row["gold"]), group=one[:start])


def squad(folder: Path) -> Iterator[Row]:
    """SQuAD 1.1 (Rajpurkar et al. 2016); articles stay together."""
    path = folder / "squad" / "dev-v1.1-from-explorer.json"
    with open_text(path) as file:
        articles = json.load(file)["data"]
    for article in articles:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                fields = {"passage": paragraph["context"], "question": qa["question"].strip()}
                fields["answer"] = qa["answers"][0]["text"]
                yield Row(fields, group=article["title"])


def _translation(folder: Path, language: str) -> Iterator[Row]:
    where = folder / "translation"
    for held_out, stem in ((False, "train"), (True, "test_2016_flickr")):
        with (
            open_text(where / f"{stem}.en.gz") as source,
            open_text(where / f"{stem}.{language}.gz") as target,
        ):
            for one, two in zip(source, target, strict=True):
                yield Row({"source": one.strip(), "answer": two.strip()}, held_out=held_out)


def en_de(folder: Path) -> Iterator[Row]:
    """Multi30k (Elliott et al. 2016), English to German."""
    return _translation(folder, "de")


def en_fr(folder: Path) -> Iterator[Row]:
    """Multi30k, English to French."""
    return _translation(folder, "fr")


def scitldr(folder: Path) -> Iterator[Row]:
    """Summaries of papers (Cachola et al. 2020): an abstract, a sentence."""
    for held_out, path in _parts(folder / "summarisation", "train.jsonl", "test.jsonl"):
        for row in _lines(path):
            fields = {"text": " ".join(row["source"]), "title": row["title"]}
            yield Row({**fields, "answer": row["target"][0]}, held_out=held_out)


def gsm8k(folder: Path) -> Iterator[Row]:
    """Grade-school mathematics (Cobbe et al. 2021), without the calculator's marks."""
    for held_out, path in _parts(folder / "gsm8k", "train.jsonl", "test.jsonl"):
        for row in _lines(path):
            steps, _, number = re.sub(r"<<.*?>>", "", row["answer"]).rpartition("\n#### ")
            fields = {"question": row["question"], "answer": f"{steps}\nThe answer is {number}."}
            yield Row(fields, held_out=held_out)


def _sentences(path: Path) -> Iterator[list[list[str]]]:
    """Sentences of a file of one word a line: the columns of each word."""
    words = []
    with open_text(path) as file:
        for line in [*file, "\n"]:
            columns = line.rstrip("\r\n").split("\t")
            if line.startswith("#") and len(columns) == 1:
                continue
            if columns[0].strip():
                words.append(columns)
            elif words:
                yield words
                words = []


def wnut(folder: Path) -> Iterator[Row]:
    """Names in messages (WNUT 2017, Derczynski et al. 2017): "person: Ada Lovelace; ..."."""
    for held_out, path in _parts(folder / "ner", "wnut17train.conll", "emerging.dev.conll"):
        for words in _sentences(path):
            found: list[list[str]] = []
            before = "O"
            for word, tag, *_ in words:
                kind = tag[2:].replace("-", " ")
                if tag.startswith("B-") or (tag.startswith("I-") and before == "O"):
                    found.append([f"{kind}: {word}"])
                elif tag.startswith("I-"):
                    found[-1].append(word)
                before = tag
            answer = "; ".join(" ".join(name) for name in found) or "none"
            text = " ".join(word for word, *_ in words)
            yield Row({"text": text, "answer": answer}, held_out=held_out)


def ewt_pos(folder: Path) -> Iterator[Row]:
    """Universal parts of speech of English web text (Silveira et al. 2014): "the/DET cat/NOUN"."""
    for held_out, path in _parts(folder / "pos", "en_ewt-ud-dev.conllu", "en_ewt-ud-test.conllu"):
        for words in _sentences(path):
            words = [w for w in words if w[0].isdigit()]  # not 3-4, which is written as one
            text = " ".join(w[1] for w in words)
            answer = " ".join(f"{w[1]}/{w[3]}" for w in words)
            yield Row({"text": text, "answer": answer}, held_out=held_out)


def _instructions(path: Path) -> Iterator[Row]:
    with open_text(path) as file:
        rows = json.load(file)
    for row in rows:
        asked = "\n\n".join(t for t in (row["instruction"], row.get("input", "")) if t.strip())
        turns = [t for pair in row.get("history") or [] for t in pair]
        turns += [asked, row["output"]]
        if all(t.strip() for t in turns):
            roles = ("user", "assistant") * (len(turns) // 2)
            said = zip(roles, turns, strict=True)
            yield Row({"text": asked}, messages=tuple({"role": r, "content": t} for r, t in said))


def alpaca(folder: Path) -> Iterator[Row]:
    """Instructions written by a model (Taori et al. 2023), as they are."""
    return _instructions(folder / "sft" / "alpaca_2000.json")


def lima(folder: Path) -> Iterator[Row]:
    """Instructions chosen by people (Zhou et al. 2023), some of several turns, as they are."""
    return _instructions(folder / "sft" / "lima_1029.json")


def python_question(folder: Path | None) -> Iterator[Row]:
    """Objects of the standard library and what their docstrings say first; needs no files."""
    del folder
    for name, _, answer in corpus.questions():
        yield Row({"name": name, "answer": answer}, group=answer)


def python_module(folder: Path | None) -> Iterator[Row]:
    """Which of four modules a docstring is from; needs no files."""
    del folder
    answers = [(n.split(".")[0], answer) for n, _, answer in corpus.questions()]
    modules = sorted({module for module, _ in answers})
    for module, text in answers:
        if module.lower() in text.lower():
            continue
        rng = np.random.default_rng(digest(text))
        others = [m for m in rng.choice(modules, 4, replace=False).tolist() if m != module][:3]
        choices = rng.permutation([module, *others]).tolist()
        yield Row({"text": text}, tuple(choices), choices.index(module), group=text)
