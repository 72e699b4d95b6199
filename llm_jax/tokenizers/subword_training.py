"""Training of the subword tokenizers. Same text, same options: the same model, byte for byte."""

import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from llm_jax.tokenizers.base import (
    BOS,
    EOS,
    PAD,
    UNK,
    cut_inside,
    name_special_tokens,
    roles_by_name,
)
from llm_jax.tokenizers.bpe_reference import byte_characters
from llm_jax.tokenizers.subword import SPACE, HuggingFace, SentencePiece, import_tokenizers

# The characters that sentencepiece's trainers reserve for themselves, and the noncharacter with
# which we mark where no piece may cross.
_CUT = "\ufdd0"
_RESERVED = re.compile(f"[\0\u2585{SPACE}{_CUT}]")
_LINE_ENDS_AND_TABS = re.compile(r"[\r\n]+|\t+")


def train_sentencepiece(
    texts: Iterable[str],
    *,
    model_type: str,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    split_digits: bool = False,
    keep_indentation: bool = True,
    byte_fallback: bool = True,
    options: Mapping[str, object] | None = None,
) -> SentencePiece:
    """Trains a sentencepiece model that changes no character of its input.

    Line ends and tabs form pieces of their own, as in GPT-2: a prompt that ends before a line end
    is then cut into the same pieces as the line was in training.

    The unigram trainer never considers a string that is followed by the same character wherever it
    stands. On text with spaces around every sign (WikiText) it therefore misses frequent words, and
    needs some 20 % more tokens than BPE; on ordinary prose 4 %.

    Args:
      texts: parts of documents, small enough to be one sentence each; see `training.sample`.
      model_type: "bpe" or "unigram".
      keep_indentation: False drops leading, trailing and repeated spaces, for good.
      byte_fallback: False makes characters that are not in the vocabulary unknown.

    Raises:
      ValueError: the text does not give as many pieces as `vocab_size`, or none at all.
    """
    import sentencepiece

    standard = [PAD, UNK, BOS, EOS]
    names = name_special_tokens(standard, special_tokens)
    has_text = False
    failure: Exception | None = None

    def sentences() -> Iterator[str]:
        nonlocal has_text, failure
        try:
            for text in texts:
                text = _RESERVED.sub(_CUT, _CUT.join(cut_inside(text, names)))
                has_text = has_text or bool(text.strip(_CUT))
                yield _LINE_ENDS_AND_TABS.sub(lambda run: f"{_CUT}{run[0]}{_CUT}", text)
        except Exception as error:  # the library would turn it into a message of its own
            failure = error
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=not keep_indentation,
            allow_whitespace_only_pieces=keep_indentation,
            split_digits=split_digits,
            byte_fallback=byte_fallback,
            # The rarest 0.01 % of the characters are better spelled in bytes than given rows.
            character_coverage=0.9999 if byte_fallback else 1.0,
            pretokenization_delimiter=_CUT,
            control_symbols=names[len(standard) :],
            max_sentence_length=1 << 24,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            num_threads=16,  # sums are split by it: a fixed number keeps the model the same
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        if failure is not None:
            raise failure from None
        raise ValueError(_explain(str(error), vocab_size, has_text)) from None
    return SentencePiece(model.getvalue(), options)


