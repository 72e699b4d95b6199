"""Recompute the goldens of `peft_tiny` with Hugging Face's peft (torch is needed only here).

PYTHONPATH=tests python tests/interop/peft_goldens/make_peft_goldens.py

For every case peft makes the adapter on a base of `hf_tiny` and saves it, which gives the names and
shapes of its file; the values are then ours, and peft loads them and computes the logits.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import peft
import torch
import transformers
from interop import hf_tiny, peft_tiny
from safetensors import safe_open

ALL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def lora(**keys) -> peft.LoraConfig:
    """A LoRA for a language model."""
    return peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **keys)


# name: (base, config, whether c_attn is made of blocks)
CASES = {
    "lora-llama": ("llama-3_llama3", lambda: lora(r=4, lora_alpha=8, target_modules=ALL), False),
    # A regular expression, rank-stabilised, other ranks and alphas for some, whole modules.
    "lora-patterns": (
        "llama-2_gqa",
        lambda: lora(
            r=4,
            lora_alpha=6,
            use_rslora=True,
            target_modules=r".*\.(q|k|v|down)_proj",
            rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, "down_proj": 6},
            alpha_pattern={"v_proj": 3},
            modules_to_save=["lm_head", "input_layernorm"],
        ),
        False,
    ),
    "lora-layers": (
        "qwen2-no_window",
        lambda: lora(
            r=3, lora_alpha=3, target_modules=["q_proj", "up_proj"], layers_to_transform=[1]
        ),
        False,
    ),
    "lora-gpt2": (
        "gpt2-tied",
        lambda: lora(
            r=4, lora_alpha=8, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True
        ),
        False,
    ),
    # What our own writer makes of updates of queries, keys and values.
    "lora-gpt2_blocks": (
        "gpt2-tied",
        lambda: lora(
            r=4,
            lora_alpha=8,
            target_modules=["c_attn", "c_fc"],
            rank_pattern={"c_attn": 12},
            alpha_pattern={"c_attn": 24},
            fan_in_fan_out=True,
        ),
        True,
    ),
    "prompt-gpt2": (
        "gpt2-tied",
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        False,
    ),
    "prompt-gemma2": (
        "gemma2-softcaps",
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        False,
    ),
    "prefix-llama": (
        "llama-2_gqa",
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        False,
    ),
}


def base_model(folder):
    """The base, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


@torch.no_grad()
def make(name: str, base: str, config, blocks: bool, seed: int) -> tuple[dict, np.ndarray]:
    """The JSON and the logits of one case."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        hf_tiny.write(folder / "base", hf_tiny.load(base))
        peft.get_peft_model(base_model(folder / "base"), config()).save_pretrained(folder / "new")
        values = json.loads((folder / "new" / "adapter_config.json").read_text())
        values["base_model_name_or_path"] = ""
        with safe_open(folder / "new" / "adapter_model.safetensors", "np") as file:
            tensors = [(key, file.get_slice(key).get_shape()) for key in sorted(file.keys())]
        case = {"base": base, "config": values, "tensors": tensors, "blocks": blocks, "seed": seed}
        golden = peft_tiny.Golden(
            name=name,
            versions={},
            logits=np.zeros(0),
            **case | {"base": hf_tiny.load(base)},
        )
        peft_tiny.write(folder / "made", golden)
        model = base_model(folder / "base")
        prompt = torch.tensor(golden.prompt)[None]
        plain = model(prompt).logits[0].numpy()
        logits = peft_tiny.peft_logits(folder / "base", folder / "made", golden.prompt)
    moved = np.abs(logits - plain).max()
    if moved < 0.1:
        raise ValueError(f"{name}: the adapter moves no logit by more than {moved}")
    print(f"{name:20} {len(tensors):3} tensors  moves logits by {moved:.2f}")
    return case, logits.astype(np.float32)


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    versions = {m.__name__: m.__version__ for m in (peft, transformers, torch)}
    cases, logits = {}, {}
    for seed, (name, (base, config, blocks)) in enumerate(CASES.items()):
        cases[name], logits[name] = make(name, base, config, blocks, seed)
    np.savez_compressed(peft_tiny.FOLDER / "logits.npz", **logits)
    text = json.dumps({"versions": versions, "cases": cases}, separators=(",", ":"))
    (peft_tiny.FOLDER / "cases.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
