"""Hugging Face's library, given the exported files, finds the same ids."""

import json
import random
import re

import pytest

from llm_jax import tokenizers
from llm_jax.tokenizers import sentencepiece_model

# What tells two tokenizers apart: signs that stand for a space, digits that are none to one regex
# engine, combining marks, control characters, the spelling of byte pieces and special tokens.
ODD = [
    *("a", " ", "  ", "\n", "\t", "the", "é", "e\u0301", "日", "\U0001f917", "\u200d", "\ufeff"),
    *(
        "\u2581",
        "\u2585",
        "\u00a0",
        "\x1c",
        "\x85",
        "\x00",
        "_",
        "\u203f",
        "0",
        "42",
        "²",
        "½",
        "٣",
    ),
    *("<0x41>", "<s>", "</s>", "<unk>", "<pad>", "<|user|>", "<|user", "'s", "don't"),
]
RUN = re.compile(r"(.)\1{9}")
SPACES = [" " * n + "x" for n in range(24)] + ["a" + " " * n for n in range(24)]


@pytest.fixture(scope="module")
def texts(prose):
    rng = random.Random(0)
    odd = ["".join(rng.choices(ODD, k=rng.randint(0, 24))) for _ in range(600)]
    return ["", prose[:20_000], *prose[20_000:60_000].split("\n"), *odd]


def library_of(files):
    library = tokenizers.loading.import_tokenizers().Tokenizer.from_str(
        files["tokenizer.json"].decode()
    )
    library.no_padding()  # as transformers does; BERT's own file asks for it
    library.no_truncation()
    return library


def check(tokenizer, texts):
    """The same ids, text for text, and the same text from them."""
    library = library_of(tokenizers.huggingface_files(tokenizer, 512))
    assert library.get_vocab_size() == tokenizer.vocab_size
    for text in texts:
        ids = tokenizer.encode(text, special=True)
        found = library.encode(text, add_special_tokens=False).ids
        if tokenizer.kind == "sentencepiece_unigram" and RUN.search(text):
            # Several cuts are equally probable: the same pieces, in either order.
            assert sorted(found) == sorted(ids), repr(text)
        else:
            assert found == ids, repr(text)
        if tokenizer.lossless:
            assert library.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_ids_of_every_kind(kind, trained, texts):
    check(trained[kind], [*texts, *SPACES])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sentencepiece_bpe", {"keep_indentation": False}),
        ("sentencepiece_bpe", {"byte_fallback": False}),
        ("sentencepiece_unigram", {"keep_indentation": False, "byte_fallback": False}),
        ("hf_bpe", {"keep_indentation": False, "split_digits": True}),
        ("word", {"split_digits": True}),
    ],
)
def test_ids_with_other_options(kind, options, prose, texts):
    special = ["<|user|>", "<|end|>"]
    tokenizer = tokenizers.train(
        kind, [prose[:200_000]], vocab_size=800, special_tokens=special, **options
    )
    check(tokenizer, [*texts, *SPACES])


def test_ids_of_a_model_with_a_space_before_the_text(real_data, texts, wikitext):
    """Llama 2's: once before the text and not before or after a special token, and runs of spaces
    whose pieces all have the same score."""
    tokenizer = tokenizers.load(real_data / "tokenizers/llama2/tokenizer.model")
    more = ["<s>Hi", "<s> Hi</s> there", " Hi", "\u2581<s>x", "\n\u2581<unk>"]
    check(tokenizer, [*more, *texts, *SPACES, *wikitext.split("\n")[:200]])


def test_ids_of_imported_hugging_face_tokenizers(real_data, texts):
    for name in ("gpt2", "bert"):
        check(tokenizers.load(real_data / "tokenizers" / name), [*texts, *SPACES])


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_the_folder_is_the_same_tokenizer_for_us(kind, trained, tmp_path):
    tokenizer = tokenizers.from_files(trained[kind].files())
    tokenizer.chat_template = {"default": "{{ bos_token }}", "tool_use": "T"}
    for name, content in tokenizers.huggingface_files(tokenizer, 512).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert tokenizers.load(tmp_path).fingerprint() == tokenizer.fingerprint()


