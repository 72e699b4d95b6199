"""Tokenizers that other projects publish, and files that are not what they should be."""

import json
import shutil

import pytest

from llm_jax import tokenizers

HELLO = {
    "gpt2": [15496, 995],
    "llama2": [15043, 3186],
    "t5": [8774, 296],
    "bert": [7592, 2088],
}


@pytest.fixture(scope="module")
def published(real_data):
    return {name: tokenizers.load(real_data / "tokenizers" / name) for name in HELLO}


@pytest.mark.parametrize("name", HELLO)
def test_known_encodings(published, name):
    assert published[name].encode("Hello world") == HELLO[name]


def test_kinds_sizes_and_roles(published):
    def facts(name):
        t = published[name]
        return t.kind, t.vocab_size, (t.pad_id, t.unk_id, t.bos_id, t.eos_id)

    assert facts("gpt2") == ("hf_bpe", 50257, (50256, None, 50256, 50256))
    assert facts("llama2") == ("sentencepiece_bpe", 32000, (None, 0, 1, 2))
    assert facts("t5") == ("hf_unigram", 32100, (0, 2, None, 1))
    assert facts("bert") == ("hf_wordpiece", 30522, (0, 100, 101, 102))


@pytest.mark.parametrize("name", HELLO)
def test_published_tokenizers_survive_our_files(published, tmp_path, name):
    published[name].save(tmp_path)
    again = tokenizers.load(tmp_path)
    text = "Some text, [SEP] <s> <extra_id_0> and 🎉 more."
    assert again.fingerprint() == published[name].fingerprint()
    for special in (False, True):
        assert again.encode(text, special=special) == published[name].encode(text, special=special)
    assert again.eos_id == published[name].eos_id


def test_only_gpt2_is_lossless_and_the_others_lose_something(published):
    assert {name for name, t in published.items() if t.lossless} == {"gpt2"}
    for name, text in {"llama2": "a▁b", "t5": "ﬁne", "bert": "Fine"}.items():
        assert published[name].decode(published[name].encode(text)) != text


def test_gpt2_and_llama2_give_wikitext_back(published, wikitext):
    for name in ("gpt2", "llama2"):
        for text in (wikitext[:300_000], "  two spaces", " one", ""):
            assert published[name].decode(published[name].encode(text)) == text


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_ids_and_text_are_the_librarys(real_data, published, wikitext, name):
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(
        str(real_data / "tokenizers" / name / "tokenizer.json")
    )
    library.no_padding()
    library.no_truncation()
    for line in wikitext.replace("<unk>", "it's").splitlines()[:300]:
        ids = library.encode(line, add_special_tokens=False).ids
        assert published[name].encode(line) == ids
        assert published[name].decode(ids) == library.decode(ids)


def test_special_tokens_of_published_tokenizers_are_text_unless_parsed(published):
    for name, spelling in {
        "gpt2": "<|endoftext|>",
        "llama2": "</s>",
        "t5": "</s>",
        "bert": "[SEP]",
    }.items():
        tokenizer = published[name]
        text = f"a{spelling}b {spelling}"
        assert tokenizer.eos_id not in tokenizer.encode(text)
        assert tokenizer.encode(text, special=True).count(tokenizer.eos_id) == 2


def test_no_space_is_put_after_a_special_token(published):
    llama = published["llama2"]
    assert llama.encode("Hello</s>world", special=True) == [15043, 2, 11526]
    assert llama.token_bytes()[11526] == b"world"
    assert llama.decode([15043, 2, 11526], skip_special=False) == "Hello</s>world"


def test_a_stream_drops_the_first_space_only(published):
    llama = published["llama2"]
    ids = llama.encode("Hello world 🎉")
    decoder = tokenizers.StreamDecoder(llama)
    parts = [decoder.push(i) for i in ids]
    assert parts[:2] == ["Hello", " world"]
    assert "".join(parts) + decoder.flush() == "Hello world 🎉"
    decoder = tokenizers.StreamDecoder(llama, prompt_ids=ids[:1])
    assert decoder.push(ids[1]) == " world"


