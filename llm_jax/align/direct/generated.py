"""Answers that a policy writes itself, before and after: their length, and how far it has moved."""

from typing import Any

import jax
import numpy as np

from llm_jax import report
from llm_jax.align import rollout
from llm_jax.align.policies import Policy
from llm_jax.config import TrainConfig
from llm_jax.data.comparisons import Comparisons
from llm_jax.peft import lora
from llm_jax.train import companion
from llm_jax.types import PyTree


class Generated:
    """Answers to held-out prompts by the model that a run starts from and by the one that it makes.

    They are drawn at temperature 1, so that mean log-ratios estimate the KL divergence.
    """

    def __init__(self, cfg: TrainConfig, corpus: Comparisons, mesh: Any, start: str):
        self._cfg, self._corpus, self._mesh, self._start = cfg, corpus, mesh, start
        prompts = corpus.prompts(cfg.dpo.sample_prompts)
        if cfg.model.positions == "learned" and prompts:  # a prompt without room is not asked
            room = cfg.model.max_length - cfg.dpo.sample_tokens
            sized = zip(prompts, rollout.prompt_ids(corpus, prompts), strict=True)
            prompts = [prompt for prompt, ids in sized if len(ids) <= room]
        self._prompts = prompts

    def compare(self, params: PyTree) -> tuple[dict[str, Any], list[report.Block]]:
        """Rows for the summary, and a table with answers for the report; nothing with several
        processes, or if no prompt is asked for."""
        if not self._prompts or jax.process_count() > 1:
            return {}, []
        tuned = self._cfg.peft.method != "none" and not self._cfg.peft.also
        before = lora.detach(params) if tuned else self._at_start()
        first = self._answers(before)
        last = self._answers(params)
        ids = rollout.prompt_ids(self._model(params), self._prompts)
        tokens = [[a.tokens for a in group] for group in last]
        reference = rollout.log_probs(self._model(before), ids, tokens)
        kl = rollout.kl([[a.log_probs for a in group] for group in last], reference)
        found = {
            "generated_tokens_before": _mean_tokens(first),
            "generated_tokens": _mean_tokens(last),
            "kl": kl.k1,
            "kl_stderr": kl.k1_error,
        }
        rows = [
            {"model": name, "tokens an answer": _mean_tokens(a), "ended by itself": _ended(a)}
            for name, a in (("before", first), ("after", last))
        ]
        blocks: list[report.Block] = [
            report.Text("## Answers of its own"),
            report.Table(rows, caption=f"To {len(self._prompts)} held-out prompts, temperature 1"),
        ]
        for prompt, old, new in list(zip(self._prompts, first, last, strict=True))[:3]:
            text = f"{prompt[-1]['content']}\n\n[before] {old[0].text}\n\n[after] {new[0].text}"
            blocks.append(report.Code(text))
        return found, blocks

    def _at_start(self) -> PyTree:
        return companion.load(self._start, self._mesh, like=self._cfg.model).params

    def _answers(self, params: PyTree) -> list[list[rollout.Answer]]:
        return rollout.sample(
            self._model(params),
            self._prompts,
            n=1,
            max_new_tokens=self._cfg.dpo.sample_tokens,
            seed=self._cfg.seed,
        )

    def _model(self, params: PyTree) -> Policy:
        return Policy(self._cfg, params, self._corpus.tokenizer, self._mesh)


def _mean_tokens(answers: list[list[rollout.Answer]]) -> float:
    return float(np.mean([len(a.tokens) for group in answers for a in group]))


def _ended(answers: list[list[rollout.Answer]]) -> float:
    return float(np.mean([a.finish_reason == "stop" for group in answers for a in group]))
