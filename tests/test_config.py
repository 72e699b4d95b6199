"""Typed configs: unknown keys, freezing, overrides, and that every key is read."""

import copy
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from llm_jax import config as configs
from llm_jax import tokenizers
from llm_jax.config import ModelConfig, TrainConfig

ROOT = Path(__file__).parents[1]


def test_unknown_key_names_the_nearest():
    cfg = TrainConfig()
    with pytest.raises(AttributeError, match="did you mean 'd_model'"):
        cfg.model.dmodel = 3
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        configs.override(cfg, {"optimizer.learning_rat": 3.0})
    with pytest.raises(ValueError, match="did you mean 'model'"):
        configs.from_dict(TrainConfig, {"modle": {}})


def test_frozen_is_hashable_and_refuses():
    cfg = configs.freeze(TrainConfig())
    with pytest.raises(AttributeError, match="frozen"):
        cfg.model.d_model = 3
    assert hash(cfg) == hash(configs.freeze(TrainConfig()))
    assert cfg != configs.freeze(TrainConfig(seed=1))


def test_round_trips(tmp_path):
    cfg = TrainConfig(
        data=configs.DataConfig(
            sources=(configs.SourceConfig(name="a", weights=((0.0, 1.0), (1.0, 2.0))),)
        )
    )
    configs.freeze(cfg)
    configs.save(cfg, tmp_path / "config.json")
    assert configs.load(TrainConfig, tmp_path / "config.json") == cfg
    assert copy.deepcopy(cfg) == cfg and configs.thaw(cfg) == cfg


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.schedule": "cosin"}, "did you mean 'cosine'"),
        ({"batch_size": 10, "accumulation": 4}, "batch_size=10 is not divisible by accumulation=4"),
        ({"length": 0}, "length=0"),
        ({"model.n_heads": 8, "model.kv_heads": 3}, "kv_heads=3"),
        ({"model.positions": "learned", "model.max_length": 8, "length": 16}, "model.max_length"),
        ({"model.rope_scaling": "yarn"}, "rope_original_length"),
        ({"model.dropout": 1.0}, "dropout"),
        ({"model.embed_noise": -1.0}, "model.embed_noise=-1.0"),
        ({"epochs": -1.0}, "epochs=-1.0"),
        ({"peft.rank": 0}, "peft.rank=0"),
        ({"peft.dropout": 1.5}, "peft.dropout=1.5"),
        ({"peft.targets": "("}, "peft.targets: '(' is no regular expression"),
        ({"peft.also": ("[",)}, "peft.also: '[' is no regular expression"),
        ({"optimizer.freeze_rules": (("*", True),)}, "optimizer.freeze_rules: '*' is no"),
    ],
)
def test_validation_names_the_key(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        configs.validate(configs.override(TrainConfig(), changes))


def test_resolve_follows_from_the_rest():
    m = ModelConfig(d_model=96, n_heads=3, activation="swiglu")
    configs.resolve_model(m, vocab_size=11, length=7, backend="gpu")
    assert (m.vocab_size, m.kv_heads, m.head_dim, m.d_ff, m.max_length, m.dtype) == (
        11,
        3,
        32,
        256,
        7,
        "bfloat16",
    )
    with pytest.raises(ValueError, match=r"model.n_heads=3"):
        configs.resolve_model(
            ModelConfig(d_model=32, n_heads=3), vocab_size=1, length=1, backend="cpu"
        )


def test_every_key_is_read_somewhere():
    code = "\n".join(p.read_text() for p in (ROOT / "llm_jax").rglob("*.py"))

    def keys(cls):
        for f in dataclasses.fields(cls):
            if isinstance(f.type, type) and issubclass(f.type, configs.Config):
                yield from keys(f.type)
            else:
                yield f.name

    by_name = {f.name for f in dataclasses.fields(configs.MeshConfig)}  # read in a loop
    by_name |= set(inspect.signature(tokenizers.train).parameters)  # the options of a tokenizer
    unread = [
        k
        for k in [*keys(TrainConfig), *keys(configs.SourceConfig)]
        if k not in by_name and not re.search(rf"\.{k}\b", code)
    ]
    assert not unread, f"config keys that nothing reads: {unread}"
