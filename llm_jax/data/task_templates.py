"""Phrasings of each task, in the manner of FLAN (Wei et al. 2022, arXiv 2109.01652, section 2.1).

A phrasing asks with the fields of a row in braces. `{answer}` is the right answer, `{options}` the
list of answers to choose from. Reversed phrasings ask for what is usually given: a question for an
answer, a sentence of a sentiment; they are trained on and never scored.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """One phrasing of a task.

    Attributes:
      ask: what the user says.
      answer: what the assistant says.
      labels: this phrasing's words for the choices of a row, in their order; empty: the row's own.
      letters: the choices are lettered and the answer is a letter.
      reverse: whether the roles of question and answer are exchanged.
      gold: number of the right choice that a row needs for this phrasing; None: any. What a
        sentence is not a paraphrase of, it cannot be asked for as one.
    """

    ask: str
    answer: str = "{answer}"
    labels: tuple[str, ...] = ()
    letters: bool = False
    reverse: bool = False
    gold: int | None = None


def _reverse(ask: str, answer: str, **more) -> Template:
    return Template(ask, answer, reverse=True, **more)


NO_YES = ("no", "yes")

SENTIMENT = (
    Template("{text}\nIs this review positive or negative?"),
    Template("Decide how the writer felt about the film.\n\n{text}\n\n{options}"),
    Template("Review: {text}\nSentiment:"),
    Template("Would the author of these words recommend the film?\n{text}", labels=NO_YES),
    Template(
        "Sort the following line from a review into one of two classes.\n{text}\n{options}",
        labels=("bad", "good"),
    ),
    Template("Someone said of a movie: “{text}” Did they like it?", labels=NO_YES),
    Template("What is the tone of this text?\n\n{text}\n\n{options}"),
    _reverse("Write a {answer} line about a film.", "{text}"),
    _reverse("Make up part of a movie review whose sentiment is {answer}.", "{text}"),
)
PARAPHRASE = (
    Template("First: {first}\nSecond: {second}\nDo both sentences say the same?"),
    Template("Is one of these a paraphrase of the other?\n\n1. {first}\n2. {second}\n\n{options}"),
    Template("{first}\n{second}\nSame meaning? Answer yes or no."),
    Template(
        "Compare the meaning of two sentences.\nA: {first}\nB: {second}\n{options}",
        labels=("different", "equivalent"),
    ),
    Template("Could “{second}” stand in for “{first}” without a change of meaning?"),
    Template("Sentence one: {first}\nSentence two: {second}\nAre they equivalent?\n{options}"),
    _reverse("Say this in other words: {first}", "{second}", gold=1),
)
SIMILARITY = (
    Template("On a scale from 0 to 5, how alike in meaning are these?\n{first}\n{second}"),
    Template("Rate the similarity (0 to 5).\nA: {first}\nB: {second}\nRating:"),
    Template("1) {first}\n2) {second}\nGive a number between 0 (unrelated) and 5 (the same)."),
    Template("How close is “{first}” to “{second}”, from 0 to 5?"),
)
ENTAILMENT = (
    Template("{premise}\n\nGiven this, is it true that: {hypothesis}\n{options}"),
    Template("Text: {premise}\nClaim: {hypothesis}\nDoes the claim follow from the text?"),
    Template("Read and answer yes or no.\n{premise}\nMay we conclude that “{hypothesis}”?"),
    Template(
        "Premise: {premise}\nHypothesis: {hypothesis}\n{options}",
        labels=("not entailed", "entailed"),
    ),
    Template("If “{premise}”, must it be the case that “{hypothesis}”?\n{options}"),
    Template("{hypothesis}\nIs that supported by the passage below?\n\n{premise}"),
    _reverse("{premise}\nState one thing that follows from it.", "{hypothesis}", gold=1),
)
ACCEPTABILITY = (
    Template("Is this sentence good English?\n{text}"),
    Template("{text}\n\nWould a native speaker accept this sentence?\n{options}"),
    Template("Judge the grammar: {text}", labels=("unacceptable", "acceptable")),
    Template("“{text}” Is that grammatical? Answer yes or no."),
    Template("Sentence: {text}\nDoes it contain a grammatical error?", labels=("yes", "no")),
    Template(
        "Mark the sentence as right or wrong.\n{text}\n{options}",
        labels=("wrong", "right"),
    ),
)
PASSAGE_YES_NO = (
    Template("{passage}\n\nQuestion: {question}\nAnswer yes or no."),
    Template("Read the passage and answer.\n{passage}\n{question}\n{options}"),
    Template("Q: {question}\nHere is a text that tells:\n{passage}\nA (yes/no):"),
    Template("Based on the text, {question}\n\nText: {passage}\n\n{options}"),
    Template("{question} Look it up in this passage.\n\n{passage}"),
    _reverse("{passage}\nAsk a yes/no question that this passage answers with {answer}.", "{question}"),
)  # fmt: skip
CHOICE_QUESTION = (
    Template("{question}\n{options}"),
    Template("Answer the following question.\n{question}\n\n{options}"),
    Template("{question}\nChoose a letter.\n{options}", letters=True),
    Template("Which of these is right?\nQuestion: {question}\n{options}\nAnswer:"),
    Template("A pupil is asked: {question}\n{options}\nWhat should the pupil pick?"),
    Template("{options}\n\nOf the above, give the letter that answers: {question}", letters=True),
    Template("Q: {question}\nA:"),
    _reverse("Write an examination question whose answer is: {answer}", "{question}"),
)
GOAL = (
    Template("Goal: {goal}\nWhich way works better?\n{options}"),
    Template("I would like to do this: {goal}\nPick the sensible solution.\n{options}"),
    Template("{goal}\n{options}\nAnswer with the letter of the better idea.", letters=True),
    Template("How does one do it? {goal}\n{options}"),
    Template("Give a practical solution.\n{goal}"),
    _reverse("What might somebody want who does this: {answer}", "{goal}"),
)
GAP = (
    Template("Fill the gap marked _.\n{text}\n{options}"),
    Template("{text}\nWho or what is meant by the blank?\n{options}"),
    Template("In the sentence below, what should stand in place of _ ?\n\n{text}\n\n{options}"),
    Template("Complete it sensibly: {text}\n{options}\nGive the letter.", letters=True),
    Template("Sentence with a hole: {text}\nThe hole is for either of:\n{options}\nWhich one?"),
)
EXTRACTIVE = (
    Template("{passage}\n\n{question}"),
    Template("Answer from the passage, in its own words.\n{passage}\nQuestion: {question}"),
    Template("Question: {question}\nPassage: {passage}\nShort answer:"),
    Template("Here is an article.\n\n{passage}\n\nA reader asks: {question}"),
    Template("Find the words of the text that answer the question “{question}”.\n\n{passage}"),
    _reverse("{passage}\n\nWhat could one ask whose answer is “{answer}”?", "{question}"),
    _reverse("Make a question for this answer: {answer}\nIt should be about:\n{passage}", "{question}"),
)  # fmt: skip
SUMMARY = (
    Template("Summarise in one sentence:\n{text}"),
    Template("{text}\n\nWhat is the main point?"),
    Template("Abstract: {text}\nToo long, did not read:"),
    Template("A colleague has no time. Tell them briefly what this paper does.\n\n{text}"),
    Template("Title: {title}\nAbstract: {text}\nGive a very short summary."),
    _reverse("Think of a title for a paper of which one could say: {answer}", "{title}"),
)
MATHS = (
    Template("{question}"),
    Template("Solve this step by step.\n{question}"),
    Template("Problem: {question}\nSolution:"),
    Template("{question}\nShow how you get there, and end with the number."),
    Template("Here is a word problem for a school class. Work it out.\n\n{question}"),
    _reverse("Make a word problem with this solution:\n{answer}", "{question}"),
)
ENTITIES = (
    Template("Which names are in this text, and of what kind?\n{text}"),
    Template("List the named entities.\n\n{text}"),
    Template("Text: {text}\nEntities (kind: name):"),
    Template("Find people, places, groups, products and works that are named here: {text}"),
    _reverse("Write a message that mentions {answer}.", "{text}"),
)
PARTS_OF_SPEECH = (
    Template("Tag each word with its part of speech.\n{text}"),
    Template("{text}\n\nWrite every word with a slash and its universal part of speech."),
    Template("Sentence: {text}\nTagged:"),
    Template("Do a part-of-speech analysis: {text}"),
    _reverse("Remove the tags: {answer}", "{text}"),
)
PYTHON_QUESTION = (
    Template("What does `{name}` do?"),
    Template("Explain `{name}` in Python."),
    Template("I found `{name}` in the standard library. What is it for?"),
    Template("Describe `{name}` in a sentence or two."),
    Template("Python documentation of `{name}`:"),
    Template("A colleague asks about `{name}`. What do you say?"),
    _reverse("Which part of Python's standard library is described so?\n{answer}", "`{name}`"),
    _reverse("{answer}\nWhat has this docstring?", "`{name}`"),
)
PYTHON_MODULE = (
    Template("From which module of Python is this?\n{text}\n{options}"),
    Template("{text}\n\nIn which module of the standard library would you find it?\n{options}"),
    Template("Docstring: {text}\n{options}\nModule:"),
    Template("Pick the letter of the module that has this docstring.\n{text}\n{options}",
             letters=True),
    Template("Which import does one need for that?\n{text}\n{options}"),
)  # fmt: skip


def translation(language: str) -> tuple[Template, ...]:
    """Phrasings of a translation from English."""
    return (
        Template(f"Translate into {language}: {{source}}"),
        Template(f"{{source}}\n\nHow do you say this in {language}?"),
        Template(f"English: {{source}}\n{language}:"),
        Template(f"Give the {language} for “{{source}}”."),
        Template(f"A tourist wants to say this in {language}. Help them.\n{{source}}"),
        _reverse(f"Translate from {language} into English: {{answer}}", "{source}"),
        _reverse(f"{language}: {{answer}}\nEnglish:", "{source}"),
    )
