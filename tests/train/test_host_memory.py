"""Memory that is kept: a real process, and the pages that the kernel had to give it again."""

import subprocess
import sys

import pytest
from runs import ROOT, environment

PROGRAM = """
import resource, sys
if "keep" in sys.argv:
    from llm_jax.train import host_memory
    assert host_memory.keep() and host_memory.keep()
    host_memory.fit(int(sys.argv[2]))
import jax, jax.numpy as jnp

@jax.jit
def step(x):  # temporaries of 64 MB
    rows = jnp.sin(x)[None] * jnp.arange(16.0)[:, None]
    return x + (rows @ rows.T).mean()  # a product needs its operand in memory

x = jnp.ones(1_000_000)
for _ in range(3):
    x = step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    x = step(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_temporaries_are_not_faulted_in_again_unless_the_model_is_large():
    def faults(*args):
        command = [sys.executable, "-c", PROGRAM, *args]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    # 64 MB are 16,384 pages of 4 KiB, or 32 huge ones.
    assert faults("keep", str(10 << 20)) < 50
    assert faults("keep", str(1 << 30)) > 1000
    assert faults() > 1000
