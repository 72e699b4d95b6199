"""Eight virtual CPU devices for the whole suite, one compilation cache for its run."""

import os
import tempfile

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the suite's time is compilation.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
if "LLM_JAX_TEST_CACHE" not in os.environ:  # xdist's workers have that of the process above them
    _CACHE = tempfile.TemporaryDirectory(prefix="llm_jax_test_cache_")
    os.environ["LLM_JAX_TEST_CACHE"] = _CACHE.name
jax.config.update("jax_compilation_cache_dir", os.environ["LLM_JAX_TEST_CACHE"])

from runs import QUICK_COMPILATION  # noqa: E402

# XLA reads its flags once: they are for this process, not for those that it starts.
if QUICK_COMPILATION:
    _BEFORE = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = f"{QUICK_COMPILATION} {_BEFORE or ''}"
    jax.jit(lambda x: x + 1)(0)
    del os.environ["XLA_FLAGS"]
    if _BEFORE is not None:
        os.environ["XLA_FLAGS"] = _BEFORE

from llm_jax import config as configs  # noqa: E402
from llm_jax import sharding  # noqa: E402


@pytest.fixture(scope="session")
def data_dir():
    """The folder of real data, or a skip."""
    path = os.environ.get("LLM_JAX_DATA")
    if not path or not os.path.isdir(path):
        pytest.skip("LLM_JAX_DATA names no folder of real data")
    return path


@pytest.fixture(scope="session")
def one_device():
    """The mesh of a single device."""
    return sharding.make_mesh(configs.MeshConfig(), jax.devices()[:1])


WORDS = "the quick brown fox jumps over a lazy dog and then it sleeps under some old tree".split()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A file of 300 short documents' worth of text that a tiny model can learn."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    lines = [
        " ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 9)) + ".\n" for i in range(1, 301)
    ]
    path.write_text("".join(lines))
    return path
