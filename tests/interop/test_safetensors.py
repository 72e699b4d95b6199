"""Damaged and odd safetensors files."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax.interop import safetensors
from llm_jax.interop.safetensors import Source, Tensor, write


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.arange(12, dtype=np.float32).reshape(4, 3), "b": np.ones(5)}, path)
    return path


def test_reads_rows_and_types(tmp_path):
    x = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    kinds = {"f32": x, "bf16": x.astype(ml_dtypes.bfloat16), "f16": x.astype(np.float16)}
    save_file(kinds, tmp_path / "model.safetensors")
    source = Source(tmp_path)
    for name, values in kinds.items():
        assert source.shapes[name] == (7, 4)
        assert source.read(name).dtype == values.dtype
        assert np.array_equal(source.read(name, 2, 5), values[2:5])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_library_reads_what_is_written(tmp_path, dtype):
    rng = np.random.default_rng(1)
    values = {f"t{i}": rng.standard_normal((3, i + 1)).astype(np.float32) for i in range(6)}
    tensors = [Tensor(n, x.shape, lambda x=x: x) for n, x in values.items()]
    files = write(tmp_path, tensors, dtype=getattr(ml_dtypes, dtype, dtype), shard_bytes=100)
    assert len(files) >= 3 and files[-1] == safetensors.INDEX
    size = (tmp_path / files[0]).stat().st_size
    assert size < 100 + 500  # a header and at most the 100 bytes asked for
    placed = json.loads((tmp_path / safetensors.INDEX).read_text())["weight_map"]
    for name, x in values.items():
        found = load_file(tmp_path / placed[name])[name]
        assert np.array_equal(found, x.astype(found.dtype)) and found.dtype == np.dtype(dtype)
    assert Source(tmp_path).shapes == {n: x.shape for n, x in values.items()}


def test_truncated(file):
    content = file.read_bytes()
    for keep in (len(content) - 1, len(content) - 60):
        file.write_bytes(content[:keep])
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated: \d+ bytes of"):
            Source(file)
    for keep in (0, 5, 40):
        file.write_bytes(content[:keep])
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            Source(file)


def test_a_file_that_is_none(file):
    file.write_bytes(b"PK\x03\x04" + bytes(500))
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        Source(file)


def test_a_name_twice_in_a_header(file):
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    header += b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="'a' is in it twice"):
        Source(file)


def test_a_size_that_does_not_fit_its_shape(file):
    header = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="a has 8 bytes for F32"):
        Source(file)


def sharded(folder):
    tensors = [Tensor(n, (4,), lambda: np.ones(4)) for n in "abc"]
    return write(folder, tensors, dtype="float32", shard_bytes=16)


def test_a_missing_shard(tmp_path):
    files = sharded(tmp_path)
    (tmp_path / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{files[1]} of 3 files is missing"):
        Source(tmp_path)


def test_an_index_that_disagrees_with_its_files(tmp_path):
    files = sharded(tmp_path)
    index = json.loads((tmp_path / safetensors.INDEX).read_text())
    index["weight_map"]["d"] = files[0]
    (tmp_path / safetensors.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has no tensor 'd'"):
        Source(tmp_path)


def test_a_tensor_in_two_files(tmp_path):
    files = sharded(tmp_path)
    save_file({"a": np.ones(4), "b": np.ones(4)}, tmp_path / files[1])
    with pytest.raises(ValueError, match=f"'a' is in {files[0]} and in {files[1]}"):
        Source(tmp_path)


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickles only; save them as safetensors"):
        Source(tmp_path)


def test_integer_weights_are_named(tmp_path):
    save_file({"a": np.ones((2, 2), np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="'a' has the type I8"):
        Source(tmp_path).read("a")
