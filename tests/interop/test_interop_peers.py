"""transformers on our exports, and its logits anew; needs the environment of constraints/peers.txt.

`pytest -m peers`. New goldens: tests/interop/goldens/make_goldens.py.
"""

import jax
import numpy as np
import pytest
from interop import hf_tiny

from llm_jax import config as configs
from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.interop import huggingface, reference

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("name", hf_tiny.names())
def test_transformers_loads_our_export(name, tmp_path):
    """Strictly, and with the logits that it has for the original."""
    from interop import reload_exports

    golden = hf_tiny.load(name)
    folder = hf_tiny.write(tmp_path / "original", golden)
    again = reference.logits(folder, golden.prompts[0][None])[0]
    np.testing.assert_allclose(again, golden.logits[0], atol=2e-5)  # of this version of it
    cfg, params = huggingface.load(folder, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    configs.resolve_model(cfg, vocab_size=0, length=0, backend="cpu")
    (tmp_path / "export").mkdir()
    huggingface.save(tmp_path / "export", cfg, params, shard_bytes=30_000)
    good, line = reload_exports.check(str(tmp_path / "export"), name)
    assert good, line
