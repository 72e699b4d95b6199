r"""Speed of the loader, and memory of preparing and loading text of growing size.

    python -m benchmarks.data --output=benchmarks/results/data.json

Speed: one process, all leaves of a Batch (bytes included), rows in random order out of a
memory-mapped corpus with documents of 500 tokens on average; median over repeats, and the range.
Memory: text of the embedded corpus over and over in one file, tokenised into bytes, then 1,000
shuffled batches. What counts is the process's own memory (RssAnon); pages of mapped shards
(RssFile) belong to the page cache, and the system takes them back when it needs them. Linux only.
About 4 minutes on 2 cores, and 6 GB of disk in the temporary folder for the 2,000 MB of text.
"""

import concurrent.futures
import datetime
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
from absl import flags

from experiments.cli import run_main

OUTPUT = flags.DEFINE_string("output", None, "JSON file to write; none: only print.")
MEGABYTES = flags.DEFINE_list(
    "megabytes", ["100", "1000", "2000"], "Sizes of the text; empty: skip."
)
REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each speed; 0: skip.", lower_bound=0)
SECONDS = flags.DEFINE_float("seconds", 1.0, "Length of each measurement.")

SHAPES = ((1024, 32), (64, 12), (64, 256))  # (length, batch size); (64, 12) is shakespeare_char's
CORPUS_TOKENS, VOCAB_SIZE, DOCUMENT_TOKENS = 100_000_000, 32_000, 500


