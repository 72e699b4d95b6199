"""From a data config to tokens: reads, splits, trains the tokenizer, writes shards, reuses them."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from llm_jax import tokenizers
from llm_jax.config import DataConfig, SourceConfig, TokenizerConfig, TrainConfig
from llm_jax.data import documents, progress, shards
from llm_jax.data.mixture import Component
from llm_jax.data.tokens import MANIFEST, Tokens, open_

TOKENIZER, TRAIN, EVAL = "tokenizer", "train", "eval"
ORIGIN = "origin.json"  # beside a trained tokenizer: its options and its text


@dataclasses.dataclass
class Corpus:
    """What training needs of the data: text as one stream of tokens.

    `data.chat_corpus.ChatCorpus` is the other kind.
    """

    tokenizer: tokenizers.Tokenizer
    train: list[Component]  # what `make_loader` takes
    evaluation: Tokens | None  # None: nothing is held out
    directory: str
    end_tokens: tuple[int, ...] = ()  # ids that end a sample besides the tokenizer's own
    stop: tuple[str, ...] = ()  # strings that do

    @property
    def train_tokens(self) -> int:
        """Tokens for training."""
        return sum(c.tokens.total for c in self.train)

    @property
    def eval_tokens(self) -> int:
        """Tokens that are held out."""
        return 0 if self.evaluation is None else self.evaluation.total

    def loader(self, cfg: TrainConfig, blocks: Sequence[int] = (0,), block_count: int = 1) -> Any:
        """A run's `Loader`; `blocks` of `block_count` as in `make_loader`."""
        from llm_jax.data.loader import make_loader  # brings jax, without which data is prepared

        return make_loader(
            self.train,
            length=cfg.length,
            batch_size=cfg.batch_size,
            steps=cfg.steps,
            packing=cfg.data.packing,
            isolate_documents=cfg.data.isolate_documents,
            seed=cfg.seed,
            token_lengths=self.tokenizer.token_lengths(),
            shuffle=cfg.data.shuffle,
            blocks=blocks,
            block_count=block_count,
        )

    def eval_batches(
        self, cfg: TrainConfig, blocks: Sequence[int] = (0,), block_count: int = 1
    ) -> Any:
        """A run's held-out `EvalBatches`, or None."""
        if self.evaluation is None:
            return None
        from llm_jax.data.loader import eval_batches

        return eval_batches(
            self.evaluation,
            length=cfg.length,
            batch_size=cfg.eval.batch_size or cfg.batch_size // cfg.accumulation,
            packing=cfg.data.packing,
            isolate_documents=cfg.data.isolate_documents,
            rows=cfg.eval.rows,
            token_lengths=self.tokenizer.token_lengths(),
            blocks=blocks,
            block_count=block_count,
        )

    def prompt(self, text: str) -> str:
        """What a sample goes on from."""
        return text

    def parts(self) -> list[dict[str, Any]]:
        """Rows of a report's table of the data."""
        parts = [(c.name, c.tokens) for c in self.train]
        if self.evaluation is not None:
            parts.append(("held out", self.evaluation))
        rows = [{"part": name, "documents": t.documents, "tokens": t.total} for name, t in parts]
        for row, (_, t) in zip(rows, parts, strict=True):
            if t.manifest is not None:
                row["bytes"] = t.manifest.bytes
                row["bytes per token"] = t.manifest.bytes / max(t.total, 1)
        return rows


def prepare_corpus(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    workdir: str,
    *,
    writer: bool = True,
    verify: bool = True,
) -> Corpus:
    """Tokenised training and held-out text, made now, or reused if nothing has changed.

    Everything is in `workdir`/data, or in a folder of `data.cache_dir` whose name is a hash of all
    that it depends on, so that many runs can share it. Held out is the last `eval_fraction` of the
    characters of each source, or `eval_inputs`. A tokenizer without a `path` is trained on the
    training part. An input may be a folder that `prepare_data` wrote: then its tokenizer, its
    shards and its split are used as they are.

    Args:
      writer: False on all processes but the first; they open what the first has written, and need
        neither the text nor the tokenizer's files.
      verify: whether to compare hashes, see `tokens.open_`.
    """
    root = os.path.join(workdir, "data")
    if data.cache_dir:
        texts, loaded = Texts(data), _loaded(data, tokenizer)
        parts = [texts.identity(s, TRAIN) for s in sources_of(data)]
        if data.eval_inputs:
            parts.append(documents.identity(data.eval_inputs))
        by = loaded.fingerprint() if loaded else training_options(tokenizer)
        depends = json.dumps([parts, by, data.add_bos, data.add_eos])
        name = hashlib.sha256(depends.encode()).hexdigest()[:16]
        root = os.path.join(os.path.expanduser(data.cache_dir), name)
    return prepare_in(root, data, tokenizer, writer=writer, verify=verify)


def prepare_in(
    root: str,
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    writer: bool = True,
    verify: bool = True,
) -> Corpus:
    """As `prepare_corpus`, into `root`/tokenizer, `root`/train and `root`/eval.

    With `data.sources` there is a train-NAME and an eval-NAME for each.
    """
    sources, texts = sources_of(data), Texts(data)
    for inputs in (data.eval_inputs, *(s.inputs for s in sources if not _is_prepared(s))):
        if inputs and writer:
            documents.resolve(inputs)  # a missing file is an error before hours of work, not after
    found = _tokenizer(os.path.join(root, TOKENIZER), texts, sources, data, tokenizer, writer)
    fingerprint = found.fingerprint()

    def tokens(source: SourceConfig, part: str) -> Tokens:
        if _is_prepared(source):
            return _open_prepared(source.inputs[0], part, data, fingerprint, verify)
        named = data.sources and source in sources
        folder = os.path.join(root, f"{part}-{source.name}" if named else part)
        if writer:
            shards.prepare(
                texts.documents(source, part),
                found,
                folder,
                add_bos=data.add_bos,
                add_eos=data.add_eos,
                identity=texts.identity(source, part),
                characters=functools.partial(texts.characters, source, part),
            )
        return open_(folder, tokenizer=fingerprint, verify=verify)

    train = [Component(s.name, tokens(s, TRAIN), s.weights) for s in sources]
    evaluation = None
    if data.eval_inputs:
        evaluation = tokens(SourceConfig(name=EVAL, inputs=data.eval_inputs), EVAL)
    elif data.eval_fraction:
        evaluation = Tokens.concatenate([tokens(s, EVAL) for s in sources])
    return Corpus(
        found, train, evaluation, root, tuple(tokenizer.end_tokens), tuple(tokenizer.stop)
    )


class Texts:
    """The training and the held-out text of each source."""

    def __init__(self, data: DataConfig):
        self._key = data.text_key
        # With held-out text of its own, a source is for training from end to end.
        self._fraction = 0.0 if data.eval_inputs else data.eval_fraction
        self._counts: dict[tuple, int] = {}

    def documents(self, source: SourceConfig, part: str) -> Iterator[documents.Document]:
        """Reads nothing before the first document is asked for."""
        bounds = self._bounds(source, part)
        yield from documents.take(documents.read(source.inputs, text_key=self._key), *bounds)

    def characters(self, source: SourceConfig, part: str) -> int:
        """Length of a part of a source."""
        start, stop = self._bounds(source, part)
        return (self._count(source.inputs) if stop is None else stop) - start

    def identity(self, source: SourceConfig, part: str) -> list:
        """JSON-ready; changes whenever the text of the part may have changed."""
        return [documents.identity(source.inputs), self._key, self._fraction, part]

    def _bounds(self, source: SourceConfig, part: str) -> tuple[int, int | None]:
        if not self._fraction:
            return 0, None
        start = documents.held_out_start(self._count(source.inputs), self._fraction)
        return (0, start) if part == TRAIN else (start, None)

    def _count(self, inputs: tuple) -> int:
        key = tuple(inputs)
        if key not in self._counts:
            with progress.bar(f"read {inputs[0]}", None, "char") as bar:
                total = 0
                for document in documents.read(inputs, text_key=self._key):
                    total += len(document.text)
                    bar.update(len(document.text))
            self._counts[key] = total
        return self._counts[key]