def train_hf_bpe(
    texts: Iterable[str],
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    split_digits: bool = False,
    keep_indentation: bool = True,
    options: Mapping[str, object] | None = None,
) -> HuggingFace:
    """Trains GPT-2's byte-level BPE (the pre-tokenisation of its paper's code, all 256 bytes)."""
    hf = import_tokenizers()
    names = name_special_tokens([PAD, BOS, EOS], special_tokens)
    library = hf.Tokenizer(hf.models.BPE())
    if not keep_indentation:
        library.normalizer = hf.normalizers.Replace(hf.Regex(r"[ \t]+"), " ")
    splitters = [hf.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if split_digits:
        splitters.insert(0, hf.pre_tokenizers.Split(hf.Regex(r" ?\p{N}"), "isolated"))
    library.pre_tokenizer = hf.pre_tokenizers.Sequence(splitters)
    library.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=sorted(byte_characters().values()),
        min_frequency=2,
        show_progress=False,
    )
    library.train_from_iterator(_parts(texts, names), trainer)
    _check_size(library.get_vocab_size(), vocab_size)
    merges = json.loads(library.to_str())["model"]["merges"]
    for name in {"".join(pair) for pair in merges} & set(names):
        raise ValueError(f"special token {name!r} spells a byte-level piece; choose another name")
    specials = {name: i for i, name in enumerate(names)}
    return HuggingFace(library.to_str().encode(), roles_by_name(specials), options)


def train_hf_wordpiece(
    texts: Iterable[str],
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    split_digits: bool = False,
    options: Mapping[str, object] | None = None,
) -> HuggingFace:
    """Trains BERT's WordPiece, cased. White space is lost and unseen characters are unknown."""
    hf = import_tokenizers()
    standard = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names = name_special_tokens(standard, special_tokens)
    normalizer = hf.normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    splitter = hf.pre_tokenizers.BertPreTokenizer()
    if split_digits:
        digits = hf.pre_tokenizers.Digits(individual_digits=True)
        splitter = hf.pre_tokenizers.Sequence([splitter, digits])

    # The library numbers the continuation pieces of single characters in the order of a hash table,
    # which differs from run to run, and ties between merges follow the numbers. Declared beforehand
    # in sorted order, they make the result the same each time.
    texts = [normalizer.normalize_str(part) for part in _parts(texts, names)]
    characters = sorted(set().union(*map(set, texts)) - {" "})
    continuing = [
        f"##{char}"
        for char in characters
        if not char.isspace() and len(splitter.pre_tokenize_str(f"a{char}")) == 1
    ]
    learner = hf.Tokenizer(hf.models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = splitter
    trainer = hf.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*names, *continuing],
        min_frequency=2,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    _check_size(learner.get_vocab_size(), vocab_size)
    library = hf.Tokenizer(hf.models.WordPiece(vocab=learner.get_vocab(), unk_token="[UNK]"))
    library.normalizer, library.pre_tokenizer = normalizer, splitter
    library.decoder = hf.decoders.WordPiece()
    library.add_special_tokens(names)
    roles = dict(zip(("pad", "unk", "bos", "eos"), range(4), strict=True))
    return HuggingFace(library.to_str().encode(), roles, options)


def _parts(texts: Iterable[str], names: Sequence[str]) -> Iterator[str]:
    return itertools.chain.from_iterable(cut_inside(text, names) for text in texts)


def _check_size(size: int, wanted: int) -> None:
    if size < wanted:
        raise ValueError(
            f"the text gives only {size} pieces; set --vocab_size={size} or lower, or give more "
            "text through --input"
        )
    if size > wanted:
        raise ValueError(
            f"--vocab_size={wanted} is too small: special tokens and single characters alone are "
            f"{size} pieces"
        )


def _explain(message: str, vocab_size: int, has_text: bool) -> str:
    """One line about --vocab_size or --input for what sentencepiece reported."""
    if not has_text or "sentences_.empty()" in message or "required_chars_.empty()" in message:
        return "there is no text to train a tokenizer on; change --input"
    if found := re.search(r"too high \(\d+\).*<= (\d+)", message):
        return (
            f"the text gives only {found[1]} pieces, not {vocab_size}; set --vocab_size={found[1]} "
            "or lower, or give more text through --input"
        )
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return (
            f"--vocab_size={vocab_size} is too small: special tokens, bytes and single characters "
            f"alone are {found[1]} pieces; set --vocab_size above that"
        )
    return f"sentencepiece could not train with --vocab_size={vocab_size}: " + " ".join(
        message.split()
    )
