"""The training loop: data, state, steps, evaluation, checkpoints and what a run leaves behind.

Resume order: (1) data and tokenizer are prepared or found again, (2) the config is resolved and
frozen, (3) mesh and program, (4) the loader, whose batch is a function of (seed, step) alone,
(5) the state: the last checkpoint of this run, or the parameters of `checkpoint.init_from`, or a
fresh start, (6) steps from where the state stands.

With several processes each runs this same code on its share of the rows; process 0 alone writes and
prints, and all of them stop at the same step.
"""

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax import config as configs
from llm_jax import mesh as mesh_choice
from llm_jax import models, sharding
from llm_jax.config import TrainConfig
from llm_jax.data.prepare import Corpus
from llm_jax.models import heads
from llm_jax.nn.params import count, flatten
from llm_jax.train import base_model, checkpoint, distributed, environment, inputs, summary
from llm_jax.train.checkpoint import Checkpoints
from llm_jax.train.measures import Measures
from llm_jax.train.metrics import (
    MetricsLog,
    Progress,
    SpikeScore,
    Throughput,
    peak_flops,
    train_flops_per_token,
)
from llm_jax.train.profile import Window
from llm_jax.train.program import Program, abstract_state, build, put
from llm_jax.train.step import readable
from llm_jax.train.task import MakeTask, Task
from llm_jax.train.watchdog import Watchdog
from llm_jax.types import TrainState

# (config, mesh, peak FLOP/s of the mesh, summary) -> rows of a table
Comparison = Callable[[TrainConfig, jax.sharding.Mesh, float, dict], list[dict[str, Any]]]
SIGTERM_EXIT = 143  # what a shell reports for a process that SIGTERM ended


class Interrupted(SystemExit):
    """The run was asked to stop, and saved; running the same command again goes on."""


class NonFiniteError(ValueError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def train(
    cfg: TrainConfig,
    workdir: str | Path,
    *,
    dry_run: bool = False,
    debug: bool = False,
    devices: Sequence[jax.Device] | None = None,
    compare: Comparison | None = None,
    task: MakeTask | None = None,
) -> dict[str, Any]:
    """Runs or resumes the training that `cfg` describes in `workdir`; returns its summary.

    `cfg` is resolved and frozen here. `dry_run` prepares everything, prints what would run and
    compiles nothing. `debug` runs without jit and without scan and stops at the first NaN.
    `devices` are those of the mesh (default: all). `compare` makes rows for the report from the
    config, the mesh, a device's peak FLOP/s and the summary, such as `scaling.plan.report_rows`.
    `task` makes what is learned where it is not language modelling.

    Raises:
      ValueError, OSError: what the user can mend, in one line.
      Interrupted: after SIGTERM or Ctrl-C, once the state is saved.
    """
    begin = time.perf_counter()
    if "://" in str(workdir):
        raise ValueError(
            f"--workdir={workdir}: a run lives in folders; mount the bucket (gcsfuse, NFS) on all "
            "machines and give the mounted folder"
        )
    workdir = Path(workdir)
    environment.check_accelerator()
    environment.use_compilation_cache(cfg.log.compilation_cache)
    workdir.mkdir(parents=True, exist_ok=True)
    distributed.check_shared(workdir)
    if debug:
        cfg.model.scan = False
        jax.config.update("jax_debug_nans", True)
        jax.config.update("jax_disable_jit", True)

    if cfg.peft.method != "none" and not cfg.checkpoint.init_from:
        raise ValueError(
            f"peft.method={cfg.peft.method} tunes a model that is there already; name it with "
            "--init_from (checkpoint.init_from)"
        )
    if cfg.checkpoint.init_from and not cfg.tokenizer.path:
        tokenizer = base_model.load_tokenizer(cfg.checkpoint.init_from)
        cfg.tokenizer.path = base_model.keep_tokenizer(tokenizer, workdir)
    if cfg.data.format == "preference" and task is None:
        raise ValueError(
            "data.format=preference: answers to compare are learned from by experiments.reward and "
            "experiments.dpo"
        )
    configs.validate(cfg)
    corpus = inputs.prepare(cfg, workdir)
    configs.resolve_model(
        cfg.model,
        vocab_size=corpus.tokenizer.vocab_size,
        length=cfg.length,
        backend=jax.default_backend(),
    )
    if cfg.model.vocab_size < corpus.tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={cfg.model.vocab_size} is smaller than the tokenizer's "
            f"{corpus.tokenizer.vocab_size}; leave it 0 to take the tokenizer's"
        )
    configs.validate(cfg)
    if cfg.mesh.auto:
        _choose_mesh(cfg, devices)
    configs.freeze(cfg)
    mesh = sharding.make_mesh(cfg.mesh, devices)
    peak = peak_flops(mesh.local_devices[0]) * mesh.size
    with jax.set_mesh(mesh):
        loader = corpus.loader(cfg, *distributed.row_blocks(mesh))
        made = task(cfg, mesh, corpus, loader) if task else Task()
        program = build(cfg, mesh, made.loss_fn, evaluates=made.evaluates, beside=made.specs)
        run = _Run(cfg, workdir, corpus, loader, program, made, peak, compare)
        if dry_run:
            return run.describe()
        made.prepare()
        return run.train(begin)


