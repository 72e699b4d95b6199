"""Tiny GGUF files, written the way llama.cpp's converter writes them."""

import numpy as np

from llm_jax import tokenizers

HEADS, KV_HEADS, HEAD_DIM, WIDTH, HIDDEN, LAYERS = 4, 2, 8, 32, 64, 2
# General settings of every architecture but GPT-2, by key.
SIZES = {
    "block_count": LAYERS,
    "context_length": 128,
    "embedding_length": WIDTH,
    "feed_forward_length": HIDDEN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 50000.0,
}
BYTE_TOKENS = list(tokenizers.bpe_reference.byte_characters().values())
BPE = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": [*BYTE_TOKENS, "th", "<|end|>"],
    "token_type": [1] * 257 + [3],
    "merges": ["t h"],
    "eos_token_id": 257,
}
VOCAB = 258


def write(path, architecture, tensors, settings=(), tokenizer=BPE, template=None):
    """Writes a file; a tensor is an array (float32) or a pair of blocks and their type."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    keys = {f"{architecture}.{key}": value for key, value in dict(settings).items()}
    keys |= {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    if template is not None:
        keys["tokenizer.chat_template"] = template
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, list):
            if value:
                writer.add_array(key, value)
        else:
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[
                type(value)
            ](key, value)
    for name, value in tensors.items():
        data, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)
