"""Conversations for tests: rows, a template, and what a batch of them teaches."""

from llm_jax import config as configs

BYTES = configs.TokenizerConfig(kind="byte")
LINE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"


def pair(question, answer, **more):
    return {"prompt": question, "completion": answer, **more}


def talk(*texts):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


def train_config(**changes):
    cfg = configs.TrainConfig(batch_size=4, length=64, steps=20)
    cfg.data.packing = "first_fit"
    return configs.override(cfg, changes)


def learnt(tokenizer, batch):
    """The targets that count, as text, row by row."""
    return [
        tokenizer.decode(targets[weights > 0], skip_special=False)
        for targets, weights in zip(batch.targets, batch.weights, strict=True)
    ]
