"""The measurements of `benchmarks.data`; no flags here, so that tests import them."""

import concurrent.futures
import itertools
import multiprocessing
import os
import pathlib
import statistics
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

SHAPES = ((1024, 32), (64, 12), (64, 256))  # (length, batch size); (64, 12) is shakespeare_char's
CORPUS_TOKENS, VOCAB_SIZE, DOCUMENT_TOKENS = 100_000_000, 32_000, 500


def random_corpus(folder: str, corpus_tokens: int):
    """Random tokens in a memory-mapped file, cut into documents at random places."""
    from llm_jax.data.tokens import Tokens

    rng = np.random.default_rng(0)
    path = os.path.join(folder, "tokens.bin")
    if not os.path.exists(path):
        rng.integers(0, VOCAB_SIZE, corpus_tokens).astype("<u2").tofile(path)
    offsets = random_offsets(corpus_tokens, corpus_tokens // DOCUMENT_TOKENS)
    half = corpus_tokens // 2  # two shards, as any corpus above the size of a shard has several
    shards = [np.memmap(path, "<u2", "r", 0, half), np.memmap(path, "<u2", "r", 2 * half, half)]
    return Tokens(shards, offsets, vocab_size=VOCAB_SIZE)


def random_offsets(corpus_tokens: int, documents: int) -> np.ndarray:
    """Where about so many documents start, and the end."""
    cuts = np.random.default_rng(1).integers(1, corpus_tokens, documents - 1)
    return np.unique(np.concatenate([[0, corpus_tokens], cuts]))


def measure_speeds(
    repeats: int,
    seconds: float,
    folder: str,
    corpus_tokens: int = CORPUS_TOKENS,
    shapes: Sequence[tuple[int, int]] = SHAPES,
) -> list[dict]:
    """Tokens/s of `batch(step)` and of the prefetching iterator, for each packing and shape."""
    from llm_jax.data.loader import make_loader
    from llm_jax.data.mixture import Component

    tokens = random_corpus(folder, corpus_tokens)
    lengths = np.random.default_rng(0).integers(1, 9, VOCAB_SIZE).astype(np.int32)
    rows = []
    for packing, isolate, (length, batch_size) in itertools.product(
        ("split", "first_fit", "pad"), (True, False), shapes
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


def measure_memory(megabytes: int, folder: str, batches: int = 1000) -> dict:
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
        loaded = in_fresh_process(_load, folder, batches)
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


def _load(folder: str, batches: int) -> None:
    from llm_jax.data.loader import eval_batches, make_loader
    from llm_jax.data.mixture import Component
    from llm_jax.data.tokens import open_

    train, held_out = (open_(os.path.join(folder, part)) for part in ("train", "eval"))
    lengths = np.ones(train.vocab_size, np.int32)
    loader = make_loader(
        [Component("x", train)], length=1024, batch_size=32, steps=batches, token_lengths=lengths
    )
    for _ in loader:
        pass
    for _ in itertools.islice(
        eval_batches(held_out, length=1024, batch_size=32, token_lengths=lengths), 100
    ):
        pass


def measure_tokenizers(kinds: Sequence[str], megabytes: float, vocab_size: int) -> list[dict]:
    """MB/s and tokens/s of encoding the embedded corpus on one core, for each kind of tokenizer."""
    return on_one_core(_encode_with_each, kinds, megabytes, vocab_size)


def _encode_with_each(kinds: Sequence[str], megabytes: float, vocab_size: int) -> list[dict]:
    from llm_jax import corpus
    from llm_jax.tokenizers.training import cut

    texts, size = [], 0
    for part in itertools.chain.from_iterable(cut(t) for _, t in corpus.documents("docs")):
        if size >= megabytes * 1e6:
            break
        texts.append(part)
        size += len(part.encode())
    return [_encode(kind, texts, size, vocab_size) for kind in kinds]


def _encode(kind: str, texts: list[str], size: int, vocab_size: int) -> dict:
    from llm_jax import tokenizers

    start = time.perf_counter()
    tokenizer = tokenizers.train(kind, texts, vocab_size=vocab_size)
    trained = time.perf_counter() - start
    tokenizer.encode_batch(texts[:2])  # what a library sets up once is not counted
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        ids = tokenizer.encode_batch(texts)
        seconds.append(time.perf_counter() - start)
    tokens, median = sum(map(len, ids)), statistics.median(seconds)
    return {
        "kind": kind,
        "vocab_size": tokenizer.vocab_size,
        "megabytes": round(size / 1e6, 2),
        "train_seconds": round(trained, 2),
        "megabytes_per_second": round(size / 1e6 / median, 2),
        "lowest": round(size / 1e6 / max(seconds), 2),
        "highest": round(size / 1e6 / min(seconds), 2),
        "million_tokens_per_second": round(tokens / 1e6 / median, 3),
        "bytes_per_token": round(size / tokens, 3),
    }


def measure_packing(
    documents: int, seconds: float, folder: str, corpus_tokens: int = CORPUS_TOKENS
) -> list[dict]:
    """Seconds to plan so many documents and tokens/s of making rows, on one core, per packing."""
    return on_one_core(_pack_each, documents, seconds, folder, corpus_tokens)


def _pack_each(documents: int, seconds: float, folder: str, corpus_tokens: int) -> list[dict]:
    tokens = random_corpus(folder, corpus_tokens)
    return [_pack(kind, tokens, documents, seconds) for kind in ("split", "first_fit", "pad")]


def _pack(kind: str, tokens, documents: int, seconds: float) -> dict:
    from llm_jax.data.packing import make_plan, packed_rows, split_rows

    (length, batch_size), rng = SHAPES[0], np.random.default_rng(0)
    planning = None
    if kind == "split":
        count = tokens.total // length
        rows = lambda at: split_rows(tokens, at * length, length, isolate=True)  # noqa: E731
        used = 1.0
    else:
        # A plan is made from the bounds of the documents alone: no tokens are needed for many.
        many = types.SimpleNamespace(
            branches=None, offsets=random_offsets(documents * DOCUMENT_TOKENS, documents)
        )
        start = time.perf_counter()
        make_plan(many, kind, length)
        planning = round(time.perf_counter() - start, 3)
        plan = make_plan(tokens, kind, length)
        count, used = len(plan), plan.utilisation
        rows = lambda at: packed_rows(tokens, plan, at, isolate=True)  # noqa: E731
    batches = (rows(rng.integers(0, count, batch_size)) for _ in itertools.count())
    rates = [_rate(batches, seconds) * length * batch_size / 1e6 for _ in range(3)]
    return {
        "packing": kind,
        "length": length,
        "batch_size": batch_size,
        "million_tokens_per_second": round(statistics.median(rates), 2),
        "lowest": round(min(rates), 2),
        "highest": round(max(rates), 2),
        "utilisation": round(used, 4),
        "planned_documents": documents,
        "plan_seconds": planning,
    }


def on_one_core(function: Callable, *args: Any) -> Any:
    """Result of a function in a process of its own that one core has to do for."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_pinned, function, *args).result()


def _pinned(function: Callable, *args: Any) -> Any:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return function(*args)


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
