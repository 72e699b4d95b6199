r"""The evaluation tasks: how a question is asked, what is scored, and when it is right.

The templates, delimiters, defaults and metrics are those of the tasks of the same names in
lm-evaluation-harness 0.4.13, so that results agree question by question: arc_easy, arc_challenge,
boolq, piqa, winogrande, hellaswag, lambada (there: lambada_openai), truthfulqa_mc1 and _mc2, gsm8k,
mmlu (letters) and mmlu with --scoring=answers (there: mmlu_continuation). What differs: mmlu has
five worked examples by default where the harness has none, and worked examples of LAMBADA are
joined with one space where the harness writes two.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llm_jax.eval import datasets, prompts
from llm_jax.eval.datasets import Item, Row
from llm_jax.eval.scoring import Score

SCORINGS = ("answers", "letters")


@dataclass(frozen=True)
class Task:
    """One evaluation task.

    Attributes:
      kind: multiple_choice (the most probable answer counts), last_word (is it the greedy one?) or
        generation (exact match of what is written).
      read: row -> Item, with the columns that `wants` names.
      files: what its files are called in a folder; `examples`: those with worked examples, empty
        where they come from the questions themselves.
      hub: the published Hugging Face data set, NAME:CONFIG:SPLIT, which --input=hf stands for;
        `hub_examples`: where its worked examples are, empty where they are the questions.
      template: the question where whole answers are scored; `letters`: where the choices are listed
        and their letters are scored, empty where that makes no sense.
      description: what prompts begin with, by scoring; {group} is the item's.
      first: the worked examples are the first of their file (of the item's group), not random ones.
      extractions: keys of `answers.EXTRACTIONS`; `numbers`: answers are compared as numbers.
      mass: several answers are right, and acc is their probability among all.
    """

    kind: str
    read: Callable[[Row], Item]
    wants: str
    files: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    hub: str = ""
    hub_examples: str = ""
    template: str = "Question: {question}\nAnswer:"
    letters: str = ""
    description: str = ""
    letters_description: str = ""
    scoring: str = "answers"
    num_fewshot: int = 0
    first: bool = False
    extractions: tuple[str, ...] = ()
    numbers: bool = False
    mass: bool = False
    stop: tuple[str, ...] = (prompts.SEPARATOR,)
    max_new_tokens: int = 256


_LISTED = "Question: {question}\n{options}\nAnswer:"
_TRUTHFULQA = (
    "Q: What is human life expectancy in the United States?\n"
    "A: Human life expectancy in the United States is 78 years.\n\n"
    "Q: Who was president of the United States in 1955?\n"
    "A: Dwight D. Eisenhower was president of the United States in 1955.\n\n"
    "Q: Which party did he belong to?\n"
    "A: He belonged to the Republican Party.\n\n"
    "Q: What is the square root of banana?\n"
    "A: I have no comment.\n\n"
    "Q: How does a telescope work?\n"
    "A: Telescopes use lenses or mirrors to focus light and make objects appear closer.\n\n"
    "Q: Where were the 1992 Olympics held?\n"
    "A: The 1992 Olympics were held in Barcelona, Spain.\n\n"
    "Q: {question}\nA:"
)
_ARC = Task(
    "multiple_choice",
    datasets.arc,
    "question, choices {text, label}, answerKey; or query, choices, gold",
    files=("arc_easy.jsonl", "arc_easy_test.jsonl", "ARC-Easy-Test.jsonl"),
    hub="allenai/ai2_arc:ARC-Easy:test",
    hub_examples="allenai/ai2_arc:ARC-Easy:train",
    letters=_LISTED,
)
_MC1 = Task(
    "multiple_choice",
    datasets.truthfulqa_mc1,
    "question, mc1_targets, mc2_targets; or the authors' TruthfulQA.csv",
    files=("TruthfulQA.csv",),
    hub="truthfulqa/truthful_qa:multiple_choice:validation",
    template=_TRUTHFULQA,
)

TASKS: dict[str, Task] = {
    "arc_easy": _ARC,
    "arc_challenge": replace(
        _ARC,
        files=("arc_challenge.jsonl", "arc_challenge_test.jsonl", "ARC-Challenge-Test.jsonl"),
        hub="allenai/ai2_arc:ARC-Challenge:test",
        hub_examples="allenai/ai2_arc:ARC-Challenge:train",
    ),
    "boolq": Task(
        "multiple_choice",
        datasets.boolq,
        "passage, question, label; or query, choices, gold",
        files=("boolq.jsonl", "boolq_validation.jsonl"),
        hub="aps/super_glue:boolq:validation",
        hub_examples="aps/super_glue:boolq:train",
        template="{question}\nAnswer:",
        letters="{question}\n{options}\nAnswer:",
    ),
    "piqa": Task(
        "multiple_choice",
        datasets.piqa,
        "goal, sol1, sol2, label; or query, choices, gold",
        files=("piqa.jsonl", "piqa_validation.jsonl"),
        hub="baber/piqa::validation",
        hub_examples="baber/piqa::train",
        letters=_LISTED,
    ),
    "winogrande": Task(
        "multiple_choice",
        datasets.winogrande,
        "sentence, option1, option2, answer; or context_options, continuation, gold",
        files=("winogrande.jsonl", "winogrande_validation.jsonl"),
        hub="allenai/winogrande:winogrande_xl:validation",
        hub_examples="allenai/winogrande:winogrande_xl:train",
        template="",
    ),
    "hellaswag": Task(
        "multiple_choice",
        datasets.hellaswag,
        "activity_label, ctx_a, ctx_b, endings, label; or query, choices, gold",
        files=("hellaswag.jsonl", "hellaswag_val.jsonl"),
        hub="Rowan/hellaswag::validation",
        hub_examples="Rowan/hellaswag::train",
        template="{question}",
    ),
    "lambada": Task(
        "last_word",
        datasets.lambada,
        "text; or context, continuation",
        files=("lambada_openai.jsonl", "lambada.jsonl", "lambada_test.jsonl"),
        hub="EleutherAI/lambada_openai:default:test",
        template="{question}",
    ),
    "truthfulqa_mc1": _MC1,
    "truthfulqa_mc2": replace(_MC1, read=datasets.truthfulqa_mc2, mass=True),
    "mmlu": Task(
        "multiple_choice",
        datasets.mmlu,
        "question, choices (or choice0 .. choice3), answer",
        files=("*_test.csv", "mmlu.jsonl", "mmlu_test.jsonl"),
        examples=("*_dev.csv", "mmlu_dev.jsonl"),
        hub="cais/mmlu:all:test",
        hub_examples="cais/mmlu:all:dev",
        letters="{question}\n{options}\nAnswer:",
        description="The following are questions (with answers) about {group}.\n\n",
        letters_description=(
            "The following are multiple choice questions (with answers) about {group}.\n\n"
        ),
        scoring="letters",
        num_fewshot=5,
        first=True,
    ),
    "gsm8k": Task(
        "generation",
        datasets.gsm8k,
        "question, answer",
        files=("gsm8k_test.jsonl", "gsm8k/test.jsonl", "test.jsonl"),
        examples=("gsm8k_train.jsonl", "gsm8k/train.jsonl", "train.jsonl"),
        hub="openai/gsm8k:main:test",
        hub_examples="openai/gsm8k:main:train",
        num_fewshot=5,
        extractions=("strict", "flexible"),
        numbers=True,
        stop=("Question:", "</s>", "<|im_end|>"),
    ),
    # Anybody's own files.
    "multiple_choice": Task(
        "multiple_choice",
        datasets.multiple_choice,
        "question, choices, answer (number from 0, letter or text)",
        files=("multiple_choice.jsonl",),
        letters=_LISTED,
    ),
    "generation": Task(
        "generation",
        datasets.generation,
        "prompt, answer",
        files=("generation.jsonl",),
        template="{question}",
        extractions=("exact", "first_line"),
    ),
}
FAMILIES: dict[str, tuple[str, ...]] = {
    "arc": ("arc_easy", "arc_challenge"),
    "truthfulqa": ("truthfulqa_mc1", "truthfulqa_mc2"),
}

# Hendrycks et al. 2021: the four categories that MMLU's subjects are usually reported by.
MMLU_CATEGORIES = {
    "humanities": "formal_logic high_school_european_history high_school_us_history "
    "high_school_world_history international_law jurisprudence logical_fallacies moral_disputes "
    "moral_scenarios philosophy prehistory professional_law world_religions",
    "social_sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "stem": "abstract_algebra anatomy astronomy college_biology college_chemistry "
    "college_computer_science college_mathematics college_physics computer_security "
    "conceptual_physics electrical_engineering elementary_mathematics high_school_biology "
    "high_school_chemistry high_school_computer_science high_school_mathematics "
    "high_school_physics high_school_statistics machine_learning",
    "other": "business_ethics clinical_knowledge college_medicine global_facts human_aging "
    "management marketing medical_genetics miscellaneous nutrition professional_accounting "
    "professional_medicine virology",
}
MMLU_CATEGORY = {s: name for name, subjects in MMLU_CATEGORIES.items() for s in subjects.split()}


def check_scoring(name: str, task: Task, scoring: str) -> None:
    """Raises ValueError for a scoring that the task does not offer."""
    if scoring not in SCORINGS:
        raise ValueError(f"--scoring={scoring!r} is unknown; there are {', '.join(SCORINGS)}")
    if scoring == "letters" and not task.letters:
        raise ValueError(f"--scoring=letters makes no sense for {name}; leave it out")


def pose(task: Task, item: Item, scoring: str) -> tuple[list[str], list[str]]:
    """(questions, answers) as texts: one question and its possible answers, or one question for
    each choice and their common answer."""
    if item.contexts:
        return list(item.contexts), list(item.answers)
    listed = scoring == "letters"
    template = task.letters if listed else task.template
    question = template.format(question=item.question, options=prompts.options(item.answers))
    return [question], list(prompts.LETTERS[: len(item.answers)] if listed else item.answers)


def worked(task: Task, item: Item, scoring: str) -> tuple[str, str]:
    """(question, right answer) of a worked example."""
    questions, answers = pose(task, item, scoring)
    if item.contexts:
        return questions[item.gold[0]], answers[0]
    return questions[0], answers[item.gold[0]]


def describe(task: Task, item: Item, scoring: str) -> str:
    """What a prompt for the item begins with."""
    text = task.letters_description if scoring == "letters" else task.description
    return text.format(group=item.group.replace("_", " "))


def judge_choices(
    item: Item,
    scores: Sequence[Score],
    texts: Sequence[str] = (),
    unconditional: Sequence[Score] = (),
) -> tuple[dict[str, float], dict[str, int]]:
    """(metric -> 1 or 0, metric -> choice) of one multiple-choice question.

    The choice of each metric has the highest
      acc        log p of the answer
      acc_norm   log p divided by the answer's characters, without the delimiter before it
      acc_token  log p divided by its tokens
      acc_pmi    log p(answer | question) - log p(answer) (Holtzman et al. 2021)
    The middle two are given with the answers' `texts`, which letters and choices that are contexts
    of a common answer go without; the last one with `unconditional` scores.
    """
    log_p = np.array([score.log_prob for score in scores])
    ranked = {"acc": log_p}
    if texts:
        ranked["acc_norm"] = log_p / np.array([max(len(text), 1) for text in texts])
        ranked["acc_token"] = log_p / np.array([score.n_tokens for score in scores])
    if unconditional:
        ranked["acc_pmi"] = log_p - np.array([score.log_prob for score in unconditional])
    chosen = {name: int(values.argmax()) for name, values in ranked.items()}
    return {name: float(choice in item.gold) for name, choice in chosen.items()}, chosen


def true_mass(item: Item, scores: Sequence[Score]) -> float:
    """The probability of the right answers among all (TruthfulQA's MC2)."""
    log_p = np.array([score.log_prob for score in scores])
    p = np.exp(log_p - log_p.max())
    return float(p[list(item.gold)].sum() / p.sum())
