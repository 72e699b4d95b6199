"""Tiny Hugging Face folders whose logits transformers computed (`goldens/make_goldens.py`).

A golden holds a config, the names and shapes of its tensors, prompts, and the logits. The weights
are a function of name, shape and seed, so `write` makes the folder without torch.

  golden = hf_tiny.load("gemma2-softcaps")
  hf_tiny.write(tmp_path, golden, shards=2)
  golden.prompts[0], golden.logits[0]            # ids [L], logits [L, V] of that prompt alone
  golden.next_tokens, golden.next_logits         # [2, 4], [2, 4, V]: fed one by one after a prompt
"""

import dataclasses
import functools
import json
import math
import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "goldens"
PAD = 0  # the id that fills the left of shorter rows; no prompt contains it


@dataclasses.dataclass(frozen=True)
class Golden:
    """One tiny checkpoint and what transformers makes of it in float32."""

    name: str  # <architecture>-<what is special>
    config: dict  # config.json
    tensors: tuple  # (name, shape) of every tensor in the file
    unused: tuple  # names of those that transformers leaves alone
    seed: int
    versions: dict  # of transformers and torch
    prompts: tuple  # two arrays of ids [L]
    next_tokens: np.ndarray  # [2, 4]
    logits: tuple  # [L, V] of each prompt; left-padded in a batch they are the same
    next_logits: np.ndarray  # [2, 4, V], after each of the next tokens

    def padded(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Both prompts in a batch: tokens, mask and positions [2, L], padded on the left."""
        longest = max(len(prompt) for prompt in self.prompts)
        tokens_BxL = np.full((2, longest), PAD, np.int32)
        mask_BxL = np.zeros((2, longest), np.int32)
        for row, prompt in enumerate(self.prompts):
            tokens_BxL[row, longest - len(prompt) :] = prompt
            mask_BxL[row, longest - len(prompt) :] = 1
        return tokens_BxL, mask_BxL, np.maximum(mask_BxL.cumsum(1) - 1, 0)


@functools.cache
def _cases(architecture: str) -> dict:
    return json.loads((FOLDER / f"{architecture}.json").read_text())


def architectures() -> list[str]:
    """The model types that have goldens."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def names(architecture: str = "") -> list[str]:
    """All goldens, or those of one architecture."""
    chosen = [architecture] if architecture else architectures()
    return [name for one in chosen for name in _cases(one)["cases"]]


def load(name: str) -> Golden:
    """The golden of this name."""
    architecture = name.split("-")[0]
    file = _cases(architecture)
    case = file["cases"][name]
    with np.load(FOLDER / f"{architecture}.npz") as arrays:
        logits = tuple(arrays[f"{name}/{row}"] for row in range(2))
        next_logits = arrays[f"{name}/next"]
    return Golden(
        name=name,
        config=json.loads(case["config"]),
        tensors=tuple((tensor, tuple(shape)) for tensor, shape in case["tensors"]),
        unused=tuple(case["unused"]),
        seed=case["seed"],
        versions=file["versions"],
        prompts=tuple(np.asarray(prompt, np.int32) for prompt in case["prompts"]),
        next_tokens=np.asarray(case["next_tokens"], np.int32),
        logits=logits,
        next_logits=next_logits,
    )


def weight(name: str, shape: tuple[int, ...], seed: int, unit_offset: bool = False) -> np.ndarray:
    """The float32 values of one tensor; `unit_offset`: norms multiply by 1 + weight (Gemma)."""
    if name.endswith("attn.bias") and len(shape) == 4:
        return np.tril(np.ones(shape, np.float32))  # the causal mask in GPT-2's own files
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    x = rng.standard_normal(shape, dtype=np.float32)
    is_norm = "norm" in name or ".ln_" in name or name.startswith("ln_")
    if name.endswith("bias"):
        return 0.1 * x if "correction" in name else 0.3 * x
    if is_norm:
        return 0.3 * x if unit_offset else 1 + 0.3 * x
    is_table = any(part in name for part in ("embed_tokens", "wte", "wpe", "lm_head"))
    return 0.4 * x if is_table else 0.17 * x


def weights(golden: Golden) -> dict[str, np.ndarray]:
    """All tensors of the file, by name."""
    unit_offset = golden.config["model_type"].startswith("gemma")
    return {name: weight(name, shape, golden.seed, unit_offset) for name, shape in golden.tensors}


def write(folder, golden: Golden, *, shards: int = 1, dtype: str = "float32") -> Path:
    """Write config.json and model.safetensors (or `shards` files and their index); the folder."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(golden.config, indent=2))
    if dtype == "bfloat16":
        import ml_dtypes  # registers the type with numpy; not where the goldens are made
    to = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    # Files in bfloat16 keep the router's correction in float32.
    tensors = {
        name: x if "correction" in name else x.astype(to) for name, x in weights(golden).items()
    }
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    order, share = list(tensors), math.ceil(len(tensors) / shards)
    weight_map = {}
    for shard in range(shards):
        part = order[shard * share : (shard + 1) * share]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder
