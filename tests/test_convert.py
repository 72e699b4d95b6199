"""`experiments.convert` and `llm_jax.load` on models of other formats, as users run them."""

import json

import numpy as np
import pytest
from interop import hf_tiny
from runs import run_binary

import llm_jax
from llm_jax import tokenizers
from llm_jax.interop import pretrained
from llm_jax.nn.params import flatten
from llm_jax.tokenizers.export import huggingface_files

TEXT = "the quick brown fox jumps over the lazy dog. 0123456789 ABC"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder with weights in two files and a tokenizer of fewer tokens than rows."""
    path = tmp_path_factory.mktemp("hf") / "tiny-llama"
    hf_tiny.write(path, hf_tiny.load("llama-2_gqa"), shards=2)
    tokenizer = tokenizers.train("char", [TEXT])
    for name, content in huggingface_files(tokenizer, 64).items():
        (path / name).write_bytes(content)
    return path


def convert(*args):
    return run_binary("convert", *(f"--{a}" for a in args))


def test_there_and_back(folder, tmp_path):
    """hf -> llm_jax -> hf in processes of their own; --verify prints the round trip."""
    here, back = tmp_path / "here", tmp_path / "back"
    done = convert("from=hf", "to=llm_jax", f"input={folder}", f"output={here}", "verify")
    assert done.returncode == 0, done.stderr
    assert "output against input: max |difference of logits| 0.00e+00" in done.stdout
    done = convert("from=llm_jax", "to=hf", f"input={here}", f"output={back}", "shard_gb=0.00005")
    assert done.returncode == 0, done.stderr
    assert len(list(back.glob("model-*.safetensors"))) > 1
    assert {"config.json", "generation_config.json", "README.md", "tokenizer.json"} <= {
        p.name for p in back.iterdir()
    }
    original, again = llm_jax.load(folder), llm_jax.load(back)
    assert original.tokenizer.encode(TEXT) == again.tokenizer.encode(TEXT)
    again_flat = flatten(again.params)
    for path, leaf in flatten(original.params).items():
        assert np.array_equal(np.asarray(leaf), np.asarray(again_flat[path])), path
    golden = hf_tiny.load("llama-2_gqa")
    difference = np.abs(np.asarray(again.logits(golden.prompts[0][None]))[0] - golden.logits[0])
    assert difference.max() < 1e-4
    card = (back / "README.md").read_text()
    assert "LlamaForCausalLM" in card and "tags:" in card


def damaged(folder, to):
    """A copy of the folder, to be damaged."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_nothing_is_left_of_a_conversion_that_fails(folder, tmp_path):
    bad, out = damaged(folder, tmp_path / "bad"), tmp_path / "out"
    shard = sorted(bad.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    done = convert("from=hf", "to=llm_jax", f"input={bad}", f"output={out}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"{shard.name} is truncated" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


def test_nothing_is_left_of_a_write_that_fails(folder, tmp_path, monkeypatch):
    """The disk fills up behind the weights: no folder that looks whole."""
    model = llm_jax.load(folder)
    monkeypatch.setattr("llm_jax.api.model_card", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        model.export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("from=gguf", "to=hf"), "--from=gguf, but --input={folder} looks like hf"),
        (("from=hf", "to=hf", "output={folder}"), "--output={folder} exists"),
        (("from=hf", "to=llm_jax", "tokenizer=/nowhere"), "tokenizer /nowhere: no such file"),
    ],
)
def test_user_errors(folder, tmp_path, args, message):
    args = [a.format(folder=folder) for a in args]
    if not any(a.startswith("output") for a in args):
        args.append(f"output={tmp_path / 'out'}")
    done = convert(*args, f"input={folder}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert message.format(folder=folder) in done.stderr


def test_a_tokenizer_with_more_tokens_than_rows(folder, tmp_path):
    bad = damaged(folder, tmp_path / "bad")
    big = tokenizers.train("char", ["".join(map(chr, range(200, 400)))])
    for name, content in huggingface_files(big, 64).items():
        (bad / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"the tokenizer has 201 tokens, but .*vocab_size=\d+"):
        llm_jax.load(bad)


def test_special_tokens_without_rows(folder, tmp_path):
    """Gemma 3 1B has the token of images and no row for it: it loads, and the token is an error."""
    golden = hf_tiny.load("llama-2_gqa")
    rows = golden.config["vocab_size"]
    path = damaged(folder, tmp_path / "model")
    text = "".join(map(chr, range(48, 48 + rows - 1)))  # with <unk> as many tokens as rows
    tokenizer = tokenizers.train("char", [text], special_tokens=["<image>"])
    assert tokenizer.special_tokens["<image>"] == rows
    for name, content in huggingface_files(tokenizer, 64).items():
        (path / name).write_bytes(content)
    model = llm_jax.load(path)
    with pytest.raises(ValueError, match=f"token id {rows} is outside the model's vocabulary"):
        model.generate(["<image>"], max_new_tokens=1)


def test_a_missing_tokenizer(folder, tmp_path):
    bad = damaged(folder, tmp_path / "bad")
    for file in bad.glob("*token*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer .*bad: none of"):
        llm_jax.load(bad)


def test_several_end_tokens(folder, tmp_path):
    """Chat models end a turn with another token than a text: both end a generated text."""
    path = damaged(folder, tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5, 7]}))
    model = llm_jax.load(path)
    assert model.config.tokenizer.end_tokens == (2, 5, 7)
    free = model.complete(["the "], temperature=0, max_new_tokens=24, end_tokens=())[0]
    last = free.tokens[10]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, last]}))
    ended = llm_jax.load(path).complete(["the "], temperature=0, max_new_tokens=24)[0]
    assert ended.tokens == free.tokens[: free.tokens.index(last) + 1]
    assert ended.finish_reason == "stop"
    llm_jax.load(path).save(tmp_path / "saved")
    assert llm_jax.load(tmp_path / "saved").config.tokenizer.end_tokens == (2, last)


def test_kinds_by_their_looks(folder, tmp_path):
    assert pretrained.kind(folder) == "hf"
    for name, kind in {"m.gguf": "gguf", "m.bin": "llama2c", "m.txt": None}.items():
        (tmp_path / name).write_bytes(b"")
        assert pretrained.kind(tmp_path / name) == kind
    assert pretrained.kind(tmp_path) is None
