"""What a run measures of itself: speed, FLOPs, spikes; and where the numbers go."""

import functools
import json
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import chips
from llm_jax.config import ModelConfig
from llm_jax.nn.params import ParamSpec, count, flatten, unflatten
from llm_jax.types import PyTree


def peak_flops(device: jax.Device) -> float:
    """FLOP/s that MFU is measured against: the data sheet's, or for a kind that is not listed
    (every CPU) the best of a few large float32 matmuls on it."""
    chip = chips.by_kind(device.device_kind)
    if chip is not None and chip.platform != "cpu":
        return chip.peak_flops / chip.devices
    return _measured_flops(device)


@functools.cache
def _measured_flops(device: jax.Device) -> float:
    n = 2048  # smaller ones do not keep all cores busy: a step then seems to run above the peak
    x = jax.device_put(jnp.ones((n, n), jnp.float32), device)
    f = jax.jit(jnp.matmul)
    f(x, x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        f(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    # Virtual devices share one machine.
    return 2 * n**3 / min(times) / len(jax.local_devices(backend=device.platform))


def is_routed(spec: ParamSpec) -> bool:
    """Whether a parameter belongs to one of many experts each (the router belongs to all)."""
    return "expert" in spec.axes[:-1]


def active_count(specs: PyTree, cfg: ModelConfig, *, embeddings: bool = True) -> float:
    """Parameters that one token meets: of the routed experts, top_k of n_experts. Counted as
    `nn.params.count` does."""
    routed = {path: s for path, s in flatten(specs).items() if is_routed(s)}
    share = cfg.moe.top_k / cfg.moe.n_experts if routed else 1.0
    return count(specs, embeddings=embeddings) - (1 - share) * count(unflatten(routed))


def train_flops_per_token(
    specs: PyTree, cfg: ModelConfig, length: int, trained: PyTree | None = None
) -> float:
    """FLOPs of forward and backward per token: 6 N + 12 M H Dh L (Chowdhery et al. 2022).

    N counts what a token is multiplied with: all parameters but the embedding tables, plus the
    output head; of a layer's routed experts only the top_k that a token goes through. The
    attention term is the full one, without the causal half. Of a tuned model, whose `trained` specs
    are given, the frozen parameters have no gradient of their own: 4 N, and 2 or 6 for each trained
    one, which is the model's own or new.
    """
    head = -(-cfg.vocab_size // cfg.vocab_multiple) * cfg.vocab_multiple * cfg.d_model
    n = active_count(specs, cfg, embeddings=False) + head
    attention = 12 * cfg.n_layers * cfg.n_heads * cfg.head_dim * length
    if trained is None:
        return 6 * n + attention
    own = flatten(specs)
    flops = ((2 if path in own else 6) * math.prod(s.shape) for path, s in flatten(trained).items())
    return 4 * n + sum(flops) + attention


def peak_memory() -> int:
    """Bytes that this process has held at most: on its accelerator where the driver counts them,
    the one of its devices that held most; else in the machine's memory."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if found := [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]:
        return max(found)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class SpikeScore:
    """How many standard deviations a loss lies above the mean of the last `window` losses."""

    def __init__(self, window: int = 128):
        self.losses: deque[float] = deque(maxlen=window)

    def __call__(self, loss: float) -> float:
        """The score of `loss`, 0 until there are 16 to compare with; then remembers it."""
        score = 0.0
        if len(self.losses) >= 16:
            score = (loss - float(np.mean(self.losses))) / (float(np.std(self.losses)) + 1e-6)
        if math.isfinite(loss):
            self.losses.append(loss)
        return score if math.isfinite(score) else 0.0


class Throughput:
    """Tokens per second of training alone: evaluation, samples and saving are taken out."""

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self._last, self._steps, self.seconds, self.steps = time.perf_counter(), 0, 0.0, 0

    def step(self, steps: int = 1) -> None:
        """Counts finished steps."""
        self._steps += steps

    def pause(self) -> None:
        """Forgets the time since the last reading; to be called when work other than steps ends."""
        self._last = time.perf_counter()

    def read(self) -> float:
        """Tokens per second since the last reading."""
        now = time.perf_counter()
        seconds, steps = now - self._last, self._steps
        self.seconds, self.steps = self.seconds + seconds, self.steps + steps
        self._last, self._steps = now, 0
        return steps * self.tokens_per_step / max(seconds, 1e-9)


class MetricsLog:
    """metrics.jsonl, one object a line, and TensorBoard events if asked for.

    Lines past `step` are dropped when it opens: a run that resumes writes them again.
    """

    def __init__(self, workdir: Path, *, step: int, tensorboard: bool, active: bool = True):
        self._file = self._events = None
        if not active:
            return
        path = workdir / "metrics.jsonl"
        kept = []
        if step and path.exists():
            for line in path.read_text().splitlines():
                try:
                    kept += [line] if json.loads(line)["step"] <= step else []
                except ValueError:
                    break  # cut off in the middle when the run died
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ImportError(
                    "log.tensorboard=True needs tensorboardX: pip install 'llm_jax[track]'"
                ) from None
            self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, values: dict[str, Any]) -> None:
        """Writes one line; `values` has "step" first."""
        if self._file is None:
            return
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in clean.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._events.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


class Progress:
    """A progress bar on a terminal; elsewhere a line of text every `seconds`."""

    def __init__(self, total: int, start: int, *, active: bool = True, seconds: float = 15.0):
        import sys

        self._bar, self._active, self._seconds = None, active, seconds
        self._total, self._start, self._begin = total, start, time.perf_counter()
        self._printed = 0.0
        if active and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def update(self, step: int, fields: Callable[[], dict[str, str]]) -> None:
        """Shows that `step` steps are done."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix(fields(), refresh=False)
            return
        now = time.perf_counter()
        if now - self._printed >= self._seconds or step == self._total:
            self._printed = now
            rate = (step - self._start) / max(now - self._begin, 1e-9)
            left = (self._total - step) / max(rate, 1e-9)
            shown = "  ".join(f"{k} {v}" for k, v in fields().items())
            print(f"step {step}/{self._total}  {shown}  {left:.0f} s left", flush=True)

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
