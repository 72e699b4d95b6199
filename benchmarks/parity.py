r"""The same training run on every mesh, against one device.

    python -m benchmarks.parity --output=benchmarks/results/parity.json
    python -m benchmarks.parity --only=context,stage,experts/2/

A decoder with random parameters learns for 30 steps at learning rate 1e-3, dense and with experts,
on 8 virtual CPU devices in 1, 2 or 4 processes (real ones, which talk through gloo). Of each layout
of the devices the table says how far it is from one device, as the largest relative difference: of
the losses of all steps; of the first step's gradient norm; and of the loss of one more step, after
a checkpoint of step 30, saved on another layout, was restored on this one. Exits with code 1 where
a difference is above its tolerance or a step was skipped (bad_steps). About 20 minutes on 2 cores.
"""

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from typing import NamedTuple

from absl import flags

from experiments.cli import run_main

OUTPUT = flags.DEFINE_string("output", "", "JSON file to write; empty: none.")
ONLY = flags.DEFINE_list("only", [], "Layouts whose name has one of these words; empty: all.")
FOLDER = flags.DEFINE_string(
    "folder", "", "Keeps checkpoints and finished layouts; with it a second run goes on."
)
WORKER = flags.DEFINE_string("worker", "", "Internal: a job of layouts, as JSON.")

STEPS, ROWS, LENGTH, VOCABULARY, DEVICES = 30, 16, 64, 256, 8
# Largest relative differences. Sums over data, fsdp and tensor have as many terms as on one device
# in another order; ring attention, the pipeline and the dispatch to experts also compute otherwise.
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-3}
OTHERWISE = 2e-6
GRADIENT = {"float32": 2e-6, "bfloat16": 1e-2}
MODELS = {
    "dense": {},
    "experts": {"model.moe.n_experts": 8, "model.moe.d_ff": 64},
}
SAVED_ON = {
    "dense": "fsdp=4 tensor=2",
    "experts": "fsdp=2 expert=4",
}  # where the checkpoint is made


class Layout(NamedTuple):
    """A mesh, how many processes hold its devices, and what else the run changes."""

    model: str
    mesh: str  # "data=2 fsdp=4"
    processes: int = 1
    dtype: str = "float32"
    changes: dict = {}  # noqa: RUF012

    @property
    def name(self) -> str:
        """Unique among LAYOUTS."""
        more = "".join(f" {k.split('.')[-1]}={v}" for k, v in self.changes.items())
        kind = f"{self.model} {self.dtype}" if self.dtype != "float32" else self.model
        return f"{kind}/{self.processes}/{self.mesh}{more}"

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> size."""
        return {k: int(v) for k, _, v in (pair.partition("=") for pair in self.mesh.split())}

    @property
    def tolerance(self) -> float:
        """Of the losses."""
        computed_otherwise = {"context", "stage", "expert"} & self.sizes.keys()
        if self.dtype == "float32" and computed_otherwise:
            return OTHERWISE
        return TOLERANCE[self.dtype]


def _layouts() -> list[Layout]:
    dense = [
        *("data=8", "fsdp=8", "stage=8", "context=8", "tensor=8"),
        *("data=2 fsdp=4", "fsdp=4 tensor=2", "data=2 fsdp=2 tensor=2"),
        *("data=2 context=4", "fsdp=2 context=2 tensor=2"),
        *("data=2 stage=4", "fsdp=2 stage=2 tensor=2", "stage=2 context=2 tensor=2"),
    ]
    experts = [
        *("data=8", "fsdp=8", "expert=8", "tensor=8"),
        *("fsdp=2 expert=4", "data=2 expert=2 tensor=2", "expert=2 context=2 tensor=2"),
        "stage=2 expert=4",
    ]
    out = [Layout("dense", mesh) for mesh in dense]
    out.append(Layout("dense", "fsdp=2 stage=4", changes={"model.pipeline_turns": 2}))
    out.append(Layout("dense", "fsdp=4 stage=2", changes={"mesh.slices": 2}))
    out += [Layout("experts", mesh) for mesh in experts]
    # Room for all tokens at one expert: nothing is dropped.
    roomy = {"model.moe.dispatch": "all_to_all", "model.moe.capacity_factor": 8.0}
    out.append(Layout("experts", "data=2 expert=4", changes=roomy))
    for mesh in ("fsdp=8", "tensor=8", "data=2 fsdp=2 tensor=2", "context=8", "stage=2 fsdp=4"):
        out.append(Layout("dense", mesh, 2))
    out.append(Layout("experts", "fsdp=2 expert=4", 2))
    for mesh in ("fsdp=8", "data=2 tensor=4", "stage=4 tensor=2"):
        out.append(Layout("dense", mesh, 4))
    out.append(Layout("experts", "fsdp=2 expert=2 tensor=2", 4))
    for mesh in ("data=2 fsdp=2 tensor=2", "context=8", "stage=4 fsdp=2"):
        out.append(Layout("dense", mesh, dtype="bfloat16"))
    out.append(Layout("experts", "fsdp=2 expert=4", dtype="bfloat16"))
    return out


LAYOUTS = _layouts()


def config(layout: Layout):
    """The frozen config of a layout's run."""
    from llm_jax import config as configs

    cfg = configs.TrainConfig(batch_size=ROWS, length=LENGTH, steps=STEPS + 1)
    values = {
        "model.d_model": 64,
        "model.n_layers": 8,
        "model.n_heads": 8,
        "model.d_ff": 128,
        "model.dtype": layout.dtype,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 3,
        "checkpoint.asynchronous": False,
        "mesh.data": 1,
        **{f"mesh.{axis}": n for axis, n in layout.sizes.items()},
        **MODELS[layout.model],
        **layout.changes,
    }
    configs.override(cfg, values)
    configs.resolve_model(cfg.model, vocab_size=VOCABULARY, length=LENGTH, backend="cpu")
    configs.validate(cfg)
    return configs.freeze(cfg)


