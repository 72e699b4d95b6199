"""Recompute `renderings.npz`: ids and assistant masks of transformers' `apply_chat_template`.

LLM_JAX_DATA=... PYTHONPATH=.:tests python tests/data/goldens/make_renderings.py

Of Llama 2's tokenizer, which is found in LLM_JAX_DATA, there is a hash for each template.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import transformers
from data.goldens import chat_cases
from tokenizers import Tokenizer

import llm_jax.tokenizers


def rendered(tokenizer, template: str) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and masks of all conversations."""
    rows = [
        tokenizer.apply_chat_template(
            messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        for messages in chat_cases.conversations()
    ]
    return [row["input_ids"] for row in rows], [row["assistant_masks"] for row in rows]


def llama2():
    ours = llm_jax.tokenizers.load(Path(os.environ["LLM_JAX_DATA"]) / chat_cases.LLAMA2)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in llm_jax.tokenizers.huggingface_files(ours, 4096).items():
            (Path(folder) / name).write_bytes(content)
        return transformers.AutoTokenizer.from_pretrained(folder)


def main() -> None:
    library = Tokenizer.from_str(chat_cases.tokenizer_json().decode())
    names = {f"{role}_token": name for role, name in chat_cases.ROLES.items()}
    small = transformers.PreTrainedTokenizerFast(tokenizer_object=library, **names)
    large = llama2()
    arrays = {"transformers": np.array(transformers.__version__)}
    for name, template in chat_cases.TEMPLATES.items():
        ids, masks = rendered(small, template)
        arrays[f"{name}_sizes"] = np.array([len(row) for row in ids], np.uint16)
        arrays[f"{name}_ids"] = np.concatenate(ids).astype(np.uint16)
        arrays[f"{name}_mask"] = np.packbits(np.concatenate(masks).astype(bool))
        found = hashlib.sha256(repr(rendered(large, template)).encode()).hexdigest()
        arrays[f"{name}_llama2"] = np.array(found)
    np.savez_compressed(Path(__file__).with_name("renderings.npz"), **arrays)


if __name__ == "__main__":
    main()
