"""Configs of short runs, and the binaries as processes of their own."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from llm_jax import config as configs

ROOT = Path(__file__).parents[1]
# Of XLA on a CPU: halves the time of a compilation. Not for other versions, in some of which the
# first is gone, as an unknown flag ends the process.
QUICK_COMPILATION = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if jax.__version_info__[:2] == (0, 10)
    else ""
)


def run_config(corpus, **changes) -> configs.TrainConfig:
    """A mutable config of a run that takes a second."""
    values = {
        "steps": 12,
        "batch_size": 8,
        "length": 32,
        "model.d_model": 32,
        "model.n_layers": 2,
        "model.n_heads": 4,
        "model.d_ff": 64,
        "model.vocab_multiple": 8,
        "model.scan": False,
        "optimizer.learning_rate": 3e-3,
        "optimizer.warmup_steps": 2,
        "optimizer.ema_decay": 0.5,
        "tokenizer.kind": "byte",
        "data.inputs": (str(corpus),),
        "eval.every": 6,
        "eval.sample_tokens": 8,
        "checkpoint.every": 6,
        "log.every": 1,
        "log.compilation_cache": "",
        **changes,
    }
    return configs.override(configs.TrainConfig(), values)


def flags_of(cfg_changes: dict) -> list[str]:
    return [f"--config.{k}={v}" for k, v in cfg_changes.items()]


def environment(devices: int | None = None, *, optimized: bool = False, **more: str) -> dict:
    """Environment variables of a binary.

    Args:
      optimized: compile as users do; it takes twice the time.
    """
    env = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": os.environ["LLM_JAX_TEST_CACHE"],
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(not optimized),
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "PYTHONPATH": str(ROOT),
        **more,
    }
    flags = [QUICK_COMPILATION] if QUICK_COMPILATION and not optimized else []
    if devices:
        flags.append(f"--xla_force_host_platform_device_count={devices}")
    env["XLA_FLAGS"] = " ".join(flags)
    return env


def start(module: str, *args: str, devices: int | None = None, **environ: str) -> subprocess.Popen:
    """A binary (or the code after `-c`) as a process of its own."""
    what = ["-c"] if module == "-c" else ["-m", f"experiments.{module}"]
    return subprocess.Popen(
        [sys.executable, *what, *args],
        cwd=ROOT,
        env=environment(devices, **environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_job(processes: int, module: str, *args: str, devices: int = 1) -> list[subprocess.Popen]:
    """The processes of one job on this machine, each with so many virtual devices."""
    port = free_port()
    return [
        start(
            module,
            *args,
            devices=devices,
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES=str(processes),
            JAX_PROCESS_ID=str(i),
            JAX_DISABLE_MOST_OPTIMIZATIONS="1",  # they compile in a third of the time
        )
        for i in range(processes)
    ]


def finish_job(job: list[subprocess.Popen], timeout: float = 400) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each process; none of them outlives the test."""
    with ThreadPoolExecutor(len(job)) as pool:
        try:
            outs = list(pool.map(lambda p: p.communicate(timeout=timeout), job))
        finally:
            for process in job:
                process.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(job, outs, strict=True)]


def run_binary(module: str, *args: str, devices: int | None = None) -> subprocess.CompletedProcess:
    process = start(module, *args, devices=devices)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(args, process.returncode, out, err)