def test_config_names_the_special_tokens(trained):
    files = tokenizers.huggingface_files(trained["sentencepiece_bpe"], 512)
    config = json.loads(files["tokenizer_config.json"])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    assert json.loads(files["special_tokens_map.json"]) == names
    assert config.items() >= names.items()
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_max_length"] == 512
    assert config["clean_up_tokenization_spaces"] is False
    added = json.loads(files["tokenizer.json"])["added_tokens"]
    assert [t["content"] for t in added] == [*names.values(), "<|user|>", "<|end|>"]
    assert all(token["special"] for token in added)


def test_a_tokenizer_that_adds_tokens_by_default_says_so(trained):
    old = trained["sentencepiece_bpe"]
    options = {"imported": True, "add_bos_token": True, "add_eos_token": True}
    model = old.files()["tokenizer.model"]
    tokenizer = tokenizers.subword.SentencePiece(model, options)
    files = tokenizers.huggingface_files(tokenizer, 512)
    assert json.loads(files["tokenizer_config.json"])["add_bos_token"] is True
    library, ids = library_of(files), old.encode("Hi there")
    assert library.encode("Hi there").ids == [old.bos_id, *ids, old.eos_id]
    assert library.encode("Hi there", add_special_tokens=False).ids == ids
    assert library_of(tokenizers.huggingface_files(old, 512)).encode("Hi there").ids == ids


def test_a_folder_that_was_changed_since_is_read_as_what_it_says_now(trained, tmp_path):
    for name, content in tokenizers.huggingface_files(trained["hf_bpe"], 512).items():
        (tmp_path / name).write_bytes(content)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["eos_token"] = "<|end|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizers.load(tmp_path)
    assert tokenizer.eos_id == tokenizer.special_tokens["<|end|>"] != trained["hf_bpe"].eos_id


def test_what_cannot_be_said_exactly_is_an_error(real_data):
    pieces = [
        sentencepiece_model.Piece("<unk>", 0, sentencepiece_model.UNKNOWN),
        sentencepiece_model.Piece("<tool>", 0, sentencepiece_model.USER_DEFINED),
        sentencepiece_model.Piece("\u2581", -1, sentencepiece_model.NORMAL),
        sentencepiece_model.Piece("a", -2, sentencepiece_model.NORMAL),
    ]
    model = sentencepiece_model.write(
        pieces, model_type=sentencepiece_model.BPE, roles={"unk": 0}, dummy_prefix=True
    )
    with pytest.raises(ValueError, match="user-defined pieces and changes spaces"):
        tokenizers.huggingface_files(tokenizers.subword.SentencePiece(model), 512)


def test_a_sentencepiece_folder_with_hugging_faces_files_beside_it(trained, tmp_path):
    """Roles, added tokens and the template of the files beside a `tokenizer.model` count."""
    old = trained["sentencepiece_bpe"]
    (tmp_path / "tokenizer.model").write_bytes(old.files()["tokenizer.model"])
    n = old.vocab_size
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>"},
        "pad_token": "<unk>",
        "chat_template": "{{ eos_token }}",
        "added_tokens_decoder": {
            str(n): {"content": "<|im_end|>", "special": True},
            str(n + 1): {"content": "<think>", "special": False},
            str(n + 2): {"content": "<|tool|>", "special": True},
            "2": {"content": "<s>", "special": True},
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    new = tokenizers.load(tmp_path)
    assert new.vocab_size == n + 3
    assert (new.bos_id, new.eos_id, new.pad_id) == (old.bos_id, n, old.unk_id)
    assert new.special_tokens == {**old.special_tokens, "<|im_end|>": n, "<|tool|>": n + 2}
    text = "<s>a <think>b<|im_end|>"
    ids = [old.bos_id, *old.encode("a "), n + 1, *old.encode("b"), n]
    assert new.encode(text, special=True) == ids
    assert new.decode(ids, skip_special=False) == text
    # Plain text cannot end the turn: a user-defined piece would.
    assert n not in new.encode(text)
    assert new.apply_chat_template([{"role": "user", "content": ""}]) == [n]
    assert tokenizers.from_files(new.files()).fingerprint() == new.fingerprint()
    check(new, [text, "  <think>  x<|im_end|> y"])

    config["added_tokens_decoder"] = {str(n + 1): {"content": "<gap>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"'<gap>' has id {n + 1}, but {n} comes next"):
        tokenizers.load(tmp_path)
