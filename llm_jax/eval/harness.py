"""lm-evaluation-harness (`lm_eval`) over a model of ours: any of its tasks, with its own prompts.

  lm = LlmJax(llm_jax.load("runs/quickstart"))
  lm_eval.simple_evaluate(lm, tasks=["arc_easy"])

Texts are cut into tokens, prefixed and truncated as lm_eval's wrapper of transformers (HFLM) does it,
so that both give one number for the same weights.
"""

import difflib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging
from tqdm import tqdm

from llm_jax import models
from llm_jax.decode.generate import start_ids
from llm_jax.eval import scoring

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import simple_parse_args_string
except ImportError as error:
    raise ImportError(
        f"llm_jax.eval.harness needs lm_eval ({error}): pip install 'llm_jax[eval]'"
    ) from None

# Of a task's generation_kwargs: what `decode.generate` takes under the same name.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("llm_jax")
class LlmJax(TemplateLM):
    """An `lm_eval.api.model.LM`; `loglikelihood` is inherited and ends in `_loglikelihood_tokens`.

    Every process of a job runs all requests on its part of the mesh, so rank is 0 and world_size 1.
    """

    # What opens `checkpoint=` of an argument string. Evaluation lies below `llm_jax.load`, so
    # whoever wants strings says it: `LlmJax.loader = llm_jax.load`.
    loader: Callable[[str], Any] | None = None

    def __init__(
        self,
        model: Any,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
    ):
        """
        Args:
          model: an `llm_jax.api.Model`.
          batch_size: rows that go through the model together.
          max_length: tokens that go into the model at most; default: what it has room for.
          max_gen_toks: tokens to generate where a task does not say.
          add_bos_token: whether texts begin with the begin token; default: `config.data.add_bos`.
          prefix_token_id: what a text without context follows; default: the begin, else end token.
          seed: of tasks that sample.

        Raises ValueError for sizes below 1, and for a max_length that the model has no positions for.
        """
        super().__init__()
        # lm_eval's bootstrap would fork a process in which JAX runs threads, which can hang.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        cfg = model.config.model
        self.model, self.tokenizer, self.seed = model, model.tokenizer, seed
        self.batch_size, self.max_gen_toks = int(batch_size), int(max_gen_toks)
        room = models.family(cfg.family).room(model.params, cfg)
        self.max_length = int(max_length or room)
        for name in ("batch_size", "max_length", "max_gen_toks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} has to be at least 1")
        if cfg.positions == "learned" and self.max_length > room:
            raise ValueError(
                f"max_length={self.max_length} is more than the model's {room} positions"
            )
        self.add_bos = model.config.data.add_bos if add_bos_token is None else bool(add_bos_token)
        if self.add_bos and self.tokenizer.bos_id is None:
            raise ValueError("add_bos_token: this tokenizer has no begin token")
        self._prefix = start_ids(self.tokenizer)[0] if prefix_token_id is None else prefix_token_id

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict | None = None
    ) -> "LlmJax":
        """From lm_eval's command line: "checkpoint=PATH,batch_size=8,..." (or pretrained=PATH)."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "LlmJax":
        """The same from a dict. `loader` opens the path.

        Raises ValueError without a loader or a path, and for arguments that nothing reads.
        """
        given = {
            k: v for k, v in {**(additional_config or {}), **arg_dict}.items() if v is not None
        }
        paths = [given.pop(key) for key in ("checkpoint", "pretrained") if key in given]
        known = (
            "batch_size",
            "max_length",
            "max_gen_toks",
            "add_bos_token",
            "prefix_token_id",
            "seed",
        )
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(
                f"model_args: {unknown[0]}= is not one of checkpoint, {', '.join(known)}"
            )
        if len(paths) != 1:
            raise ValueError("model_args need one checkpoint=PATH")
        if cls.loader is None:
            raise ValueError("model_args: set LlmJax.loader = llm_jax.load, or pass a loaded model")
        return cls(cls.loader(paths[0]), **given)

    @property
    def eot_token_id(self) -> int:
        """The end token; of a tokenizer without one, what texts start from."""
        end = self.tokenizer.eos_id
        return self._prefix if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """In the names of lm_eval's caches of requests."""
        return f"llm_jax-{self.tokenizer.kind}-{self.tokenizer.fingerprint()[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes into a result's config."""
        leaves = jax.tree.leaves(self.model.params)
        return {
            "model_num_parameters": sum(x.size for x in leaves),
            "model_dtype": self.model.config.model.dtype,
            "max_length": self.max_length,
            "add_bos_token": self.add_bos,
            "tokenizer": self.tokenizer_name,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids; special tokens spelled out are read as such, and a begin token is not doubled."""
        ids = self.tokenizer.encode(string, special=True)
        add_bos = self.add_bos if add_special_tokens is None else add_special_tokens
        begin = [self.tokenizer.bos_id]
        return ids if not add_bos or None in begin or ids[:1] == begin else begin + ids

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return self.tokenizer.decode(tokens, skip_special=skip_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return scoring.encode_pair(self.tokenizer, context, continuation, add_bos=self.add_bos)

    def _score(self, pairs: Sequence[tuple], disable_tqdm: bool) -> list[scoring.Score]:
        with (
            jax.set_mesh(self.model.mesh),
            tqdm(total=len(pairs), desc="log-likelihoods", disable=disable_tqdm) as bar,
        ):
            return scoring.score_continuations(
                self.model.params,
                self.model.config.model,
                pairs,
                batch_size=self.batch_size,
                window=self.max_length,
                progress=bar.update,
            )

    def _loglikelihood_tokens(
        self, requests: list[tuple], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log p in nats, greedy) of ((context, continuation), context ids, continuation ids)."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        if cut := sum(len(a) + len(b) > self.max_length + 1 for a, b in pairs):
            logging.warning(
                "%d of %d contexts are cut from the left to max_length=%d tokens",
                cut,
                len(pairs),
                self.max_length,
            )
        answers = [(s.log_prob, s.greedy) for s in self._score(pairs, disable_tqdm)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows of `max_length` that score each token once.

        With `add_bos` the begin token that a text gets is scored too, after the prefix token, as HFLM
        scores it.
        """
        texts = [request.args[0] for request in requests]
        pairs, owners = [], []
        for n, text in enumerate(texts):
            windows = scoring.rolling(
                self.tok_encode(text),
                window=self.max_length,
                stride=self.max_length,
                prefix=self._prefix,
            )
            for pair in windows:
                pairs.append(pair)
                owners.append(n)
        totals = [0.0] * len(texts)
        for owner, score in zip(owners, self._score(pairs, disable_tqdm), strict=True):
            totals[owner] += score.log_prob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of `until`, which they do not contain; greedy unless a task samples.

        Prompts are cut from the left to what leaves room for `max_gen_toks`. Those with the same
        generation_kwargs are sorted by length and generated in batches of `batch_size` rows.

        Raises ValueError for generation_kwargs that nothing here reads.
        """
        groups = defaultdict(list)
        for n, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(n)
        out = [""] * len(requests)
        with tqdm(total=len(requests), desc="generation", disable=disable_tqdm) as bar:
            for members in groups.values():
                options, until, limit = self._generation(requests[members[0]].args[1])
                prompts = {n: self._prompt(requests[n].args[0], limit) for n in members}
                members = sorted(members, key=lambda n: -len(prompts[n]))
                for at in range(0, len(members), self.batch_size):
                    group = members[at : at + self.batch_size]
                    # Rows that are missing repeat the last one, so that no further shape compiles.
                    rows = [prompts[n] for n in group]
                    rows += rows[-1:] * (self.batch_size - len(group))
                    completions = self.model.complete(
                        rows, max_new_tokens=limit, stop=until, seed=self.seed + at, **options
                    )
                    for n, completion in zip(group, completions, strict=False):
                        out[n] = completion.text
                        self.cache_hook.add_partial("generate_until", requests[n].args, out[n])
                    bar.update(len(group))
        return out

    def _generation(self, kwargs: dict) -> tuple[dict[str, Any], list[str], int]:
        """(options of `decode.generate`, stop strings, tokens at most) of a task's generation_kwargs."""
        kwargs = dict(normalize_gen_kwargs(kwargs, self.max_gen_toks))
        until = [text for text in kwargs.pop("until") if text]
        limit, do_sample = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample")
        if unknown := sorted(set(kwargs) - set(SAMPLING)):
            raise ValueError(f"generation_kwargs: {unknown[0]!r} is not one of {SAMPLING}")
        if limit >= self.max_length:
            raise ValueError(f"max_gen_toks={limit} has to be below max_length={self.max_length}")
        kwargs.setdefault("temperature", 0.0)
        if do_sample and not kwargs["temperature"]:
            raise ValueError("generation_kwargs: do_sample needs a temperature above 0")
        # Special tokens leave no trace in the text, so as strings they would never be found.
        special = self.tokenizer.special_tokens
        named = [special[text] for text in until if text in special]
        kwargs["end_tokens"] = (*self.model.config.tokenizer.end_tokens, *named)
        until = [text for text in until if text not in special]
        return kwargs, until, limit

    def _prompt(self, context: str, limit: int) -> list[int]:
        return self.tok_encode(context)[-(self.max_length - limit) :] or [self._prefix]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; its last message stays open without `add_generation_prompt`.

        A template that refuses a system message gets the others alone, with a warning, as HFLM does.
        """

        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return render(chat_history)
        except ValueError as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            logging.warning("the system message is left out: %s", error)
            return render(rest)


def evaluate(
    model: Any,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """`lm_eval.simple_evaluate` on a model of ours, as plain data for a JSON file.

    Args:
      model: an `llm_jax.api.Model`.
      tasks: names of lm_eval's tasks, groups and tags, or of those in `include_path`.
      include_path: folder of task files of one's own; theirs win over lm_eval's.
      options: of `LlmJax`.
      settings: of `simple_evaluate` (num_fewshot, limit, apply_chat_template, log_samples, ...).

    Raises:
      FileNotFoundError: no folder at `include_path`.
      ValueError: a task that nobody knows; the message names the nearest.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable

    if include_path and not os.path.isdir(include_path):
        raise FileNotFoundError(f"--include_path={include_path}: no such folder")
    # Reading the index of lm_eval's own 14,000 tasks takes ten seconds; groups may name them.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(tasks) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=include_path)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; see --include_path"
            raise ValueError(f"--tasks={task}: lm_eval knows no such task{hint}")
    # In one process; 100,000, lm_eval's own number, take minutes for a perplexity.
    settings.setdefault("bootstrap_iters", 1000)
    lm = LlmJax(model, **(options or {}))
    found = lm_eval.simple_evaluate(lm, tasks=list(tasks), task_manager=manager, **settings)
    return json.loads(json.dumps(found, default=handle_non_serializable))