def measure_speeds(repeats: int, seconds: float, folder: str) -> list[dict]:
    """Tokens/s of `batch(step)` and of the prefetching iterator, for each packing and shape."""
    from llm_jax.data.loader import make_loader
    from llm_jax.data.mixture import Component
    from llm_jax.data.tokens import Tokens

    rng = np.random.default_rng(0)
    path = os.path.join(folder, "tokens.bin")
    rng.integers(0, VOCAB_SIZE, CORPUS_TOKENS).astype("<u2").tofile(path)
    cuts = rng.choice(CORPUS_TOKENS, CORPUS_TOKENS // DOCUMENT_TOKENS, replace=False)
    offsets = np.unique(np.concatenate([[0, CORPUS_TOKENS], cuts]))
    half = CORPUS_TOKENS // 2  # two shards, as any corpus above the size of a shard has several
    shards = [np.memmap(path, "<u2", "r", 0, half), np.memmap(path, "<u2", "r", 2 * half, half)]
    tokens = Tokens(shards, offsets, vocab_size=VOCAB_SIZE)
    lengths = rng.integers(1, 9, VOCAB_SIZE).astype(np.int32)
    rows = []
    for packing, isolate, (length, batch_size) in itertools.product(
        ("split", "first_fit", "pad"), (True, False), SHAPES
    ):
        start = time.perf_counter()
        loader = make_loader(
            [Component("x", tokens)],
            length=length,
            batch_size=batch_size,
            steps=10_000_000,
            packing=packing,
            isolate_documents=isolate,
            token_lengths=lengths,
        )
        planned = time.perf_counter() - start
        calls = {"batch": map(loader.batch, itertools.count()), "iterator": loader.iterate()}
        timed = {how: [_rate(made, seconds) for _ in range(repeats)] for how, made in calls.items()}
        for how, rates in timed.items():
            millions = [rate * length * batch_size / 1e6 for rate in rates]
            rows.append(
                {
                    "packing": packing,
                    "isolate_documents": isolate,
                    "length": length,
                    "batch_size": batch_size,
                    "how": how,
                    "million_tokens_per_second": round(statistics.median(millions), 2),
                    "lowest": round(min(millions), 2),
                    "highest": round(max(millions), 2),
                    "utilisation": round(loader.utilisation["x"], 4),
                    "plan_seconds": round(planned, 2),
                }
            )
    return rows


def _rate(batches: Iterator, seconds: float) -> float:
    """Batches per second."""
    next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    return count / (time.perf_counter() - start)


def measure_memory(megabytes: int, folder: str) -> dict:
    """Peak memory, MB, of preparing and of loading a text file of that size."""
    from llm_jax import corpus

    text = "".join(text for _, text in corpus.documents("docs")).encode()
    path = os.path.join(folder, "text.txt")
    with open(path, "wb") as f:
        left = megabytes * 1_000_000
        while left > 0:
            left -= f.write(text[:left])
    try:
        prepared = in_fresh_process(_prepare, path, folder)
        loaded = in_fresh_process(_load, path, folder)
    finally:
        for file in pathlib.Path(folder).rglob("*.bin"):
            file.unlink()
        os.remove(path)
    return {
        "megabytes": megabytes,
        "prepare": prepared,
        "load": loaded,
        "prepare_megabytes_per_second": round(megabytes / prepared["seconds"], 1),
    }


def _prepare(path: str, folder: str) -> None:
    from llm_jax.config import DataConfig, TokenizerConfig
    from llm_jax.data.prepare import prepare_in

    prepare_in(folder, DataConfig(inputs=(path,)), TokenizerConfig(kind="byte"), verify=False)


def _load(path: str, folder: str) -> None:
    from llm_jax.data.loader import eval_batches, make_loader
    from llm_jax.data.mixture import Component
    from llm_jax.data.tokens import open_

    train, held_out = (open_(os.path.join(folder, part)) for part in ("train", "eval"))
    lengths = np.ones(train.vocab_size, np.int32)
    loader = make_loader(
        [Component("x", train)], length=1024, batch_size=32, steps=1000, token_lengths=lengths
    )
    for _ in loader:
        pass
    for _ in itertools.islice(
        eval_batches(held_out, length=1024, batch_size=32, token_lengths=lengths), 100
    ):
        pass


def in_fresh_process(function: Callable, *args) -> dict:
    """Runs a function in a process of its own; seconds and peaks of RssAnon and RssFile in MB."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_watched, function, *args).result()


def _watched(function: Callable, *args) -> dict:
    peaks, done = {"RssAnon": 0, "RssFile": 0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            for line in pathlib.Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]))

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    try:
        function(*args)
    finally:
        done.set()
        thread.join()
    seconds = round(time.perf_counter() - start, 2)
    return {"seconds": seconds} | {k: round(v / 1024, 1) for k, v in peaks.items()}


def cpu_model() -> str:
    """The name of this machine's processor."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(result: dict) -> str:
    """The result as text."""
    lines = []
    for r in result["speed"]:
        isolated = "isolated" if r["isolate_documents"] else "joined"
        lines.append(
            f"{r['packing']:9} {isolated:8} {r['length']:5} x {r['batch_size']:<4} {r['how']:9}"
            f"{r['million_tokens_per_second']:8.1f} M tokens/s "
            f"({r['lowest']:.1f} to {r['highest']:.1f})"
        )
    for r in result["memory"]:
        lines.append(
            f"{r['megabytes']:6,} MB of text: prepare {r['prepare']['RssAnon']:.0f} MB in "
            f"{r['prepare']['seconds']:.0f} s, load {r['load']['RssAnon']:.0f} MB "
            f"(+ {r['load']['RssFile']:.0f} MB of mapped files)"
        )
    return "\n".join(lines)


def main(_) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "grain", "jax")}
    result = {
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()} | versions,
        "device": {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0))},
        "config": {
            "corpus_tokens": CORPUS_TOKENS,
            "document_tokens": DOCUMENT_TOKENS,
            "vocab_size": VOCAB_SIZE,
            "repeats": REPEATS.value,
            "seconds": SECONDS.value,
        },
        "speed": [],
        "memory": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        if REPEATS.value:
            result["speed"] = measure_speeds(REPEATS.value, SECONDS.value, folder)
        for megabytes in MEGABYTES.value:
            inner = os.path.join(folder, megabytes)
            os.makedirs(inner)
            result["memory"].append(measure_memory(int(megabytes), inner))
    print(table(result))
    if OUTPUT.value:
        path = pathlib.Path(OUTPUT.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