def batch(step: int):
    """The whole batch of a step: arithmetic sequences with a stride of each row's own."""
    import numpy as np

    from llm_jax.types import Batch

    rng = np.random.default_rng(step)
    start, stride = rng.integers(0, VOCABULARY, (ROWS, 1)), rng.integers(1, 5, (ROWS, 1))
    tokens = ((start + stride * np.arange(LENGTH + 1)) % VOCABULARY).astype(np.int32)
    noise = rng.random(tokens.shape) < 0.05
    tokens = np.where(noise, rng.integers(0, VOCABULARY, tokens.shape), tokens).astype(np.int32)
    weights = np.ones((ROWS, LENGTH), np.float32)
    return Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=weights)


class Trainer:
    """A layout's program, and the batches that its processes need."""

    def __init__(self, layout: Layout, devices: list):
        from llm_jax import sharding
        from llm_jax.train.program import build

        self.cfg = config(layout)
        self.mesh = sharding.make_mesh(self.cfg.mesh, devices)
        self.program = build(self.cfg, self.mesh)

    def step(self, state, step: int):
        """(state, metrics) of one step on its batch."""
        import jax
        import numpy as np

        from llm_jax.train import distributed
        from llm_jax.train.program import put

        blocks, count = distributed.row_blocks(self.mesh)
        mine = np.arange(ROWS).reshape(count, -1)[list(blocks)].reshape(-1)
        rows = put(jax.tree.map(lambda x: x[mine], batch(step)), self.mesh, 1)
        return self.program.step(state, rows)

    def train(self) -> tuple[dict, object]:
        """Losses and gradient norms of STEPS steps from the initial state, and the last state."""
        import jax

        state, losses, norms = self.program.init(jax.random.key(0)), [], []
        for step in range(STEPS):
            state, metrics = self.step(state, step)
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
            if int(metrics["bad_steps"]):
                raise RuntimeError(f"step {step} was skipped: its numbers are not finite")
        return {"losses": losses, "gradient_norm": norms[0]}, state

    def checkpoints(self, folder: str):
        """The checkpoints of a run in `folder`."""
        from llm_jax.tokenizers.simple import Bytes
        from llm_jax.train.checkpoint import Checkpoints

        return Checkpoints(folder, self.cfg, Bytes(()), {"made by": "benchmarks.parity"})

    def after(self, folder: str) -> float:
        """The loss of the step after a restored checkpoint."""
        from llm_jax.train.program import abstract_state

        saved = self.checkpoints(folder)
        state = saved.restore(abstract_state(self.program), STEPS)
        saved.close()
        return float(self.step(state, STEPS)[1]["loss"])


def work(job: dict) -> None:
    """One process of a job: runs its layouts and appends their results to a file, a line each."""
    import jax

    n = job["processes"]
    jax.config.update("jax_num_cpu_devices", DEVICES // n)
    from llm_jax.train import distributed

    if n > 1:
        distributed.start(job["address"], n, job["process"])
    for values in job["layouts"]:
        layout = Layout(*values)
        folder = os.path.join(job["folder"], f"{layout.model} {layout.dtype}")
        saves = layout._replace(processes=1, changes={}).mesh == SAVED_ON[layout.model]
        begin = time.perf_counter()
        try:
            size = math.prod(layout.sizes.values())
            trainer = Trainer(layout, jax.devices()[:size])
            with jax.set_mesh(trainer.mesh):
                result, state = trainer.train()
                if saves and n == 1 and not os.path.exists(folder):
                    saved = trainer.checkpoints(folder)
                    saved.save(state, STEPS, None, wait=True)
                    saved.close()
                if os.path.exists(folder):
                    result["after_restore"] = trainer.after(folder)
        except Exception:
            result = {"error": traceback.format_exc()}
        if job["process"] == 0:
            line = {"name": layout.name, "seconds": time.perf_counter() - begin, **result}
            with open(job["results"], "a") as f:
                f.write(json.dumps(line) + "\n")
    distributed.finish()


def finished(results: str) -> dict[str, dict]:
    """Name -> result of the layouts in a file of results."""
    if not os.path.exists(results):
        return {}
    with open(results) as f:
        return {line["name"]: line for line in map(json.loads, f)}


def run(layouts: list[Layout], folder: str) -> dict[str, dict]:
    """Name -> result of layouts of one process count, in processes of their own."""
    n = layouts[0].processes
    results = os.path.join(folder, f"results-{n}.jsonl")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    job = {"processes": n, "address": address, "folder": folder, "results": results}
    # XLA's pool has a thread a core by default (NPROC). Devices that wait for each other in different
    # collectives, of a pipeline and of its weights, can take all of them, and XLA ends the process.
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "48"}
    env.pop("XLA_FLAGS", None)
    # Should it happen all the same: what is missing is tried again, twice.
    for _ in range(3):
        found = finished(results)
        missing = [layout for layout in layouts if layout.name not in found]
        if not missing:
            return found
        processes = []
        for i in range(n):
            worker = json.dumps({**job, "process": i, "layouts": [tuple(x) for x in missing]})
            command = [sys.executable, "-m", "benchmarks.parity", f"--worker={worker}"]
            log = open(os.path.join(folder, f"worker-{n}-{i}.log"), "w")
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        codes = [p.wait() for p in processes]
        found = finished(results)
    for layout in layouts:
        if layout.name not in found:
            with open(os.path.join(folder, f"worker-{n}-0.log")) as f:
                found[layout.name] = {"error": f"exit codes {codes}\n{f.read()[-3000:]}"}
    return found


