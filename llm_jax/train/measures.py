"""What a run measures of its model now and then: the held-out data, tasks, samples."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax

from llm_jax import models
from llm_jax.config import TrainConfig
from llm_jax.data.prepare import Corpus
from llm_jax.decode.generate import generate
from llm_jax.eval import likelihood
from llm_jax.eval import run as tasks
from llm_jax.train import distributed
from llm_jax.train.program import Program, put
from llm_jax.train.task import Task
from llm_jax.train.watchdog import Watchdog
from llm_jax.types import Batch, PyTree


class Measures:
    """The measurements of a run.

    Attributes:
      batches: the held-out batches, or None.
      samples: of this process, in the order in which they were drawn.
    """

    def __init__(
        self, cfg: TrainConfig, workdir: Path, corpus: Corpus, program: Program, task: Task
    ):
        self._cfg, self._workdir, self._corpus = cfg, workdir, corpus
        self._program, self._task = program, task
        self.batches = corpus.eval_batches(cfg, *distributed.row_blocks(program.mesh))
        self.samples: list[dict] = []
        self._alone = jax.process_count() == 1
        self._asked = self._questions() if self._alone else None

    def _questions(self) -> tasks.Asked | None:
        """Those of `eval.tasks`, read before the first step."""
        wanted, add_bos = self._cfg.eval, self._cfg.data.add_bos
        options = tasks.Options(
            input=wanted.task_input,
            limit=wanted.task_limit,
            num_fewshot=wanted.task_shots,
            add_bos=add_bos,
        )
        return tasks.ask(self._corpus.tokenizer, wanted.tasks, options) if wanted.tasks else None

    def notes(self) -> list[str]:
        """What several processes leave out."""
        if self._alone:
            return []
        notes = []
        if self.batches is not None and self._cfg.eval.sample_tokens:
            notes.append("several processes draw no samples; experiments.generate does it after")
        if self._cfg.eval.tasks:
            notes.append("several processes score no tasks; experiments.evaluate does it after")
        return notes

    def evaluate(self, params: PyTree, step: int, watch: Watchdog) -> dict[str, float]:
        """Numbers of the held-out data, and of `eval.tasks`."""

        def batches() -> Iterator[Batch]:
            for i, batch in enumerate(self.batches):
                watch.mark("evaluation batch", i)
                yield put(batch, self._program.mesh)

        if self._task.evaluate:
            found = self._task.evaluate(params, batches())
        else:
            found = likelihood.evaluate(self._program.evaluate, params, batches())
        if self._asked:
            watch.mark("tasks after step", step)
            tokenizer = self._corpus.tokenizer
            found |= tasks.values(tasks.score(params, self._cfg.model, tokenizer, self._asked))
        return found

    def sample(self, params: PyTree, step: int, watch: Watchdog) -> None:
        """Draws one from each of `eval.prompts`, and writes them to samples.jsonl."""
        cfg, model = self._cfg.eval, self._cfg.model
        if not (cfg.sample_tokens and cfg.prompts and self._alone and model.head == "lm"):
            return
        watch.mark("samples after step", step)
        n = cfg.sample_tokens
        if model.positions == "learned":
            n = min(n, models.family(model.family).room(params, model) - 1)
        outs = generate(
            params,
            model,
            self._corpus.tokenizer,
            [self._corpus.prompt(text) for text in cfg.prompts],
            max_new_tokens=n,
            seed=self._cfg.seed,
            end_tokens=self._cfg.tokenizer.end_tokens,
            stop=self._cfg.tokenizer.stop,
            add_bos=self._cfg.data.add_bos,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
        )
        for prompt, out in zip(cfg.prompts, outs, strict=True):
            self.samples.append({"step": step, "prompt": prompt, "text": out.text})
        with (self._workdir / "samples.jsonl").open("a") as f:
            for sample in self.samples[-len(outs) :]:
                f.write(json.dumps(sample) + "\n")
