"""peft on adapters that we wrote, and its logits anew; needs the environment of constraints/peers.txt.

`pytest -m peers`. New goldens: tests/interop/peft_goldens/make_peft_goldens.py.
"""

import jax
import numpy as np
import pytest
from interop import hf_tiny, peft_tiny
from interop.test_peft_format import METHODS, TOLERANCE, learned, read_base, run

from llm_jax.config import PeftConfig
from llm_jax.interop import peft_format

pytestmark = pytest.mark.peers

ALL = r"/(attn|mlp)/\w+/w$"
ADAPTERS = {
    "lora": {"method": "lora", "rank": 3, "targets": ALL},
    "stabilized": {
        "method": "lora",
        "rank": 2,
        "rank_stabilized": True,
        "targets": r"attn/[qv]/w$",
    },
    "prompt": {"method": "prompt", "tokens": 4},
    "prefix": {"method": "prefix", "tokens": 3},
}


@pytest.mark.parametrize("name", peft_tiny.names())
def test_goldens_are_what_this_version_computes(name, tmp_path):
    golden = peft_tiny.load(name)
    base = hf_tiny.write(tmp_path / "base", golden.base)
    adapter = peft_tiny.write(tmp_path / "adapter", golden)
    again = peft_tiny.peft_logits(base, adapter, golden.prompt)
    np.testing.assert_allclose(again, golden.logits, atol=2e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("golden", ["lora-llama", "lora-gpt2", "prompt-gemma2", "lora-layers"])
def test_peft_loads_what_we_write(golden, adapter, tmp_path):
    """With the logits that we compute."""
    golden, peft = peft_tiny.load(golden), PeftConfig(**ADAPTERS[adapter])
    cfg, params = read_base(golden, tmp_path / "base")
    trained = learned(cfg, peft)
    peft_format.save(tmp_path / "adapter", trained, peft, cfg)
    tree = METHODS[peft.method].attach(params, jax.tree.map(jax.numpy.asarray, trained), peft)
    ours = np.asarray(run(tree, golden.prompt[None], cfg)[0])
    theirs = peft_tiny.peft_logits(tmp_path / "base", tmp_path / "adapter", golden.prompt)
    assert float(np.abs(ours - theirs).max()) < TOLERANCE
    plain = np.asarray(run(params, golden.prompt[None], cfg)[0])
    assert float(np.abs(plain - theirs).max()) > 0.1