def compare(layout: Layout, result: dict, reference: dict) -> dict:
    """The row of the table."""
    row = {
        "model": layout.model,
        "dtype": layout.dtype,
        "processes": layout.processes,
        "mesh": layout.mesh,
        "changes": layout.changes,
    }
    if "error" in result:
        return {**row, "ok": False, "error": result["error"]}

    def relative(a: float, b: float) -> float:
        return abs(a - b) / abs(b)

    pairs = zip(result["losses"], reference["losses"], strict=True)
    row |= {
        "loss_difference": max(relative(a, b) for a, b in pairs),
        "gradient_difference": relative(result["gradient_norm"], reference["gradient_norm"]),
        "restored_difference": relative(result["after_restore"], reference["after_restore"]),
        "tolerance": layout.tolerance,
        "bad_steps": 0,
        "first_loss": result["losses"][0],
        "last_loss": result["losses"][-1],
        "seconds": round(result["seconds"], 1),
    }
    row["ok"] = (
        row["loss_difference"] <= layout.tolerance
        and row["gradient_difference"] <= GRADIENT[layout.dtype]
        and row["restored_difference"] <= layout.tolerance
    )
    return row


def table(rows: list[dict]) -> str:
    """The rows as markdown."""
    lines = [
        "| model | processes | mesh | loss | first gradient | after restore | tolerance |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        more = "".join(f" {k.split('.')[-1]}={v}" for k, v in row["changes"].items())
        what = f"{row['model']} {'bf16' if row['dtype'] == 'bfloat16' else 'fp32'}"
        start = f"| {what} | {row['processes']} | {row['mesh']}{more} |"
        if "error" in row:
            last = row["error"].strip().splitlines()[-1]
            lines.append(f"{start} failed: {last} | | | |")
            continue
        numbers = [row[f"{k}_difference"] for k in ("loss", "gradient", "restored")]
        mark = "" if row["ok"] else " **missed**"
        cells = " | ".join(f"{n:.1e}" for n in numbers)
        lines.append(f"{start} {cells} | {row['tolerance']:.0e}{mark} |")
    return "\n".join(lines)


def main(_) -> None:
    if WORKER.value:
        return work(json.loads(WORKER.value))
    layouts = [x for x in LAYOUTS if not ONLY.value or any(word in x.name for word in ONLY.value)]
    if not layouts:
        raise ValueError(f"--only={','.join(ONLY.value)} names no layout")
    kinds = dict.fromkeys((x.model, x.dtype) for x in layouts)
    needed = []  # the reference of each kind, and where its checkpoint is made
    for model, dtype in kinds:
        needed += [Layout(model, SAVED_ON[model], 1, dtype), Layout(model, "data=1", 1, dtype)]
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        folder = FOLDER.value or stack.enter_context(tempfile.TemporaryDirectory())
        results = {}
        for n in sorted({1, *(x.processes for x in layouts)}):
            mine = [x for x in layouts if x.processes == n]
            if n == 1:
                mine = needed + [x for x in mine if x not in needed]
            results |= run(mine, folder)
    rows = []
    for layout in layouts:
        reference = results[Layout(layout.model, "data=1", 1, layout.dtype).name]
        if "error" in reference:
            raise RuntimeError(reference["error"])
        rows.append(compare(layout, results[layout.name], reference))
    print(table(rows))
    if OUTPUT.value:
        report = {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
            },
            "run": {"steps": STEPS, "rows": ROWS, "length": LENGTH, "devices": DEVICES},
            "minutes": round((time.perf_counter() - begin) / 60, 1),
            "rows": rows,
        }
        path = pathlib.Path(OUTPUT.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
    missed = [row for row in rows if not row["ok"]]
    for row in missed:
        print(row.get("error", ""), file=sys.stderr)
    if missed:
        raise ValueError(f"{len(missed)} of {len(rows)} layouts missed their tolerance")


if __name__ == "__main__":
    run_main(main)
