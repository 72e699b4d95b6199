"""The goldens of `hf_tiny` as reward models: classifiers with one label, without an output head.

What transformers says of them is in reward_goldens.json; to make it anew, where torch and
transformers are:

  PYTHONPATH=tests python tests/interop/reward_tiny.py
"""

import dataclasses
import json
from pathlib import Path

from interop import hf_tiny

FOLDER = Path(__file__).parent
NAMES = {  # of a golden: the class of its reward model
    "gemma2-softcaps": "Gemma2ForSequenceClassification",
    "gemma3_text-1b": "Gemma3TextForSequenceClassification",
    "gpt2-untied": "GPT2ForSequenceClassification",
    "llama-2_gqa": "LlamaForSequenceClassification",
    "mistral-window": "MistralForSequenceClassification",
    "mixtral-8x7b": "MixtralForSequenceClassification",
    "olmo2-7b_mha": "Olmo2ForSequenceClassification",
    "qwen2-window": "Qwen2ForSequenceClassification",
    "qwen3-tied": "Qwen3ForSequenceClassification",
    "qwen3_moe-30b": "Qwen3MoeForSequenceClassification",
}


def load(name: str) -> hf_tiny.Golden:
    """The golden as a reward model."""
    golden = hf_tiny.load(name)
    config = {
        **golden.config,
        "architectures": [NAMES[name]],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": hf_tiny.PAD,
    }
    width = config.get("hidden_size", config.get("n_embd"))
    kept = tuple(t for t in golden.tensors if t[0] != "lm_head.weight")
    return dataclasses.replace(golden, config=config, tensors=(*kept, ("score.weight", (1, width))))


def expected() -> dict[str, list[float]]:
    """The rewards of both prompts, by golden."""
    return json.loads((FOLDER / "reward_goldens.json").read_text())["rewards"]


def main() -> None:
    import tempfile

    import torch
    import transformers

    rewards = {}
    for name in NAMES:
        golden = load(name)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                hf_tiny.write(folder, golden),
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
            )
            if found := {what: names for what, names in info.items() if names}:
                raise ValueError(f"{name}: {found}")
            rewards[name] = [
                float(model.eval()(torch.tensor(prompt[None]).long()).logits[0, 0])
                for prompt in golden.prompts
            ]
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    text = json.dumps({"versions": versions, "rewards": rewards}, indent=1)
    (FOLDER / "reward_goldens.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
