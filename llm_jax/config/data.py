"""Tokenizers and the data that rows are made of.

No `Literal` and no postponed annotations in this file: ml_collections reads the types at run time.
"""

from dataclasses import field

from llm_jax.config.base import Config, settings


@settings
class TokenizerConfig(Config):
    """A tokenizer to load (`path`) or to train on the training data."""

    path: str = ""  # saved tokenizer, sentencepiece .model, Hugging Face tokenizer.json, ...
    kind: str = "sentencepiece_bpe"  # a key of llm_jax.tokenizers.KINDS
    vocab_size: int = 4096
    special_tokens: tuple = ()
    split_digits: bool = False
    keep_indentation: bool = True
    byte_fallback: bool = True
    unk: bool = True  # char and word: whether there is an unknown token
    train_bytes: int = 20_000_000  # at most this much text is used for training it
    end_tokens: tuple = ()  # ids that end a generated text, besides the tokenizer's own
    stop: tuple = ()  # strings that end an answer, where no id does


@settings
class SourceConfig(Config):
    """One source of a mixture."""

    name: str = ""
    inputs: tuple = ()  # files, folders, globs, hf:NAME, embedded:NAME
    text: bool = False  # among dialogues: plain text, every token of which is trained (replay)
    # (fraction of training, weight) points, linear in between; annealing on a better mix at the
    # end is ((0, 1), (0.9, 1), (1, 4)).
    weights: tuple = ((0.0, 1.0),)


@settings
class DialogueConfig(Config):
    """Conversations in, rows out: what supervised fine-tuning reads (data.format="dialogue")."""

    layout: str = "auto"  # auto | alpaca | completion (prompt / completion) | messages | sharegpt
    # The tokenizer's own ("") | chatml | llama2 | llama3 | alpaca | zephyr | a file with a Jinja
    # template. The run's tokenizer carries it from then on.
    template: str = ""
    system: str = ""  # said by the system where a conversation does not begin with one
    train_on: str = "assistant"  # assistant (its turns) | last (its last turn) | all (every token)
    # What becomes of an example longer than a row: cut (its end) | oldest (its oldest exchanges go,
    # the system's turn stays) | drop
    too_long: str = "cut"
    malformed: str = "skip"  # skip (counted and named) | fail
    max_turn_chars: int = 200_000  # a longer turn is malformed


@settings
class PreferenceDataConfig(Config):
    """Answers to compare in, rows out: what reward models and direct optimisation read
    (data.format="preference"). Template, system and damaged rows are those of data.dialogue."""

    layout: str = "auto"  # auto | pairs | dialogues | sharegpt | rankings | ratings | judged
    # Answers that were judged equally good: drop (no pair) | half (a pair, preferred by half)
    ties: str = "drop"
    # The pairs of a prompt count as one together, not each as one: a ranking of many answers then
    # weighs no more than a pair.
    per_prompt: bool = False
    # A prompt is in a row once, for all of its answers, which attention kernels and rings
    # (mesh.context) cannot do; False: a copy in front of each answer.
    shared_prompt: bool = True
    # Held out are all rows of so many prompts (eval_fraction): the last (-1), or drawn with this seed
    split_seed: int = -1


@settings
class DataConfig(Config):
    """Text in, rows out."""

    # text | dialogue (conversations: supervised fine-tuning) | preference (answers to compare)
    format: str = "text"
    dialogue: DialogueConfig = field(default_factory=DialogueConfig)
    preference: PreferenceDataConfig = field(default_factory=PreferenceDataConfig)
    # Files, folders, globs, hf:NAME, embedded:NAME, or one folder that prepare_data wrote.
    inputs: tuple = ("embedded:docs",)
    # SourceConfigs; replaces `inputs` when given
    sources: tuple = field(default=(), metadata={"of": SourceConfig})
    eval_inputs: tuple = ()  # held-out text; empty: the last eval_fraction of each source
    eval_fraction: float = 0.1  # by characters, from the end; by conversations; by prompts
    text_key: str = "text"  # field of jsonl and parquet rows
    # split (concatenate and split) | random (windows at random places) | first_fit (several in a
    # row) | pad (one in a row) | bucket (dialogues: one in a row, rows of a step of like length)
    packing: str = "split"
    isolate_documents: bool = True  # no token sees a neighbour's document, positions restart
    add_bos: bool = False
    add_eos: bool = True  # the tokenizer's end token after each document
    shuffle: bool = True
    cache_dir: str = ""  # token shards; empty: WORKDIR/data
