"""Tiny adapters whose logits Hugging Face's peft computed (`peft_goldens/make_peft_goldens.py`).

A golden is an adapter_config.json for one of the bases of `hf_tiny`, the names and shapes of the
adapter's tensors (whose values are a function of name, shape and seed) and logits.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from interop import hf_tiny

FOLDER = Path(__file__).parent / "peft_goldens"


@dataclasses.dataclass(frozen=True)
class Golden:
    """One tiny adapter and what peft makes of it in float32."""

    name: str
    base: hf_tiny.Golden
    config: dict  # adapter_config.json
    tensors: tuple  # (name, shape) of every tensor in the file
    blocks: bool  # lora_B of c_attn is three blocks on a diagonal
    seed: int
    versions: dict  # of peft, transformers and torch
    logits: np.ndarray  # [L, V] of the base's second prompt

    @property
    def prompt(self) -> np.ndarray:
        """Ids [L]."""
        return self.base.prompts[1]


def names() -> list[str]:
    """All goldens."""
    return list(json.loads((FOLDER / "cases.json").read_text())["cases"])


def load(name: str) -> Golden:
    """The golden of this name."""
    file = json.loads((FOLDER / "cases.json").read_text())
    case = dict(file["cases"][name])
    with np.load(FOLDER / "logits.npz") as arrays:
        logits = arrays[name]
    case["base"] = hf_tiny.load(case["base"])
    case["tensors"] = tuple((tensor, tuple(shape)) for tensor, shape in case["tensors"])
    return Golden(name=name, versions=file["versions"], logits=logits, **case)


def weights(golden: Golden) -> dict[str, np.ndarray]:
    """All tensors of the adapter, by name."""
    found = {name: hf_tiny.weight(name, shape, golden.seed) for name, shape in golden.tensors}
    for name, x in found.items():
        if golden.blocks and name.endswith("c_attn.lora_B.weight"):
            rows, ranks = np.arange(x.shape[0]), np.arange(x.shape[1])
            same = rows[:, None] * 3 // x.shape[0] == ranks[None] * 3 // x.shape[1]
            found[name] = np.where(same, x, np.float32(0))
    return found


def write(folder, golden: Golden) -> Path:
    """Write adapter_config.json and adapter_model.safetensors; the folder."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(golden.config, indent=2))
    save_file(weights(golden), folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def peft_logits(base, adapter, prompt: np.ndarray) -> np.ndarray:
    """float32 logits [L, V] of a prompt [L] under the adapter of one folder on the base of another,
    where peft is installed."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    tuned = peft.PeftModel.from_pretrained(model, adapter).eval()
    prefix = tuned.active_peft_config.peft_type == "PREFIX_TUNING"
    with torch.no_grad():
        out = tuned(torch.tensor(np.asarray(prompt, np.int64))[None], use_cache=prefix)
    return out.logits[0, -len(prompt) :].numpy()
