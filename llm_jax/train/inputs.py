"""A run's data: text, conversations or preferences, made by one process and opened by the others."""

from pathlib import Path

from llm_jax.config import TrainConfig
from llm_jax.data.comparisons import Wanted, prepare_preferences
from llm_jax.data.dialogue import prepare_dialogues
from llm_jax.data.prepare import Corpus, prepare_corpus, prepare_in
from llm_jax.train import distributed


def prepare(cfg: TrainConfig, workdir: Path) -> Corpus:
    """The data that `cfg` names; fills in `cfg.steps` what `cfg.epochs` asks for, and in
    `cfg.tokenizer` what ends an answer.

    Process 0 writes what is written, which takes as long as it takes; the others open it then.
    """
    data = _prepare(cfg, workdir)
    # What ends an answer goes with the model: `Model.chat` needs it too.
    cfg.tokenizer.end_tokens = tuple(dict.fromkeys([*cfg.tokenizer.end_tokens, *data.end_tokens]))
    cfg.tokenizer.stop = tuple(dict.fromkeys([*cfg.tokenizer.stop, *data.stop]))
    if cfg.peft.start_text:
        cfg.peft.start_ids = tuple(int(i) for i in data.tokenizer.encode(cfg.peft.start_text))
    if cfg.epochs:
        rows = sum(data.loader(cfg).epoch_rows.values())
        cfg.steps = max(round(cfg.epochs * rows / cfg.batch_size), 1)
    return data


def _prepare(cfg: TrainConfig, workdir: Path) -> Corpus:
    made: list[Corpus] = []

    def in_memory(writer: bool) -> Corpus:
        options = {"length": cfg.length, "writer": writer}
        if cfg.data.format == "dialogue":
            return prepare_dialogues(cfg.data, cfg.tokenizer, str(workdir), **options)
        options["wanted"] = _wanted(cfg)
        return prepare_preferences(cfg.data, cfg.tokenizer, str(workdir), **options)

    def make() -> str:
        if cfg.data.format != "text":
            made.append(in_memory(True))
        else:
            made.append(prepare_corpus(cfg.data, cfg.tokenizer, str(workdir)))
        return made[0].directory

    root = distributed.from_main("data", make)
    if made:
        return made[0]
    if cfg.data.format != "text":
        return in_memory(False)
    return prepare_in(root, cfg.data, cfg.tokenizer, writer=False, verify=False)


def _wanted(cfg: TrainConfig) -> Wanted:
    """What the run's objective needs of answers."""
    if cfg.model.head == "reward":
        return Wanted(reads="ends", pairs=cfg.reward.loss != "regression")
    return Wanted(pairs=cfg.dpo.loss != "kto", others=cfg.dpo.loss == "kto")
