"""llama2.c's files: the same story as the reference program, and every layout of the format."""

import pathlib
import struct

import numpy as np
import pytest

from llm_jax.interop import llama2c


class RunC:
    """The forward pass of run.c in NumPy, straight from the legacy file: neighbouring pairs of a
    head rotate together, float32, one token at a time."""

    def __init__(self, content: bytes):
        sizes = np.frombuffer(content[:28], np.int32)
        self.dim, hidden, self.layers, self.heads, self.kv_heads, vocab, length = map(int, sizes)
        self.head_dim = self.dim // self.heads
        kv_dim, n = self.kv_heads * self.head_dim, self.layers
        shapes = {
            "embedding": (abs(vocab), self.dim),
            "norm1": (n, self.dim),
            "q": (n, self.dim, self.dim),
            "k": (n, kv_dim, self.dim),
            "v": (n, kv_dim, self.dim),
            "o": (n, self.dim, self.dim),
            "norm2": (n, self.dim),
            "w1": (n, hidden, self.dim),
            "w2": (n, self.dim, hidden),
            "w3": (n, hidden, self.dim),
            "norm": (self.dim,),
            "tables": (length, self.head_dim),
        }
        numbers, at = np.frombuffer(content[28:], np.float32), 0
        self.w = {}
        for name, shape in shapes.items():
            self.w[name] = numbers[at : at + int(np.prod(shape))].reshape(shape)
            at += int(np.prod(shape))
        self.w["head"] = numbers[at:].reshape(-1, self.dim) if vocab < 0 else self.w["embedding"]
        self.keys, self.values = [[[] for _ in range(n)] for _ in range(2)]

    def rotate(self, x, position):
        pairs = x.reshape(-1, self.head_dim // 2, 2)
        angle = position / 10000.0 ** (np.arange(0, self.head_dim, 2) / self.head_dim)
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        a, b = pairs[..., 0], pairs[..., 1]
        return np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(-1, self.head_dim)

    def step(self, token):
        """Logits [V] after one more token."""
        w, x = self.w, self.w["embedding"][token]
        position = len(self.keys[0])
        for i in range(self.layers):
            h = normed(x, w["norm1"][i])
            q = self.rotate(w["q"][i] @ h, position)
            self.keys[i].append(self.rotate(w["k"][i] @ h, position))
            self.values[i].append((w["v"][i] @ h).reshape(-1, self.head_dim))
            repeats = self.heads // self.kv_heads
            k, v = (np.repeat(np.stack(c[i]), repeats, 1) for c in (self.keys, self.values))
            scores = np.einsum("hd,shd->hs", q, k) / np.sqrt(np.float32(self.head_dim))
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            x = x + w["o"][i] @ np.einsum("hs,shd->hd", weights, v).reshape(-1)
            h = normed(x, w["norm2"][i])
            gate = w["w1"][i] @ h
            x = x + w["w2"][i] @ (gate / (1 + np.exp(-gate)) * (w["w3"][i] @ h))
        return w["head"] @ normed(x, w["norm"])


def normed(x, weight):
    return weight * x / np.sqrt(np.mean(x * x) + 1e-5)


def story(content, prompt_ids, n):
    """Greedy continuation of <s> and the prompt, `n` tokens with the prompt, as run.c -t 0."""
    model, ids = RunC(content), [1]
    while len(ids) <= n:
        logits = model.step(ids[-1])
        ids.append(
            prompt_ids[len(ids) - 1] if len(ids) <= len(prompt_ids) else int(logits.argmax())
        )
        if ids[-1] == 1:
            break
    return ids[1:]


def half_split_logits(source, config, ids):
    """Logits [L, V] of the tensors under Hugging Face's names, whose halves of a head rotate."""
    head_dim, eps = config["head_dim"], config["rms_norm_eps"]

    def norm(x, name):
        return source.read(name) * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)

    def rotate(x):
        x = x.reshape(len(ids), -1, head_dim)
        theta = config["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
        angle = np.concatenate([np.arange(len(ids))[:, None] * theta] * 2, -1)[:, None]
        turned = np.concatenate([-x[..., head_dim // 2 :], x[..., : head_dim // 2]], -1)
        return x * np.cos(angle) + turned * np.sin(angle)

    x = source.read("model.embed_tokens.weight")[ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."

        def project(h, name, layer=layer):
            return h @ source.read(f"{layer}{name}.weight").T

        h = norm(x, f"{layer}input_layernorm.weight")
        q, k = rotate(project(h, "self_attn.q_proj")), rotate(project(h, "self_attn.k_proj"))
        v = project(h, "self_attn.v_proj").reshape(k.shape)
        repeats = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, repeats, 1), np.repeat(v, repeats, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head_dim)
        scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + project(
            np.einsum("hqk,khd->qhd", weights, v).reshape(len(ids), -1), "self_attn.o_proj"
        )
        h = norm(x, f"{layer}post_attention_layernorm.weight")
        gate = project(h, "mlp.gate_proj")
        x = x + project(gate / (1 + np.exp(-gate)) * project(h, "mlp.up_proj"), "mlp.down_proj")
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm.weight") @ source.read(head).T


SIZES = (16, 24, 2, 4, 2, 300, 8)  # dim, hidden_dim, layers, heads, kv_heads, vocabulary, length
ORDER = ("norm1", "q", "k", "v", "o", "norm2", "w1", "w2", "w3")


@pytest.fixture
def parts():
    """Random weights by their names in run.c; a layer's are lists."""
    dim, hidden, layers, heads, kv_heads, vocab, _ = SIZES
    kv_dim = dim // heads * kv_heads
    shapes = {"norm1": (dim,), "q": (dim, dim), "k": (kv_dim, dim), "v": (kv_dim, dim)}
    shapes |= {"o": (dim, dim), "norm2": (dim,), "w1": (hidden, dim), "w2": (dim, hidden)}
    shapes |= {"w3": (hidden, dim)}
    rng = np.random.default_rng(0)
    found = {n: [rng.normal(size=s).astype("f4") for _ in range(layers)] for n, s in shapes.items()}
    found |= {n: [rng.normal(size=(vocab, dim)).astype("f4")] for n in ("embedding", "head")}
    return found | {"norm": [rng.normal(size=dim).astype("f4")]}


def legacy(parts, tied):
    sizes = list(SIZES)
    sizes[5] *= 1 if tied else -1
    names = ["embedding", *ORDER, "norm"]
    tables = np.zeros(SIZES[6] * SIZES[0] // SIZES[3], np.float32)
    out = [struct.pack("<7i", *sizes), *(w.tobytes() for n in names for w in parts[n])]
    return b"".join([*out, tables.tobytes(), *([] if tied else [parts["head"][0].tobytes()])])


def newer(parts, tied, version, group=8):
    head = struct.pack("<Ii7iB", 0x616B3432, version, *SIZES, tied)
    head += struct.pack("<i", group) if version == 2 else b""
    out = [
        head.ljust(256, b"\0"),
        *(w.tobytes() for n in ("norm1", "norm2", "norm") for w in parts[n]),
    ]
    names = ["embedding", "q", "k", "v", "o", "w1", "w2", "w3", *([] if tied else ["head"])]
    for w in (w for n in names for w in parts[n]):
        if version == 2:
            groups = w.reshape(-1, group)
            scale = np.abs(groups).max(1) / 127
            out += [np.round(groups / scale[:, None]).astype(np.int8).tobytes()]
            out += [scale.astype("f4").tobytes()]
        else:
            out.append(w.tobytes())
    return b"".join(out)


def tokenizer_file(n=300):
    entries = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    entries += [(b"<0x%02X>" % i, 0.0) for i in range(256)]
    pieces = [b" ", b"a", b"b", b"c", b" a", b"ab", b"bc", b" ab", b"abc", b"\xc3\xa9", b"  "]
    entries += [(piece, -float(i)) for i, piece in enumerate(pieces)]
    entries += [(b"x%d" % i, -100.0 - i) for i in range(n - len(entries))]
    body = b"".join(struct.pack("<fi", score, len(text)) + text for text, score in entries)
    return struct.pack("<i", 7) + body


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer.bin").write_bytes(tokenizer_file())
    return tmp_path


IDS = [1, 260, 7, 299, 0, 42]


@pytest.mark.parametrize("tied", [True, False])
def test_layouts_hold_the_same_model(parts, tied, folder):
    """Legacy and version 1 exactly, version 2 up to its rounding; all give run.c's logits."""
    content = legacy(parts, tied)
    files = {"v0.bin": content, "v1.bin": newer(parts, tied, 1), "v2.bin": newer(parts, tied, 2)}
    model = RunC(content)
    expected = np.stack([model.step(i) for i in IDS])
    tensors = {}
    for name, data in files.items():
        (folder / name).write_bytes(data)
        config, source, tokenizer = llama2c.read(folder / name)
        assert tokenizer.vocab_size == config["vocab_size"] == 300
        assert config["tie_word_embeddings"] is tied
        tensors[name] = {n: source.read(n) for n in source.shapes}
        for n, w in tensors[name].items():  # rows that cut heads, and groups that cross rows
            for start, stop in ((1, len(w)), (3, 6), (len(w) - 1, len(w))):
                np.testing.assert_array_equal(source.read(n, start, stop), w[start:stop])
        if name != "v2.bin":
            logits = half_split_logits(source, config, IDS)
            # Unpermuted queries and keys would be off by more than 1.
            np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
        source.close()
    for n, w in tensors["v0.bin"].items():
        np.testing.assert_array_equal(tensors["v1.bin"][n], w, err_msg=n)
        np.testing.assert_allclose(tensors["v2.bin"][n], w, atol=np.abs(w).max() / 200, err_msg=n)


def test_groups_may_cross_rows(parts, folder):
    """24 columns of w2 in groups of 16: the scale changes within a row."""
    (folder / "m.bin").write_bytes(newer(parts, True, 2, group=16))
    _, source, _ = llama2c.read(folder / "m.bin")
    found = source.read("model.layers.1.mlp.down_proj.weight", 3, 5)
    w = parts["w2"][1][3:5]
    np.testing.assert_allclose(found, w, atol=np.abs(w).max() / 100)


def run_c_encode(text, vocabulary):
    """run.c's encode: a space, characters or their bytes, then the best merge until none is left."""
    ids = [vocabulary[b" "][0]] if text else []
    for char in text:
        known = vocabulary.get(char.encode())
        ids += [known[0]] if known else [3 + byte for byte in char.encode()]
    spelled = {index: piece for piece, (index, _) in vocabulary.items()}
    while True:
        best, at = -1e10, None
        for i in range(len(ids) - 1):
            index, score = vocabulary.get(spelled[ids[i]] + spelled[ids[i + 1]], (None, -np.inf))
            if score > best:
                best, at, merged = score, i, index
        if at is None:
            return ids
        ids[at : at + 2] = [merged]


def vocabulary_of(content):
    found, at = {}, 4
    while at < len(content):
        score, length = struct.unpack_from("<fi", content, at)
        found.setdefault(content[at + 8 : at + 8 + length], (len(found), score))
        at += 8 + length
    return found


TEXTS = ["", "a", "abc abcab", " abc", "  ab  c", "\u00e9\u00e8 \U0001f917\nb", "a" * 9, "cab\tbca"]


def test_tokenizer_encodes_as_run_c(folder):
    tokenizer = llama2c.read_tokenizer(folder / "tokenizer.bin")
    vocabulary = vocabulary_of((folder / "tokenizer.bin").read_bytes())
    for text in TEXTS:
        assert tokenizer.encode(text) == run_c_encode(text, vocabulary)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.encode("<s>a</s>", special=True) == [1, vocabulary[b"a"][0], 2]


def test_errors(parts, folder):
    content = legacy(parts, True)
    path = folder / "m.bin"

    def fails(data, message, error=ValueError, **options):
        path.write_bytes(data)
        with pytest.raises(error, match=message) as caught:
            llama2c.read(path, **options)
        assert "\n" not in str(caught.value)

    fails(content[:20], "it has 20 bytes")
    fails(content[:-1], r"has 35,035 bytes, a llama2.c model with its header has 35,036: truncated")
    fails(content + b"\0", "truncated, or no such model")
    fails(b"PK\x03\x04" * 100, "is not a llama2.c model: its header says")
    fails(struct.pack("<Ii", 0x616B3432, 3).ljust(300, b"\0"), "version 3 of llama2.c's format")
    fails(newer(parts, True, 2)[:-4], "truncated, or no such model")
    (folder / "tokenizer.bin").write_bytes(tokenizer_file(290))
    fails(content, "has 290 tokens, .*m.bin has 300; give the right one with --tokenizer")
    (folder / "tokenizer.bin").write_bytes(tokenizer_file()[:-1])
    fails(content, "tokenizer.bin is truncated after 299 tokens")
    (folder / "tokenizer.bin").write_bytes(tokenizer_file().replace(b"<0x41>", b"<0x42>"))
    fails(content, "tokenizer.bin is not a tokenizer of llama2.c")
    (folder / "tokenizer.bin").unlink()
    fails(content, "no tok.*bin; give its tokenizer with --tokenizer", FileNotFoundError)
    (folder / "tok300.bin").write_bytes(tokenizer_file())
    (folder / "tok999.bin").write_bytes(b"another model's")
    path.write_bytes(content)
    assert llama2c.read(path)[2].vocab_size == 300
    with pytest.raises(FileNotFoundError, match="no such file"):
        llama2c.read(folder / "absent.bin")


# What run.c -t 0 prints, and the ids of it (commit 350e04f; -n 200 and -n 60). Without a prompt it
# begins with "Once upon a time" itself.
LILY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside "
    "in the park. One day, she saw a big, red ball. She wanted to play with it, but i"
    "t was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what"
    ' to do. She said, "I want to play with your ball, but I can\'t find it."\n'
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't kn"
    'ow what to do."\n'
    "Lily didn't want to help her mom, so she"
)
LILY_IDS = """
403 407 261 378 432 383 286 261 376 298 315 421 395 317 426 338 401 396 267 337 410 408 419
292 411 322 265 282 295 433 426 385 328 432 358 394 261 370 432 352 266 268 388 426 338 391
266 267 337 335 312 432 398 312 286 267 414 270 333 415 426 13 438 310 439 419 357 336 432
313 438 310 432 278 316 439 419 298 414 267 265 282 295 433 426 436 317 286 296 418 269 279
292 416 439 413 409 416 327 263 415 294 267 400 426 338 336 432 313 442 391 267 337 335 364
420 268 388 432 398 359 280 303 439 413 272 417 264 312 426 436 13 438 310 286 296 418 269
279 292 416 439 413 409 416 327 263 415 294 267 400 426 338 336 432 313 442 439 423 262 304
420 422 432 317 426 359 279 292 416 439 413 409 416 327 263 415 294 267 400 426 436 13 438
310 279 292 416 439 413 391 267 281 421 427 311 357 432 384 358
"""
DOG = (
    "The big dog, Zoë. He liked to play with his toys. He liked to play with his toys"
    " and run around. One day, he saw a big tree. He wanted to play with it. He"
)
DOG_IDS = """
291 370 400 428 432 410 469 414 198 174 426 346 397 355 267 337 335 345 267 422 419 426 346
397 355 267 337 335 345 267 422 419 269 352 379 261 420 277 264 426 385 328 432 281 394 261
370 259 276 411 426 346 391 266 267 337 335 312 426 346
"""


@pytest.fixture
def real_weights(data_dir):
    return pathlib.Path(data_dir) / "weights"


@pytest.mark.parametrize(
    ("prompt", "text", "ids"),
    [
        ("", LILY, LILY_IDS),
        ("Once upon a time", LILY, LILY_IDS),
        ("The big dog, Zo\u00eb", DOG, DOG_IDS),
    ],
)
def test_stories260k(prompt, text, ids, real_weights):
    content = (real_weights / "stories260K.bin").read_bytes()
    config, source, tokenizer = llama2c.read(real_weights / "stories260K.bin")
    ids = [int(i) for i in ids.split()]
    start = tokenizer.encode(prompt)
    assert ids[: len(start)] == start
    assert story(content, start, len(ids)) == ids
    assert tokenizer.decode(ids) == text
    # And the tensors that are handed on tell it as well.
    best = half_split_logits(source, config, [1, *ids[:-1]]).argmax(-1).tolist()
    assert best[len(start) :] == ids[len(start) :]


def test_real_tokenizer_encodes_as_run_c(real_weights):
    content = (real_weights / "tok512.bin").read_bytes()
    tokenizer, vocabulary = (
        llama2c.read_tokenizer(real_weights / "tok512.bin"),
        vocabulary_of(content),
    )
    text = (real_weights.parent / "text/tinyshakespeare.txt").read_text()[:20_000]
    for line in [*text.split("\n"), *TEXTS]:
        assert tokenizer.encode(line) == run_c_encode(line, vocabulary)
