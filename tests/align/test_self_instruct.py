"""A run keeps only what passes every rule, counts the rest, and goes on as if never stopped."""

import json
import re

import pytest
from tiny import tiny_train

from llm_jax.align import self_instruct
from llm_jax.align.self_instruct import prompts, report, turns
from llm_jax.align.self_instruct.tasks import SEED_TASKS, Task, read_tasks
from llm_jax.data import conversations
from llm_jax.decode.generate import Completion

SEEDS = read_tasks(SEED_TASKS)
OPTIONS = self_instruct.Options(style="base", batch_size=4)
NOUNS = "bridge river candle garden letter window mountain kettle violin harbour forest".split()
VERBS = "Describe Explain Compare Praise Question Rename Review Sketch Summon Weigh".split()


class Writer:
    """Stands for a model: a text made from the prompt's last question and the seed.

    One in five texts of a stage is malformed in one of the ways of BAD.
    """

    tokenizer = None
    BAD = ("", "too long a text|length", "Task: echo of the prompt", "so it is " * 9)

    def __init__(self):
        self.calls = 0

    def complete(self, asked, *, seed, **sampling):
        self.calls += 1
        return [self._one(text, seed + 13 * i) for i, text in enumerate(asked)]

    def _one(self, prompt, n):
        if n % 5 == 0 and not prompt.endswith(prompts.KIND):
            text, _, reason = self.BAD[n // 5 % 4].partition("|")
        else:
            text, reason = self._good(prompt, n), "stop"
        return Completion(text, [], [], reason or "stop")

    def _good(self, prompt, n):
        word = f"{NOUNS[n % 11]} {NOUNS[n // 11 % 11]}"
        if re.search(r"Task \d+:$", prompt):
            return f" {VERBS[n % 10]} the {word} of number {n}.\nTask 8: {VERBS[n % 7]} it"
        if prompt.endswith(prompts.KIND):
            return ("Yes", "No", "no", "perhaps")[n % 4]
        return f" {word} {n}"


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def test_all_that_was_parsed_is_kept_or_rejected_by_a_rule(tmp_path):
    counts = self_instruct.run(Writer(), SEEDS, tmp_path, target=30, options=OPTIONS, source="x")
    kept, rejected = read(tmp_path / "kept.jsonl"), read(tmp_path / "rejected.jsonl")
    assert counts["kept"] == len(kept) >= 30
    nothing = sum(r["rule"] == "nothing to parse" for r in rejected)
    assert counts["parsed"] + nothing == len(kept) + len(rejected) and nothing > 0
    assert sum(r["count"] for r in counts["rejected"]) == len(rejected)
    assert {"truncated", "echoes the prompt", "repetition loop", "too short"} <= {
        r["rule"] for r in rejected
    }
    for row in kept:
        assert row.keys() == {"instruction", "input", "output"} and row["output"].strip()
        text = json.dumps(row)
        assert "echo" not in text and "so it is" not in text and "too long" not in text
    assert len({row["instruction"] for row in kept}) == len(kept)
    found, malformed = conversations.read([str(tmp_path / "kept.jsonl")])  # what tuning reads
    assert len(found) == len(kept) and not malformed
    text = (tmp_path / "report.md").read_text()
    assert "repetition loop" in text and kept[0]["instruction"] in text


def test_nothing_malformed_is_ever_kept(tmp_path):
    class Broken(Writer):
        def _one(self, prompt, n):
            return Completion(self.BAD[n % 4], [], [], "stop")

    counts = self_instruct.run(Broken(), SEEDS, tmp_path, target=5, limit=12, options=OPTIONS)
    assert counts["kept"] == 0 and counts["asked"] == 12
    assert (tmp_path / "kept.jsonl").read_text() == ""


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    self_instruct.run(Writer(), SEEDS, whole, target=20, options=OPTIONS)
    self_instruct.run(Writer(), SEEDS, parts, target=3, options=OPTIONS)
    self_instruct.run(Writer(), SEEDS, parts, target=9, options=OPTIONS)
    with open(parts / "rounds.jsonl", "a") as file:
        file.write('{"asked": 4, "parsed": 7, "kept": [{"instr')  # killed while it wrote
    with open(parts / "kept.jsonl", "a") as file:
        file.write('{"instruction": "of the round that was cut short"}\n')
    self_instruct.run(Writer(), SEEDS, parts, target=20, options=OPTIONS)
    assert files(parts) == files(whole)
    idle = Writer()
    self_instruct.run(idle, SEEDS, parts, target=20, options=OPTIONS)
    assert idle.calls == 0 and files(parts) == files(whole)
    assert [t.instruction for t in self_instruct.kept_tasks(parts)] == [
        row["instruction"] for row in read(parts / "kept.jsonl")
    ]


def test_another_run_in_the_same_folder_is_an_error(tmp_path):
    self_instruct.run(Writer(), SEEDS, tmp_path, target=1, options=OPTIONS)
    other = self_instruct.Options(style="base", batch_size=4, temperature=0.1)
    with pytest.raises(ValueError, match=r"temperature=0\.8.* 0\.1; set it back"):
        self_instruct.run(Writer(), SEEDS, tmp_path, target=1, options=other)
    with pytest.raises(ValueError, match="seed_tasks="):
        self_instruct.run(Writer(), SEEDS[:-1], tmp_path, target=1, options=OPTIONS)


def test_a_list_of_a_base_model():
    read = prompts.Base().parse_instructions
    text = " Plan a trip.\nTask 8: Buy a car.\nTask 9: Learn a lan"
    assert read(text, False) == [
        ("Plan a trip.", True),
        ("Buy a car.", True),
        ("Learn a lan", False),
    ]
    assert read(text, True)[-1] == ("Learn a lan", True)
    five = " a\nTask 2: b\nTask 3: c\nTask 4: d\nTask 5: e"
    assert read(five, False) == [("a", True), ("b", True), ("c", True), ("d", True)]


def test_labels_come_first_where_the_answer_is_a_label():
    label = Task("Name the mood.", "", "glad")
    text = prompts.Base().labelled(label, [t for t in SEEDS if t.classification][:1])
    assert text.endswith("Task: Name the mood.\nClass label: glad\nInput:")
    assert text.index("Class label: complaint") < text.index("I have waited")
    text = prompts.Base().output(Task("Sort it.", "b a", ""), SEEDS[:1])
    assert text.endswith("Task: Sort it.\nInput: b a\nOutput:")


class Template:
    """A tokenizer with a chat template, whose ids are the text."""

    chat_template = "yes"

    def apply_chat_template(self, messages, add_generation_prompt):
        assert add_generation_prompt
        return "|".join(f"{m['role']}={m['content']}" for m in messages) + "|assistant="


def test_prompts_of_a_conversation():
    style = prompts.style("auto", Template())
    text = style.instruction(SEEDS[:2])
    assert text.count(prompts.NEW_TASK) == 3 and text.endswith("|assistant=")
    assert style.output(SEEDS[1], []) == (
        f"user={SEEDS[1].instruction}\n\n{SEEDS[1].input}|assistant="
    )
    assert style.parse_instructions('"Plan a trip."', True) == [("Plan a trip.", True)]
    assert style.parse_instructions("Task: Plan a trip.", False) == [("Plan a trip.", False)]
    assert prompts.style("auto", None).stop("kind") == ("\n",)
    with pytest.raises(ValueError, match="--style=chat: the tokenizer has no chat template"):
        prompts.style("chat", None)


def test_second_turns(tmp_path):
    class Talker(Writer):
        def _good(self, prompt, n):
            if prompt.endswith("User:"):
                return (" Why is the thing so big?", " What is it that makes you so sure?")[n % 2]
            return f" Since number {n} says so."

    tasks = [Task(f"Explain the {noun} to me.", "", f"It is {noun}.") for noun in NOUNS]
    counts = turns.write_turns(Talker(), tasks[:5], SEEDS, tmp_path, OPTIONS)
    counts = turns.write_turns(Talker(), tasks, SEEDS, tmp_path, OPTIONS)
    rows, rejected = read(tmp_path / "conversations.jsonl"), read(tmp_path / "rejected_turns.jsonl")
    assert counts["asked"] == 11 == len(rows) + len(rejected)
    assert counts["kept"] == len(rows) > 3 and len(rejected) > 0
    for row in rows:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * 2
        assert all(m["content"].strip() for m in row["messages"])
    found, malformed = conversations.read([str(tmp_path / "conversations.jsonl")])
    assert len(found) == len(rows) and not malformed
    with pytest.raises(ValueError, match="follow_up"):
        turns.second_turns(Talker(), tasks, [t for t in SEEDS if not t.follow_up], OPTIONS)


def test_a_model_of_ours(tmp_path, one_device):
    """Untrained, it writes nothing that could be kept."""
    import jax

    from llm_jax.api import Model
    from llm_jax.models import family
    from llm_jax.nn import params
    from llm_jax.tokenizers import simple

    cfg = tiny_train(**{"model.vocab_size": 259, "model.n_layers": 1})
    values = params.init(family(cfg.model.family).specs(cfg.model), jax.random.key(0))
    model = Model(cfg, values, simple.train_bytes(), one_device)
    options = self_instruct.Options(batch_size=2, instruction_tokens=8)
    counts = self_instruct.run(model, SEEDS, tmp_path, target=1, limit=2, options=options)
    assert counts["asked"] == 2 and counts["kept"] == 0 and counts["parsed"] > 0


def test_stages_of_the_report_are_all_that_there_are():
    assert set(prompts.STOPS) == set(report.STAGES)