def sources_of(data: DataConfig) -> tuple[SourceConfig, ...]:
    sources = data.sources or (SourceConfig(name=TRAIN, inputs=data.inputs),)
    for source in sources:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", source.name):
            raise ValueError(
                f"data.sources: the name {source.name!r} has to be of letters, digits, _, - and ."
            )
        if _is_prepared(source) and len(source.inputs) > 1:
            raise ValueError(
                f"{source.name}: a folder of prepared data has to be the only input of its source; "
                "use data.sources to mix it with others"
            )
    return tuple(sources)


def _is_prepared(source: SourceConfig) -> bool:
    return any(os.path.isfile(os.path.join(i, TRAIN, MANIFEST)) for i in source.inputs)


def _open_prepared(
    folder: str, part: str, data: DataConfig, fingerprint: str, verify: bool
) -> Tokens:
    path = os.path.join(folder, part)
    if not os.path.isdir(path):
        raise FileNotFoundError(
            f"{folder} has no held-out part; name held-out text in --eval_input"
        )
    found = open_(path, tokenizer=fingerprint, verify=verify)
    for key in ("add_bos", "add_eos"):
        was = getattr(found.manifest, key)
        if was != getattr(data, key):
            raise ValueError(f"{path} was prepared with {key}={was}; set data.{key}={was}")
    return found


# --------------------------------------------------------------------------------------- tokenizer


def _tokenizer(
    folder: str,
    texts: Texts,
    sources: tuple[SourceConfig, ...],
    data: DataConfig,
    config: TokenizerConfig,
    writer: bool,
) -> tokenizers.Tokenizer:
    """The tokenizer of these sources, which `folder` holds afterwards."""
    if not writer:
        return tokenizers.load(folder)
    loaded = _loaded(data, config)
    with shards.lock(folder):
        if loaded:
            save_tokenizer(loaded, folder, None)
            return loaded
        options = training_options(config)
        origin = [options, [texts.identity(s, TRAIN) for s in sources]]
        origin = json.loads(json.dumps(origin))
        with contextlib.suppress(FileNotFoundError, ValueError):
            with open(os.path.join(folder, ORIGIN)) as f:
                if json.load(f) == origin:
                    return tokenizers.load(folder)
            logging.warning("%s: training the tokenizer again: text or options changed", folder)
        kind, max_bytes = options.pop("kind"), options.pop("train_bytes")
        text = (d.text for s in sources for d in texts.documents(s, TRAIN))
        trained = tokenizers.train(kind, text, max_bytes=max_bytes, **options)
        save_tokenizer(trained, folder, origin)
        return trained


def _loaded(data: DataConfig, config: TokenizerConfig) -> tokenizers.Tokenizer | None:
    """The tokenizer that the config names or the prepared inputs have; None: train one."""
    named = tokenizers.load(config.path) if config.path else None
    for source in sources_of(data):
        if _is_prepared(source):
            own = tokenizers.load(os.path.join(source.inputs[0], TOKENIZER))
            if named and own.fingerprint() != named.fingerprint():
                raise ValueError(
                    f"{source.inputs[0]} was prepared with another tokenizer than "
                    f"{config.path or 'the other sources'}; prepare it with --tokenizer=DIR"
                )
            named = own
    return named


def training_options(config: TokenizerConfig) -> dict:
    """What training a tokenizer depends on."""
    elsewhere = ("path", "end_tokens", "stop")
    names = [f.name for f in dataclasses.fields(config) if f.name not in elsewhere]
    return {name: getattr(config, name) for name in names}


def save_tokenizer(
    tokenizer: tokenizers.Tokenizer, folder: str, origin: list | None = None
) -> None:
    """Writes a tokenizer in one move."""
    partial = folder + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    if origin is not None:
        with open(os.path.join(partial, ORIGIN), "w") as f:
            json.dump(origin, f, indent=1)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
