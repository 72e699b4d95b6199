"""The README.md that goes with exported weights."""

from collections.abc import Mapping
from typing import Any

from llm_jax import models
from llm_jax.config import TrainConfig
from llm_jax.nn.params import count


def model_card(
    cfg: TrainConfig,
    values: Mapping[str, Any],
    tokenizer: Any,
    summary: Mapping[str, Any],
    ending: str = "",
) -> str:
    """Markdown with the front matter that model hubs read.

    `values` are those of config.json, `summary` those of the run's summary.json (or empty); `ending`
    is the text that ends an answer, which a reward model needs.
    """
    m = cfg.model
    name = cfg.name or values["model_type"]
    n = count(models.family(m.family).specs(m))
    rows = {
        "Architecture": f"{values['architectures'][0]} ({values['model_type']})",
        "Parameters": f"{n:,}",
        "Layers, width, heads (key heads)": f"{m.n_layers}, {m.d_model}, {m.n_heads} ({m.kv_heads})",
        "Context": f"{m.max_length:,} tokens",
        "Vocabulary": f"{m.vocab_size:,} tokens ({tokenizer.kind})",
        "Type of the weights": values["torch_dtype"],
    }
    trained = {
        "Training data": ", ".join(cfg.data.inputs) if summary else "",
        "Training tokens": f"{summary['tokens']:,}" if "tokens" in summary else "",
        "Bits per byte (held-out text)": _number(summary.get("bits_per_byte")),
        "Loss (held-out text, nats a token)": _number(summary.get("eval_loss")),
    }
    table = "\n".join(f"| {k} | {v} |" for k, v in {**rows, **trained}.items() if v)
    template = "\nIt has a chat template.\n" if tokenizer.chat_template else ""
    task, loader, use = "text-generation", "AutoModelForCausalLM", ""
    if m.head == "reward":
        task, loader = "text-classification", "AutoModelForSequenceClassification"
        use = f"""
# A reward is read at the token that ends the answer, so that nothing may stand behind it.
text, end = tokenizer.apply_chat_template(messages, tokenize=False), {ending!r}
text = text[: text.rindex(end) + len(end)]
reward = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0]
"""
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags:
- llm_jax
---

# {name}

Exported from llm_jax.

| | |
|---|---|
{table}
{template}
```python
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
{use}```
"""


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.4f}"
