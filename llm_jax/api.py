"""The object that a notebook, a server or a later verb holds: a trained model with its tokenizer."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import config as configs
from llm_jax import models, sharding, tokenizers
from llm_jax.config import MeshConfig, PeftConfig, TrainConfig
from llm_jax.data.rendering import Renderer
from llm_jax.decode.generate import Completion, generate
from llm_jax.eval.likelihood import text_log_probs
from llm_jax.interop import huggingface, peft_format, pretrained
from llm_jax.interop.model_card import model_card
from llm_jax.models import heads
from llm_jax.peft import lora
from llm_jax.tokenizers.export import huggingface_files
from llm_jax.train import base_model, checkpoint, host_memory
from llm_jax.types import Array, Batch, PyTree


class Model:
    """A language model ready for use.

    Attributes:
      config: the frozen TrainConfig it was trained with.
      params: its parameter tree.
      tokenizer: its tokenizer.
      trained: of an adapted model, what was trained of `params`; else None.
      path: where it was loaded from (of an adapted model, its base); "" for none.
    """

    def __init__(
        self,
        config: TrainConfig,
        params: PyTree,
        tokenizer: Any,
        mesh: jax.sharding.Mesh,
        trained: PyTree | None = None,
        path: str = "",
    ):
        self.config, self.params, self.tokenizer, self.mesh = config, params, tokenizer, mesh
        self.trained, self.path = trained, path
        host_memory.fit(sum(x.nbytes for x in jax.tree.leaves(params)))

    def logits(self, tokens: Any) -> Array:
        """Ids [B, L] -> float32 [B, L, V]: logits of the token after each.

        Raises:
          ValueError: ids of another rank, or outside the vocabulary.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"tokens have to be integers [B, L], not {tokens.dtype} {tokens.shape}"
            )
        vocab = self.config.model.vocab_size
        if tokens.min() < 0 or tokens.max() >= vocab:
            bad = tokens[(tokens < 0) | (tokens >= vocab)][0]
            raise ValueError(f"token id {bad} is outside the model's vocabulary of {vocab}")
        if (
            self.config.model.positions == "learned"
            and tokens.shape[1] > self.config.model.max_length
        ):
            raise ValueError(
                f"{tokens.shape[1]} tokens do not fit the model's {self.config.model.max_length} positions"
            )
        with jax.set_mesh(self.mesh):
            return _logits(self.params, jnp.asarray(tokens, jnp.int32), self.config.model)

    def log_probs(self, texts: Sequence[str]) -> list[np.ndarray]:
        """log p of each token of each text given what stands before it, nats: float32 [n tokens]."""
        if isinstance(texts, str):
            raise ValueError("log_probs takes a list of texts, not one string")
        with jax.set_mesh(self.mesh):
            return text_log_probs(self.params, self.config.model, self.tokenizer, texts)

    def complete(self, prompts: Sequence[str | Sequence[int]], **sampling: Any) -> list[Completion]:
        """Completions with tokens, log-probabilities and the reason they ended; see `decode.generate`."""
        if isinstance(prompts, str):
            raise ValueError("prompts have to be a list of texts, not one string")
        sampling.setdefault("add_bos", self.config.data.add_bos)
        sampling.setdefault("end_tokens", self.config.tokenizer.end_tokens)
        with jax.set_mesh(self.mesh):
            return generate(self.params, self.config.model, self.tokenizer, prompts, **sampling)

    def generate(self, prompts: Sequence[str | Sequence[int]], **sampling: Any) -> list[str]:
        """The completed texts, without their prompts; keywords as in `decode.generate.generate`."""
        return [completion.text for completion in self.complete(prompts, **sampling)]

    def chat(self, messages: Sequence[dict[str, Any]], **sampling: Any) -> str:
        """The assistant's answer to `messages` ({"role": ..., "content": ...}), in the tokenizer's
        chat template."""
        return self.answers([messages], **sampling)[0].text.strip()

    def answers(
        self, conversations: Sequence[Sequence[dict[str, Any]]], **sampling: Any
    ) -> list[Completion]:
        """`chat`, of several conversations at once, as completions: they end at `stop` and where the
        model was taught to end an answer."""
        sampling["stop"] = [*sampling.get("stop", ()), *self.config.tokenizer.stop]
        render = partial(self.tokenizer.apply_chat_template, add_generation_prompt=True)
        return self.complete([render(messages) for messages in conversations], **sampling)

    def with_adapter(self, path: str | Path) -> "Model":
        """This model with what a run with PEFT, or a Hugging Face PEFT folder, trained on it. Its
        arrays are shared, so that many adapters cost one base; this object stays as it is.

        Raises:
          FileNotFoundError: no adapter there.
          ValueError: an adapter of another model, a run on other weights, or this model has an
            adapter already.
        """
        if self.trained is not None:
            raise ValueError("this model has an adapter; take the base, or merged()")
        config, tokenizer = configs.thaw(self.config), self.tokenizer
        if peft_format.is_folder(path):
            config.peft, trained = peft_format.load(path, self.config.model, self.mesh)
        else:
            run = checkpoint.load_config(path)
            if run.peft.method == "none":
                raise ValueError(f"{path} is a whole model, not an adapter; load it")
            for part in ("peft", "data", "tokenizer"):
                setattr(config, part, configs.thaw(getattr(run, part)))
            config.model.head = run.model.head
            base_model.check_base(path, run, self.params)
            trained = base_model.load_trained(path, run, self.mesh)
            tokenizer = checkpoint.load_tokenizer(path)
        config.checkpoint.init_from = self.path
        config = configs.freeze(config)
        params = base_model.tuned(self.params, trained, config)
        return Model(config, params, tokenizer, self.mesh, trained, self.path)

    def merged(self) -> "Model":
        """The same model with plain arrays: adapters added to their matrices, quantised ones as
        they are computed with. It can be saved, exported, and tuned anew.

        Raises:
          ValueError: what was trained is no change of the model's parameters (a prompt or prefix).
        """
        if "prefix" in self.params:
            raise ValueError(
                f"peft.method={self.config.peft.method} trains tokens in front of a text, which no "
                "parameter of the model can stand for; keep its run's folder"
            )
        config = configs.thaw(self.config)
        config.peft = PeftConfig()
        return Model(configs.freeze(config), lora.merge(self.params), self.tokenizer, self.mesh)

    def save_adapter(self, folder: str | Path) -> None:
        """Writes what was trained as a new Hugging Face PEFT folder.

        Raises:
          FileExistsError: the folder is there and not empty.
          ValueError: this model has no adapter, or one that the format has no place for.
        """
        if self.trained is None:
            raise ValueError("this model has no adapter; save or export it")
        peft_format.save(folder, self.trained, self.config.peft, self.config.model, base=self.path)

    def save(self, folder: str | Path) -> None:
        """Writes a checkpoint into a new folder, from which `load`, every binary and
        `checkpoint.init_from` start; a model with adapters is `merged` first.

        Raises:
          FileExistsError: the folder is there and not empty.
          OSError: it cannot be written.
        """
        plain = self.merged()
        with huggingface.new_folder(folder) as new:
            checkpoint.save_params(new / "checkpoints", plain.config, plain.tokenizer, plain.params)
            configs.save(plain.config, new / "config.json")

    def export(
        self,
        folder: str | Path,
        *,
        dtype: str = "float32",
        shard_bytes: int = 5_000_000_000,
        summary: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Writes a new Hugging Face folder: weights, config, tokenizer, generation config, model card.

        Returns notes for the user, if any: a tokenizer that transformers cannot express is written
        in our own format.

        Raises:
          FileExistsError: the folder is there and not empty.
          ValueError: no architecture of transformers computes this model.
        """
        t, notes, params = self.tokenizer, [], self.merged().params
        if shift := float(params[heads.REWARD]["bias"]) if heads.REWARD in params else 0.0:
            notes.append(f"rewards are less by {shift:.4g} there: transformers' head has no bias")
        ends = tuple(dict.fromkeys([t.eos_id, *self.config.tokenizer.end_tokens]))
        ids = {"bos": t.bos_id, "eos": t.eos_id if len(ends) < 2 else list(ends), "pad": t.pad_id}
        with huggingface.new_folder(folder) as new:
            values = huggingface.save(
                new,
                self.config.model,
                params,
                dtype=dtype,
                shard_bytes=shard_bytes,
                token_ids=ids,
            )
            try:
                files = huggingface_files(t, self.config.model.max_length)
            except ValueError as e:
                notes.append(f"{e}; the tokenizer is written in llm_jax's own format")
                files = t.files()
            ending = Renderer(t).ending.strip() if heads.REWARD in params else ""
            card = model_card(self.config, values, t, summary or {}, ending)
            files["README.md"] = card.encode()
            for name, content in files.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                (new / name).write_bytes(content)
        return notes


@partial(jax.jit, static_argnames="cfg")
def _logits(params: PyTree, tokens: Array, cfg: configs.ModelConfig) -> Array:
    model = models.family(cfg.family)
    return model.logits(params, model.hidden(params, Batch(tokens=tokens), cfg).x, cfg)


def load(
    path: str | Path,
    *,
    source: str | None = None,
    tokenizer: str | Path | None = None,
    base: str | Path | None = None,
    mesh: MeshConfig | None = None,
    dtype: str | None = None,
) -> Model:
    """Loads a model: a run directory, its checkpoints folder or one step folder; a Hugging Face
    folder; a `.gguf` file; a llama2.c `.bin`; or a Hugging Face PEFT folder with its base.

    Args:
      source: "llm_jax", "hf", "gguf" or "llama2c"; None: by its looks.
      tokenizer: a tokenizer to use in place of the one that comes along; a llama2.c file without
        one beside it needs it.
      base: the base model of a run with PEFT or of a PEFT folder; None: the one that they name.
      mesh: None puts everything on one device, whatever mesh it was trained on.
      dtype: what weights of other formats are kept in; None: the type that the model computes in,
        which is float32 on a CPU and bfloat16 elsewhere. Exporting what was kept in bfloat16
        rounds; "float32" loses nothing.

    Raises:
      FileNotFoundError: no model there, or a part of it is missing.
      ValueError: a damaged model, one of an unknown format or architecture, or a tokenizer that
        does not belong to it.
    """
    devices = jax.devices()[:1] if mesh is None else None
    device_mesh = sharding.make_mesh(mesh or MeshConfig(), devices)

    def adapted(named: str | Path) -> Model:
        whole = load(base or named, tokenizer=tokenizer, mesh=mesh, dtype=dtype)
        if whole.trained is not None:  # tuned on what was tuned
            whole = whole.merged()
        model = whole.with_adapter(path)
        if tokenizer:
            model.tokenizer = whole.tokenizer
        return model

    if peft_format.is_folder(path):
        return adapted("" if base else peft_format.base_of(path))
    where = str(Path(path).expanduser().absolute())
    source = source or pretrained.kind(path)
    if source in pretrained.FORMATS:
        _no_base(path, base)
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        found = pretrained.load(path, device_mesh, source=source, tokenizer=tokenizer, dtype=dtype)
        config = imported_config(found)
        return Model(config, found.params, found.tokenizer, device_mesh, path=where)
    config = checkpoint.load_config(path)
    if config.peft.method != "none":
        return adapted("" if base else base_model.base_of(path, config))
    _no_base(path, base)
    specs = models.family(config.model.family).specs(config.model)
    params = checkpoint.load_params(path, specs, device_mesh)
    own = tokenizers.load(tokenizer) if tokenizer else checkpoint.load_tokenizer(path)
    folder, step = checkpoint.locate(path)
    return Model(config, params, own, device_mesh, path=str(folder / str(step)))


def _no_base(path: str | Path, base: str | Path | None) -> None:
    if base:
        raise ValueError(f"{path} is a whole model; --base={base} is for an adapter, drop it")


def imported_config(found: pretrained.Pretrained) -> TrainConfig:
    """The frozen TrainConfig around a model that was trained elsewhere."""
    config = TrainConfig(name=found.name, model=found.model)
    config.length = min(config.length, found.model.max_length)
    config.data.add_bos = found.adds_bos
    config.tokenizer.end_tokens = found.end_tokens
    configs.resolve_model(
        config.model,
        vocab_size=found.tokenizer.vocab_size,
        length=config.length,
        backend=jax.default_backend(),
    )
    return configs.freeze(config)