def test_the_same_tokenizer_under_other_names(real_data, published, tmp_path):
    source = real_data / "tokenizers"
    shutil.copy(source / "gpt2/encoder.json", tmp_path / "vocab.json")
    shutil.copy(source / "gpt2/vocab.bpe", tmp_path / "merges.txt")
    shutil.copy(source / "llama2/tokenizer.model", tmp_path / "spm.model")
    text = "The same, whatever <|endoftext|> they are called."
    for path, name in [
        (tmp_path, "gpt2"),
        (tmp_path / "merges.txt", "gpt2"),
        (source / "gpt2/vocab.bpe", "gpt2"),
        (tmp_path / "spm.model", "llama2"),
        (source / "bert/vocab.txt", "bert"),
        (source / "t5/tokenizer.json", "t5"),
    ]:
        assert tokenizers.load(path).encode(text) == published[name].encode(text)


def test_roles_can_be_named(real_data):
    content = (real_data / "tokenizers/bert/tokenizer.json").read_bytes()
    tokenizer = tokenizers.from_huggingface(content, {"bos": "[MASK]", "eos": None})
    assert (tokenizer.bos_id, tokenizer.eos_id) == (103, None)
    with pytest.raises(ValueError, match=r"\['<nope>'\] are not in the vocabulary"):
        tokenizers.from_huggingface(content, {"bos": "<nope>"})


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        tokenizers.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"none of tokenizer_config.json"):
        tokenizers.load(tmp_path)


def damaged(tmp_path, trained):
    """Path of a broken tokenizer -> what the message must say."""
    model = trained["sentencepiece_bpe"].files()["tokenizer.model"]
    cases = {
        "empty.model": (b"", "not a sentencepiece model"),
        "cut.model": (model[: len(model) // 2], "not a sentencepiece model"),
        "noise.model": (b"\xff\xfe noise", "not a sentencepiece model"),
        "tokenizer.json": (b'{"model": 3}', "not a tokenizer.json"),
        "other.json": (b"{", "Expecting property name"),
        "vocab.txt": (b"a\nb\n", r"no \[UNK\]"),
        "notes.md": (b"hello", "not a tokenizer file"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        yield tmp_path / name, message


def test_damaged_files_are_named_in_one_line(tmp_path, trained):
    for path, message in damaged(tmp_path, trained):
        with pytest.raises(ValueError, match=message) as error:
            tokenizers.load(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_json_that_the_library_refuses_is_an_error(trained):
    files = trained["hf_bpe"].files()
    config = json.loads(files["tokenizer.json"])
    config["model"]["merges"] = [["no", "such"]]
    with pytest.raises(ValueError, match=r"damaged tokenizer\.json"):
        tokenizers.from_files({**files, "tokenizer.json": json.dumps(config).encode()})


def test_two_models_in_a_folder_are_an_error(tmp_path, trained):
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes(trained["sentencepiece_bpe"].files()["tokenizer.model"])
    with pytest.raises(ValueError, match=r"several models, name one of a.model, b.model"):
        tokenizers.load(tmp_path)


def test_incomplete_or_mixed_files_are_an_error(trained, prose):
    files = trained["sentencepiece_bpe"].files()
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is missing"):
        tokenizers.from_files({"tokenizer.model": files["tokenizer.model"]})
    with pytest.raises(ValueError, match=r"kind sentencepiece_bpe needs tokenizer\.model"):
        tokenizers.from_files({"tokenizer_config.json": files["tokenizer_config.json"]})
    other = tokenizers.train("sentencepiece_bpe", [prose], vocab_size=900).files()
    with pytest.raises(ValueError, match="do not belong together"):
        tokenizers.from_files({**files, "tokenizer.model": other["tokenizer.model"]})


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
IN_FRONT = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}},
}


@pytest.mark.parametrize(
    ("processor", "says", "adds"),
    [
        (None, None, False),
        (None, True, True),
        (BYTE_LEVEL, None, False),
        (IN_FRONT, None, True),
        (IN_FRONT, False, False),  # the config has the last word
        ({"type": "Sequence", "processors": [BYTE_LEVEL, IN_FRONT]}, None, True),
    ],
)
def test_whether_texts_begin_with_the_begin_token(tmp_path, processor, says, adds):
    """Llama 3 says so in the post-processor of tokenizer.json, Llama 2 in tokenizer_config.json."""
    own = tokenizers.train("hf_bpe", ["some text to learn from " * 20], vocab_size=270)
    library = json.loads(own.files()["tokenizer.json"]) | {"post_processor": processor}
    (tmp_path / "tokenizer.json").write_text(json.dumps(library))
    config = {"bos_token": "<s>"} | ({} if says is None else {"add_bos_token": says})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = tokenizers.load(tmp_path)
    assert bool(loaded.options.get("add_bos_token")) == adds
    assert loaded.encode("some text") == own.encode("some text")  # encode itself never adds one