def _choose_mesh(cfg: TrainConfig, devices: Sequence[jax.Device] | None) -> None:
    machine = mesh_choice.machine_of(jax.devices() if devices is None else devices, cfg.mesh.slices)
    n_params = count(models.family(cfg.model.family).specs(cfg.model))
    cfg.mesh, reasons = mesh_choice.choose(cfg, n_params, machine)
    if distributed.is_main():
        print("\n".join(reasons), flush=True)


class _Run:
    """One process's share of a run: the pieces that the loop needs at hand."""

    def __init__(
        self,
        cfg: TrainConfig,
        workdir: Path,
        corpus: Corpus,
        loader: Any,
        program: Program,
        task: Task,
        peak: float,
        compare: Comparison | None,
    ):
        self.cfg, self.workdir, self.corpus, self.loader = cfg, workdir, corpus, loader
        self.program, self.task, self.peak, self.compare = program, task, peak, compare
        self.main = distributed.is_main()
        self.measures = Measures(cfg, workdir, corpus, program, task)
        self.eval_batches = self.measures.batches
        self.tokens_per_step = cfg.batch_size * cfg.length
        tunes = cfg.peft.method != "none"
        self.flops_per_token = train_flops_per_token(
            program.specs, cfg.model, cfg.length, program.tuning.trained if tunes else None
        )
        distributed.check_equal(
            {
                "config": configs.to_dict(cfg),
                "data": self.loader.identity,
                "number of evaluation batches": len(self.eval_batches or ()),
            }
        )

    def describe(self) -> dict[str, Any]:
        """What would run, printed; nothing is compiled."""
        rows = summary.describe(self.cfg, self.program, self.corpus, self.flops_per_token)
        for name, value in rows.items():
            self._say(f"{name:32} {value:,}" if isinstance(value, int) else f"{name:32} {value}")
        return rows

    # The state ---------------------------------------------------------------------------------

    def initial_state(self, checkpoints: Checkpoints) -> TrainState:
        cfg = self.cfg
        key = jax.random.key(cfg.seed)
        # One answer for all: a network file system may show another machine an older folder.
        latest = json.loads(
            distributed.from_main("latest step", lambda: json.dumps(checkpoints.latest()))
        )
        if latest is not None:
            for line in environment.config_changes(
                checkpoint.load_config(checkpoints.directory), cfg
            ):
                self._say(f"note: this run goes on with {line}")
            self._say(f"resuming from step {latest} in {checkpoints.directory}")
            target = abstract_state(self.program)
            if cfg.peft.method != "none":  # the base is not in the checkpoint
                target = target.replace(frozen=self._from_base(key, checkpoints).frozen)
            elif others := self.task.params:  # nor are other models
                target = target.replace(frozen={**target.frozen, **others})
            return checkpoints.restore(target, latest)
        if cfg.checkpoint.init_from:
            self._say(f"starting from the parameters of {cfg.checkpoint.init_from}")
            return self._from_base(key, checkpoints)
        return self.program.init(key, self.task.params)

    def _from_base(self, key: jax.Array, checkpoints: Checkpoints) -> TrainState:
        program, path = self.program, self.cfg.checkpoint.init_from
        asked = (path, base_model.specs_of(path, self.cfg.model))
        if program.tuning.hold is None:
            params = base_model.load_params(*asked, program.mesh)
        else:
            params, base = base_model.load_base(*asked, program.mesh, program.tuning.hold)
            checkpoints.tunes(base)
        params = heads.fitted(params, program.specs, jax.random.fold_in(key, 2))
        return program.start(params, key, self.task.params)

    # The loop ----------------------------------------------------------------------------------

    def train(self, begin: float) -> dict[str, Any]:
        positions = distributed.positions if jax.process_count() > 1 else None
        with Watchdog(self.cfg.log.watchdog_minutes, positions) as watch:
            return self._train(begin, watch)

    def _train(self, begin: float, watch: Watchdog) -> dict[str, Any]:
        cfg, program = self.cfg, self.program
        several = jax.process_count() > 1
        finished = self.workdir / "summary.json"
        checkpoints = Checkpoints(
            self.workdir / "checkpoints",
            cfg,
            self.corpus.tokenizer,
            self.loader.identity,
            beside=self.task.specs,
        )
        state = self.initial_state(checkpoints)
        start = int(state.step)
        if start >= cfg.steps:
            self._say(
                f"this run is finished at step {start}; for more, raise --config.steps or choose another --workdir"
            )
            if finished.exists():
                return json.loads(finished.read_text())
        tokenizer_hash = self.corpus.tokenizer.fingerprint()
        environment.write(self.workdir, cfg, tokenizer_hash, self.loader.identity)
        self.log = MetricsLog(
            self.workdir, step=start, tensorboard=cfg.log.tensorboard, active=self.main
        )
        self.progress = Progress(cfg.steps, start, active=self.main)
        self.speed = Throughput(self.tokens_per_step)
        self.spikes = SpikeScore()
        self.last: dict[str, Any] = {}
        for note in self.measures.notes():
            self._say(f"note: {note}")
        stop = distributed.StopSignals()
        pending = None
        saved = start if start else None
        evaluated: dict[str, float] = {}
        batches = self.loader.iterate(start)
        log = cfg.log
        profile = Window(
            self.workdir / "profile", log.profile_start, log.profile_steps if self.main else 0
        )
        if cfg.eval.at_start and not start and self.eval_batches is not None:
            self.log.write({"step": 0, **self._evaluate(state, watch)})
            self._sample(state, 0, watch)
        self.speed.pause()
        try:
            for step in range(start + 1, cfg.steps + 1):
                watch.mark("step", step)
                profile.before(step)
                rows = self.task.add(next(batches), step - 1)
                batch = put(rows, program.mesh, cfg.accumulation)
                state, metrics = program.step(state, batch)
                hlo = partial(_hlo, program, state, batch)
                if text := profile.after(step, metrics, hlo):
                    self.progress.say(text)
                if pending is not None:
                    # Of the step before this one: the device never waits for the host.
                    self._record(*pending)
                pending = (step, metrics)
                stopping = stop.reached()
                last = step == cfg.steps or stopping
                evaluates = self.eval_batches is not None and (
                    step == cfg.steps or (cfg.eval.every and step % cfg.eval.every == 0)
                )
                saves = last or (cfg.checkpoint.every and step % cfg.checkpoint.every == 0)
                if evaluates or saves or last:
                    jax.block_until_ready(metrics["loss"])
                    rate = self._rate(1)
                    if evaluates:
                        evaluated = self._evaluate(state, watch)
                    self._record(step, metrics, extra=evaluated if evaluates else {}, rate=rate)
                    pending = None
                    if evaluates:
                        self._sample(state, step, watch)
                    if saves:
                        watch.mark("saving step", step)
                        checkpoints.save(
                            state,
                            step,
                            evaluated.get("eval_loss") if evaluates else None,
                            wait=last,
                        )
                        saved = step
                    self.speed.pause()
                if stopping:
                    break
        except NonFiniteError as e:
            checkpoints.save(self._good(state), int(state.step), None, wait=True)
            raise NonFiniteError(
                f"{e}; the last good state is saved in {checkpoints.directory}"
            ) from None
        except BaseException:
            if not several:  # the others are elsewhere: what is being written waits for them
                with contextlib.suppress(OSError):
                    checkpoints.close()  # what is being written in the background is finished
            raise
        finally:
            stop.restore()
            profile.close()
            self.progress.close()
            self.log.close()
        checkpoints.close()
        if stop.asked and int(state.step) < cfg.steps:
            self._say(
                f"stopped by {stop.asked} and saved at step {saved}; run the same command again to go on"
            )
            raise Interrupted(SIGTERM_EXIT)
        if not evaluated and self.eval_batches is not None:
            evaluated = self._evaluate(
                state, watch
            )  # the process died between its last save and here
        return self._finish(state, evaluated, begin)

    def _good(self, state: TrainState) -> TrainState:
        return state.replace(bad_steps=state.bad_steps * 0)

    def _rate(self, steps: int) -> float:
        self.speed.step(steps)
        return self.speed.read()

    def _record(
        self, step: int, metrics: dict, extra: dict | None = None, rate: float | None = None
    ):
        """Reads a finished step's numbers; writes a line where one is due."""
        values = jax.device_get(metrics)
        squares, bad = values.pop("grad_squares"), int(values.pop("bad_steps"))
        values = readable(values)
        if values.pop("weight") == 0:
            raise ValueError(
                f"no target of step {step}'s batch counts (all weights are 0); see data.packing and the data"
            )
        if bad:
            self._bad_step(step, bad, values["loss"], squares)
        spike = self.spikes(values["loss"])
        if rate is None:
            self.speed.step()
        due = step % self.cfg.log.every == 0 or step == 1 or extra or bad
        if due and rate is None:
            rate = self.speed.read()
        if rate is not None:
            self.last = {"tokens_per_second": rate, "mfu": rate * self.flops_per_token / self.peak}
        if due:
            line = {
                "step": step,
                "loss": values.pop("loss"),
                "lr": values.pop("lr"),
                "grad_norm": values.pop("grad_norm"),
                **self.last,
                "spike": spike,
                **{
                    k: v
                    for k, v in values.items()
                    if k != "nll" or self.cfg.z_loss or self.cfg.label_smoothing
                },
                **({"bad_steps": bad} if bad else {}),
                **(extra or {}),
            }
            if "nats_per_byte" in line:
                line["train_bits_per_byte"] = line.pop("nats_per_byte") / float(np.log(2))
            self.log.write(line)
            self.last["loss"] = line["loss"]
            if extra:
                self.progress.say(
                    f"step {step}: "
                    + "  ".join(
                        f"{k} {extra[k]:.4f}" for k in ("eval_loss", "bits_per_byte") if k in extra
                    )
                )
        self.progress.update(step, self._fields)

    def _fields(self) -> dict[str, str]:
        out = {}
        if "loss" in self.last:
            out["loss"] = f"{self.last['loss']:.3f}"
        if "mfu" in self.last:
            out["tokens/s"] = f"{self.last['tokens_per_second']:,.0f}"
            out["MFU"] = f"{self.last['mfu']:.1%}"
        return out

    def _bad_step(self, step: int, bad: int, loss: float, squares: np.ndarray) -> None:
        names = list(flatten(self.program.shardings.params))
        where = [n for n, s in zip(names, squares, strict=True) if not np.isfinite(s)]
        what = (
            f"loss {loss}"
            if not np.isfinite(loss)
            else f"gradient of {where[0] if where else 'the sum'}"
        )
        self.progress.say(f"step {step} is skipped: non-finite {what} ({bad} in a row)")
        if bad >= self.cfg.optimizer.max_bad_steps:
            raise NonFiniteError(
                f"{bad} non-finite steps in a row up to step {step} ({what}); lower "
                "--config.optimizer.learning_rate or look at the data"
            )

    def _evaluate(self, state: TrainState, watch: Watchdog) -> dict[str, float]:
        return self.measures.evaluate(self.program.params(state), int(state.step), watch)

    def _sample(self, state: TrainState, step: int, watch: Watchdog) -> None:
        self.measures.sample(self.program.params(state), step, watch)

    def _finish(self, state: TrainState, evaluated: dict, begin: float) -> dict[str, Any]:
        found, blocks = self.task.finish(self.program.params(state))
        result = summary.write(
            self.workdir,
            self.cfg,
            self.program,
            corpus=self.corpus,
            evaluated=evaluated,
            notes={**self.task.notes, **found},
            blocks=blocks,
            flops=self.flops_per_token * self.tokens_per_step * int(state.step),
            wall_seconds=time.perf_counter() - begin,
            active=self.main,
            compare=self.compare and partial(self.compare, self.cfg, self.program.mesh, self.peak),
        )
        return result

    def _say(self, text: str) -> None:
        if self.main:
            print(text, flush=True)


def _hlo(program: Program, state: TrainState, batch: Any) -> str:
    """The compiled step as text: it is found in the compilation cache, or compiled again."""
    return program.step.lower(state, batch).compile().as_text()
